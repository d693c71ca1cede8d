"""The executor of a Ray cluster: a task is one weight file, computed in byte order and sealed where it is made.

The driver plans, sends tasks (paths, offsets, sums: some kilobytes each), journals, and holds no tensor. Workers read
the sources and write the output by the same paths, on a file system that all nodes mount. Bytes and offsets are
fixed, so a task whose worker was lost simply runs again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from safemerge_recipes._version import __version__
from safemerge_recipes.engine.executor import Sealed
from safemerge_recipes.engine.journal import Journal
from safemerge_recipes.engine.store import Store
from safemerge_recipes.engine.whole_file import write_files
from safemerge_recipes.errors import PlanError, SafemergeError, SourceError, WriteError
from safemerge_recipes.events import BytesDone, FileSealed, Listener, TensorDone
from safemerge_recipes.planning.graph import ENGINE, Graph
from safemerge_recipes.storage.identity import fingerprint
from safemerge_recipes.storage.workers import Resources
from safemerge_recipes.weights import compiled

RETRIES = 5
"""Times that a task runs again after its worker was lost."""
SPOKEN = 0.5
"""Seconds between two words of a worker about its progress, and between two looks of the driver."""


@dataclass(frozen=True, slots=True)
class Job:
    """One weight file to write: everything a worker is told.

    Attributes:
        shard: its number in the whole output.
        graph: its tasks, as a graph of their own.
        store: where it goes.
        resources: what the worker may use.
        done: its tensors that are there from an earlier run, with their digests.
        inputs: fingerprint of every file that is read.
        versions: what the worker must have installed.
    """

    shard: int
    graph: Graph
    store: Store
    resources: Resources
    done: Mapping[str, str | None]
    inputs: Mapping[str, tuple[int, str]]
    versions: tuple[str, ...]


class Board:
    """An actor that keeps how many bytes of each file are done, for the driver's progress bar."""

    def __init__(self) -> None:
        self.done: dict[int, int] = {}

    def tell(self, shard: int, nbytes: int) -> None:
        """A worker's word."""
        self.done[shard] = nbytes

    def read(self) -> dict[int, int]:
        """All words."""
        return self.done


def versions() -> tuple[str, ...]:
    """What decides about bytes: package, arithmetic, compiled kernels."""
    return __version__, f"arithmetic {ENGINE}", "compiled" if compiled.LIBRARY is not None else "not compiled"


def write(job: Job, board: Any) -> Sealed | SafemergeError:
    """What a worker does with a job. Errors for people are returned, as Ray would wrap them in its own."""
    try:
        _check(job)
        done, spoken = 0, time.monotonic()

        def tell(nbytes: int) -> None:
            nonlocal done, spoken
            done += nbytes
            if time.monotonic() - spoken > SPOKEN:
                spoken = time.monotonic()
                board.tell.remote(job.shard, done)

        return write_files(job.graph, job.store, job.resources, job.done, threading.Event(), tell)
    except SafemergeError as error:
        return error


def _check(job: Job) -> None:
    """Raises SafemergeError where the worker is no place for this job."""
    import socket

    here = socket.gethostname()
    if versions() != job.versions:
        raise PlanError(
            f"--executor ray: the worker on {here} has safemerge-recipes {', '.join(versions())}; expected "
            f"{', '.join(job.versions)} as on the driver, install the same on all nodes"
        )
    for path, expected in job.inputs.items():
        try:
            found = fingerprint(path)
        except OSError as error:
            raise SourceError(
                f"{path}: {error.strerror} on {here}; expected every source on a file system that all nodes mount "
                "at the same place"
            ) from None
        if found != expected:
            raise SourceError(f"{path}: another file on {here} than on the driver, or changed; expected one for all")


