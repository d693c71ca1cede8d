"""The built-in metrics, selectors and merge methods: one row each, which is the only list that names them.

Plain data without pydantic and torch, so that recipes, reports and listings may read it. A row says where the object
lies and what a recipe must know of it. The keys of a method are a class in `recipe.merge`; what it computes is its file
in `methods/`, a metric's and a selector's in `gate/`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, get_args

Role = Literal["base", "aligned", "finetuned", "safety"]
"""What a source is to a recipe."""
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class MetricRow:
    """A built-in metric.

    Attributes:
        target: where its function lies, `module:attribute`.
        low: the least threshold that makes sense for it.
        high: the greatest.
    """

    target: str
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class SelectorRow:
    """A built-in selector, by its key in a gate.

    Attributes:
        target: where the `Selector` lies, `module:attribute`.
        measured: whether it decides by the metric, which may need `sources.base`.
    """

    target: str
    measured: bool = True


@dataclass(frozen=True, slots=True)
class MethodRow:
    """A built-in merge method.

    Attributes:
        target: where the `Method` lies, `module:attribute`.
        formula: the Δ that a selected tensor gets, in words or signs.
        needs: the roles it needs besides `aligned` and `finetuned`; see also `recipe.merge.merge_sources`.
        link: where it comes from; carried into the report and the model card.
        low_rank: whether its result has an exact small rank when its deltas do.
    """

    target: str
    formula: str
    needs: tuple[Role, ...] = ()
    link: str = ""
    low_rank: bool = False


METRICS: Mapping[str, MetricRow] = {
    "rho": MetricRow("safemerge_recipes.gate.metrics:rho", 0.0, 1.0),
    "rho_ratio": MetricRow("safemerge_recipes.gate.metrics:rho_ratio", 0.0, math.inf),
    "cosine": MetricRow("safemerge_recipes.gate.metrics:cosine", -1.0, 1.0),
    "residual": MetricRow("safemerge_recipes.gate.metrics:residual", 0.0, 1.0),
    "norm_ratio": MetricRow("safemerge_recipes.gate.metrics:norm_ratio", 0.0, math.inf),
    "e_diem": MetricRow("safemerge_recipes.gate.metrics:e_diem", -math.inf, math.inf),
}
"""The built-in metrics, by name."""

SELECTORS: Mapping[str, SelectorRow] = {
    "tau": SelectorRow("safemerge_recipes.gate.selectors.threshold:TAU"),
    "at_most": SelectorRow("safemerge_recipes.gate.selectors.threshold:AT_MOST"),
    "lowest": SelectorRow("safemerge_recipes.gate.selectors.rank:LOWEST"),
    "fraction": SelectorRow("safemerge_recipes.gate.selectors.rank:FRACTION"),
    "random": SelectorRow("safemerge_recipes.gate.selectors.drawn:RANDOM", measured=False),
    "complement": SelectorRow("safemerge_recipes.gate.selectors.complement:COMPLEMENT"),
    "names": SelectorRow("safemerge_recipes.gate.selectors.named:NAMES", measured=False),
    "names_file": SelectorRow("safemerge_recipes.gate.selectors.named:NAMES", measured=False),
    "always": SelectorRow("safemerge_recipes.gate.selectors.constant:ALWAYS", measured=False),
    "never": SelectorRow("safemerge_recipes.gate.selectors.constant:NEVER", measured=False),
}
"""The built-in selectors, by their key in a gate."""

METHODS: Mapping[str, MethodRow] = {
    "linear": MethodRow(
        "safemerge_recipes.methods.linear:LINEAR",
        "αΔf + (1−α)Δs",
        needs=("safety",),
        link="https://arxiv.org/abs/2503.17239",
        low_rank=True,
    ),
    "slerp": MethodRow(
        "safemerge_recipes.methods.slerp:SLERP",
        "spherical interpolation from Δf to Δs at 1−α, over the flattened tensor",
        needs=("safety",),
        link="https://en.wikipedia.org/wiki/Slerp",
        low_rank=True,
    ),
    "ties": MethodRow(
        "safemerge_recipes.methods.ties:TIES",
        "of Δf and Δs the largest ⌊density·n⌋ each, signs elected by α : 1−α, the mean of what agrees, times lambda",
        needs=("safety",),
        link="https://arxiv.org/abs/2306.01708",
    ),
    "dare_linear": MethodRow(
        "safemerge_recipes.methods.dare:DARE_LINEAR",
        "Δf and Δs dropped at random to `density` and rescaled, then as `linear`",
        needs=("safety",),
        link="https://arxiv.org/abs/2311.03099",
    ),
    "dare_ties": MethodRow(
        "safemerge_recipes.methods.dare:DARE_TIES",
        "Δf and Δs dropped at random to `density` and rescaled, then signs elected as in `ties`",
        needs=("safety",),
        link="https://arxiv.org/abs/2311.03099",
    ),
    "task_arithmetic": MethodRow(
        "safemerge_recipes.methods.task_arithmetic:TASK_ARITHMETIC",
        "lambda_finetuned·Δf + lambda_safety·Δs",
        needs=("safety",),
        link="https://arxiv.org/abs/2212.04089",
        low_rank=True,
    ),
    "project": MethodRow(
        "safemerge_recipes.methods.project:PROJECT",
        "CΔf, C = VVᵀ normalised",
        needs=("base",),
        link="https://arxiv.org/abs/2405.16833",
        low_rank=True,
    ),
    "add_safety_vector": MethodRow(
        "safemerge_recipes.methods.vectors:ADD_SAFETY_VECTOR",
        "Δf + γV",
        needs=("base",),
        link="https://arxiv.org/abs/2402.11746",
    ),
    "svd_k": MethodRow(
        "safemerge_recipes.methods.vectors:SVD_K",
        "Δf + γ·V_rank, the leading part of V",
        needs=("base",),
        link="https://arxiv.org/abs/2506.15606",
    ),
    "mask": MethodRow(
        "safemerge_recipes.methods.mask:MASK",
        "Δf, with the masked elements replaced",
    ),
    "replace": MethodRow(
        "safemerge_recipes.methods.replace:REPLACE",
        "Δs",
        needs=("safety",),
        low_rank=True,
    ),
    "drop": MethodRow(
        "safemerge_recipes.methods.replace:DROP",
        "0",
        low_rank=True,
    ),
}
"""The built-in merge methods, by name."""


def load(rows: Mapping[str, MetricRow] | Mapping[str, SelectorRow] | Mapping[str, MethodRow]) -> dict[str, Any]:
    """The objects of some rows by name, imported now."""
    found = {name: row.target.partition(":") for name, row in rows.items()}
    return {name: getattr(import_module(module), attribute) for name, (module, _, attribute) in found.items()}
