"""A plan: one decision, with its reason, for every tensor of the output. Frozen data, which can be written as JSON.

`decisions` makes it from recipe and sources; `graph` turns it into work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safemerge_recipes.gate.moments import Moments
from safemerge_recipes.recipe.mask_files import mask_holders
from safemerge_recipes.recipe.model import Merge, Policy, Recipe, Role


@dataclass(frozen=True, slots=True)
class Outlook:
    """One output tensor before measuring: `policy` None means it is not gated, for the stated `reason`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    policy: Policy | None
    reason: str
    take: Role = "finetuned"


def told(merge: Merge) -> dict[str, Any]:
    """A merge's parameters as plain values, without those that are null; of a file its name, wherever it lies."""
    values = {
        key: value.model_dump(by_alias=True, exclude_none=True) if hasattr(value, "model_dump") else value
        for key, value in merge.parameters().items()
        if value is not None
    }
    for mask in mask_holders(values):
        mask["path"] = Path(mask["path"]).name
    return values


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """The decision on one output tensor.

    `take` is the role whose weight a kept tensor has. `rho_interval` is the half-width of ρ's interval, 0
    where ρ is exact to rounding; `rho_null_interval` likewise for ρ₀. `rho_z` is (ρ − ρ₀) over the spread of ρ
    among updates unrelated to V, null where Δf is a full matrix. `of` names the weight that a tensor is a part of,
    where the output stores it quantised: its codes carry the decision.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: Literal["merge", "keep"]
    reason: str
    gated: bool
    take: Role
    policy: Policy | None
    value: float | None
    moments: Moments | None
    of: str = ""

    @property
    def weight(self) -> str:
        """The name of the weight that it is, or is a part of."""
        return self.of or self.name

    def as_json(self) -> dict[str, Any]:
        """The tensor's line of safemerge_plan.json."""
        m, gate = self.moments, self.policy.gate if self.gated and self.policy else None
        merge = self.policy.merge if self.action == "merge" and self.policy else None
        line: dict[str, Any] = {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "action": self.action,
            "reason": self.reason,
            "metric": gate.metric if gate else None,
            "value": self.value,
            "rho": m.rho if m else None,
            "rho_null": m.rho_null if m else None,
            "rho_z": m.rho_z if m else None,
            "rho_interval": m.rho_error if m else None,
            "rho_null_interval": m.null_error if m else None,
            "measured": ("sketched" if m.rho_error else "exact") if m else None,
            "norm_v": math.sqrt(m.v) if m else None,
            "norm_delta": math.sqrt(m.delta) if m else None,
            "noise_v": math.sqrt(m.v_noise) if m and m.v_noise else None,
            "noise_delta": math.sqrt(m.delta_noise) if m and m.delta_noise else None,
            "method": merge.method if merge else None,
            "alpha": merge.parameters().get("alpha") if merge else None,
        }
        if merge:
            line["parameters"] = {key: value for key, value in told(merge).items() if key != "alpha"}
        if self.action == "keep":
            line["source"] = self.take
        return line


@dataclass(frozen=True, slots=True)
class Plan:
    """Every decision of a run, in checkpoint order."""

    recipe: Recipe
    tensors: tuple[TensorPlan, ...]
    warnings: tuple[str, ...]

    @property
    def gated(self) -> tuple[TensorPlan, ...]:
        """The tensors a gate decided on."""
        return tuple(tensor for tensor in self.tensors if tensor.gated)

    def summary(self) -> dict[str, int]:
        """Counts of tensors."""
        merged = sum(tensor.action == "merge" for tensor in self.tensors)
        gated = len(self.gated)
        kept = sum(tensor.action == "keep" for tensor in self.gated)
        return {"tensors": len(self.tensors), "gated": gated, "merged": merged, "kept": kept}
