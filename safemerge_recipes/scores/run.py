"""`safemerge score` from its recipe to the score file: what is scored, by what, and what it takes.

Weights are read piece by piece; where prompts run through the model, one block is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes._version import __version__
from safemerge_recipes.errors import CheckError, PlanError, RecipeError, SourceError
from safemerge_recipes.events import BytesDone, Listener, PhaseStarted
from safemerge_recipes.scores.prompts import Asked, Example, examples, read_prompts, record
from safemerge_recipes.scores.score_file import ScoreFile, score_file
from safemerge_recipes.scores.subject import Subject
from safemerge_recipes.sources.masks import mark_of
from safemerge_recipes.sources.vocabulary import is_head
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.cut import ranges
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.workers import Resources

if TYPE_CHECKING:
    from safemerge_recipes.scores.passes import Passes
    from safemerge_recipes.scores.skeleton import Skeleton


def write_scores(
    subject: Subject, asked: Asked | None, path: Path, resources: Resources, on_event: Listener
) -> dict[str, Any]:
    """Computes the scores of a subject and writes the score file; returns what the file says of itself.

    Args:
        subject: what is scored.
        asked: the prompts; None for scores of weights alone.
        path: the file.
        resources: device and memory.
        on_event: is told what goes on.

    Raises:
        RecipeError: there are no prompts where the kind needs them, or some where it does not.
        PlanError: it takes more memory than there may be.
        SourceError: weights are not finite.
        CheckError: the model cannot run, or its activations are not finite.
    """
    kind = subject.kind
    if kind.sees == "weights" and asked is not None:
        raise RecipeError(f"--by {subject.by}: looks at weights alone; expected no --prompts")
    if kind.sees != "weights" and asked is None:
        raise RecipeError(f"--by {subject.by}: looks at activations; expected --prompts FILE")
    models = {role: mark_of(subject.family.identities_behind(role)) for role in subject.roles}
    about: dict[str, Any] = {
        "by": subject.by, "of": subject.role, "formula": kind.formula, "link": kind.link, "models": models,
        "version": __version__,
    }  # fmt: skip
    shapes = {name: subject.shape(name) for name in subject.names}
    total = sum(4 * math.prod(shape) for shape in shapes.values())
    on_event(PhaseStarted("score", total))
    with Reader() as reader:
        if asked is None:
            with score_file(path, shapes, about) as out:
                _of_weights(subject, out, reader, resources.device, on_event)
            return about
        from safemerge_recipes.scores.skeleton import Skeleton, check_extra

        check_extra()
        rows = read_prompts(asked)
        skeleton = Skeleton(subject.family, subject.runs, subject.names, reader, resources.device)
        used = examples(rows, skeleton.tokenizer, asked)
        _check_memory(subject, skeleton, used, resources)
        about |= {"prompts": record(asked, used, len(rows)), **_versions()}
        with score_file(path, shapes, about) as out:
            _of_activations(subject, skeleton, used, out, on_event)
    return about


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _of_weights(subject: Subject, out: ScoreFile, reader: Reader, device: str, on_event: Listener) -> None:
    """|W| or |δ|, piece by piece; of |δ| perhaps what is opposed to the safety model's."""
    from safemerge_recipes.weights.torch_factors import working_dtype
    from safemerge_recipes.weights.torch_rows import Evaluator

    arena = Arena(device)
    for name in subject.names:
        weights, shape = (subject.weight(name), *subject.opposed_to(name)), subject.shape(name)
        evaluate = Evaluator(weights, reader, arena, "scored", working_dtype(*weights))
        for first, last in ranges(shape, True):
            own, *other = evaluate(first, last)
            for one in other:
                own = own.masked_fill_(own.sign() == one.sign(), 0.0)
            scores = own.abs_()
            if not bool(scores.isfinite().all()):
                raise SourceError(f"sources.{subject.role}: {name} holds values that are not finite")
            out.put(name, first, scores)
            on_event(BytesDone(4 * (last - first)))


