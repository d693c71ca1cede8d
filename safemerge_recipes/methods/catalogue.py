"""What a merge method is to the engine, and the built-in ones: from a recipe's `merge` to the work of a tensor.

A method looks at the symbolic weights of one tensor and says what is to be done: a sum (`methods.FORMS`), a
kernel over blocks (`methods.KERNELS`, `masks`), or a transform of whole matrices (`transforms`). It reads
headers only, so whatever it refuses is refused before anything is measured. Each constant here is what an
entry point of the group `safemerge.methods` names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safemerge_recipes.errors import RecipeError, SourceError
from safemerge_recipes.methods.base import Apply, Prepare, Sum
from safemerge_recipes.methods.branchless import zero_where_dropped
from safemerge_recipes.methods.kernels import FORMS, KERNELS, Blocks
from safemerge_recipes.methods.mask import Replace
from safemerge_recipes.methods.transforms import Mergekit, Project, SvdK
from safemerge_recipes.recipe.model import Merge, Role
from safemerge_recipes.sources.masks import mask_ref
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.algebra import Blend, LowRank, Stored, Weight
from safemerge_recipes.weights.draw import Draw

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Sides:
    """The weights of one tensor that a method may use; a role the recipe does not give is None.

    Attributes:
        name: the tensor.
        shape: its shape.
        weights: role -> weight.
        masks: tensors of the recipe's mask files, by path and name.
    """

    name: str
    shape: tuple[int, ...]
    weights: Mapping[Role, Weight]
    masks: Mapping[str, Mapping[str, TensorRef]] = field(default_factory=dict)

    def need(self, role: Role) -> Weight:
        """The role's weight. Raises RecipeError where the recipe does not give it."""
        if role not in self.weights:
            raise RecipeError(f"sources.{role}: missing; the merge of {self.name} needs it")
        return self.weights[role]

    @property
    def aligned(self) -> Weight:
        """W_a."""
        return self.weights["aligned"]

    @property
    def finetuned(self) -> Weight:
        """W_f."""
        return self.weights["finetuned"]

    @property
    def delta(self) -> Weight:
        """Δf = W_f − W_a."""
        return self.finetuned - self.aligned

    @property
    def safety_delta(self) -> Weight:
        """Δs = W_s − W_a; zero where the recipe gives no safety model."""
        return self.weights["safety"] - self.aligned if "safety" in self.weights else Weight()

    @property
    def v(self) -> Weight:
        """V = W_a − W_b. Raises RecipeError where the recipe gives no base."""
        return self.aligned - self.need("base")

    def pair(self, merge: Merge) -> tuple[Weight, Weight, Weight]:
        """(origin, x, y): what a method of two sides adds to, and what it sees, by `merge.space`."""
        if merge.space == "weights":
            return Weight(), self.finetuned, self.weights.get("safety", Weight())
        return self.aligned, self.delta, self.safety_delta


