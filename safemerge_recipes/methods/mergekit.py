"""`mergekit:<name>`: the methods of mergekit, on whole float32 weights, whatever is installed."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safemerge_recipes.errors import PlanError, RecipeError
from safemerge_recipes.methods.base import Method, Sides
from safemerge_recipes.methods.kernel import Rows, Transform
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.methods.work import Prepare
from safemerge_recipes.recipe.builtins import Role
from safemerge_recipes.recipe.merge import Custom
from safemerge_recipes.storage.cut import PIECE
from safemerge_recipes.weights.algebra import Weight
from safemerge_recipes.weights.torch_factors import working_dtype
from safemerge_recipes.weights.torch_rows import Evaluator

if TYPE_CHECKING:
    import torch


_GENERATOR = threading.Lock()  # mergekit draws from torch's global generator: one tensor at a time seeds and uses it


@dataclass(frozen=True, slots=True)
class Mergekit(Transform):
    """A method of mergekit on whole float32 weights; inputs in the order of `roles`.

    Attributes:
        method: its name there.
        roles: names of the inputs, as `options` may address them.
        base: the position of mergekit's base model among them, or None.
        parameters: its parameters; per-input ones are mappings by role.
        seed: seeds the random choices of a tensor, together with its name.
    """

    method: str
    roles: tuple[str, ...]
    base: int | None
    parameters: tuple[tuple[str, Any], ...]
    seed: int

    def memory(self, inputs: tuple[Weight, ...], shape: tuple[int, ...]) -> int:
        """Bytes: the inputs, the result and what its methods were seen to need besides, all whole and float32."""
        return 4 * math.prod(shape) * (len(inputs) + MERGEKIT_COPIES)

    def prepare(self, name: str, inputs: tuple[Weight, ...], shape: tuple[int, ...], tools: Tools) -> Rows:
        """Rows of mergekit's result."""
        import torch
        from mergekit.merge_methods import merge_tensors

        tensors = [_whole(weight, shape, tools) for weight in inputs]
        try:
            with _GENERATOR, torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(tensor_seed(self.seed, name))
                merged = merge_tensors(
                    tensors, self.method, parameters=_by_role(self.parameters), ids=self.roles,
                    base_index=self.base, name=name, dtype=torch.float32, out_dtype=torch.float32,
                )  # fmt: skip
        except (ValueError, TypeError, RuntimeError, NotImplementedError, KeyError) as error:
            raise PlanError(
                f"merge.method: mergekit:{self.method}: {name}: mergekit says: {str(error)[:500]}; check merge.options"
            ) from None
        merged = merged.reshape(-1, shape[-1])
        return lambda first, last: merged[first:last].clone()


MERGEKIT_COPIES = 16
"""Whole float32 tensors that mergekit's methods need besides their inputs; 15 at most were seen, result included."""


def tensor_seed(seed: int, name: str) -> int:
    """The seed of one tensor's random choices, so that they do not depend on what was merged before."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:7], "little")


def _by_role(parameters: tuple[tuple[str, Any], ...]) -> Mapping[str, Any]:
    return {key: dict(value) if isinstance(value, tuple) else value for key, value in parameters}


def _whole(weight: Weight, shape: tuple[int, ...], tools: Tools) -> torch.Tensor:
    import torch

    whole = torch.empty(math.prod(shape), dtype=torch.float32, device=tools.arena.device)
    evaluate = Evaluator((weight,), tools.reader, tools.arena, "whole", working_dtype(weight))
    step = max(1, PIECE // shape[-1]) * shape[-1]
    for first in range(0, len(whole), step):
        last = min(first + step, len(whole))
        whole[first:last] = evaluate(first, last)[0]
    return whole.reshape(shape)


_PAIR: tuple[Role, ...] = ("finetuned", "safety")
_BESIDE_BASE: tuple[Role, ...] = ("aligned", "finetuned", "safety")


def mergekit_method(name: str) -> Method:
    """The method `mergekit:<name>`.

    Raises:
        RecipeError: mergekit is not installed, or has no such method.
    """
    try:
        from mergekit.merge_methods import BasePolicy, registered_methods
    except ImportError:
        raise RecipeError(
            f"merge.method: mergekit:{name}: mergekit is not installed; expected it, "
            "try: pip install 'safemerge-recipes[mergekit]'"
        ) from None
    known = {method.spec.name: method.spec for method in registered_methods()}
    if name not in known:
        raise RecipeError(
            f"merge.method: mergekit:{name}: mergekit knows no such method; expected one of {', '.join(known)}"
        )
    spec = known[name]
    based = spec.contract.base == BasePolicy.REQUIRED
    most = spec.contract.max_inputs
    pair: tuple[Role, ...] = _PAIR if not based or most == 2 else _BESIDE_BASE
    if most == 1:
        pair = ("finetuned",)

    def inputs_of(merge: Custom) -> tuple[Role, ...]:
        if merge.weights is None:
            return pair
        beside = based and most != 2  # of two inputs the first is what it calls the base
        roles = (*(("aligned",) if beside else ()), *merge.weights)
        if most is not None and len(roles) > most:
            raise RecipeError(
                f"merge.weights: found {', '.join(merge.weights)}; expected at most {most - beside} for mergekit:{name}"
            )
        return roles

    def work(merge: Custom, sides: Sides) -> Prepare:
        if merge.space != "weights" and "space" in merge.model_fields_set:
            raise RecipeError(f"merge.space: found {merge.space}; mergekit's methods see whole weights, leave it out")
        allowed = {parameter.name for parameter in spec.parameters}
        unknown = [key for key in merge.options if key not in allowed]
        if unknown:
            raise RecipeError(
                f"merge.options.{unknown[0]}: mergekit:{name} has no such parameter; "
                f"expected {', '.join(sorted(allowed)) or 'none'}"
            )
        values: dict[str, Any] = dict(merge.options)
        roles, shares = inputs_of(merge), merge.float_shares()
        defaults = {parameter.name: getattr(parameter, "default", None) for parameter in spec.parameters}
        divided = values.get("normalize", defaults.get("normalize"))
        if merge.weights is not None and divided and not sum(merge.shares().values()):
            raise RecipeError(
                f"merge.weights: sum to 0, by which mergekit:{name} divides; expected another sum, or "
                "merge.options.normalize: false"
            )
        for parameter in spec.parameters:
            if parameter.name in values or not parameter.required:
                continue
            if parameter.name == "weight":
                values["weight"] = {role: shares[role] for role in roles if role in shares}
            elif parameter.name == "t":
                values["t"] = 1 - merge.alpha
            else:
                raise RecipeError(
                    f"merge.options.{parameter.name}: missing; expected it because mergekit:{name} needs it"
                )
        frozen = tuple(
            (key, tuple(sorted(v.items())) if isinstance(v, dict) else v) for key, v in sorted(values.items())
        )
        inputs = tuple(sides.need(role) for role in roles)
        return Prepare(Weight(), inputs, Mergekit(name, roles, 0 if based else None, frozen, merge.seed))

    return Method(work, ("safety",) if "safety" in pair else (), spec.reference_url or "")
