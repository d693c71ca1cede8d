"""What a gate must beat: the same number of tensors chosen without looking at them.

A control is the gate's own plan with other tensors merged; methods, sources and everything ungated stay as
they are, so that nothing but the choice differs. Pure: plans in, plans out.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace

from safemerge_recipes.planning.plan import Plan
from safemerge_recipes.tensor_names import module_type


def merged(plan: Plan) -> frozenset[str]:
    """Names of the gated tensors that the plan merges."""
    return frozenset(tensor.name for tensor in plan.gated if tensor.action == "merge")


def choosable(plan: Plan) -> tuple[str, ...]:
    """Names of the gated tensors that a choice is about, sorted; not those where V or Δf is zero."""
    return tuple(sorted(t.name for t in plan.gated if t.moments is None or not t.moments.degenerate))


def with_merged(plan: Plan, names: Collection[str], reason: str) -> Plan:
    """The plan that merges exactly these of its gated tensors.

    Raises:
        ValueError: a name is not that of a gated tensor.
    """
    chosen = frozenset(names)
    unknown = chosen - {tensor.name for tensor in plan.gated}
    if unknown:
        raise ValueError(f"not gated: {min(unknown)}")
    tensors = tuple(
        replace(t, action="merge" if t.name in chosen else "keep", reason=reason) if t.gated else t
        for t in plan.tensors
    )
    return replace(plan, tensors=tensors)


def complement(plan: Plan) -> Plan:
    """Merges what the gate leaves, leaves what it merges."""
    return with_merged(plan, frozenset(choosable(plan)) - merged(plan), "control: complement")


def drawn(plan: Plan, seed: int, per_module: bool) -> Plan:
    """Merges as many tensors as the gate, drawn at random; `per_module`: as many of each module type."""
    draw, chosen, all_ = random.Random(seed), merged(plan), choosable(plan)
    if not per_module:
        names = draw.sample(all_, len(chosen & set(all_)))
        return with_merged(plan, names, f"control: random, seed {seed}")
    groups: dict[str, list[str]] = {}
    for name in all_:
        groups.setdefault(module_type(name), []).append(name)
    names = [
        name for group in groups.values() for name in draw.sample(group, sum(member in chosen for member in group))
    ]
    return with_merged(plan, names, f"control: random per module type, seed {seed}")


def controls(plan: Plan, seeds: Sequence[int]) -> dict[str, Plan]:
    """Every control of a plan by label: random and per-module random for each seed, complement, all, none."""
    found = {f"random {seed}": drawn(plan, seed, False) for seed in seeds}
    found |= {f"random per module {seed}": drawn(plan, seed, True) for seed in seeds}
    found["complement"] = complement(plan)
    found["merge all"] = with_merged(plan, choosable(plan), "control: all")
    found["merge none"] = with_merged(plan, (), "control: none")
    return found


def exact_p(value: float, draws: Sequence[float]) -> float:
    """One-sided exact p of the hypothesis that the choice is one more random draw.

    The share of values at least as high among the draws and the value itself: (1 + #{draw ≥ value}) / (n + 1).
    With n draws it cannot fall below 1 / (n + 1).
    """
    return (1 + sum(draw >= value for draw in draws)) / (1 + len(draws))
