"""How much memory a run will need of its own, before it starts. Pure arithmetic, in bytes.

"Own" is what comes on top of the idle footprint of Python and torch, and is not page cache. Measuring needs
its blocks, its probes and panels, and may hold a matrix between passes where the budget allows; a task needs
its blocks and factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from safemerge_recipes.errors import PlanError
from safemerge_recipes.gate.exact import panel_width
from safemerge_recipes.gate.null import NULL_PROBES, SMALL
from safemerge_recipes.gate.sketch import RANK
from safemerge_recipes.planning.graph import Graph, Task, task_memory
from safemerge_recipes.weights.algebra import Weight
from safemerge_recipes.weights.matrix import ROW_BLOCK, THIN_BLOCK
from safemerge_recipes.weights.spectrum import leading_memory

SLACK = 24_000_000
"""Bytes for the plan, headers, threads and allocator that no formula below counts."""

PRODUCTS = 16_000_000
"""Bytes a worker's matrix products keep: packed operands of the BLAS, and what the allocator does not give back."""


def human(nbytes: float) -> str:
    """Bytes for reading: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def room_of(task: Task, share: int) -> int:
    """Bytes that a task may hold between passes within a worker's share."""
    return max(0, share - task_memory(task))


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
    block = min(rows * columns, max(ROW_BLOCK if directions or wide or not low_rank else THIN_BLOCK, columns))
    factors = 3 * 8 * rank * (rows + columns)
    if v.low_rank and delta.low_rank:
        return factors
    blocks = 2 * block * (4 * 3 + 8) + PRODUCTS + v.memory(block) + delta.memory(block)
    panel = min(panel_width(max(rows, columns)), rows, columns)
    spectrum = 0
    if directions and not v.low_rank:
        spectrum = leading_memory(rows, columns, directions)
        if exact or min(rows, columns) <= SMALL:  # the Gram matrix, its eigenvectors and the solver's own
            spectrum += 4 * 8 * min(rows, columns) ** 2 + 8 * max(rows, columns) * panel
    panels = 3 * 4 * max(rows, columns) * panel
    if low_rank:
        products = 4 * (5 * columns + 3 * rows) * (rank + NULL_PROBES[null])
        return blocks + factors + max(products, spectrum, panels if wide else 0)
    sketch = 4 * RANK * (14 * columns + 12 * rows)
    return blocks + max(sketch, panels, spectrum)


def worst(items: Iterable[tuple[str, int]]) -> tuple[str, int]:
    """The name and size of the largest."""
    return max(items, key=lambda item: item[1], default=("", 0))


def fit_workers(needs: Iterable[tuple[str, int]], workers: int, memory: int) -> int:
    """The number of workers, at most `workers`, that fit the budget.

    Raises:
        PlanError: not even one fits; names the worst tensor.
    """
    name, need = worst(needs)
    free = memory - SLACK
    if need > free:
        raise PlanError(
            f"--max-memory {human(memory)}: {name} alone needs {human(need + SLACK)}; raise it to at least that"
        )
    return max(1, min(workers, free // need)) if need else workers


def projected_peak(graph: Graph, workers: int, measured: int = 0) -> int:
    """Bytes of its own that the run will need at most: the larger of measuring and writing."""
    sizes = [task_memory(task) for task in graph.tasks]
    return SLACK + max(workers * max(sizes, default=0), measured)
