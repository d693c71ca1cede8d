"""A selector: tensors whose value lies between two bounds."""

from __future__ import annotations

from safemerge_recipes.plugins import Decision, Question, RecipeError, Selector


def _bounds(question: Question) -> tuple[float, float]:
    low, high = question.value.get("from"), question.value.get("to")
    if not isinstance(low, int | float) or not isinstance(high, int | float) or low > high:
        raise RecipeError(f"{question.key}.options: found {dict(question.value)}; expected from ≤ to, two numbers")
    return float(low), float(high)


def _check(question: Question) -> None:
    _bounds(question)


def _decide(question: Question) -> dict[str, Decision]:
    low, high = _bounds(question)
    decisions = {}
    for one in question.candidates:
        inside = one.value is not None and low <= one.value <= high
        word = "in" if inside else "not in"
        decisions[one.name] = Decision(inside, f"{question.gate.metric} {one.value:.4g} {word} [{low:g}, {high:g}]")
    return decisions


def _unsettled(question: Question) -> set[str]:
    """Candidates whose interval holds a bound."""
    ends = _bounds(question)
    return {one.name for one in question.candidates if one.error and any(one.low <= end <= one.high for end in ends)}


BAND = Selector(_decide, _unsettled, _check)
