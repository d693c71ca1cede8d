"""The executor of one of N workers without a scheduler of their own, such as the tasks of a Slurm array.

All workers go through the same recipe. Each measures its share of the gate's tensors, and whatever nobody else has
measured or is measuring; all read the numbers that were put down first, so that all make the same plan. Each then
writes the files of its share. Every worker may be killed, started twice, or started again.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from safemerge_recipes.engine.batches import MEASURED, batches
from safemerge_recipes.engine.executor import Done, Sealed
from safemerge_recipes.engine.journal import Notes
from safemerge_recipes.engine.leases import Leases
from safemerge_recipes.engine.receipts import forget_receipt, joined, read_receipts
from safemerge_recipes.engine.store import Store
from safemerge_recipes.engine.whole_file import write_files
from safemerge_recipes.errors import WriteError
from safemerge_recipes.events import BytesDone, FileSealed, Listener, TensorDone, ignore
from safemerge_recipes.planning.graph import Graph
from safemerge_recipes.planning.memory import writers
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.place import Place
from safemerge_recipes.storage.workers import Resources, check, run_parallel

if TYPE_CHECKING:
    from safemerge_recipes.gate.measurer import Asked, Measured
    from safemerge_recipes.gate.moments import Effort, Moments

LOOK = 1.0
"""Seconds between two looks at what others do."""
_EACH = 4
"""Batches that a worker's share of the measuring is cut into, unless they are larger than elsewhere."""


class Parts:
    """The `Executor` of worker `number` of `count`, counted from 1.

    Args:
        number: which.
        count: how many there are.
        place: where the workers of an output tell each other.
    """

    def __init__(self, number: int, count: int, place: Place) -> None:
        self.number, self.count, self.place = number, count, place
        self._leases = Leases(place)

    def _own_first(self, count: int) -> list[int]:
        """The numbers below `count`, those of this worker's share first."""
        return sorted(range(count), key=lambda n: (n - (self.number - 1)) % self.count)

    def measure(
        self,
        asked: Sequence[Asked],
        effort: Effort,
        rank: int,
        null: bool,
        resources: Resources,
        on_event: Listener,
    ) -> Measured:
        """See `Executor`: together with the other workers."""
        from safemerge_recipes.gate.measurer import Measured, measure_all

        total = sum(one.nbytes for one in asked)
        cut = list(batches(asked, max(1, min(MEASURED, total // (_EACH * self.count)))))
        left = [(f"moments/{_name(cut[n])}.json", cut[n]) for n in self._own_first(len(cut))]
        found: dict[str, Moments] = {}
        peak = 0
        while left:
            still = []
            for name, batch in left:
                content = self.place.read(name)
                if content is None and self._leases.is_free(name):
                    with self._leases.held(name):
                        made = measure_all(batch, effort, rank, null, resources, ignore)
                        content = self.place.offer(name, _text(made.moments))
                        peak = max(peak, made.peak)
                if content is None:
                    still.append((name, batch))
                    continue
                found.update(_moments(content, name, self.place))
                on_event(BytesDone(sum(one.nbytes for one in batch)))
            if still:
                time.sleep(LOOK)
            left = still
        return Measured(found, peak)

    def share(self, graph: Graph) -> list[int]:
        """The files that this worker writes."""
        return [shard for shard, _ in graph.by_file()][self.number - 1 :: self.count]

    def close(self) -> None:
        """Holds nothing."""

    def run(
        self,
        graph: Graph,
        store: Store,
        resources: Resources,
        done: Done,
        journal: Notes,
        on_event: Listener,
    ) -> Sealed:
        """See `Executor`: writes the files of its share, and says what all workers have written so far."""
        stop = threading.Event()
        workers, own = writers(graph, store.held, resources)
        keys = {task.slot.name: task.key for task in graph.tasks}
        turn = threading.Lock()

        def work(shard: int, arena: Arena) -> None:
            file = graph.layout.files[shard]
            while True:
                receipt = read_receipts(self.place, graph.alone(shard), store.alone(shard).list()).get(0)
                if receipt is not None:
                    on_event(BytesDone(graph.layout.sizes[shard]))
                    return _tell(receipt.tensors, file, receipt.sha256, on_event, resumed=True)
                if self._leases.is_free(file):
                    break
                check(stop)
                time.sleep(LOOK)
            with self._leases.held(file):
                forget_receipt(self.place, file)
                sealed = write_files(
                    graph.alone(shard), store.alone(shard), own, {}, stop,
                    lambda nbytes: on_event(BytesDone(nbytes)),
                )  # fmt: skip
                check(stop)
                with turn:
                    for name, digest in sealed.tensors.items():
                        journal.done(name, keys[name], digest)
                    journal.sealed(file, sealed.files[file])
            _tell(sealed.tensors, file, sealed.files[file], on_event)

        light = not any(task.needs_torch for task in graph.tasks)
        run_parallel(self.share(graph), work, workers, resources.device, stop, light=light)
        return joined(read_receipts(self.place, graph, store.list()), graph)


def _tell(names: Mapping[str, object], file: str, sha256: str, on_event: Callable[..., None], **how: bool) -> None:
    for name in names:
        on_event(TensorDone(name, **how))
    on_event(FileSealed(file, sha256))


def _name(batch: Sequence[Asked]) -> str:
    return hashlib.sha256("|".join(one.key for one in batch).encode()).hexdigest()[:32]


def _text(moments: Mapping[str, Moments]) -> bytes:
    return json.dumps({name: asdict(one) for name, one in moments.items()}).encode()


def _moments(content: bytes, name: str, place: Place) -> dict[str, Moments]:
    from safemerge_recipes.gate.moments import Moments

    try:
        return {tensor: Moments(**values) for tensor, values in json.loads(content).items()}
    except (ValueError, TypeError, AttributeError):
        raise WriteError(
            f"{place.name}/{name}: not what a worker of this version writes; remove it and run the part again"
        ) from None
