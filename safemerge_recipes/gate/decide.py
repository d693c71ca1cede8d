"""The gate: measured tensors in, decisions with reasons out. Pure; reads nothing.

Holds the built-in metrics and the rule for tensors where a metric is undefined; how candidates are chosen is
the selectors' business. `unsettled` names the candidates whose interval leaves the decision open; once those
are measured exactly, `decide` gives the decisions that exact measurement of all would give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from safemerge_recipes.errors import PlanError
from safemerge_recipes.gate.moments import Moments
from safemerge_recipes.gate.selectors import SELECTORS, Candidate, Decision, Question, Selector, ask
from safemerge_recipes.recipe.model import Gate

__all__ = ["METRICS", "Candidate", "Decision", "Metric", "candidate", "check", "decide", "unsettled"]

Metric = Callable[[Moments, int], tuple[float | None, float]]
"""(moments of a tensor or group, gate.rank) -> (value or None where undefined, half-width of its interval)."""


def rho(m: Moments, rank: int) -> tuple[float | None, float]:
    """ρ = cos(VVᵀΔ, Δ), the paper's (arXiv 2503.17239), in [0, 1]."""
    return m.rho, m.rho_error


def rho_ratio(m: Moments, rank: int) -> tuple[float | None, float]:
    """ρ/ρ₀: how many times what an update unrelated to V would show, ρ₀ ≈ √(‖V‖⁴/‖VᵀV‖²/d_out)."""
    if m.rho is None or not m.rho_null:
        return None, 0.0
    ratio = m.rho / m.rho_null
    return ratio, (m.rho_error + ratio * m.null_error) / max(m.rho_null - m.null_error, 1e-300)


def cosine(m: Moments, rank: int) -> tuple[float | None, float]:
    """cos(Δ, V) in [−1, 1]: whether fine-tuning went along with alignment or against it."""
    if m.degenerate:
        return None, 0.0
    return max(-1.0, min(1.0, m.inner / (math.sqrt(m.delta) * math.sqrt(m.v)))), 0.0


def residual(m: Moments, rank: int) -> tuple[float | None, float]:
    """1 − ‖U_kᵀΔ‖²/‖Δ‖² in [0, 1]: energy of Δ outside the k leading left singular directions of V."""
    if m.degenerate:
        return None, 0.0
    return max(0.0, 1 - m.inside / m.delta), m.inside_error / m.delta


def norm_ratio(m: Moments, rank: int) -> tuple[float | None, float]:
    """‖Δ‖/‖V‖."""
    return (None, 0.0) if m.degenerate else (math.sqrt(m.delta / m.v), 0.0)


def e_diem(m: Moments, rank: int) -> tuple[float | None, float]:
    """(d − √(2n)) / √(2n(1 − 1/π)) with d = ‖CΔ − Δ‖, C = VVᵀ/‖V‖, n elements: SPLoRA's distance, a surrogate.

    SPLoRA (arXiv 2506.18931) standardises d by its mean and variance over samples of layers, which its published
    code replaces by these values for n elements where it is given none; the order within one shape is the same.
    """
    if m.degenerate:
        return None, 0.0
    square = m.image / m.v - 2 * m.overlap / math.sqrt(m.v) + m.delta
    error = m.image_error / m.v + 2 * m.overlap_error / math.sqrt(m.v)
    d = math.sqrt(max(0.0, square))
    half = max(math.sqrt(max(0.0, square + error)) - d, d - math.sqrt(max(0.0, square - error)))
    spread = math.sqrt(2 * m.numel * (1 - 1 / math.pi))
    return (d - math.sqrt(2 * m.numel)) / spread, half / spread


METRICS: Mapping[str, Metric] = {
    "rho": rho,
    "rho_ratio": rho_ratio,
    "cosine": cosine,
    "residual": residual,
    "norm_ratio": norm_ratio,
    "e_diem": e_diem,
}
"""The built-in metrics."""


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