Works = Sum | Apply | Prepare


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method; what the entry-point group `safemerge.methods` names.

    Attributes:
        work: what is to be done for a selected tensor. Raises RecipeError or SourceError for what cannot be.
        needs: the roles it needs besides `aligned` and `finetuned`, for plugins (the built-in ones' are the
            recipe's knowledge).
        link: where it comes from, for plugins.
    """

    work: Callable[[Merge, Sides], Works]
    needs: tuple[Role, ...] = ()
    link: str = ""


def _form(name: str) -> Method:
    def work(merge: Merge, sides: Sides) -> Works:
        origin, x, y = sides.pair(merge)
        v = sides.aligned - sides.weights["base"] if "base" in sides.weights else Weight()
        return Sum(origin + FORMS[name](merge, x, y, v))

    return Method(work)


def _kernel(name: str) -> Method:
    def work(merge: Merge, sides: Sides) -> Works:
        origin, x, y = sides.pair(merge)
        return Apply(origin, (x, y), KERNELS[name](merge))

    return Method(work)


# Factors


def blend(merge: Merge, sides: Sides, draw: tuple[float, int, str] | None = None) -> Weight:
    """Δ as PEFT's `linear` combines two adapters: (Σ√(wᵢsᵢ)Bᵢ)(Σ√(wᵢsᵢ)Aᵢ), with s the scale of an adapter.

    An adapter that lacks the module takes no part, as in PEFT (0.21, `add_weighted_adapter`). With the same A on
    both sides and weights 0.8 and 0.2 the deltas weigh 1.2 and 0.6: the square roots' cross terms.

    Raises:
        SourceError: a side is not one LoRA product, or the ranks differ.
    """
    parts: list[tuple[float, float, LowRank]] = []
    for role, delta, share in (
        ("finetuned", sides.delta, merge.alpha),
        ("safety", sides.safety_delta, 1 - merge.alpha),
    ):
        if delta.is_zero:
            continue
        coefficient, operand = delta.terms[0]
        if len(delta.terms) != 1 or not isinstance(operand, LowRank):
            raise SourceError(
                f"sources.{role}: {sides.name}: is not an adapter on the aligned model; "
                "merge.space: factors combines the factors of adapters, use space: delta for anything else"
            )
        weight = float(coefficient) * share * operand.scale
        root = math.sqrt(abs(weight))
        parts.append((root, math.copysign(root, weight), operand))
    ranks = [part[2].rank for part in parts]
    if len(set(ranks)) > 1 or len({part[2].transposed for part in parts}) > 1:
        raise SourceError(
            f"sources.safety: {sides.name}: has rank {ranks[1]}, the fine-tuned adapter {ranks[0]}; "
            "merge.space: factors needs equal ranks, use space: delta"
        )
    return Weight.of(Blend(tuple(parts), draw)) if parts else Weight()


def _linear(merge: Merge, sides: Sides) -> Works:
    if merge.space == "factors":
        return Sum(sides.aligned + blend(merge, sides))
    return _form("linear").work(merge, sides)


def _dare_linear(merge: Merge, sides: Sides) -> Works:
    if merge.space == "factors":
        return Sum(sides.aligned + blend(merge, sides, (merge.density, merge.seed, sides.name)))
    return _kernel("dare_linear").work(merge, sides)


# The safety vector


@dataclass(frozen=True, slots=True)
class ThinnedSum:
    """x + γ·y with DARE on one of them: elements dropped at random, the rest divided by the density."""

    gamma: float
    draw: Draw
    on: str

    def scan(self, name: str, numel: int, blocks: Blocks, arena: Arena) -> str:
        """The tensor's name; no pass is needed."""
        return name

    def apply(self, name: str, start: int, x: torch.Tensor, y: torch.Tensor, arena: Arena) -> torch.Tensor:
        """The block's sum."""
        keep_x, keep_y = self.draw.keep(name, start, x.numel(), arena)
        if self.on == "delta":
            return zero_where_dropped(x, keep_x).mul_(self.draw.rescale).add_(y, alpha=self.gamma)
        return x.add_(zero_where_dropped(y, keep_y), alpha=self.gamma * self.draw.rescale)


def _add_safety_vector(merge: Merge, sides: Sides) -> Works:
    if merge.dare is None:
        return Sum(sides.finetuned + merge.gamma * sides.v)
    thinned = ThinnedSum(merge.gamma, Draw(merge.dare.density, merge.dare.seed), merge.dare.on)
    if merge.dare.on == "delta":
        return Apply(sides.aligned, (sides.delta, sides.v), thinned)
    return Apply(Weight(), (sides.finetuned, sides.v), thinned)


def _svd_k(merge: Merge, sides: Sides) -> Works:
    if sides.v.is_zero or not merge.gamma:
        return Sum(sides.finetuned)
    return Prepare(sides.finetuned, (sides.v,), SvdK(merge.gamma, merge.rank))


def _project(merge: Merge, sides: Sides) -> Works:
    if sides.v.is_zero or sides.delta.is_zero:
        return Sum(sides.aligned)  # C = 0, as the published code has it, or nothing to project
    return Prepare(sides.aligned, (sides.v, sides.delta), Project(str(merge.normalize)))


# Masks


def _mask(merge: Merge, sides: Sides) -> Works:
    assert merge.mask is not None  # the recipe's own check
    ref = mask_ref(sides.masks, merge.mask.path, sides.name, sides.shape)
    fills: Mapping[str, Callable[[], Weight]] = {
        "safety": lambda: sides.need("safety"),
        "aligned": lambda: sides.aligned,
        "zero": Weight,
    }
    inputs = (sides.finetuned, fills[merge.mask.fill](), Weight.of(Stored(ref)))
    return Apply(Weight(), inputs, Replace(merge.mask.threshold, merge.mask.invert))


# mergekit

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
    roles: tuple[Role, ...] = _PAIR if not based or most == 2 else _BESIDE_BASE
    if most == 1:
        roles = ("finetuned",)

    def work(merge: Merge, sides: Sides) -> Works:
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
        shares = {"finetuned": merge.alpha, "safety": 1 - merge.alpha}
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

    return Method(work, ("safety",) if "safety" in roles else (), spec.reference_url or "")


LINEAR = Method(_linear)
SLERP = _kernel("slerp")
TIES = _kernel("ties")
DARE_LINEAR = Method(_dare_linear)
DARE_TIES = _kernel("dare_ties")
TASK_ARITHMETIC = _form("task_arithmetic")
REPLACE = _form("replace")
DROP = _form("drop")
ADD_SAFETY_VECTOR = Method(_add_safety_vector)
PROJECT = Method(_project)
SVD_K = Method(_svd_k)
MASK = Method(_mask)

METHODS: Mapping[str, Method] = {
    "linear": LINEAR,
    "slerp": SLERP,
    "ties": TIES,
    "dare_linear": DARE_LINEAR,
    "dare_ties": DARE_TIES,
    "task_arithmetic": TASK_ARITHMETIC,
    "project": PROJECT,
    "add_safety_vector": ADD_SAFETY_VECTOR,
    "svd_k": SVD_K,
    "mask": MASK,
    "replace": REPLACE,
    "drop": DROP,
}
"""The built-in methods, by name."""
