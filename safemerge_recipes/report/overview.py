"""A plan as reports see it: plain JSON in, tensors with their thresholds, grouped by block and module type.

Reads the content of safemerge_plan.json and lets missing or odd values pass as missing: a report never fails
for what it cannot show. Knows no output format and no engine; `sentences` puts it into words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safemerge_recipes.recipe.builtins import SELECTORS
from safemerge_recipes.recipe.patterns import compile_patterns
from safemerge_recipes.tensor_names import block_of, module_type
from safemerge_recipes.text import clean, count, number


@dataclass(frozen=True, slots=True)
class Threshold:
    """What the metric is compared with: `tau` (strict) or `at_most`."""

    key: str
    value: float
    above: bool

    @property
    def sign(self) -> str:
        """The comparison that selects for merging."""
        return {("tau", False): "<", ("tau", True): ">", ("at_most", False): "≤", ("at_most", True): "≥"}[
            self.key, self.above
        ]


@dataclass(frozen=True, slots=True)
class Line:
    """One tensor of the plan. `kind` is its module type, `block` its place among the blocks, if in any.

    `rho_z` is ρ's distance from ρ₀ in spreads of unrelated updates, where that is known. `noise` is the part of ‖V‖ or
    ‖Δ‖, whichever has more, that rounding quantised weights is expected to make. `ruled` says that a
    rule has a selector, metric or direction of its own for the tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    merged: bool
    gated: bool
    reason: str
    kind: str
    block: int | None
    metric: str
    value: float | None
    rho: float | None
    rho_null: float | None
    rho_z: float | None
    norm_v: float | None
    norm_delta: float | None
    noise: float | None
    method: str
    alpha: float | None
    source: str
    threshold: Threshold | None
    ruled: bool
    weights: tuple[tuple[str, float], ...] = ()

    @property
    def ratio(self) -> float | None:
        """ρ/ρ₀: 1 is what an update unrelated to V would show."""
        return self.rho / self.rho_null if self.rho is not None and self.rho_null else None

    @property
    def tau_rho(self) -> float | None:
        """Where the threshold lies on the scale of ρ."""
        if self.threshold is None:
            return None
        if self.metric == "rho_ratio":
            return self.threshold.value * self.rho_null if self.rho_null else None
        return self.threshold.value if self.metric == "rho" else None

    @property
    def tau_ratio(self) -> float | None:
        """Where the threshold lies on the scale of ρ/ρ₀."""
        if self.threshold is None:
            return None
        if self.metric == "rho":
            return self.threshold.value / self.rho_null if self.rho_null else None
        return self.threshold.value if self.metric == "rho_ratio" else None


@dataclass(frozen=True, slots=True)
class Overview:
    """A plan's tensors in checkpoint order, with what the recipe says about them."""

    name: str
    description: str
    recipe: Mapping[str, Any]
    lines: tuple[Line, ...]
    blocks: tuple[str, ...]
    warnings: tuple[str, ...]
    summary: Mapping[str, Any]

    @property
    def gated(self) -> list[Line]:
        """The tensors that a gate decided on."""
        return [line for line in self.lines if line.gated]

    @property
    def measured(self) -> bool:
        """Whether any tensor has a ρ."""
        return any(line.rho is not None for line in self.lines)

    def kinds(self) -> dict[str, list[Line]]:
        """Gated tensors by module type, in the order of their first appearance."""
        found: dict[str, list[Line]] = {}
        for line in self.lines:
            if line.gated:
                found.setdefault(line.kind, []).append(line)
        return found

    def thresholds(self) -> list[tuple[str, Threshold]]:
        """The distinct (metric, threshold) pairs in force, in order of appearance."""
        return list(dict.fromkeys((line.metric, line.threshold) for line in self.lines if line.threshold))

    def methods(self) -> list[str]:
        """The methods in use, in order of appearance."""
        return list(dict.fromkeys(line.method for line in self.lines if line.merged and line.method))


def read_plan(plan: Mapping[str, Any]) -> Overview:
    """The overview of a plan's JSON."""
    recipe = mapping(plan.get("recipe"))
    raw = [mapping(line) for line in sequence(plan.get("tensors"))]
    names = [str(line.get("name", "")) for line in raw]
    places, labels = _blocks(names)
    limits = _thresholds(recipe, names)
    gated = [bool(line.get("metric")) or line.get("action") == "merge" for line in raw]
    stacks = {_stack(name) for name, inside in zip(names, gated, strict=True) if inside and name in places}
    lines = tuple(
        _line(line, name, inside, places.get(name), limits[name], len(stacks) > 1)
        for line, name, inside in zip(raw, names, gated, strict=True)
    )
    return Overview(
        name=clean(recipe.get("name"), 200) or "Unnamed merge",
        description=clean(" ".join(str(recipe.get("description") or "").split()), 2000),
        recipe=recipe,
        lines=lines,
        blocks=labels,
        warnings=tuple(clean(text, 1000) for text in sequence(plan.get("warnings"))),
        summary=mapping(plan.get("summary")),
    )


