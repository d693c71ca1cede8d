"""How many bytes of its own measuring a tensor needs, from shapes and ranks alone, before anything is read."""

from __future__ import annotations

import math

from safemerge_recipes.gate.null import NULL_PROBES
from safemerge_recipes.gate.sketch import RANK
from safemerge_recipes.weights.algebra import Weight
from safemerge_recipes.weights.matrix import NARROW_PIECE, ROW_PIECE, panel_width
from safemerge_recipes.weights.spectrum import SMALL, leading_memory

PRODUCTS = 16_000_000
"""Bytes a worker's matrix products keep: packed operands of the BLAS, and what the allocator does not give back."""


def measure_memory(v: Weight, delta: Weight, directions: int = 0, exact: bool = False, null: bool = False) -> int:
    """Bytes that measuring one tensor needs, without what may be held between passes.

    `directions`: how many leading singular directions of V are found besides; `exact`: from its Gram matrix;
    `null`: whether ρ₀ is measured with the same care.
    """
    rank = sum(op.rank for _, op in (*v, *delta) if hasattr(op, "rank"))
    shape = v.shape if v.terms else delta.shape if delta.terms else (1, 1)
    columns = shape[-1]
    rows = math.prod(shape) // max(1, columns)
    low_rank = v.low_rank or delta.low_rank
    wide = exact and (null or not low_rank)  # d × d products
    piece = min(rows * columns, max(ROW_PIECE if directions or wide or not low_rank else NARROW_PIECE, columns))
    factors = 3 * 8 * rank * (rows + columns)
    if v.low_rank and delta.low_rank:
        return factors
    pieces = 2 * piece * (4 * 3 + 8) + PRODUCTS + v.memory(piece) + delta.memory(piece)
    panel = min(panel_width(max(rows, columns)), rows, columns)
    spectrum = 0
    if directions and not v.low_rank:
        spectrum = leading_memory(rows, columns, directions)
        if exact or min(rows, columns) <= SMALL:  # the Gram matrix, its eigenvectors and the solver's own
            spectrum += 4 * 8 * min(rows, columns) ** 2 + 8 * max(rows, columns) * panel
    panels = 3 * 4 * max(rows, columns) * panel
    if low_rank:
        products = 4 * (5 * columns + 3 * rows) * (rank + NULL_PROBES[null])
        return pieces + factors + max(products, spectrum, panels if wide else 0)
    sketch = 4 * RANK * (14 * columns + 12 * rows)
    return pieces + max(sketch, panels, spectrum)
