"""Decides: measured tensors in, decisions with reasons out. Pure; reads nothing.

Holds the rule for tensors where a metric is undefined; what a metric is stands in `metrics`, how candidates are
chosen in `selectors`. `unsettled` names the candidates whose interval leaves the decision open; once those
are measured exactly, `decide` gives the decisions that exact measurement of all would give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safemerge_recipes.errors import PlanError
from safemerge_recipes.gate.metrics import METRICS, Metric
from safemerge_recipes.gate.moments import Moments
from safemerge_recipes.gate.selectors import SELECTORS, Candidate, Decision, Question, Selector, ask
from safemerge_recipes.recipe.gate import Gate


def candidate(name: str, moments: Moments | None, gate: Gate, metrics: Mapping[str, Metric] = METRICS) -> Candidate:
    """The candidate of a tensor or group under the gate's metric."""
    if moments is None:
        return Candidate(name, None)
    value, error = metrics[gate.metric](moments, gate.rank)
    why = (moments.degenerate or "it cannot be computed") if value is None else None
    return Candidate(name, value, error, why)


def check(gate: Gate, names: Sequence[str], selectors: Mapping[str, Selector] = SELECTORS) -> None:
    """Refuses, before anything is measured, what the selector cannot do with so many candidates.

    Raises:
        PlanError: more are to be chosen than there are.
        RecipeError: patterns match nothing, or a plugin's selector is not known.
    """
    selector, question = ask(gate, [Candidate(name, None) for name in names], selectors)
    selector.check(question)


def _split(gate: Gate, candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """(those the selector decides on, those whose metric is undefined)."""
    if not gate.needs_metric:
        return list(candidates), []
    return [c for c in candidates if c.why is None], [c for c in candidates if c.why is not None]


def _ask(
    gate: Gate, candidates: Sequence[Candidate], selectors: Mapping[str, Selector]
) -> tuple[Selector, Question, list[Candidate]]:
    regular, undefined = _split(gate, candidates)
    return *ask(gate, regular, selectors), undefined


def unsettled(gate: Gate, candidates: Sequence[Candidate], selectors: Mapping[str, Selector] = SELECTORS) -> set[str]:
    """The names of candidates whose interval does not settle the decisions."""
    selector, question, _ = _ask(gate, candidates, selectors)
    return selector.unsettled(question)


def decide(
    gate: Gate, candidates: Sequence[Candidate], selectors: Mapping[str, Selector] = SELECTORS
) -> dict[str, Decision]:
    """A decision for every candidate, in their order.

    Raises:
        PlanError: more candidates are to be chosen than there are, or a degenerate one is an error.
        RecipeError: `names` names nothing.
    """
    selector, question, undefined = _ask(gate, candidates, selectors)
    if undefined and gate.degenerate == "error":
        c = undefined[0]
        raise PlanError(f"{c.name}: {c.why}, so {gate.metric} is undefined, and gate.degenerate is `error`")
    selector.check(question)
    found = {
        **selector.decide(question),
        **{
            c.name: Decision(gate.degenerate == "merge", f"{c.why}, {gate.metric} is undefined: {gate.degenerate}")
            for c in undefined
        },
    }
    return {c.name: found[c.name] for c in candidates}
