"""A weight as pieces of rows of a matrix, for torch's products; as many passes as are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.weights.algebra import Weight
from safemerge_recipes.weights.torch_factors import working_dtype

if TYPE_CHECKING:
    import numpy as np
    import torch

ROW_PIECE = 1 << 20
"""Elements of a piece of rows of the streamed matrices ..."""
NARROW_PIECE = 1 << 18
"""... and where products have but a few columns: its float32 form is 1 MiB and stays in a core's cache."""


PANEL = 1 << 23
"""Elements of the panels into which d × d products are cut."""


def panel_width(longest: int) -> int:
    """Columns of the exact products held at once, for matrices with a side of that length."""
    return max(64, min(1024, PANEL // longest))


class TorchRows:
    """A weight as pieces of rows of a matrix `(rows, columns)`; kept in memory if it fits `room` bytes.

    `again`: what is kept lies in a buffer of the arena, which the next matrix of the slot takes over: half of the
    time of keeping is pages that are new. It stays with the worker, so `room` must be the same for all of its tensors.
    """

    def __init__(
        self,
        weight: Weight,
        reader: Reader,
        arena: Arena,
        slot: str,
        room: int = 0,
        piece: int = ROW_PIECE,
        again: bool = False,
    ) -> None:
        import torch

        from safemerge_recipes.weights.torch_rows import Evaluator  # only where a tensor is read: starts need not wait

        self.columns = weight.shape[-1]
        self.rows = math.prod(weight.shape) // self.columns
        self.dtype, self._device = working_dtype(weight), arena.device
        self._evaluate = Evaluator((weight,), reader, arena, slot, self.dtype)
        self._step = max(1, piece // self.columns)
        self._hold = self.rows * self.columns * self.dtype.itemsize <= room
        self._held: list[tuple[slice, torch.Tensor]] = []
        self._kept: torch.Tensor | None = None
        if again and self._hold:
            nbytes = self.rows * self.columns * self.dtype.itemsize
            self._kept = arena.take(f"{slot}:held", nbytes, torch.uint8).view(self.dtype).view(-1, self.columns)

    def lift(self, x: np.ndarray) -> torch.Tensor:
        """The array as it goes into products with the pieces."""
        import torch

        return torch.from_numpy(x).contiguous().to(self._device, self.dtype)

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, piece `(len(rows), columns)`); a piece is valid until the next one unless held."""
        if self._held:
            yield from self._held
            return
        held = []
        for first in range(0, self.rows, self._step):
            last = min(first + self._step, self.rows)
            (piece,) = self._evaluate(first * self.columns, last * self.columns)
            piece = piece.view(-1, self.columns)
            if self._hold:
                piece = piece.clone() if self._kept is None else self._kept[first:last].copy_(piece)
                held.append((slice(first, last), piece))
            yield slice(first, last), piece
        self._held = held

    def part(self, first: int, last: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows [first, last), a piece at a time, in memory of their own or at the beginning of `out`."""
        import torch

        if out is None:
            out = torch.empty(last - first, self.columns, dtype=self.dtype, device=self._device)
        out = out[: last - first]
        for at in range(first, last, self._step):
            end = min(at + self._step, last)
            out[at - first : end - first] = self._evaluate(at * self.columns, end * self.columns)[0].view(
                -1, self.columns
            )
        return out

    def panel(self, columns: slice) -> torch.Tensor:
        """All rows of some columns, `(rows, len(columns))`. Reads the whole matrix again unless it is held."""
        import torch

        return torch.cat([piece[:, columns].clone() for _, piece in self])


def square_sum(x: torch.Tensor) -> float:
    """‖x‖²: each row's norm in the tensor's dtype, total in float64."""
    import torch

    return float(torch.linalg.vector_norm(x, dim=-1).double().square().sum())


def inner_product(x: torch.Tensor, y: torch.Tensor) -> float:
    """⟨x, y⟩, summed like `square_sum`."""
    return float((x * y).sum(dim=-1).double().sum())
