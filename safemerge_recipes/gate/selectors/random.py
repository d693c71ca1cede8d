"""`random`: a control that merges so many at random, whatever the metric says."""

from __future__ import annotations

import random
from collections.abc import Mapping

from safemerge_recipes.errors import PlanError
from safemerge_recipes.gate.selectors.base import Decision, Question, Selector, by_type


def _drawn(question: Question) -> list[str]:
    """Names at random. Per module type: the counts given, or proportional to the types' sizes (largest remainders)."""
    value, ordered = question.value, sorted(question.candidates, key=lambda c: c.name)
    draw = random.Random(value.seed)
    if isinstance(value.count, Mapping):
        types = by_type(ordered)
        groups = [(types.get(kind, []), count, kind) for kind, count in sorted(value.count.items())]
    elif value.per == "module":
        found = list(by_type(ordered).items())
        shares = [value.count * len(group) / len(ordered) for _, group in found]
        counts = [int(share) for share in shares]
        rest = sorted(range(len(found)), key=lambda i: (counts[i] - shares[i], i))
        for i in rest[: max(0, value.count - sum(counts))]:
            counts[i] += 1
        groups = [(group, count, kind) for (kind, group), count in zip(found, counts, strict=True)]
    else:
        groups = [(ordered, value.count, "")]
    chosen: list[str] = []
    for group, count, kind in groups:
        if count > len(group):
            where = f".{kind}" if kind else ""
            raise PlanError(
                f"{question.key}.count{where}: {count} are to be drawn, only {len(group)} are gated; "
                "lower it, or widen gate.scope"
            )
        chosen += draw.sample([c.name for c in group], count)
    return chosen


def _random(question: Question) -> dict[str, Decision]:
    chosen, seed = set(_drawn(question)), question.value.seed
    words = {True: f"drawn at random (seed {seed})", False: f"not drawn at random (seed {seed})"}
    return {c.name: Decision(c.name in chosen, words[c.name in chosen]) for c in question.candidates}


def _draw_check(question: Question) -> None:
    if question.candidates:
        _drawn(question)


RANDOM = Selector(_random, lambda question: set(), _draw_check, measured=False)