def _of_activations(
    subject: Subject, skeleton: Skeleton, used: Sequence[Example], out: ScoreFile, on_event: Listener
) -> None:
    from safemerge_recipes.scores.inputs import Inputs
    from safemerge_recipes.scores.passes import Passes

    backwards = subject.kind.sees == "gradients"
    skeleton.fill([name for name in skeleton.outside() if backwards or not is_head(name)])
    passes = Passes(skeleton, used, levels=backwards)
    try:
        passes.begin()
        for place, block in enumerate(skeleton.blocks):
            inside = skeleton.inside(block)
            scored = [name for name in inside if name in set(subject.names)]
            skeleton.fill(inside)
            if backwards:
                passes.forward(place)
            else:
                seen = Inputs(subject, skeleton, scored, used)
                with seen:
                    passes.forward(place)
                for name in scored:
                    scores = seen.scores(name)
                    out.put(name, 0, scores.flatten())
                    on_event(BytesDone(4 * scores.numel()))
            skeleton.empty(inside)
        if backwards:
            passes.end()
            for place in reversed(range(len(skeleton.blocks))):
                _gradients(subject, skeleton, passes, place, out, on_event)
    finally:
        passes.close()


def _gradients(
    subject: Subject, skeleton: Skeleton, passes: Passes, place: int, out: ScoreFile, on_event: Listener
) -> None:
    """The mean over prompts of |W ⊙ ∂L/∂W|, or of (∂L/∂W)², for one block."""
    import torch

    inside = skeleton.inside(skeleton.blocks[place])
    scored = set(inside) & set(subject.names)
    skeleton.fill(inside, wanted=scored.__contains__)
    own = {name: skeleton.places[name] for name in inside if name in scored}
    sums = {name: torch.zeros(subject.shape(name), device=skeleton.device) for name in own}

    squared = subject.by == "fisher"

    def each(number: int) -> None:
        for name, (module, attribute) in own.items():
            weight = module._parameters[attribute]
            sums[name] += weight.grad.square() if squared else (weight.detach() * weight.grad).abs_()
            weight.grad = None

    passes.backward(place, each)
    for name, total in sums.items():
        if not bool(total.isfinite().all()):
            raise CheckError(f"{name}: its gradients are not finite on these prompts; expected finite numbers")
        out.put(name, 0, (total / len(passes.examples)).flatten())
        on_event(BytesDone(4 * total.numel()))
    skeleton.empty(inside)


def memory_of(subject: Subject, skeleton: Skeleton, used: Sequence[Example]) -> int:
    """Bytes that scoring takes at most, about: what lies outside the blocks, one block, one prompt's activations."""
    inventory, kind = subject.family.inventory, subject.kind

    def size(names: Sequence[str]) -> int:
        return sum(inventory[name].numel for name in names)

    blocks = [skeleton.inside(block) for block in skeleton.blocks]
    tokens = max(len(one.ids) for one in used)
    widths = [sum(max(inventory[n].shape) for n in names if len(inventory[n].shape) > 1) for names in blocks]
    activations = 2 * tokens * max(widths) + 16 * tokens * tokens
    copies = 4 if kind.sees == "gradients" else 1
    numbers = size(skeleton.outside()) + copies * (max(map(size, blocks)) + activations)
    scratch = max(inventory[name].numel for name in subject.names)
    products = 0
    if kind.sees == "gradients":
        vocabulary = max((inventory[n].shape[0] for n in skeleton.outside() if len(inventory[n].shape) == 2), default=0)
        numbers += 3 * tokens * vocabulary
    if kind.sees == "products":
        squares = [[inventory[n].shape[-1] ** 2 for n in names if n in set(subject.names)] for names in blocks]
        products = max(sum(found) + 3 * max(found, default=0) for found in squares)
    return 4 * (numbers + 3 * scratch) + 8 * products


def _check_memory(subject: Subject, skeleton: Skeleton, used: Sequence[Example], resources: Resources) -> None:
    needed = memory_of(subject, skeleton, used)
    if needed > resources.memory:
        raise PlanError(
            f"score --by {subject.by}: takes about {needed / 1e9:.2f} GB, for one block at a time and prompts of up to "
            f"{max(len(one.ids) for one in used)} tokens; found --max-memory {resources.memory / 1e9:.2f} GB, try "
            f"--max-memory {math.ceil(needed / 1e8) / 10:.1f}GB, or a shorter --max-length"
        )


def described(about: Mapping[str, Any]) -> str:
    """What a score file says of itself, as a line for people."""
    prompts = about.get("prompts")
    on = f", {prompts['prompts']} prompts, {prompts['counted_tokens']} tokens" if prompts else ""
    return f"{about['by']} of {about['of']}: {about['formula']}{on}"
