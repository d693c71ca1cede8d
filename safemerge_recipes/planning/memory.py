"""How much memory a run will need of its own, before it starts. Pure arithmetic, in bytes.

"Own" is what comes on top of the idle footprint of Python and torch, and is not page cache. A task needs its
pieces and factors, and may hold a matrix between passes where the budget allows.
"""

from __future__ import annotations

from safemerge_recipes.planning.graph import Task, task_memory
from safemerge_recipes.storage.workers import SLACK


def room_of(task: Task, share: int) -> int:
    """Bytes that a task may hold between passes within a worker's share."""
    return max(0, share - task_memory(task))


def projected_peak(largest: int, workers: int, measured: int = 0) -> int:
    """Bytes of its own that the run will need at most: the larger of writing, by its `largest` task, and measuring."""
    return SLACK + max(workers * largest, measured)