class OnRay:
    """The `Executor` of a Ray cluster.

    Args:
        address: `auto`, `HOST:PORT` or `ray://HOST:PORT`; None: the cluster that this process is part of, else one
            of its own on this machine.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address

    def run(
        self,
        graph: Graph,
        store: Store,
        resources: Resources,
        done: Mapping[str, str | None],
        journal: Journal,
        on_event: Listener,
    ) -> Sealed:
        """See `Executor`. Also raises PlanError when the cluster cannot be reached or has no worker."""
        store.open()  # room and permission show now
        store.close()
        for name in done:
            on_event(TensorDone(name, resumed=True))
        with _connected(self.address, resources) as ray:
            return _Run(ray, graph, store, resources, done, journal, on_event).finish()


@contextlib.contextmanager
def _connected(address: str | None, resources: Resources) -> Iterator[Any]:
    """Ray, connected. What was started here is ended here."""
    import ray

    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a merge reports nothing to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    own = {"num_cpus": resources.workers, "include_dashboard": False}
    started = own if address is None and "RAY_ADDRESS" not in os.environ else {}
    before = signal.getsignal(signal.SIGTERM)  # Ray's own would end the program without a word
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", configure_logging=False, **started)
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PlanError(
            f"--ray-address {address or 'local'}: the cluster cannot be reached: {first[:300]}; expected a running "
            "one, see `ray status`, or leave the option out"
        ) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    try:
        yield ray
    finally:
        ray.shutdown()


class _Run:
    """One graph on a connected cluster."""

    def __init__(
        self,
        ray: Any,
        graph: Graph,
        store: Store,
        resources: Resources,
        done: Mapping[str, str | None],
        journal: Journal,
        on_event: Listener,
    ) -> None:
        self.ray, self.graph, self.store, self.done = ray, graph, store, done
        self.resources = Resources(1, resources.share, "cuda:0" if resources.device != "cpu" else "cpu")
        self.journal, self.on_event = journal, on_event
        self.keys = {task.slot.name: task.key for task in graph.tasks}
        self.files: dict[str, str] = {}
        self.tensors: dict[str, str] = {}
        self.told: dict[int, int] = {}
        self.prints: dict[str, tuple[int, str]] = {}
        gpus = 0 if resources.device == "cpu" else 1
        self.remote = ray.remote(write).options(
            num_cpus=1, num_gpus=gpus, max_retries=RETRIES, scheduling_strategy="SPREAD"
        )
        self.board = ray.remote(Board).options(num_cpus=0).remote()

    def finish(self) -> Sealed:
        """Sends the files out and takes in what comes back."""
        open_ = deque(shard for shard, _ in self.graph.by_file())
        flying: dict[Any, int] = {}
        try:
            while open_ or flying:
                while open_ and len(flying) < 2 * self._slots():
                    shard = open_.popleft()
                    flying[self.remote.remote(self._job(shard), self.board)] = shard
                ready, _ = self.ray.wait(list(flying), timeout=SPOKEN)
                self._look()
                for ref in ready:
                    self._take(flying.pop(ref), self._result(ref))
        except BaseException:
            self._cancel(list(flying))
            raise
        self.store.commit()
        return Sealed(self.files, self.tensors)

    def _slots(self) -> int:
        """Tasks that the cluster can do at once, as it is now."""
        have = self.ray.cluster_resources()
        found = have.get("GPU" if self.resources.device != "cpu" else "CPU", 0)
        return max(1, int(found))  # a cluster that grows may have none yet

    def _job(self, shard: int) -> Job:
        graph = self.graph.alone(shard)
        paths = {ref.path for task in graph.tasks for ref in task.work.refs}
        for path in paths - self.prints.keys():
            self.prints[path] = fingerprint(path)
        there = {task.slot.name: self.done[task.slot.name] for task in graph.tasks if task.slot.name in self.done}
        inputs = {path: self.prints[path] for path in paths}
        return Job(shard, graph, self.store.alone(shard), self.resources, there, inputs, versions())

    def _result(self, ref: Any) -> Sealed:
        try:
            found = self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise WriteError(
                f"--executor ray: a task was lost ({type(error).__name__}: {lines[-1].strip()[:300]}); expected "
                f"safemerge-recipes {__version__} and enough memory on all nodes"
            ) from None
        if isinstance(found, SafemergeError):
            raise found
        assert isinstance(found, Sealed)
        return found

    def _take(self, shard: int, found: Sealed) -> None:
        """Journals what a worker finished."""
        for name, digest in found.tensors.items():
            self.tensors[name] = digest
            if name not in self.done:
                self.journal.done(name, self.keys[name], digest)
                self.on_event(TensorDone(name))
        for file, digest in found.files.items():
            self.files[file] = digest
            self.on_event(FileSealed(file, digest))
        layout = self.graph.layout
        self._tell(shard, layout.sizes[shard] - len(layout.headers[shard]))

    def _look(self) -> None:
        """Tells what the board says; progress is worth no failure."""
        with contextlib.suppress(self.ray.exceptions.RayError):
            for shard, nbytes in self.ray.get(self.board.read.remote(), timeout=SPOKEN).items():
                self._tell(shard, nbytes)

    def _tell(self, shard: int, nbytes: int) -> None:
        """A task that runs again tells nothing until it is where the lost one was."""
        before = self.told.get(shard, 0)
        if nbytes > before:
            self.told[shard] = nbytes
            self.on_event(BytesDone(nbytes - before))

    def _cancel(self, refs: list[Any]) -> None:
        """Ends what is under way and waits for it, so that nobody writes after this."""
        with contextlib.suppress(self.ray.exceptions.RayError, ConnectionError):
            for ref in refs:
                self.ray.cancel(ref, force=True)
            if refs:
                self.ray.wait(refs, num_returns=len(refs), timeout=10)


def on_ray(address: str | None = None) -> OnRay:
    """The executor. Raises PlanError where Ray is not installed."""
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise PlanError("--executor ray: Ray is not installed; install it with `pip install 'safemerge-recipes[ray]'`")
    return OnRay(address)
