"""The gate: measured tensors in, decisions with reasons out. Pure; reads nothing.

A candidate is a tensor, or a group of tensors decided together, with its value and the half-width of the
interval the value is known to. `unsettled` names the candidates whose interval leaves the decision open;
once those are measured exactly, `decide` gives the decisions that exact measurement of all would give.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safemerge_recipes.errors import PlanError, RecipeError
from safemerge_recipes.measure import Moments
from safemerge_recipes.names import module_type
from safemerge_recipes.patterns import compile_patterns
from safemerge_recipes.recipe import Gate


@dataclass(frozen=True, slots=True)
class Candidate:
    """One decision to make. `value` None: the metric is undefined (`why`) or was not measured."""

    name: str
    value: float | None
    error: float = 0.0
    why: str | None = None

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return (self.value or 0.0) - self.error

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return (self.value or 0.0) + self.error


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a tensor is merged, and why."""

    merge: bool
    reason: str


def _rho(m: Moments, rank: int) -> tuple[float | None, float]:
    return m.rho, m.rho_error


def _rho_ratio(m: Moments, rank: int) -> tuple[float | None, float]:
    if m.rho is None or not m.rho_null:
        return None, 0.0
    ratio = m.rho / m.rho_null
    relative = (m.rho_error / m.rho if m.rho else 0.0) + m.null_error / m.rho_null
    return ratio, ratio * relative


def _norm_ratio(m: Moments, rank: int) -> tuple[float | None, float]:
    return (None, 0.0) if m.degenerate else (math.sqrt(m.delta / m.v), 0.0)


METRICS: Mapping[str, Callable[[Moments, int], tuple[float | None, float]]] = {
    "rho": _rho,
    "rho_ratio": _rho_ratio,
    "norm_ratio": _norm_ratio,
}
"""Built-in metrics: moments of a tensor or group -> (value, half-width of its interval)."""


def candidate(name: str, moments: Moments | None, gate: Gate) -> Candidate:
    """The candidate of a tensor or group under the gate's metric."""
    if moments is None:
        return Candidate(name, None)
    value, error = METRICS[gate.metric](moments, gate.rank)
    return Candidate(name, value, error, moments.degenerate if value is None else None)


def _sign(gate: Gate) -> int:
    return 1 if gate.direction == "below" else -1


def _ranked(gate: Gate, candidates: Sequence[Candidate]) -> list[Candidate]:
    """From first to last to be chosen; ties by name."""
    return sorted(candidates, key=lambda c: (_sign(gate) * (c.value or 0.0), c.name))


