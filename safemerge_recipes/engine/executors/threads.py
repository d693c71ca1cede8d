"""The local executor: worker threads of this process, each on a tensor of its own; a seal follows behind them.

Each task reads by offset, computes piece by piece, and writes at its final offset. Memory is a few pieces a worker,
plus what a method may hold between passes within the budget.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from safemerge_recipes.engine.executor import Done, Sealed
from safemerge_recipes.engine.journal import Notes
from safemerge_recipes.engine.produce import produce
from safemerge_recipes.engine.seal import Sealer
from safemerge_recipes.engine.store import Store
from safemerge_recipes.errors import RecipeError, WriteError
from safemerge_recipes.events import BytesDone, Listener, TensorDone
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.planning.graph import Graph, Task
from safemerge_recipes.planning.memory import room_of
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.workers import Resources, StoppedError, check, run_parallel

if TYPE_CHECKING:
    from safemerge_recipes.gate.measurer import Asked, Measured
    from safemerge_recipes.gate.moments import Effort


class Threads:
    """The `Executor` of one machine."""

    def measure(
        self, asked: Sequence[Asked], effort: Effort, rank: int, null: bool, resources: Resources, on_event: Listener
    ) -> Measured:
        """See `Executor`."""
        from safemerge_recipes.gate.measurer import measure_all

        return measure_all(asked, effort, rank, null, resources, on_event)

    def close(self) -> None:
        """Holds nothing."""

    def run(
        self, graph: Graph, store: Store, resources: Resources, done: Done, journal: Notes, on_event: Listener
    ) -> Sealed:
        """See `Executor`."""
        stop = threading.Event()
        open_ = [task for task in graph.tasks if task.slot.name not in done]
        store.open()
        sealer = Sealer(store, graph, stop, on_event, resources.workers)
        for name, digest in done.items():
            sealer.finished(name, digest)
            on_event(BytesDone(graph.layout.slots[name].nbytes))
            on_event(TensorDone(name, resumed=True))
        with contextlib.suppress(RuntimeError):  # no more threads: `result` does it
            sealer.start()
        with Reader(resources.workers) as reader:

            def work(task: Task, arena: Arena) -> None:
                tools = Tools(reader, arena, room_of(task, resources.share))
                digest = _written(task, tools, store, stop, graph.allow_overflow, on_event)
                journal.done(task.slot.name, task.key, digest)
                sealer.finished(task.slot.name, digest)
                on_event(TensorDone(task.slot.name))

            try:
                light = not any(task.needs_torch for task in open_)
                with contextlib.suppress(StoppedError):  # by the seal, which says why
                    run_parallel(open_, work, resources.workers, resources.device, stop, light=light)
                sealed = sealer.result()
                store.commit()
            except OSError as error:
                raise WriteError(
                    f"{store.place}: {error.strerror} while writing; mend it and run the same command"
                ) from None
            finally:
                stop.set()
                sealer.join()
                store.close()
        return sealed


LOCAL = Threads()
"""What runs where nothing else is asked for."""


def local(address: str | None = None) -> Threads:
    """The local executor. Raises RecipeError for an address."""
    if address is not None:
        raise RecipeError("--ray-address: expected only with --executor ray")
    return LOCAL


def _written(
    task: Task, tools: Tools, store: Store, stop: threading.Event, allow_overflow: bool, on_event: Listener
) -> str | None:
    """Writes one tensor; returns the xxh3 of its bytes, None for a copy, whose bytes nobody saw."""
    import xxhash

    slot = task.slot
    if task.work.copied is not None:
        for done in store.copy(slot.shard, slot.offset, task.work.copied, tools.reader):
            on_event(BytesDone(done))
            check(stop)
        return None
    at, digest = slot.offset, xxhash.xxh3_128()
    for piece in produce(task, tools, stop, allow_overflow=allow_overflow):
        store.write(slot.shard, at, piece)
        digest.update(piece)
        at += len(piece)
        on_event(BytesDone(len(piece)))
        check(stop)
    return digest.hexdigest()
