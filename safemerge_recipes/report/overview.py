"""A plan as reports see it: plain JSON in, tensors with their thresholds, grouped by block and module type.

Reads the content of safemerge_plan.json and lets missing or odd values pass as missing: a report never fails
for what it cannot show. Knows no output format and no engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safemerge_recipes.recipe.patterns import compile_patterns
from safemerge_recipes.tensor_names import block_of, module_type
from safemerge_recipes.text import clean, count, figure, grouped, number, things

SYMBOLS: Mapping[str, str] = {"rho": "ρ", "rho_ratio": "ρ/ρ₀", "norm_ratio": "‖Δf‖/‖V‖"}
"""Metrics that have a symbol."""

FORMULAS: Mapping[str, str] = {
    "linear": "αΔf + (1−α)Δs",
    "slerp": "Δf to Δs on the sphere, t = 1−α",
    "replace": "Δs",
    "drop": "0",
    "task_arithmetic": "λf·Δf + λs·Δs",
    "project": "CΔf",
    "add_safety_vector": "Δf + γV",
}
"""Methods whose Δ is short to write."""

_SELECTORS = (
    "tau",
    "at_most",
    "lowest",
    "fraction",
    "random",
    "complement",
    "names",
    "names_file",
    "always",
    "never",
)


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
    """One tensor of the plan. `kind` is its module type, `block` its place among the blocks, if in any."""

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
    norm_v: float | None
    norm_delta: float | None
    method: str
    alpha: float | None
    source: str
    threshold: Threshold | None

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
    recipe = _mapping(plan.get("recipe"))
    raw = [_mapping(line) for line in _sequence(plan.get("tensors"))]
    names = [str(line.get("name", "")) for line in raw]
    places, labels = _blocks(names)
    limits = _thresholds(recipe, names)
    gated = [bool(line.get("metric")) or line.get("action") == "merge" for line in raw]
    stacks = {_stack(name) for name, inside in zip(names, gated, strict=True) if inside and name in places}
    lines = tuple(
        _line(line, name, inside, places.get(name), limits.get(name), len(stacks) > 1)
        for line, name, inside in zip(raw, names, gated, strict=True)
    )
    return Overview(
        name=clean(recipe.get("name"), 200) or "Unnamed merge",
        description=clean(" ".join(str(recipe.get("description") or "").split()), 2000),
        recipe=recipe,
        lines=lines,
        blocks=labels,
        warnings=tuple(clean(text, 1000) for text in _sequence(plan.get("warnings"))),
        summary=_mapping(plan.get("summary")),
    )


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _sequence(value: object) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()


def _stack(name: str) -> str:
    return (block_of(name) or "").rpartition(".")[0]


def _blocks(names: Sequence[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Place of each tensor's block among the distinct block numbers, and the numbers' labels."""
    number_of = {name: block.rpartition(".")[2] for name in names if (block := block_of(name)) is not None}
    labels = tuple(sorted(dict.fromkeys(number_of.values()), key=lambda text: (len(text), text)))
    place = {label: index for index, label in enumerate(labels)}
    return {name: place[label] for name, label in number_of.items()}, labels


def _line(
    raw: Mapping[str, Any], name: str, gated: bool, block: int | None, limit: Threshold | None, stacked: bool
) -> Line:
    kind = clean(module_type(name), 60)
    return Line(
        name=clean(name),
        shape=tuple(count(n) for n in _sequence(raw.get("shape"))),
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
        norm_v=number(raw.get("norm_v")),
        norm_delta=number(raw.get("norm_delta")),
        method=clean(raw.get("method"), 100),
        alpha=number(raw.get("alpha")),
        source=clean(raw.get("source"), 20),
        threshold=limit if gated else None,
    )


# What the recipe says


def selector(gate: Mapping[str, Any]) -> tuple[str, Any]:
    """The selector that a gate, or a rule's change of one, gives; ("", None) without any."""
    return next(((key, gate[key]) for key in _SELECTORS if gate.get(key) is not None), ("", None))


def _threshold(gate: Mapping[str, Any], above: bool) -> Threshold | None:
    key, value = selector(gate)
    if key == "complement":
        key, value = selector(_mapping(value))
    limit = number(value)
    return Threshold(key, limit, above) if key in ("tau", "at_most") and limit is not None else None


