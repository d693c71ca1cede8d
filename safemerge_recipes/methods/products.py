"""Products of a few directions with a streamed matrix: what the methods that see whole matrices share.

Matrices are streamed in pieces of rows; a result of low rank stays as its two factors. Products are float32 (float64
where a float64 tensor takes part), small matrices float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from safemerge_recipes.methods.kernel import Rows
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.weights.algebra import Weight
from safemerge_recipes.weights.directions import factors, left_directions
from safemerge_recipes.weights.matrix import ROW_PIECE, TorchRows

if TYPE_CHECKING:
    import torch


def product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> Rows:
    """The rows of left @ right, `(rows, r)` and `(r, columns)`."""
    left, right = left.to(dtype), right.to(dtype)
    return lambda first, last: left[first:last] @ right


def left_times(left: torch.Tensor, delta: Weight, tools: Tools) -> torch.Tensor:
    """leftᵀ·Δ for a narrow `left` `(rows, r)`, float64: one pass over Δ, or none where it is of low rank."""
    import torch

    if delta.low_rank:
        b, a = factors(delta, tools.reader, tools.arena)
        return (left.T @ b) @ a
    matrix = TorchRows(delta, tools.reader, tools.arena, "delta", 0)
    narrow = left.to(matrix.dtype)
    total = torch.zeros(left.shape[1], matrix.columns, dtype=matrix.dtype, device=tools.arena.device)
    for rows, piece in matrix:
        total.addmm_(narrow[rows].T, piece)
    return total.double()


def factor_bytes(rank: int, shape: tuple[int, ...]) -> int:
    """Bytes of narrow matrices of this rank and their float64 originals, and of the streamed pieces."""
    columns = shape[-1]
    rows = math.prod(shape) // columns
    return 4 * 8 * rank * (rows + columns) + 2 * max(ROW_PIECE, columns) * (4 * 3 + 8)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, tools: Tools) -> Rows:
    """The rows of a matrix of zeros, such as an expert's that nothing was trained on."""
    import torch

    return lambda first, last: torch.zeros(last - first, shape[-1], dtype=dtype, device=tools.arena.device)


def triplets(name: str, delta: Weight, rank: int, tools: Tools) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular triplets of Δ: U `(rows, k)`, σ `(k,)`, Uᵀ·Δ = diag(σ)·Wᵀ `(k, columns)`; float64.

    From its factors, or its Gram matrix on the shorter side; k is `rank`, or fewer where Δ has a lower rank.
    """
    found = left_directions(name, delta, rank, tools.reader, tools.arena, tools.room, exact=True)
    return found.left, found.values, left_times(found.left, delta, tools)


def triplet_memory(rank: int, delta: Weight, shape: tuple[int, ...]) -> int:
    """Bytes that `triplets` of so many directions take at most."""
    rows, columns = math.prod(shape) // shape[-1], shape[-1]
    if delta.low_rank:
        return factor_bytes(ranks(delta), shape)
    side = min(rows, columns)
    return factor_bytes(rank, shape) + 8 * (4 * side * side + 2 * rows * side)


def ranks(*weights: Weight) -> int:
    """The sum of the ranks of all products in some sums."""
    return sum(operand.rank for weight in weights for _, operand in weight if hasattr(operand, "rank"))
