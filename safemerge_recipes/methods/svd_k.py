"""`svd_k` (LoX, arXiv 2506.15606): the leading part of the safety vector V = W_aligned − W_base added to Δf."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    PlainSerializer,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)

from safemerge_recipes.methods.base import Method, Sides
from safemerge_recipes.methods.kernel import Rows, Transform
from safemerge_recipes.methods.products import factor_bytes, left_times, product, ranks, zeros
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.methods.work import Prepare, Sum
from safemerge_recipes.recipe.fields import Strict
from safemerge_recipes.recipe.merge import Merge
from safemerge_recipes.recipe.merge_keys import Gamma
from safemerge_recipes.weights.algebra import Weight
from safemerge_recipes.weights.directions import left_directions
from safemerge_recipes.weights.spectrum import leading_memory
from safemerge_recipes.weights.torch_factors import working_dtype

if TYPE_CHECKING:
    import torch


class Entropy(Strict):
    """As many leading directions of V as hold this part of the entropy of its spectrum (LSSF, arXiv 2602.00038)."""

    entropy: float = Field(gt=0, le=1)
    """The part."""

    def rank(self, values: torch.Tensor) -> int:
        """The smallest r with H_r ≥ part·H_n, H_r = −Σ_{i≤r} p_i·log p_i, p_i = σ_i²/Σσ², of all singular values σ."""
        import torch

        shares = values.double().square() / values.double().square().sum()
        terms = torch.special.entr(shares).cumsum(0)
        reached = (terms >= self.entropy * terms[-1]).nonzero()
        return 1 + int(reached[0]) if len(reached) else len(values)


def _or_entropy(value: Any, number: ValidatorFunctionWrapHandler) -> Any:
    if isinstance(value, Entropy):
        return value
    return Entropy.model_validate(value) if isinstance(value, dict) and set(value) == {"entropy"} else number(value)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, Entropy) else value


_SHARE = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
_RANKS: dict[str, Any] = {
    "anyOf": [
        {"type": "integer", "minimum": 1, "maximum": 65536},
        {"type": "object", "properties": {"entropy": _SHARE}, "required": ["entropy"], "additionalProperties": False},
    ]
}
Rank = Annotated[
    int,
    Field(ge=1, le=65536),
    WrapValidator(_or_entropy),
    PlainSerializer(_plain, return_type=Any),
    WithJsonSchema(_RANKS),
]


class SvdK(Merge):
    """Δf and the leading part of the safety vector."""

    method: Literal["svd_k"]
    gamma: Gamma = 1.0
    rank: Rank = 16
    """How many leading singular directions of V are added (`svd_k`: Δf + gamma · V_rank); `{entropy: 0.9}`: as many in
    each tensor as hold that part of the entropy of V's spectrum, for which all of it is found."""


@dataclass(frozen=True, slots=True)
class LeadingPart(Transform):
    """γ·SVD_k(V) = γ·U_k·U_kᵀ·V for inputs (V,): the leading part of the safety vector (LoX, arXiv 2506.15606)."""

    gamma: float
    rank: int | Entropy
    matrices: ClassVar[str] = "matrix"

    def memory(self, inputs: tuple[Weight, ...], shape: tuple[int, ...]) -> int:
        """Bytes of thin matrices."""
        columns = shape[-1]
        rows = math.prod(shape) // columns
        if isinstance(self.rank, Entropy):
            side = min(rows, columns)
            return factor_bytes(side + ranks(*inputs), shape) + 8 * (4 * side * side + 2 * rows * side)
        return factor_bytes(self.rank + ranks(*inputs), shape) + leading_memory(rows, columns, self.rank)

    def prepare(self, name: str, inputs: tuple[Weight, ...], shape: tuple[int, ...], tools: Tools) -> Rows:
        """Rows of γ·U_k·(U_kᵀV)."""
        (v,) = inputs
        if v.is_zero:
            return zeros(shape, working_dtype(v), tools)
        if isinstance(self.rank, Entropy):
            side = min(math.prod(shape) // shape[-1], shape[-1])
            found = left_directions(name, v, side, tools.reader, tools.arena, tools.room, exact=True)
            left = found.left[:, : self.rank.rank(found.values)]
        else:
            left = left_directions(name, v, self.rank, tools.reader, tools.arena, tools.room).left
        return product(left * self.gamma, left_times(left, v, tools), working_dtype(v))


def leading(merge: SvdK, sides: Sides) -> Prepare | Sum:
    """W_f + γ·SVD_k(V)."""
    if sides.v.is_zero or not merge.gamma:
        return Sum(sides.finetuned)
    return Prepare(sides.finetuned, (sides.v,), LeadingPart(merge.gamma, merge.rank))


SVD_K = Method(
    leading,
    keys=SvdK,
    formula="Δf + γ·V_rank, the leading part of V",
    needs=("base",),
    link="https://arxiv.org/abs/2506.15606",
)
