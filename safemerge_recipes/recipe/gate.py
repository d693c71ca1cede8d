"""The gate of a recipe: which tensors are merged, by a metric and one selector."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from safemerge_recipes.recipe import builtins
from safemerge_recipes.recipe.fields import Count, Options, Patterns, Problems, Seed, Strict, Text, check_known

SELECTORS = (*builtins.SELECTORS, "plugin")
"""The keys of a gate of which exactly one is given."""


def decides_by_metric(selector: str) -> bool:
    """Whether a selector needs the metric, and so perhaps `sources.base`; a plugin's may."""
    return selector == "plugin" or bool(builtins.SELECTORS[selector].measured)


class Random(Strict):
    """A random choice of tensors, as a control."""

    count: Count | Annotated[dict[Text, Count], Field(min_length=1, max_length=10_000)]
    """How many tensors are chosen; or how many of each module type, such as `{self_attn.q_proj: 3}`."""
    seed: Seed = 0
    """Seed of the choice."""
    per: Literal["module"] | None = None
    """`module` keeps for each module type the count that an even spread gives it."""

    @model_validator(mode="after")
    def _check(self) -> Random:
        if self.per is not None and not isinstance(self.count, int):
            raise ValueError("found `per` beside counts of module types; expected it only beside one number")
        return self


class PluginSelector(Strict):
    """A selector that a plugin registers."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,99}$")]
    """Its name; `safemerge plugins` lists them."""
    options: Options = Field(default={})
    """Its parameters, by name."""


class _Selectors(Strict, defer_build=True):
    tau: float | None = None
    """Merge where the metric is below this value (strict, unrounded)."""
    at_most: float | None = None
    """Merge where the metric is at most this value, as Safe LoRA does."""
    lowest: int | None = Field(default=None, ge=1, le=10_000_000)
    """Merge this many tensors with the lowest metric; ties by tensor name."""
    fraction: float | None = Field(default=None, gt=0, le=1)
    """Merge this part of the tensors, those with the lowest metric; rounded up."""
    random: Random | None = None
    """A control: merge tensors chosen at random."""
    names: Patterns | None = None
    """Merge the tensors that match these patterns."""
    names_file: Text | None = None
    """Merge the tensors listed in this file: one pattern a line, `#` starts a comment."""
    always: Literal[True] | None = None
    """Merge every gated tensor."""
    never: Literal[True] | None = None
    """Merge nothing."""
    plugin: PluginSelector | None = None
    """Merge what a plugin's selector picks."""
    per: Literal["module"] | None = None
    """`module` ranks within each module type; only beside `lowest` or `fraction`."""

    def selectors(self) -> list[str]:
        """The selectors that are given."""
        return [name for name in SELECTORS if getattr(self, name, None) is not None]

    def _check_selectors(self) -> None:
        allowed = [name for name in SELECTORS if name in type(self).model_fields]
        found = self.selectors()
        if not found:
            raise ValueError(f"found no selector; expected exactly one of {', '.join(allowed)}")
        if len(found) > 1:
            raise ValueError(f"found {len(found)} selectors, {' and '.join(found)}; expected exactly one")
        if self.per is not None and found[0] not in ("lowest", "fraction"):
            raise ValueError(f"found `per` beside `{found[0]}`; expected it only beside `lowest` or `fraction`")

    @property
    def selector(self) -> tuple[str, Any]:
        """The selector that is given, and its value."""
        name = self.selectors()[0]
        return name, getattr(self, name)


def _exactly_one(schema: dict[str, Any]) -> None:
    schema["oneOf"] = [{"required": [name]} for name in SELECTORS if name in schema["properties"]]


class Complement(_Selectors, defer_build=False):
    """Exactly what one selector does not pick."""

    model_config = ConfigDict(json_schema_extra=_exactly_one)

    @model_validator(mode="after")
    def _check(self) -> Complement:
        self._check_selectors()
        return self


class GateChange(_Selectors, defer_build=False):
    """The parts of the gate that a rule changes. A selector takes the place of the recipe's."""

    complement: Complement | None = None
    """A control: merge exactly what this selector does not pick."""
    metric: str = Field(default="rho", pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,99}$")
    """What is measured: `rho` (the paper's cos(VVᵀΔf, Δf)), `rho_ratio` (ρ over its null ρ₀), `cosine`,
    `residual`, `norm_ratio`, `e_diem`, or a plugin's metric."""
    direction: Literal["below", "above"] = "below"
    """Merge where the metric is low (the paper's) or high. With `above`, `tau` means >, `at_most` means ≥,
    and `lowest` and `fraction` take the highest."""
    granularity: Literal["tensor", "module", "block"] = "tensor"
    """What is decided together: a weight matrix, a module, or a block of the model. The metric of a group is
    that of its concatenated deltas."""
    scope: Patterns | None = None
    """Patterns of the tensors that are gated. Default: every 2-D weight of a linear layer that differs
    between aligned and fine-tuned. Vectors (norms, biases) are gated only where `names` lists them."""
    degenerate: Literal["keep", "merge", "error"] = "keep"
    """What happens where V = 0 or Δf = 0 leaves the metric undefined."""
    precision: Literal["exact", "adaptive"] = "adaptive"
    """`exact` computes every metric in full; `adaptive` only as far as the decision needs."""
    rank: int = Field(default=16, ge=1, le=65536)
    """Rank of the safety subspace for the metric `residual`."""

    @field_validator("metric")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        return check_known("metric", name, builtins.METRICS, info)


class Gate(GateChange):
    """Which tensors are merged: a metric and exactly one selector."""

    model_config = ConfigDict(json_schema_extra=_exactly_one)

    @model_validator(mode="after")
    def _check(self) -> Gate:
        self._check_selectors()
        problems = Problems([])
        known = builtins.METRICS.get(self.metric)
        low, high = (known.low, known.high) if known else (-math.inf, math.inf)
        owners: list[tuple[tuple[str, ...], _Selectors]] = [((), self)]
        if self.complement is not None:
            owners.append((("complement",), self.complement))
        for place, owner in owners:
            for key in ("tau", "at_most"):
                value = getattr(owner, key)
                if value is None or low <= value <= high:
                    continue
                bounds = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
                message = f"found {value:g}; expected a threshold {bounds} for the metric {self.metric}"
                problems.add((*place, key), message, value)
        if "rank" in self.model_fields_set and not self.uses_rank:
            users = " and ".join(name for name, metric in builtins.METRICS.items() if metric.directions)
            problems.add(("rank",), f"rank is not used by the metric {self.metric}; only by {users}")
        problems.check("Gate")
        return self

    @property
    def uses_rank(self) -> bool:
        """Whether the metric looks inside the leading directions of V; a plugin's may."""
        return self.metric not in builtins.METRICS or bool(builtins.METRICS[self.metric].directions)

    @property
    def needs_metric(self) -> bool:
        """Whether the decision depends on the metric."""
        name, value = self.selector
        return decides_by_metric(value.selector[0] if name == "complement" else name)


def change_gate(gate: Gate, change: GateChange | None) -> Gate:
    """The gate with a rule's changes; another selector or metric forgets what belongs to the old one."""
    if change is None:
        return gate
    values = gate.given()
    given = change.given()
    if change.selectors():
        for key in (*SELECTORS, "per"):
            values.pop(key, None)
    if given.get("metric", gate.metric) != gate.metric:
        values.pop("rank", None)
    return Gate.model_validate({**values, **given})
