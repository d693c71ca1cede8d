"""`tsv` (task singular vectors, TSV-Merge, arXiv 2412.00081): the leading directions of each delta, made orthogonal.

Of n deltas of d_out × d_in each gives its ⌊min(d_out, d_in)/n⌋ leading singular triplets. All left vectors together
are replaced by the nearest orthonormal ones, and all right ones, so that the deltas do not interfere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from safemerge_recipes.methods.base import Method, Sides
from safemerge_recipes.methods.kernel import Rows, Transform
from safemerge_recipes.methods.products import product, triplet_memory, triplets, zeros
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.methods.work import Prepare, Sum
from safemerge_recipes.recipe.merge import Weighted
from safemerge_recipes.weights.algebra import Weight
from safemerge_recipes.weights.spectrum import NEGLIGIBLE
from safemerge_recipes.weights.torch_factors import working_dtype

if TYPE_CHECKING:
    import torch


class Tsv(Weighted):
    """The leading directions of the deltas, each 1 where no weights are given, made orthogonal."""

    short: ClassVar[tuple[str, ...]] = ()
    method: Literal["tsv"]

    def _pair(self) -> tuple[Any, Any]:
        """The sum of both."""
        return 1, 1


@dataclass(frozen=True, slots=True)
class SingularVectors(Transform):
    """U⊥·diag(weightᵢ·σᵢ)·W⊥ᵀ for inputs (Δ₁, …, Δₙ), each with its ⌊min(d_out, d_in)/n⌋ leading triplets.

    X⊥ = X·(XᵀX)^(−1/2), the nearest matrix with orthonormal columns to X = [X₁ … Xₙ]. Directions that two deltas share
    exactly are shared out: n times the same delta gives that delta, with the mean of the weights.
    """

    shares: tuple[float, ...]
    matrices: ClassVar[str] = "matrix"

    def memory(self, inputs: tuple[Weight, ...], shape: tuple[int, ...]) -> int:
        """Bytes of one delta's triplets, and of the vectors of all and their Gram matrices."""
        rank = min(shape) // len(self.shares)
        one = max(triplet_memory(rank, delta, shape) for delta in inputs)
        width = sum(min(rank, sum(getattr(o, "rank", rank) for _, o in delta)) for delta in inputs)
        return one + 8 * (4 * width * (shape[0] + shape[1]) + 6 * width * width)

    def prepare(self, name: str, inputs: tuple[Weight, ...], shape: tuple[int, ...], tools: Tools) -> Rows:
        """Rows of (U⊥·diag(weight·σ))·W⊥ᵀ."""
        import torch

        rank = min(shape) // len(self.shares)
        left, right, sizes = [], [], []
        for share, delta in zip(self.shares, inputs, strict=True):
            if delta.is_zero or not rank:
                continue
            u, values, image = triplets(name, delta, rank, tools)
            left.append(u)
            right.append((image / values[:, None]).T)
            sizes.append(share * values)
        if not left:
            return zeros(shape, working_dtype(*inputs), tools)
        u, w = orthonormal(torch.cat(left, dim=1)), orthonormal(torch.cat(right, dim=1))
        return product(u * torch.cat(sizes), w.T, working_dtype(*inputs))


def orthonormal(x: torch.Tensor) -> torch.Tensor:
    """X·(XᵀX)^(−1/2), `(n, k)` float64; directions in which X has no extent stay zero."""
    import torch

    squares, vectors = torch.linalg.eigh(x.T @ x)
    real = squares > NEGLIGIBLE * squares[-1]
    vectors = vectors[:, real]
    return x @ (vectors / squares[real].sqrt()) @ vectors.T


def work(merge: Tsv, sides: Sides) -> Prepare | Sum:
    """W_a + the merged directions."""
    shares = {role: share for role, share in merge.shares().items() if share}
    _, deltas = sides.weighed(shares, "delta")
    if all(delta.is_zero for delta in deltas):
        return Sum(sides.aligned)
    return Prepare(sides.aligned, deltas, SingularVectors(tuple(map(float, shares.values()))))


TSV = Method(
    work,
    keys=Tsv,
    formula="U⊥·diag(weight·σ)·W⊥ᵀ, of the leading singular vectors of each delta, made orthogonal together",
    needs=("safety",),
    link="https://arxiv.org/abs/2412.00081",
    low_rank=True,
)