def _thresholds(recipe: Mapping[str, Any], names: Sequence[str]) -> dict[str, Threshold | None]:
    """The threshold of each tensor: that of the first rule that matches, else the recipe's."""
    gate = _mapping(recipe.get("gate"))
    found: dict[str, Threshold | None] = {}
    for rule in map(_mapping, _sequence(recipe.get("rules"))):
        change = _mapping(rule.get("gate"))
        above = (change.get("direction") or gate.get("direction")) == "above"
        limit = _threshold(change if selector(change)[0] else gate, above)
        patterns = rule.get("tensors") or ()
        try:
            matcher = compile_patterns(patterns)
        except (ValueError, TypeError):
            continue
        for name in names:
            if name not in found and matcher(name):
                found[name] = limit
    default = _threshold(gate, gate.get("direction") == "above")
    return {name: found.get(name, default) for name in names}


def symbol(metric: object) -> str:
    """How a metric is written."""
    return SYMBOLS.get(str(metric), clean(metric, 40))


def criterion(gate: Mapping[str, Any]) -> str:
    """What a gate selects, such as `where ρ < 0.35`; empty where it does not say."""
    key, value = selector(gate)
    metric, above = symbol(gate.get("metric") or "rho"), gate.get("direction") == "above"
    end = "highest" if above else "lowest"
    per = " of each module type" if gate.get("per") == "module" else ""
    if key in ("tau", "at_most"):
        limit = _threshold(gate, above)
        return f"where {metric} {limit.sign} {figure(limit.value)}" if limit else ""
    if key == "lowest":
        return f"the {count(value)} {end} in {metric}{per}"
    if key == "fraction":
        return f"the {figure((number(value) or 0) * 100)} % {end} in {metric}{per}"
    if key == "random":
        return f"drawn at random (seed {count(_mapping(value).get('seed'))})"
    if key == "complement":
        inner = criterion({"metric": gate.get("metric"), "direction": gate.get("direction"), **_mapping(value)})
        return f"all but those {inner}"
    return {
        "names": "as named in the recipe",
        "names_file": "as named in a file",
        "always": "without a condition",
    }.get(key, "")


def criteria(recipe: Mapping[str, Any]) -> list[str]:
    """What the recipe's gate selects, then what those of its rules select that differ."""
    gate = _mapping(recipe.get("gate"))
    found = {criterion(gate): None}
    common = {key: value for key, value in gate.items() if key not in _SELECTORS}
    for rule in map(_mapping, _sequence(recipe.get("rules"))):
        change = _mapping(rule.get("gate"))
        if selector(change)[0]:
            found[criterion({**common, **change})] = None
    return [text for text in found if text]


def method_words(view: Overview, method: str) -> str:
    """A method and its α, such as `linear, α = 0.8`, or `linear, α from 0.7 to 0.8` where rules differ."""
    alphas = sorted(
        {line.alpha for line in view.lines if line.merged and line.method == method and line.alpha is not None}
    )
    if not alphas:
        return method
    if len(alphas) == 1:
        return f"{method}, α = {figure(alphas[0])}"
    return f"{method}, α from {figure(alphas[0])} to {figure(alphas[-1])}"


def method_link(method: str) -> str | None:
    """The address of a method's source, if known; never made from outside text."""
    from safemerge_recipes.recipe.builtins import METHODS

    row = METHODS.get(method)
    return (row.link or None) if row else None


def sentence(view: Overview, done: bool) -> str:
    """What is merged, or was, in one sentence."""
    gated = view.gated
    merged = sum(line.merged for line in gated)
    verb = ("was merged" if merged == 1 else "were merged") if done else ("merges" if merged == 1 else "merge")
    if not gated:
        verb = "was" if done else "is"
        return f"None of the {things(len(view.lines), 'tensor')} is gated; nothing {verb} merged."
    known = criteria(view.recipe)
    why = f", {known[0]}" if known else ""
    more = f", or by rule {known[1]}" if len(known) == 2 else ", or by rules" if known[1:] else ""
    rest = len(view.lines) - merged
    return (
        f"{grouped(merged)} of {things(len(gated), 'gated tensor')} {verb}{why}{more}; "
        f"the other {things(rest, 'tensor')} keep{'s' if rest == 1 else ''} {kept_from(view)}."
    )


def kept_from(view: Overview) -> str:
    """Whose values the kept tensors have."""
    words = {"finetuned": "fine-tuned", "aligned": "aligned", "safety": "safety"}
    roles = dict.fromkeys(line.source or "finetuned" for line in view.lines if not line.merged)
    named = [words.get(role, role) for role in roles] or ["fine-tuned"]
    return f"the {' or '.join(named)} value{'s' if len(view.lines) > 1 else ''}"
