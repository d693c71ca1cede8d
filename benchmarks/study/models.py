"""The models of a family that are scored: which merge each is, and what the four comparisons hold against what."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass

ALIGNED, FINE_TUNED = "aligned", "fine-tuned"
PAPER, UNIFORM = "paper's merge", "uniform"
HALF = "Δs on the lowest half"
GATED, EVERYWHERE = "gated V", "V everywhere"
CARRY = "Δf + Δs"
DRAW = "random"
"""Its draws are `random 0`, `random 1`, …"""

GRID = tuple(itertools.product((0.05, 0.1, 0.15), (0.3, 0.5, 0.7)))
"""τ and α that are tried on the tuning split."""
LAMBDAS = (1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Choice:
    """What the tuning split chose: τ and α of the paper's merge, λ of Δs; `by` says how."""

    tau: float
    alpha: float
    lambda_: float
    by: str

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """One of the four: `this` against `against`; None: against random draws."""

    letter: str
    question: str
    this: str
    against: str | None


COMPARISONS = (
    Comparison("A", "the paper's merge against the same α everywhere", PAPER, UNIFORM),
    Comparison("B", "the paper's merge against as many tensors at random", PAPER, None),
    Comparison("C", "Δf + λΔs on the lowest half by ρ against the same without Δs", HALF, FINE_TUNED),
    Comparison("D", "Δf + V where ρ < τ against V everywhere", GATED, EVERYWHERE),
)


def paper(tau: float, alpha: float) -> tuple[str, ...]:
    """αΔf + (1−α)Δs where ρ < τ."""
    return (f"gate.tau={tau:g}", "merge.method=linear", f"merge.alpha={alpha:g}")


def added(lambda_: float, *gate: str) -> tuple[str, ...]:
    """Δf + λΔs where a gate says."""
    method = ("merge.method=task_arithmetic", "merge.lambda_finetuned=1.0", f"merge.lambda_safety={lambda_:g}")
    return (*gate, *method)


def vector(*gate: str) -> tuple[str, ...]:
    """Δf + V where a gate says."""
    return (*gate, "merge.method=add_safety_vector", "merge.gamma=1.0")


def points(choice: Choice) -> Mapping[str, tuple[str, ...]]:
    """label -> overrides of the merges that are scored on the test split."""
    everywhere, below = "gate.always=true", f"gate.tau={choice.tau:g}"
    return {
        PAPER: paper(choice.tau, choice.alpha),
        UNIFORM: (everywhere, "merge.method=linear", f"merge.alpha={choice.alpha:g}"),
        HALF: added(choice.lambda_, "gate.fraction=0.5"),
        GATED: vector(below),
        EVERYWHERE: vector(everywhere),
    }


def tried() -> Mapping[str, tuple[str, ...]]:
    """label -> overrides of what is tried on the tuning split: the grid of τ and α, then λ."""
    found = {f"τ = {tau:g}, α = {alpha:g}": paper(tau, alpha) for tau, alpha in GRID}
    return found | {f"λ = {one:g}": added(one, "gate.fraction=0.5") for one in LAMBDAS}
