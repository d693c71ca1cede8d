"""`complement`: a control that merges exactly what another selector does not."""

from __future__ import annotations

from safemerge_recipes.gate.selectors.base import Decision, Question, Selector, ask_of


def _inner(question: Question) -> tuple[Selector, Question]:
    return ask_of(question.gate, question.value, question.key, question.candidates, question.selectors)


def _complement(question: Question) -> dict[str, Decision]:
    selector, inner = _inner(question)
    return {
        name: Decision(not one.merge, f"complement of: {one.reason}") for name, one in selector.decide(inner).items()
    }


def _complement_unsettled(question: Question) -> set[str]:
    selector, inner = _inner(question)
    return selector.unsettled(inner)


def _complement_check(question: Question) -> None:
    selector, inner = _inner(question)
    selector.check(inner)


COMPLEMENT = Selector(_complement, _complement_unsettled, _complement_check)
