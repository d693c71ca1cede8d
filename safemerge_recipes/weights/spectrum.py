"""The leading singular directions of a matrix that is only ever seen in pieces of rows.

Block power iteration on the right side (Halko, Martinsson, Tropp 2011, arXiv 0909.4061): one pass over the
pieces multiplies a thin orthonormal basis by VᵀV, a Rayleigh-Ritz step turns the basis towards the singular
vectors, and the residual of the same pass bounds the angle to the true subspace (Davis and Kahan). Iteration
stops at a stated tolerance. Seeded by the tensor's name, so every run finds the same directions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

OVERSAMPLING = 8
"""Directions carried along beyond twice those asked for: where the spectrum decays slowly, as V's does, twice the
width halves the passes."""
PASSES = 12
"""Most passes over the matrix before the last one."""
TOLERANCE = 1e-4
"""Iteration stops when the sine of the largest angle to the true subspace is bounded by this ..."""
SETTLED = 1e-7
"""... or when a pass raised the energy that the directions hold by no more than this part of it."""
NEGLIGIBLE = 1e-6
"""Singular values below this part of the largest are rounding: float32 products cannot tell them from zero."""


SMALL = 256
"""Matrices with a side up to this are always decomposed, and their ρ₀ found, exactly: sketching would cost as much."""


class RowPieces(Protocol):
    """A matrix `(rows, columns)` as pieces of rows; every iteration is a fresh pass."""

    rows: int
    columns: int
    dtype: torch.dtype

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]: ...


@dataclass(frozen=True, slots=True)
class Leading:
    """Leading singular directions.

    Attributes:
        left: orthonormal columns `(rows, k)`, float64; fewer than asked for where the matrix has a lower rank.
        values: their singular values `(k,)`, largest first, float64.
        error: bound on the sine of the largest angle between these directions and the true ones, up to 1.
    """

    left: torch.Tensor
    values: torch.Tensor
    error: float


def normal(name: str, rows: int, columns: int) -> np.ndarray:
    """Standard normal numbers `(rows, columns)`, float32, the same for the same name everywhere."""
    import numpy as np

    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.SFC64(seed)).standard_normal((rows, columns), dtype=np.float32)


def normal_probes(name: str, columns: int, count: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Standard normal probes `(columns, count)`, the same for the same tensor name everywhere."""
    import torch

    return torch.from_numpy(normal(name, columns, count)).to(device=device, dtype=dtype)


def leading_memory(rows: int, columns: int, k: int) -> int:
    """Bytes that `leading` needs at most besides the pieces: a dozen thin float64 matrices."""
    return 8 * (2 * k + OVERSAMPLING) * (6 * columns + 6 * rows)


def leading(matrix: RowPieces, k: int, name: str, device: str) -> Leading:
    """The k leading left singular directions of a streamed matrix.

    Args:
        matrix: its pieces of rows; read once a pass, at most `PASSES` + 1 times.
        k: how many directions.
        name: seeds the start.
        device: where the thin matrices live.
    """
    import torch

    width = min(2 * k + OVERSAMPLING, matrix.rows, matrix.columns)
    k = min(k, width)
    whole = width == min(matrix.rows, matrix.columns)
    basis = torch.linalg.qr(torch.from_numpy(normal(name, matrix.columns, width)).double()).Q.to(device)
    before = 0.0
    for number in range(PASSES):
        thin = basis.to(matrix.dtype)
        image = torch.zeros(matrix.columns, width, dtype=matrix.dtype, device=device)
        for _, piece in matrix:
            image.addmm_(piece.T, piece @ thin)
        wide = image.double()
        values, turn = torch.linalg.eigh(basis.T @ wide)
        values, turn = values.flip(0).clamp(min=0), turn.flip(1)
        ritz, away = basis @ turn, wide @ turn
        away -= ritz * values
        energy = float(values[:k].sum())
        settled = number > 0 and abs(energy - before) <= SETTLED * energy
        if _sine(values, k, away, whole) <= TOLERANCE or settled or (whole and number):
            break
        before = energy
        basis = torch.linalg.qr(wide).Q
    both = torch.cat([ritz[:, :k], away[:, :k]], dim=1).to(matrix.dtype)
    image = torch.empty(matrix.rows, 2 * k, dtype=matrix.dtype, device=device)
    for rows, piece in matrix:
        image[rows] = piece @ both
    left, sizes, _ = torch.linalg.svd(image[:, :k].double(), full_matrices=False)
    real = sizes > NEGLIGIBLE * sizes[:1]
    rest = image[:, k:].double()[:, real] / sizes[real]
    return Leading(left[:, real], sizes[real], _sine(values, int(real.sum()), rest, whole))


def _sine(values: torch.Tensor, k: int, away: torch.Tensor, whole: bool) -> float:
    """Davis-Kahan: ‖residual‖ / gap between the k-th and the next squared singular value; twice, as both are found."""
    if k == 0 or (whole and k == len(values)):
        return 0.0
    gap = float(values[k - 1] - (values[k] if k < len(values) else 0.0))
    return min(1.0, 2 * float(away[:, :k].norm()) / gap) if gap > 0 else 1.0


def leading_of_gram(gram: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """From a float64 Gram matrix `(n, n)`: its k leading eigenvectors `(n, k)`, and the singular values `(k,)`.

    Those of negligible size are left out.
    """
    import torch

    squares, vectors = torch.linalg.eigh(gram)
    squares, vectors = squares[-k:].flip(0), vectors[:, -k:].flip(1)
    real = squares > NEGLIGIBLE**2 * squares[:1]
    return vectors[:, real], squares[real].sqrt()
