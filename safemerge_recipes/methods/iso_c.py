"""`iso_c` (isotropic merging in the common subspace, arXiv 2502.04959): the sum of the deltas with an even spectrum.

Σ weight·Δ = U·diag(σ)·Wᵀ becomes σ̄·U·Wᵀ, σ̄ the mean of the singular values: no direction outweighs another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from safemerge_recipes.methods.base import Method, Sides
from safemerge_recipes.methods.kernel import Rows, Transform
from safemerge_recipes.methods.products import product, triplet_memory, triplets, zeros
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.methods.work import Prepare, Sum
from safemerge_recipes.recipe.merge import Weighted
from safemerge_recipes.weights.algebra import Weight, total
from safemerge_recipes.weights.torch_factors import working_dtype


class IsoC(Weighted):
    """The sum of the deltas, each 1 where no weights are given, with an even spectrum."""

    short: ClassVar[tuple[str, ...]] = ()
    method: Literal["iso_c"]

    def _pair(self) -> tuple[Any, Any]:
        """The sum of both."""
        return 1, 1


@dataclass(frozen=True, slots=True)
class Isotropic(Transform):
    """σ̄·U·Wᵀ for inputs (Δ,), Δ = U·diag(σ)·Wᵀ: singular values become their mean.

    Directions in which Δ is zero stay zero and do not count for the mean, as Δ says nothing of them; so the product of
    LoRA factors keeps its rank.
    """

    matrices: ClassVar[str] = "matrix"

    def memory(self, inputs: tuple[Weight, ...], shape: tuple[int, ...]) -> int:
        """Bytes of all singular directions."""
        return triplet_memory(min(shape), inputs[0], shape)

    def prepare(self, name: str, inputs: tuple[Weight, ...], shape: tuple[int, ...], tools: Tools) -> Rows:
        """Rows of (σ̄·U)·Wᵀ."""
        (delta,) = inputs
        if delta.is_zero:
            return zeros(shape, working_dtype(delta), tools)
        left, values, image = triplets(name, delta, min(shape), tools)
        return product(left * values.mean(), image / values[:, None], working_dtype(delta))


def work(merge: IsoC, sides: Sides) -> Prepare | Sum:
    """W_a + the evened sum."""
    shares = merge.shares()
    _, deltas = sides.weighed(shares, "delta")
    delta = total(shares.values(), deltas)
    return Sum(sides.aligned) if delta.is_zero else Prepare(sides.aligned, (delta,), Isotropic())


ISO_C = Method(
    work,
    keys=IsoC,
    formula="σ̄·U·Wᵀ, σ̄ the mean singular value of Σ weight·Δ = U·diag(σ)·Wᵀ",
    needs=("safety",),
    link="https://arxiv.org/abs/2502.04959",
    low_rank=True,
)
