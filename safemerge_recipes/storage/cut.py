"""How a tensor is cut into blocks: by its shape alone, never by the memory limit or the number of workers.

So results do not depend on those either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

BLOCK = 1 << 18
"""Elements of a block: its float32 form is 1 MiB and stays in a core's cache."""


def ranges(shape: tuple[int, ...], whole_rows: bool) -> Iterator[tuple[int, int]]:
    """(start, stop) element ranges that cover a tensor; at row boundaries where a matrix product needs them."""
    total = math.prod(shape)
    columns = shape[-1] if shape else 1
    step = BLOCK // columns * columns if 0 < columns <= BLOCK else columns if whole_rows else BLOCK
    for start in range(0, total, step or 1):
        yield start, min(start + step, total)


def largest(shape: tuple[int, ...]) -> int:
    """Elements of the largest block of a tensor of this shape, at most."""
    return min(math.prod(shape), max(BLOCK, shape[-1] if shape else 1))
