"""How much memory a run will need of its own, before it starts. Pure arithmetic, in bytes.

"Own" is what comes on top of the idle footprint of Python and torch, and is not page cache. A task needs its
pieces and factors, and may hold a matrix between passes where the budget allows.
"""

from __future__ import annotations

from dataclasses import replace

from safemerge_recipes.planning.graph import Graph, Task, task_memory
from safemerge_recipes.storage.workers import SLACK, Resources, fit_workers, worst


def room_of(task: Task, share: int) -> int:
    """Bytes that a task may hold between passes within a worker's share."""
    return max(0, share - task_memory(task))


def writers(graph: Graph, held: int, resources: Resources) -> tuple[int, Resources]:
    """How many workers may each write a file of which `held` bytes wait to be sent, and what one may use besides.

    Raises:
        PlanError: not even one may.
    """
    if held:
        name, need = worst((task.slot.name, task_memory(task)) for task in graph.tasks)
        workers = fit_workers([(name, need + held)], resources.workers, resources.memory)
        resources = replace(resources, workers=workers)
    return resources.workers, Resources(1, resources.share - held, resources.device)


def projected_peak(largest: int, workers: int, measured: int = 0) -> int:
    """Bytes of its own that the run will need at most: the larger of writing, by its `largest` task, and measuring."""
    return SLACK + max(workers * largest, measured)
