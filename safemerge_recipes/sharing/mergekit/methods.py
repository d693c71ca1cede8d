"""mergekit's methods in a recipe's words: a function each, from the values of its parameters to a `merge`.

Where a method of ours gives the same tensors it is taken; else `mergekit:<method>`, which calls mergekit itself. To add
one: a `Native` in `NATIVE`. Two inputs get the short form, `alpha`; more of them `weights` by role and name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from safemerge_recipes.errors import RecipeError
from safemerge_recipes.sharing.mergekit.settings import MISSING, Parameter

MAX_INPUTS = 100
"""Models that are merged at most, as many as `sources.others` holds."""


def role_of(place: int) -> str:
    """The role, or the name among `sources.others`, of mergekit's inputs other than its base, in order."""
    return ("finetuned", "safety")[place] if place < 2 else f"model{place + 1}"


Kind = Literal["based", "pair", "free"]
"""`based`: deltas from a base model, which is `aligned`; `pair`: the base and one other, on whole weights; `free`:
whole weights without a base."""
Values = Mapping[str, Any]
Merge = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Native:
    """A method of mergekit that ours can do: its kind, its parameters, and the `merge` that values come to or None."""

    kind: Kind
    parameters: tuple[Parameter, ...]
    merge: Callable[[Values], Merge | None]


def _linear(values: Values) -> Merge | None:
    weights = _pair(values["weight"])
    if values["normalize"]:
        total = sum(weights)
        if not total:
            return None
        weights = [weight / total for weight in weights]
    if len(weights) > 2:
        whole = {} if abs(sum(weights) - 1) < 1e-12 else {"space": "weights"}
        return {"method": "linear", **_weights(weights), **whole}
    if abs(sum(weights) - 1) < 1e-12 and min(weights) >= 0:
        return {"method": "linear", "alpha": tidy(weights[0])}
    return {
        "method": "task_arithmetic", "lambda_finetuned": tidy(weights[0]), "lambda_safety": tidy(weights[1]),
        "space": "weights",
    }  # fmt: skip


def _slerp(values: Values) -> Merge | None:
    if not 0 <= values["t"] <= 1:
        return None
    return {"method": "slerp", "alpha": tidy(1 - values["t"]), "space": "weights"}


def _task_arithmetic(values: Values) -> Merge | None:
    weights = _pair(values["weight"])
    scale = values["lambda"] / (sum(weights) or 1) if values["normalize"] else values["lambda"]
    if len(weights) > 2:
        return {"method": "task_arithmetic", **_weights([scale * weight for weight in weights])}
    return {
        "method": "task_arithmetic", "lambda_finetuned": tidy(scale * weights[0]),
        "lambda_safety": tidy(scale * weights[1]),
    }  # fmt: skip


def _elected(method: str, values: Values) -> Merge | None:
    """TIES, and DARE before it: signs are elected, so only the ratio of two weights ≥ 0 matters for what agrees."""
    weights, density = _pair(values["weight"]), _density(values)
    total = sum(weights)
    if density is None or min(weights) < 0:
        return None
    if not total or not density:
        return {"method": "drop"}
    if len(weights) > 2:
        return {
            "method": method, **_weights(weights), "density": tidy(density), "lambda": tidy(values["lambda"]),
            "normalize": bool(values["normalize"]),
        }  # fmt: skip
    factor = values["lambda"] * (1 if values["normalize"] else total)
    return {
        "method": method, "alpha": tidy(weights[0] / total), "density": tidy(density), "lambda": tidy(factor),
        "normalize": bool(values["normalize"]),
    }  # fmt: skip


def _ties(values: Values) -> Merge | None:
    return None if values["rescale"] else _elected("ties", values)


def _dare_ties(values: Values) -> Merge | None:
    if not values["rescale"] and _density(values) != 1:
        return None
    merge = _elected("dare_ties", values)
    return merge if merge is None or merge["method"] == "drop" else {**merge, "rescale": "l1"}