def _families(selector: Any, candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """The candidates that are ranked against each other."""
    if getattr(selector, "per", None) != "module":
        return [list(candidates)]
    found: dict[str, list[Candidate]] = {}
    for one in candidates:
        found.setdefault(module_type(one.name), []).append(one)
    return list(found.values())


def _count(kind: str, value: Any, members: int, gate: Gate) -> int:
    if kind == "fraction":
        return math.ceil(value * members - 1e-9)
    if value > members:
        raise PlanError(
            f"gate.{kind}: {value} tensors are to be chosen, only {members} are gated; lower it or widen gate.scope"
        )
    return int(value)


def _chosen(gate: Gate, kind: str, value: Any, selector: Any, candidates: Sequence[Candidate]) -> dict[str, str]:
    """Chosen candidate -> reason."""
    word, above = gate.metric, gate.direction == "above"
    if kind in ("tau", "at_most"):
        sign = {("tau", False): "<", ("tau", True): ">", ("at_most", False): "≤", ("at_most", True): "≥"}[kind, above]
        holds = {"<": float.__lt__, ">": float.__gt__, "≤": float.__le__, "≥": float.__ge__}[sign]
        limit = float(value)
        return {
            c.name: f"{word} {c.value:.4g} {sign} {kind} {limit:g}"
            for c in candidates
            if c.value is not None and holds(c.value, limit)
        }
    if kind in ("lowest", "fraction"):
        end = "highest" if above else "lowest"
        chosen: dict[str, str] = {}
        for members in _families(selector, candidates):
            count = _count(kind, value, len(members), gate)
            for place, one in enumerate(_ranked(gate, members)[:count]):
                chosen[one.name] = f"{word} {one.value:.4g} is {end} {place + 1} of {len(members)} ({count} merge)"
        return chosen
    if kind == "random":
        return dict.fromkeys(_drawn(value, candidates), f"drawn at random (seed {value.seed})")
    if kind in ("names", "names_file"):
        matcher = compile_patterns(value)
        return {c.name: f"named by gate.{kind}" for c in candidates if matcher(c.name)}
    if kind == "always":
        return {c.name: "always" for c in candidates}
    return {}


def _drawn(value: Any, candidates: Sequence[Candidate]) -> list[str]:
    """`count` names at random. Per module type: counts proportional to the types' sizes, largest remainders first."""
    draw = random.Random(value.seed)
    if value.count > len(candidates):
        raise PlanError(f"gate.random: {value.count} tensors are to be drawn, only {len(candidates)} are gated")
    groups = _families(value, sorted(candidates, key=lambda c: c.name))
    total = len(candidates) or 1
    shares = [value.count * len(group) / total for group in groups]
    counts = [int(share) for share in shares]
    rest = sorted(range(len(groups)), key=lambda i: (counts[i] - shares[i], i))
    for i in rest[: value.count - sum(counts)]:
        counts[i] += 1
    return [
        name
        for group, count in zip(groups, counts, strict=True)
        for name in draw.sample([c.name for c in group], count)
    ]


def _selector(gate: Gate) -> tuple[str, Any, Any]:
    """(kind, value, the object that holds it) of the selector that is in force, inside `complement` if there."""
    kind, value = gate.selector
    if kind == "complement":
        inner_kind, inner = value.selector
        return inner_kind, inner, value
    return kind, value, gate


def unsettled(gate: Gate, candidates: Sequence[Candidate]) -> set[str]:
    """The names of candidates whose interval does not settle whether they are chosen."""
    kind, value, selector = _selector(gate)
    open_ = [c for c in candidates if c.error and c.value is not None]
    if kind in ("tau", "at_most"):
        return {c.name for c in open_ if c.low <= value <= c.high}
    if kind not in ("lowest", "fraction") or not open_:
        return set()
    names: set[str] = set()
    for members in _families(selector, [c for c in candidates if c.value is not None]):
        count = _count(kind, value, len(members), gate)
        ranked = _ranked(gate, members)
        inside, outside = ranked[:count], ranked[count:]
        if not inside or not outside:
            continue
        if gate.direction == "below":
            last_in, first_out = max(c.high for c in inside), min(c.low for c in outside)
            names |= {c.name for c in inside if c.error and c.high >= first_out}
            names |= {c.name for c in outside if c.error and c.low <= last_in}
        else:
            last_in, first_out = min(c.low for c in inside), max(c.high for c in outside)
            names |= {c.name for c in inside if c.error and c.low <= first_out}
            names |= {c.name for c in outside if c.error and c.high >= last_in}
    return names


def decide(gate: Gate, candidates: Sequence[Candidate]) -> dict[str, Decision]:
    """A decision for every candidate.

    Raises:
        PlanError: more candidates are to be chosen than there are, or a degenerate one is an error.
        RecipeError: `names` names nothing.
    """
    kind, value, selector = _selector(gate)
    regular = [c for c in candidates if c.why is None or not gate.needs_metric]
    chosen = _chosen(gate, kind, value, selector, regular)
    if kind in ("names", "names_file") and not chosen:
        raise RecipeError(f"gate.{kind}: matches none of the {len(candidates)} gated tensors; check the patterns")
    complement = gate.selector[0] == "complement"
    return {c.name: _decision(gate, c, kind, value, chosen, complement) for c in candidates}


def _decision(gate: Gate, c: Candidate, kind: str, value: Any, chosen: Mapping[str, str], complement: bool) -> Decision:
    if c.why is not None and gate.needs_metric:
        if gate.degenerate == "error":
            raise PlanError(f"{c.name}: {c.why}, so {gate.metric} is undefined, and gate.degenerate is `error`")
        return Decision(gate.degenerate == "merge", f"{c.why}, {gate.metric} is undefined: {gate.degenerate}")
    if c.name in chosen:
        return Decision(not complement, ("complement of: " if complement else "") + chosen[c.name])
    return Decision(complement, ("complement: " if complement else "") + _why_not(gate, c, kind, value))


def _why_not(gate: Gate, c: Candidate, kind: str, value: Any) -> str:
    above = gate.direction == "above"
    if kind in ("tau", "at_most"):
        sign = {("tau", False): "≥", ("tau", True): "≤", ("at_most", False): ">", ("at_most", True): "<"}[kind, above]
        return f"{gate.metric} {c.value:.4g} {sign} {kind} {value:g}"
    if kind in ("lowest", "fraction"):
        return f"{gate.metric} {c.value:.4g} is not among the {'highest' if above else 'lowest'}"
    return {"random": "not drawn", "never": "never"}.get(kind, f"not named by gate.{kind}")
