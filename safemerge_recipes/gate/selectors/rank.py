"""What `lowest` and `fraction` share: merged are so many from one end, or a part, of all or of each module type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from safemerge_recipes.errors import PlanError
from safemerge_recipes.gate.selectors.base import Candidate, Decision, Question, Selector
from safemerge_recipes.tensor_names import module_type


def _ranked(question: Question, family: Sequence[Candidate]) -> list[Candidate]:
    """From first to last to be chosen; ties by name."""
    sign = -1 if question.above else 1
    return sorted(family, key=lambda c: (sign * (c.value or 0.0), c.name))


def rank(count_of: Callable[[Any, int], int]) -> Selector:
    """The selector; `count_of`: (what the recipe says, members of a family) to how many of it are merged."""

    def check(question: Question) -> None:
        for family in question.families():
            count = count_of(question.value, len(family))
            if count > len(family):
                of = f" of type {module_type(family[0].name)}" if question.per and family else ""
                raise PlanError(
                    f"{question.key}: {count} are to be chosen, only {len(family)}{of} can be; "
                    "lower it, or widen gate.scope"
                )

    def decide(question: Question) -> dict[str, Decision]:
        check(question)
        word, end = question.gate.metric, "highest" if question.above else "lowest"
        decisions: dict[str, Decision] = {}
        for family in question.families():
            count = count_of(question.value, len(family))
            for place, c in enumerate(_ranked(question, family)):
                text = f"{word} {c.value:.4g} is {end} {place + 1} of {len(family)} ({count} merge)"
                decisions[c.name] = Decision(place < count, text)
        return decisions

    def unsettled(question: Question) -> set[str]:
        sign = -1 if question.above else 1
        names: set[str] = set()
        for family in question.families():
            ranked = _ranked(question, family)
            count = min(count_of(question.value, len(family)), len(family))
            inside, outside = ranked[:count], ranked[count:]
            if not inside or not outside:
                continue
            # Seen in the direction of the ranking, `far` ends of what is in must stay below `near` ends of the rest.
            far = {c.name: max(sign * c.low, sign * c.high) for c in ranked}
            near = {c.name: min(sign * c.low, sign * c.high) for c in ranked}
            last_in, first_out = max(far[c.name] for c in inside), min(near[c.name] for c in outside)
            names |= {c.name for c in inside if c.error and far[c.name] >= first_out}
            names |= {c.name for c in outside if c.error and near[c.name] <= last_in}
        return names

    return Selector(decide, unsettled, check)
