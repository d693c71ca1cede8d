"""A connection to a Ray cluster that does jobs, a bounded number in flight, lost ones again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from safemerge_recipes._version import __version__
from safemerge_recipes.engine.executors.ray_tasks import SPOKEN
from safemerge_recipes.errors import PlanError, SafemergeError, WriteError
from safemerge_recipes.storage.workers import Resources

Key = TypeVar("Key")

RETRIES = 5
"""Times that a task runs again after its worker was lost."""
REACHED = 10.0
"""Seconds within which a cluster's head must take a connection."""


@contextlib.contextmanager
def connected(address: str | None, resources: Resources) -> Iterator[Any]:
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
        _reach(address)
        ray.init(address, log_to_driver=False, logging_level="ERROR", configure_logging=False, **started)
    except (ConnectionError, RuntimeError, ValueError, OverflowError, OSError, TimeoutError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PlanError(
            f"--ray-address {address or 'local'}: the cluster cannot be reached: {first[:300]}; expected a running "
            "one, see `ray status`, or leave the option out"
        ) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    try:
        with _quiet():
            yield ray
    finally:
        ray.shutdown()


def _reach(address: str | None) -> None:
    """Raises OSError where nobody listens: for a head that is gone Ray itself waits for minutes."""
    given = address
    if address == "auto" or (address is None and os.environ.get("RAY_ADDRESS")):
        with contextlib.suppress(ImportError, AttributeError):  # another version keeps it elsewhere
            from ray._private.services import get_ray_address_from_environment

            given = get_ray_address_from_environment("auto", None)
    host, _, port = (given or "").removeprefix("ray://").rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), REACHED).close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Ray from printing to standard output, where programs read, that a node was lost: its tasks run again."""
    try:
        from ray._private import worker

        before = worker.print_to_stdstream
    except (ImportError, AttributeError):  # another version prints elsewhere
        yield
        return
    worker.print_to_stdstream = lambda *told, **how: None
    try:
        yield
    finally:
        worker.print_to_stdstream = before


@dataclass(frozen=True, slots=True)
class Cluster:
    """A connected cluster, which does jobs with a bounded number in flight."""

    ray: Any
    gpu: bool

    def slots(self) -> int:
        """Jobs that it can do at once, as it is now: one that grows may have no node yet."""
        return max(1, int(self.ray.cluster_resources().get("GPU" if self.gpu else "CPU", 0)))

    def widest(self) -> int:
        """CPUs of its largest node, at least one."""
        return max([1, *(int(node["Resources"].get("CPU", 0)) for node in self.ray.nodes() if node["Alive"])])

    def do(
        self,
        function: Callable[..., Any],
        jobs: Iterator[tuple[Key, tuple[Any, ...]]],
        take: Callable[[Key, Any], None],
        look: Callable[[], None] = lambda: None,
        cpus: int = 1,
    ) -> None:
        """Does `function(*arguments)` of every (key, arguments), lost workers' jobs again; takes results as they come.

        A job has `cpus` CPUs to itself, or a node where none has as many: fewer run at a time, each with more memory.

        Raises:
            SafemergeError: one that a job returned; the others are ended first, as on Ctrl-C.
            WriteError: a job was lost again and again.
        """
        remote = self.ray.remote(function).options(
            num_cpus=min(cpus, self.widest()), num_gpus=int(self.gpu), max_retries=RETRIES, scheduling_strategy="SPREAD"
        )
        flying: dict[Any, Key] = {}
        more = True
        try:
            while more or flying:
                while more and len(flying) < 2 * self.slots():
                    job = next(jobs, None)
                    if job is None:
                        more = False
                    else:
                        flying[remote.remote(*job[1])] = job[0]
                if flying:
                    ready, _ = self.ray.wait(list(flying), timeout=SPOKEN)
                    look()
                    for ref in ready:
                        take(flying.pop(ref), self._result(ref))
        except BaseException:
            self._cancel(list(flying))
            raise

    def one(self, function: Callable[..., Any], job: Any, over: threading.Event) -> Any:
        """The result of one job on one core, None when `over` is set before. Raises as `do`."""
        options = self.ray.remote(function).options(num_cpus=1, max_retries=RETRIES, scheduling_strategy="SPREAD")
        ref = options.remote(job)
        while not self.ray.wait([ref], timeout=SPOKEN)[0]:
            if over.is_set():
                self._cancel([ref])
                return None
        return self._result(ref)

    def _result(self, ref: Any) -> Any:
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
        return found

    def _cancel(self, refs: list[Any]) -> None:
        """Ends what is under way and waits for it, so that nobody writes after this."""
        with contextlib.suppress(self.ray.exceptions.RayError, ConnectionError):
            for ref in refs:
                self.ray.cancel(ref, force=True)
            if refs:
                self.ray.wait(refs, num_returns=len(refs), timeout=10)
