"""Tensors to measure in batches of some gigabytes of operands: what one task on another machine takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safemerge_recipes.gate.measurer import Asked

MEASURED = 1_000_000_000
"""Bytes of operands that one task measures, unless a tensor has more."""


def batches(asked: Sequence[Asked], most: int = MEASURED) -> Iterator[tuple[Asked, ...]]:
    """Tensors in their order, at most so many bytes of operands together, or one tensor."""
    batch: list[Asked] = []
    held = 0
    for one in asked:
        if batch and held + one.nbytes > most:
            yield tuple(batch)
            batch, held = [], 0
        batch.append(one)
        held += one.nbytes
    if batch:
        yield tuple(batch)
