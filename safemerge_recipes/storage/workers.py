"""A few threads over a list of items. Torch and the kernel release the interpreter's lock where it counts."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from safemerge_recipes.errors import PlanError, SourceError
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.threads import Thread

Item = TypeVar("Item")


SLACK = 24_000_000
"""Bytes for the plan, headers, threads and allocator that no formula below counts."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use: worker threads, bytes of its own memory in all, and a torch device."""

    workers: int
    memory: int
    device: str = "cpu"

    @property
    def share(self) -> int:
        """Bytes for each worker."""
        return self.memory // self.workers


def human(nbytes: float) -> str:
    """Bytes for reading: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


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


class Attempt(threading.Event):
    """A notice to stop for one attempt at some work: set by its failure, which ends no other, or with `whole`."""

    def __init__(self, whole: threading.Event) -> None:
        super().__init__()
        self._whole = whole

    def is_set(self) -> bool:
        """Whether it was set, or `whole`."""
        return super().is_set() or self._whole.is_set()


class StoppedError(Exception):
    """Raised inside a worker to leave its item because another failed or the user interrupted."""


def check(stop: threading.Event) -> None:
    """Leaves the item where the others have to stop, too: to be called at every piece."""
    if stop.is_set():
        raise StoppedError


def _threads(wanted: int = 0) -> int:
    """The number of torch's own threads for one operation, changed where another one is wanted."""
    import torch

    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(wanted)
    return before


def _ready(device: str) -> None:
    """A GPU made ready in this thread: no TF32, whatever the environment says, and its linear algebra loaded.

    Torch loads that at its first use, which two threads must not make at once.
    """
    if device.startswith("cuda"):
        import torch

        torch.set_float32_matmul_precision("highest")
        torch.linalg.inv(torch.eye(2, device=device))


def _settings(device: str) -> AbstractContextManager[Any]:
    """One thread and, on a GPU, one stream a worker."""
    import torch

    torch.set_num_threads(1)  # parallel over tensors; also makes sums independent of the number of cores
    return torch.cuda.stream(torch.cuda.Stream(device) if device.startswith("cuda") else None)


def run_parallel(
    items: Sequence[Item],
    work: Callable[[Item, Arena], None],
    workers: int,
    device: str,
    stop: threading.Event,
    *,
    light: bool = False,
) -> None:
    """Does `work` on every item, in order of start, each worker with an arena of its own.

    `light` promises that the work does not use torch, which takes longer to load than much of it takes to do.
    An error stops the others at their next piece (`stop` is set) and is raised here; Ctrl-C likewise. Of several bad
    sources the first in the order of items is named, however many workers there are: those before it are finished.
    No thread runs on when it raises. Raises StoppedError where somebody else has set `stop`.
    """
    queue = deque(enumerate(items))
    errors: dict[int, BaseException] = {}
    active: set[int] = set()
    lock = threading.Lock()

    def over(number: int, error: BaseException | None = None) -> None:
        with lock:
            active.discard(number)
            if error is not None:
                errors[number] = error
            if errors and not (isinstance(errors[min(errors)], SourceError) and any(n < min(errors) for n in active)):
                stop.set()

    def worker() -> None:
        try:
            with _settings(device) if not light else nullcontext():
                arena = Arena(device)
                while not stop.is_set() and not errors:
                    with lock:
                        if not queue:  # another worker was faster
                            return
                        number, item = queue.popleft()
                        active.add(number)
                    try:
                        work(item, arena)
                    except StoppedError:
                        return over(number)
                    except BaseException as error:  # handed to the caller below, whatever it is
                        return over(number, error)
                    over(number)
        except BaseException as error:  # of the settings: no item is to blame
            over(-1, error)

    before = _threads() if not light else 0
    if not light:
        _ready(device)
    threads = [Thread(worker) for _ in range(min(workers, len(items)))]
    try:
        for thread in threads:
            try:
                thread.start()
            except RuntimeError:  # fewer do the same
                if thread is threads[0]:
                    raise PlanError("the system starts no more threads; raise `ulimit -u`, or stop others") from None
                threads = threads[: threads.index(thread)]
                break
        for thread in threads:
            thread.join()
    except BaseException:
        stop.set()
        for thread in threads:
            if thread.ident is not None:  # Ctrl-C may come between two starts
                thread.join()
        raise
    finally:
        if not light:
            _threads(before)
    if errors:
        raise errors[min(errors)]
    check(stop)  # an item may have been left half done: what follows must not take it for finished
