"""How a tensor is cut into pieces: by its shape alone, never by the memory limit or the number of workers.

So results do not depend on those either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

PIECE = 1 << 18
"""Elements of a piece: its float32 form is 1 MiB and stays in a core's cache."""


def ranges(shape: tuple[int, ...], whole_rows: bool) -> Iterator[tuple[int, int]]:
    """(start, stop) element ranges that cover a tensor; at row boundaries where a matrix product needs them."""
    total = math.prod(shape)
    columns = shape[-1] if shape else 1
    step = PIECE // columns * columns if 0 < columns <= PIECE else columns if whole_rows else PIECE
    for start in range(0, total, step or 1):
        yield start, min(start + step, total)


def largest(shape: tuple[int, ...]) -> int:
    """Elements of the largest piece of a tensor of this shape, at most."""
    return min(math.prod(shape), max(PIECE, shape[-1] if shape else 1))