def _dare_linear(values: Values) -> Merge | None:
    weights, density = _pair(values["weight"]), _density(values)
    total = sum(weights)
    scale = values["lambda"] * (1 if values["normalize"] else total)
    if density == 1:
        return _task_arithmetic(values)
    if not density or not values["rescale"] or not total:
        return None
    if len(weights) > 2 or abs(scale - 1) > 1e-12 or min(weights) < 0:
        factor = values["lambda"] / (total if values["normalize"] else 1)
        shares = _weights([factor * weight for weight in weights])
        return {"method": "dare_linear", **shares, "density": tidy(density), "rescale": "l1"}
    return {"method": "dare_linear", "alpha": tidy(weights[0] / total), "density": tidy(density), "rescale": "l1"}


def _passthrough(values: Values) -> Merge | None:
    (scale,) = values["scale"]
    if scale is None or scale == 1:
        return {"method": "drop"}  # no Δ: the aligned model, which is the only one
    return {"method": "task_arithmetic", "lambda_finetuned": tidy(scale), "lambda_safety": 0.0, "space": "weights"}


def _pair(values: Sequence[float]) -> list[float]:
    return [*map(float, values), *[0.0] * (2 - len(values))]


def _weights(weights: Sequence[float]) -> Merge:
    """`weights` of those inputs that have one."""
    return {"weights": {role_of(place): tidy(weight) for place, weight in enumerate(weights) if weight}}


def _density(values: Values) -> float | None:
    """The one density of all inputs that count, 0 if none does, None where they differ."""
    counting = {d for d, w in zip(values["density"], values["weight"], strict=True) if w}
    return None if len(counting) > 1 else float(counting.pop()) if counting else 0.0


def tidy(number: float) -> float:
    """A number to 12 digits: what arithmetic on decimals leaves behind is cut off."""
    return float(f"{number:.12g}")


def _task_family(normalize: bool, rescale: bool) -> tuple[Parameter, ...]:
    return (
        Parameter("weight", each=True), Parameter("density", each=True, default=1.0), Parameter("lambda", default=1.0),
        Parameter("normalize", default=normalize), Parameter("rescale", default=rescale),
        Parameter("int8_mask", default=False),
    )  # fmt: skip


NATIVE: Mapping[str, Native] = {
    "linear": Native("free", (Parameter("weight", each=True), Parameter("normalize", default=True)), _linear),
    "slerp": Native("pair", (Parameter("t"),), _slerp),
    "task_arithmetic": Native("based", _task_family(False, False), _task_arithmetic),
    "ties": Native("based", _task_family(True, False), _ties),
    "dare_linear": Native("based", _task_family(False, True), _dare_linear),
    "dare_ties": Native("based", _task_family(False, True), _dare_ties),
    "passthrough": Native("free", (Parameter("scale", each=True, default=None),), _passthrough),
}
"""mergekit's methods that are also ours."""


def called(method: str, inputs: int = 2) -> Native:
    """A method as mergekit itself computes it for so many inputs beside a base, by what its registry says of it.

    Raises:
        RecipeError: mergekit is not installed, or has no such method.
    """
    try:
        from mergekit.merge_methods import BasePolicy, registered_methods
    except ImportError:
        raise RecipeError(
            f"merge_method: {method} is computed by mergekit alone, which is not installed; "
            f"try: pip install 'safemerge-recipes[mergekit]', or one of {', '.join(NATIVE)}"
        ) from None
    known = {one.spec.name: one.spec for one in registered_methods()}
    if method not in known:
        raise RecipeError(f"merge_method: found {method!r}, unknown to mergekit; expected one of {', '.join(known)}")
    spec = known[method]
    based = spec.contract.base == BasePolicy.REQUIRED
    kind: Kind = "free" if not based else "pair" if spec.contract.max_inputs == 2 else "based"
    parameters = tuple(
        Parameter(p.name, p.scope.value != "shared", MISSING if p.required else p.default) for p in spec.parameters
    )

    def merge(values: Values) -> Merge:
        options: dict[str, Any] = {}
        for p in parameters:
            given = values[p.name]
            if not p.each:
                options |= {p.name: given} if given != p.default else {}
            elif set(given) != {p.default}:
                beside = {"safety": 0.0 if p.name == "weight" else given[0]} if kind == "based" else {}
                options[p.name] = beside | {role_of(place): one for place, one in enumerate(given)}
        merge: Merge = {"method": f"mergekit:{method}"}
        if inputs > 2:  # which models are read; what they weigh stands in the options
            merge["weights"] = {role_of(place): 1.0 for place in range(inputs)}
        return {**merge, **({"options": options} if options else {})}

    return Native(kind, parameters, merge)
