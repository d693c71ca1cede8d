"""The executor of a Ray cluster: a task is one weight file, some tensors to measure, or one source to hash.

The driver plans, sends tasks (paths, offsets, sums: some kilobytes each), journals, and holds no tensor. Workers read
the sources and write the output by the same paths, on a file system that all nodes mount. Bytes and offsets are
fixed, so a task whose worker was lost simply runs again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from safemerge_recipes.engine.batches import batches
from safemerge_recipes.engine.executor import Done, Sealed
from safemerge_recipes.engine.journal import Notes
from safemerge_recipes.engine.store import Store
from safemerge_recipes.errors import PlanError, SourceError
from safemerge_recipes.events import BytesDone, FileSealed, Listener, TensorDone
from safemerge_recipes.planning.graph import Graph
from safemerge_recipes.planning.memory import writers
from safemerge_recipes.storage.digests import Digests, InputDigest, known_digest, remember_digest
from safemerge_recipes.storage.identity import FileIdentity, check_unchanged, fingerprint
from safemerge_recipes.storage.workers import Resources

if TYPE_CHECKING:
    from safemerge_recipes.gate.measurer import Asked, Measured
    from safemerge_recipes.gate.moments import Effort, Moments

from safemerge_recipes.engine.executors.ray_cluster import Cluster, connected
from safemerge_recipes.engine.executors.ray_tasks import (
    SPOKEN,
    Board,
    HashJob,
    MeasureJob,
    WriteJob,
    measure,
    sha256,
    versions,
    write,
)

MOST_HASHED = 64
"""Sources that are hashed at a time."""


class OnRay:
    """The `Executor` of a Ray cluster, connected when it is first used.

    Args:
        address: `auto`, `HOST:PORT` or `ray://HOST:PORT`; None: the cluster that this process is part of, else one
            of its own on this machine.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address
        self._held = contextlib.ExitStack()
        self._ray: Any = None

    def _cluster(self, resources: Resources) -> Cluster:
        if self._ray is None:
            self._ray = self._held.enter_context(connected(self.address, resources))
        return Cluster(self._ray, resources.device != "cpu")

    def close(self) -> None:
        """See `Executor`: ends a cluster of its own."""
        self._ray = None
        self._held.close()

    def digests(self, identities: Sequence[FileIdentity], resources: Resources) -> Digests:
        """Hashes the sources on the cluster: a task is one file. Raises PlanError when it cannot be reached."""
        if all(known_digest(one) is not None for one in identities):
            return Digests(identities)
        return Hashing(self._cluster(resources), identities)

    def measure(
        self, asked: Sequence[Asked], effort: Effort, rank: int, null: bool, resources: Resources, on_event: Listener
    ) -> Measured:
        """See `Executor`: a task is about 1 GB of operands."""
        from safemerge_recipes.gate.measurer import Measured

        cluster, prints = self._cluster(resources), Prints()
        own = _own(resources)
        moments: dict[str, Moments] = {}
        peaks = [0]

        def take(batch: tuple[Asked, ...], found: Measured) -> None:
            moments.update(found.moments)
            peaks.append(found.peak)
            on_event(BytesDone(sum(one.nbytes for one in batch)))

        def jobs() -> Iterator[tuple[tuple[Asked, ...], tuple[Any, ...]]]:
            for batch in batches(asked):
                refs = {ref.path for one in batch for _, pair in one.matrices for weight in pair for ref in weight.refs}
                yield batch, (MeasureJob(batch, effort, rank, null, own, prints.of(refs), versions()),)

        cluster.do(measure, jobs(), take)
        return Measured(moments, max(peaks))

    def run(
        self, graph: Graph, store: Store, resources: Resources, done: Done, journal: Notes, on_event: Listener
    ) -> Sealed:
        """See `Executor`. Also raises PlanError when the cluster cannot be reached."""
        workers, fitting = writers(graph, store.held, resources)
        own, cpus = _own(fitting), ceil(resources.workers / workers)
        store.open()  # room and permission show now
        store.close()
        for name in done:
            on_event(TensorDone(name, resumed=True))
        cluster, prints = self._cluster(resources), Prints()
        keys = {task.slot.name: task.key for task in graph.tasks}
        files: dict[str, str] = {}
        tensors: dict[str, str] = {}
        told: dict[int, int] = {}
        board = cluster.ray.remote(Board).options(num_cpus=0).remote()

        def tell(shard: int, nbytes: int) -> None:
            """A task that runs again tells nothing until it is where the lost one was."""
            before = told.get(shard, 0)
            if nbytes > before:
                told[shard] = nbytes
                on_event(BytesDone(nbytes - before))

        def look() -> None:
            """Progress is worth no failure."""
            with contextlib.suppress(cluster.ray.exceptions.RayError):
                for shard, nbytes in cluster.ray.get(board.read.remote(), timeout=SPOKEN).items():
                    tell(shard, nbytes)

        def jobs() -> Iterator[tuple[int, tuple[Any, ...]]]:
            for shard, _ in graph.by_file():
                one = graph.alone(shard)
                there = {name: done[name] for name in one.layout.slots if name in done}
                paths = {ref.path for task in one.tasks for ref in task.work.refs}
                job = WriteJob(shard, one, store.alone(shard), own, there, prints.of(paths), versions())
                yield shard, (job, board)

        def take(shard: int, found: Sealed) -> None:
            for name, digest in found.tensors.items():
                tensors[name] = digest
                if name not in done:
                    journal.done(name, keys[name], digest)
                    on_event(TensorDone(name))
            for file, digest in found.files.items():
                files[file] = digest
                journal.sealed(file, digest)
                on_event(FileSealed(file, digest))
            tell(shard, graph.layout.sizes[shard] - len(graph.layout.headers[shard]))

        cluster.do(write, jobs(), take, look, cpus)
        store.commit()
        return Sealed(files, tensors)


class Hashing(Digests):
    """Digests that workers of a cluster find; a thread here waits for each that is under way."""

    def __init__(self, cluster: Cluster, identities: Sequence[FileIdentity]) -> None:
        self._cluster = cluster
        super().__init__(identities, threads=min(cluster.slots(), MOST_HASHED))

    def _digest(self, identity: FileIdentity) -> InputDigest | None:
        known = known_digest(identity)
        if known is not None:
            return known
        job = HashJob(identity.path, Prints().of([identity.path]), versions())
        found = self._cluster.one(sha256, job, self.cancelled)
        if found is None:
            return None
        check_unchanged([identity])
        remember_digest(identity, found)
        return InputDigest(found, "now")

    def close(self) -> None:
        """Ends what is under way, before the cluster is let go of."""
        super().close()
        for thread in self._threads:
            thread.join()


def _own(resources: Resources) -> Resources:
    """What one task may use: Ray shows a worker no device but its own."""
    return Resources(1, resources.share, "cpu" if resources.device == "cpu" else "cuda:0")


class Prints:
    """Fingerprints of files, each found once."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def of(self, paths: Iterable[str]) -> dict[str, tuple[int, str]]:
        """path -> fingerprint. Raises SourceError for a file that is gone."""
        found = {}
        for path in sorted(paths):
            if path not in self._found:
                try:
                    self._found[path] = fingerprint(path)
                except OSError as error:
                    raise SourceError(f"{path}: {error.strerror}; it was there when planned") from None
            found[path] = self._found[path]
        return found


def on_ray(address: str | None = None) -> OnRay:
    """The executor. Raises PlanError where Ray is not installed."""
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise PlanError("--executor ray: Ray is not installed; install it with `pip install 'safemerge-recipes[ray]'`")
    return OnRay(address)
