"""A PEFT LoRA adapter: a function from the weights of the model below it to those of the model above.

Follows PEFT's file format without importing PEFT. What adds to a weight (s·B·A, trained biases) becomes a
term of its sum, what replaces it (saved modules) takes its place, and what is not linear in it (DoRA, trained
tokens) becomes an operand that holds the weight below. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from safemerge_recipes.errors import SourceError
from safemerge_recipes.sources.checkpoint import same_bytes
from safemerge_recipes.sources.orientation import input_first
from safemerge_recipes.sources.parts import is_draft
from safemerge_recipes.sources.peft.adapter import Adapter
from safemerge_recipes.sources.peft.application import Application
from safemerge_recipes.sources.peft.expert_updates import adapt_expert, adapt_parameters, add_experts
from safemerge_recipes.sources.peft.keys import saved_as_whole
from safemerge_recipes.sources.peft.layers import adapt_layer
from safemerge_recipes.sources.peft.module_names import DiskNames
from safemerge_recipes.sources.vocabulary import embedding_of, is_head
from safemerge_recipes.tensor_names import block_index, stack_of
from safemerge_recipes.weights.algebra import Weight

HEAD = "lm_head.weight"
"""What the output head is called where it comes to exist only because an adapter unties it."""


@dataclass(frozen=True, slots=True)
class Applied:
    """The model above an adapter: its weights, and what a user should know about how they came about.

    `translated` holds (name in memory, name on disk) of tensors for which they differ.
    """

    weights: Mapping[str, Weight]
    notes: tuple[str, ...]
    translated: tuple[tuple[str, str], ...] = ()


def apply_adapter(
    adapter: Adapter, below: Mapping[str, Weight], model: Mapping[str, object], embedding: str | None
) -> Applied:
    """The weights of the model below with the adapter on top.

    Args:
        adapter: the adapter.
        below: every weight of the model it is applied to.
        model: that model's config.json.
        embedding: the input embedding that the output head is tied to, if it is and has no tensor of its own.

    Raises:
        SourceError: a module is not in the model, a tensor does not fit, or the file lacks something.
    """
    above = dict(below)
    head = HEAD if embedding is not None and HEAD not in above else None
    if embedding is not None and head is not None:
        above[head] = above[embedding]
    turned = input_first({name: w.shape for name, w in above.items()}, model)
    work = Application(adapter, above, DiskNames(above), turned, model)
    _check_unlisted(work)
    _adapt_modules(work)
    for name, ref in adapter.keys.whole.items():
        work.replace(work.target(name), ref)
    _check_biases(work, below)
    _check_targets(work)
    notes = []
    if embedding is not None and head is not None and _untied(work, embedding, head):
        notes.append(
            f"the adapter changes {embedding} and {head} apart, which the model below ties; "
            "the output has both, with tie_word_embeddings false"
        )
    if work.translated:
        name, found = work.translated[0]
        notes.append(
            f"{len(work.translated)} of the adapter's names were found under others, such as {name} as {found}"
        )
    return Applied(above, tuple(notes), tuple(work.translated))


def _adapt_modules(work: Application) -> None:
    """Every adapted module: layers and single experts one by one, then modules whose parameters are adapted."""
    adapter = work.adapter
    levels: dict[str, list[str]] = {}
    for module, parts in adapter.keys.modules.items():
        root = module
        while root.endswith(".base_layer"):
            root = root.removesuffix(".base_layer")
        plain = root == module and (work.find(f"{module}.weight") or work.find(f"{module}.bias"))
        if adapter.config.names("target_parameters") and not plain:
            levels.setdefault(root, []).append(module)
            continue
        fused = parts.keys() == {"A", "B"} and work.find(f"{module}.weight") is None and adapt_expert(work, module)
        if not fused:
            adapt_layer(work, module, parts)
    for root, modules in levels.items():
        adapt_parameters(work, root, modules)
    add_experts(work)


def _untied(work: Application, embedding: str, head: str) -> bool:
    """Whether a head that the model below ties to its embedding has to be stored; where not, it is taken out again."""
    keys, above = work.adapter.keys, work.above
    only_tokens = all("tokens" in p for m, p in keys.modules.items() if work.find(f"{m}.weight") == embedding)
    whole = any(work.find(name) == embedding for name in keys.whole if name not in keys.unlisted)  # PEFT sets these
    embedding_alone = head not in work.adapted and embedding in work.adapted
    if work.adapter.config.keeps_tied or (embedding_alone and only_tokens and not whole):
        above[head] = above[embedding]  # trained as one
    copied = [above[name].stored for name in (head, embedding)]
    if above[head] == above[embedding] or (copied[0] and copied[1] and same_bytes(copied[0], copied[1])):
        del above[head]
        return False
    return True


def _check_biases(work: Application, below: Mapping[str, Weight]) -> None:
    """Refuses a file that lacks a bias, where the config says that all were trained."""
    if work.adapter.config.bias == "all":
        missing = [name for name in below if name.endswith(".bias") and name not in work.adapted]
        if missing:
            raise SourceError(f"{work.adapter.keys.path}: bias is 'all', but nothing is there for {missing[0]}")


def _check_unlisted(work: Application) -> None:
    """Refuses whole tensors that no field of the config announces, save the embedding and the head."""
    embedding = embedding_of(work.above, work.model)
    for name in work.adapter.keys.unlisted:
        found = work.find(name)
        fits = found is not None and work.adapter.keys.whole[name].shape[1:] == work.above[found].shape[1:]
        if found is None or not fits or not (found == embedding or is_head(found)):
            raise SourceError(
                f"{work.adapter.keys.path}: unexpected key {name[:200]!r}; expected LoRA factors and what "
                "modules_to_save and bias name"
            )


def _check_targets(work: Application) -> None:
    """Refuses a file that lacks what target_modules names, in the stacks of blocks that it adapts at all.

    Other parts of the model may have modules of the same names, which the adapter never saw; and blocks for
    multi-token prediction are not there when transformers trains.
    """
    config = work.adapter.config
    stacks = {stack_of(name) for name in work.adapted}
    if config.values.get("exclude_modules"):
        return
    layers = config.values.get("layers_to_transform")
    wanted = {layers} if isinstance(layers, int) else set(layers) if isinstance(layers, list) else None
    saved = config.names("modules_to_save")
    for target in config.names("target_modules"):
        for name, weight in work.above.items():
            module = name.removesuffix(".weight")
            hit = module != name and (module == target or module.endswith(f".{target}"))
            if not hit or len(weight.shape) != 2 or name in work.adapted or ".experts." in name:
                continue
            if wanted is not None and block_index(name) not in wanted:
                continue
            if stack_of(name) not in stacks or is_draft(name, work.model):
                continue
            if saved_as_whole(module, saved):
                continue
            raise SourceError(
                f"{work.adapter.keys.path}: has nothing for {name}, which target_modules ({target!r}) names; "
                "expected every adapted module of the model, is the file complete?"
            )
