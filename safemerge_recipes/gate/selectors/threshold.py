"""What `tau` and `at_most` share: merged is what lies on one side of a threshold."""

from __future__ import annotations

import math

from safemerge_recipes.gate.selectors.base import Decision, Question, Selector


def threshold(at_most: bool) -> Selector:
    """The selector; `at_most`: the limit itself is merged, too."""

    def sign(question: Question, merges: bool) -> str:
        strict, loose = (">", "≥") if question.above else ("<", "≤")
        if merges:
            return loose if at_most else strict
        opposite = {"<": "≥", "≤": ">", ">": "≤", "≥": "<"}
        return opposite[loose if at_most else strict]

    def decide(question: Question) -> dict[str, Decision]:
        limit, decisions = float(question.value), {}
        word, key = question.gate.metric, question.key.rpartition(".")[2]
        for c in question.candidates:
            value = c.value if c.value is not None else math.nan
            inside = value > limit if question.above else value < limit
            merges = inside or (at_most and value == limit)
            decisions[c.name] = Decision(merges, f"{word} {value:.4g} {sign(question, merges)} {key} {limit:g}")
        return decisions

    def unsettled(question: Question) -> set[str]:
        return {c.name for c in question.candidates if c.error and c.low <= question.value <= c.high}

    return Selector(decide, unsettled)
