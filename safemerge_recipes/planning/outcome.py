"""Did the gate repair anything? What a plan's decisions say about that, before a byte is written.

A merge of nothing writes the unsafe model once more, and a gate that takes everything chose nothing: both are worth a
word. Pure but for the comparison of two adapters' files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safemerge_recipes.errors import PlanError, SourceError
from safemerge_recipes.storage.files import reading
from safemerge_recipes.text import figure

if TYPE_CHECKING:
    from safemerge_recipes.planning.plan import Plan, TensorPlan
    from safemerge_recipes.sources.family import Family

NEAR = 2.0
"""|z| below which a ρ is no news: 95 of 100 unrelated updates lie there."""
SAMPLE = 1 << 20
"""Bytes of each piece of two files that are compared."""
PIECES = 16
"""Pieces of two files that are compared, spread evenly."""


def check_v(gated: Sequence[TensorPlan]) -> None:
    """Refuses a family whose aligned and base sides are the same wherever the gate looks.

    Raises:
        SourceError: V is zero in every gated tensor.
    """
    measured = [tensor.moments for tensor in gated if tensor.moments is not None]
    if measured and len(measured) == len(gated) and not any(moments.v for moments in measured):
        raise SourceError(
            f"sources.base, sources.aligned: V is zero in all {len(gated)} gated tensors, so the two are the same "
            "there; expected base to be the model before alignment; check both, or leave base out where the gate "
            "and the method need none"
        )


def empty(plan: Plan) -> str | None:
    """What is to be said where the output would be the fine-tuned model once more, although it was not asked for."""
    gated = plan.gated
    if any(tensor.action == "merge" or tensor.take != "finetuned" for tensor in plan.tensors):
        return None
    if all(tensor.policy is not None and tensor.policy.gate.selector[0] == "never" for tensor in gated):
        return None
    still = [t for t in gated if t.moments is not None and t.moments.delta == 0]
    if len(still) == len(gated) and gated:
        return (
            f"nothing is merged: the fine-tuned update is zero in all {len(gated)} gated tensors (an adapter that was "
            "never trained?); check sources.finetuned"
        )
    return f"nothing is merged: 0 of {len(gated)} gated tensors{_seen(gated, True)}"


DROWNED = 0.5
"""Part of ‖V‖² or ‖Δ‖² from which on quantisation noise is at least as large as what is measured."""


def beneath_noise(plan: Plan) -> tuple[str, ...]:
    """What is to be said of V and Δ that come from quantised weights and lie beneath what rounding them did.

    Raises:
        PlanError: that is so wherever a gate looks at them, so that it would decide by noise alone.
    """
    noisy = [
        (tensor, tensor.moments)
        for tensor in plan.gated
        if tensor.policy is not None and tensor.policy.gate.needs_metric
        and tensor.moments is not None and tensor.moments.noise_share
    ]  # fmt: skip
    beneath = [(tensor, found) for tensor, found in noisy if found.noise_share >= DROWNED]
    if not beneath:
        return ()
    tensor, found = max(beneath, key=lambda one: one[1].noise_share)
    which = "V" if found.v_noise / (found.v or 1) >= found.delta_noise / (found.delta or 1) else "Δ"
    size, noise = (found.v, found.v_noise) if which == "V" else (found.delta, found.delta_noise)
    sides = "sources.base and sources.aligned" if which == "V" else "sources.finetuned (an adapter is best)"
    told = (
        f"{which} lies beneath the quantisation noise in {len(beneath)} of {len(plan.gated)} gated tensors, worst in "
        f"{tensor.name}: ‖{which}‖ is {figure(math.sqrt(size))}, and rounding alone is expected to make "
        f"{figure(math.sqrt(noise))}; the metric says little there, use models before quantisation for {sides}"
    )
    if len(beneath) == sum(t.policy is not None and t.policy.gate.needs_metric for t in plan.gated):
        raise PlanError(f"{told}; or a gate that looks at no metric, such as `gate: {{always: true}}`")
    return (told,)


def findings(plan: Plan, family: Family) -> tuple[str, ...]:
    """What is odd about a plan's decisions, one sentence each, with the range that was seen and what to try."""
    found = [empty(plan), _everything(plan), _safety_alike(plan, family), _on_the_null(plan)]
    return tuple(text for text in found if text)


def _seen(gated: Sequence[TensorPlan], nothing: bool) -> str:
    """Where the metric lies, and what would select some and not all."""
    values = sorted(tensor.value for tensor in gated if tensor.value is not None)
    gate = next((tensor.policy.gate for tensor in gated if tensor.policy is not None), None)
    if not values or gate is None:
        return ""
    low, high = figure(values[0]), figure(values[-1])
    limit = f"between {low} and {high}"
    if nothing:
        limit = f"below {high}" if gate.direction == "above" else f"above {low}"
    return f"; {gate.metric} lies between {low} and {high}: try `--set gate.fraction=0.5`, or a threshold {limit}"


def _everything(plan: Plan) -> str | None:
    gated = plan.gated
    if len(gated) < 2 or any(tensor.action != "merge" for tensor in gated):
        return None
    if any(t.policy is not None and t.policy.gate.selector[0] in ("always", "names", "names_file") for t in gated):
        return None
    return f"all {len(gated)} gated tensors are merged, so the gate chose nothing{_seen(gated, False)}"


def _on_the_null(plan: Plan) -> str | None:
    """ρ of unrelated updates scatters around ρ₀; where all do no more than that, the order is noise."""
    rho = [
        t.moments
        for t in plan.gated
        if t.policy is not None and t.moments is not None
        and t.policy.gate.needs_metric and t.policy.gate.metric in ("rho", "rho_ratio")
    ]  # fmt: skip
    z = [score for moments in rho if (score := moments.rho_z) is not None]
    if len(z) < 4 or len(z) < len(rho):
        return None
    far = sum(abs(score) >= NEAR for score in z)
    if far > len(z) // 10:  # one in twenty is what chance gives
        return None
    return (
        f"ρ lies on ρ₀ in {len(z) - far} of {len(z)} gated tensors (|z| < {NEAR:g}): updates unrelated to V would look "
        "the same, so the gate's order says little; compare it with `safemerge controls`"
    )


def _safety_alike(plan: Plan, family: Family) -> str | None:
    if "safety" not in family.models or not any(tensor.action == "merge" for tensor in plan.gated):
        return None
    safety, finetuned = family.models["safety"], family.models["finetuned"]
    same = [Path(file).resolve() for file in safety.files] == [Path(file).resolve() for file in finetuned.files]
    if not same and safety.adapter and finetuned.adapter:  # small, so that their bytes can be looked at as well
        same = len(safety.files) == len(finetuned.files)
        same = same and all(_alike(a, b) for a, b in zip(safety.files, finetuned.files, strict=True))
    if not same:
        return None
    return "sources.safety and sources.finetuned are the same files: a merge of the two changes nothing; check both"


def _alike(first: str, second: str) -> bool:
    """Whether two files hold the same, as far as evenly spread pieces of them show."""
    with reading(first) as one, reading(second) as two:
        size = one.seek(0, 2)
        if size != two.seek(0, 2):
            return False
        for piece in range(PIECES):
            at = max(0, size - SAMPLE) * piece // (PIECES - 1)
            one.seek(at)
            two.seek(at)
            if one.read(SAMPLE) != two.read(SAMPLE):
                return False
    return True