def mapping(value: object) -> Mapping[str, Any]:
    """The mapping, or an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: object) -> Sequence[Any]:
    """The list, or an empty one for anything else."""
    return value if isinstance(value, (list, tuple)) else ()


def _stack(name: str) -> str:
    return (block_of(name) or "").rpartition(".")[0]


def _blocks(names: Sequence[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Place of each tensor's block among the distinct block numbers, and the numbers' labels."""
    number_of = {name: block.rpartition(".")[2] for name in names if (block := block_of(name)) is not None}
    labels = tuple(sorted(dict.fromkeys(number_of.values()), key=lambda text: (len(text), text)))
    place = {label: index for index, label in enumerate(labels)}
    return {name: place[label] for name, label in number_of.items()}, labels


def _noise(raw: Mapping[str, Any]) -> float | None:
    """The greater part of quantisation noise in ‖V‖ and ‖Δ‖, at most 1; None without any."""
    pairs = [(number(raw.get(f"noise_{of}")), number(raw.get(f"norm_{of}"))) for of in ("v", "delta")]
    return max((min(1.0, noise / size) if size else 1.0 for noise, size in pairs if noise), default=None)


def _line(
    raw: Mapping[str, Any],
    name: str,
    gated: bool,
    block: int | None,
    limit: tuple[Threshold | None, bool],
    stacked: bool,
) -> Line:
    kind = clean(module_type(name), 60)
    return Line(
        name=clean(name),
        shape=tuple(count(n) for n in sequence(raw.get("shape"))),
        dtype=clean(raw.get("dtype"), 20),
        merged=raw.get("action") == "merge",
        gated=gated,
        reason=clean(raw.get("reason")),
        kind=f"{clean(_stack(name), 40)}: {kind}" if stacked and block is not None else kind,
        block=block,
        metric=clean(raw.get("metric"), 100),
        value=number(raw.get("value")),
        rho=number(raw.get("rho")),
        rho_null=number(raw.get("rho_null")),
        rho_z=number(raw.get("rho_z")),
        norm_v=number(raw.get("norm_v")),
        norm_delta=number(raw.get("norm_delta")),
        noise=_noise(raw),
        method=clean(raw.get("method"), 100),
        alpha=number(raw.get("alpha")),
        source=clean(raw.get("source"), 20),
        threshold=limit[0] if gated else None,
        ruled=limit[1],
        weights=_weights(mapping(raw.get("parameters")).get("weights")),
    )


def _weights(given: object) -> tuple[tuple[str, float], ...]:
    """(name of a delta, its weight), in the recipe's order."""
    named = ((clean(name, 60), number(value)) for name, value in mapping(given).items())
    return tuple((name, value) for name, value in named if value is not None)


# What the recipe says


def selector(gate: Mapping[str, Any]) -> tuple[str, Any]:
    """The selector that a gate, or a rule's change of one, gives; ("", None) without any."""
    return next(((key, gate[key]) for key in SELECTORS if gate.get(key) is not None), ("", None))


def threshold_of(gate: Mapping[str, Any], above: bool) -> Threshold | None:
    """The number that a gate compares its metric with; None where it ranks, draws or names."""
    key, value = selector(gate)
    if key == "complement":
        key, value = selector(mapping(value))
    limit = number(value)
    return Threshold(key, limit, above) if key in ("tau", "at_most") and limit is not None else None


def _thresholds(recipe: Mapping[str, Any], names: Sequence[str]) -> dict[str, tuple[Threshold | None, bool]]:
    """The threshold of each tensor, that of the first rule that matches, else the recipe's; whether it is a rule's."""
    gate = mapping(recipe.get("gate"))
    found: dict[str, tuple[Threshold | None, bool]] = {}
    for rule in map(mapping, sequence(recipe.get("rules"))):
        change = mapping(rule.get("gate"))
        above = (change.get("direction") or gate.get("direction")) == "above"
        limit = threshold_of(change if selector(change)[0] else gate, above)
        own = bool(selector(change)[0] or change.get("metric") or change.get("direction"))
        patterns = rule.get("tensors") or ()
        try:
            matcher = compile_patterns(patterns)
        except (ValueError, TypeError):
            continue
        for name in names:
            if name not in found and matcher(name):
                found[name] = (limit, own)
    default = threshold_of(gate, gate.get("direction") == "above")
    return {name: found.get(name, (default, False)) for name in names}
