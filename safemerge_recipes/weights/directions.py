"""The leading left singular directions of V, and how much of an update lies in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.weights.algebra import Weight
from safemerge_recipes.weights.matrix import TorchRows, panel_width, square_sum
from safemerge_recipes.weights.spectrum import NEGLIGIBLE, SMALL, Leading, leading, leading_of_gram
from safemerge_recipes.weights.torch_factors import joined_factors

if TYPE_CHECKING:
    import torch


def factors(weight: Weight, reader: Reader, arena: Arena) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, A) of a purely low-rank weight, coefficients and scales folded into A."""
    import torch

    pair = joined_factors(weight, reader, torch.float64, arena.device)
    assert pair is not None  # callers have asked weight.low_rank
    return pair


def left_directions(
    name: str, v: Weight, rank: int, reader: Reader, arena: Arena, room: int, exact: bool = False
) -> Leading:
    """The leading left singular directions of V: exact from its factors or its Gram matrix, else by iteration."""
    import torch

    if v.low_rank:
        b, a = factors(v, reader, arena)
        q, r = torch.linalg.qr(b)
        left, values, _ = torch.linalg.svd(r @ torch.linalg.qr(a.T).R.T, full_matrices=False)
        real = values[:rank] > NEGLIGIBLE * values[:1]
        return Leading((q @ left[:, :rank])[:, real], values[:rank][real], 0.0)
    matrix = TorchRows(v, reader, arena, "v", room)
    if not exact and min(matrix.rows, matrix.columns) > SMALL:
        return leading(matrix, rank, name, arena.device)
    side = min(matrix.rows, matrix.columns)
    gram = torch.zeros(side, side, dtype=torch.float64, device=arena.device)
    if matrix.columns <= matrix.rows:
        for _, piece in matrix:
            wide = piece.double()
            gram.addmm_(wide.T, wide)
        right, values = leading_of_gram(gram, rank)
        left = torch.cat([piece.double() @ right for _, piece in matrix])
        left /= left.norm(dim=0)
    else:
        step = panel_width(matrix.columns)
        for first in range(0, matrix.columns, step):
            panel = matrix.panel(slice(first, min(first + step, matrix.columns))).double()
            gram.addmm_(panel, panel.T)
        left, values = leading_of_gram(gram, rank)
    return Leading(left, values, 0.0)


def energy_inside(
    name: str, v: Weight, delta: Weight, rank: int, reader: Reader, arena: Arena, room: int, exact: bool
) -> tuple[float, float]:
    """‖U_kᵀΔ‖² for the `rank` leading left singular directions of V, and the half-width of its interval."""
    import torch

    found = left_directions(name, v, rank, reader, arena, room, exact)
    if delta.low_rank:
        b, a = factors(delta, reader, arena)
        inside, total = found.left.T @ b, float((b.T @ b * (a @ a.T)).sum())
        energy = float((inside.T @ inside * (a @ a.T)).sum())
    else:
        matrix = TorchRows(delta, reader, arena, "delta", 0)
        narrow = found.left.to(matrix.dtype)
        product = torch.zeros(narrow.shape[1], matrix.columns, dtype=matrix.dtype, device=arena.device)
        total = 0.0
        for rows, piece in matrix:
            product.addmm_(narrow[rows].T, piece)
            total += square_sum(piece)
        energy = square_sum(product)
    return energy, found.error * total  # |‖PΔ‖² − ‖P̃Δ‖²| ≤ ‖P − P̃‖·‖Δ‖², the sine of the largest angle
