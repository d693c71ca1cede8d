"""A few threads over a list of items. Torch and the kernel release the interpreter's lock where it counts."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from safemerge_recipes.blocks import Arena

Item = TypeVar("Item")


class StoppedError(Exception):
    """Raised inside a worker to leave its item because another failed or the user interrupted."""


def run_parallel(
    items: Sequence[Item],
    work: Callable[[Item, Arena], None],
    workers: int,
    device: str,
    stop: threading.Event,
) -> None:
    """Does `work` on every item, in order of start, each worker with an arena of its own.

    The first error stops the others at their next block (`stop` is set) and is raised here; Ctrl-C likewise.
    """
    import torch

    queue = deque(items)
    errors: list[BaseException] = []

    def worker() -> None:
        torch.set_num_threads(1)  # parallel over tensors; also makes sums independent of the number of cores
        arena = Arena(device)
        try:
            stream = torch.cuda.Stream(device) if device.startswith("cuda") else None
            with torch.cuda.stream(stream):
                while not stop.is_set():
                    work(queue.popleft(), arena)
        except IndexError:
            return
        except StoppedError:
            return
        except BaseException as error:  # handed to the caller below, whatever it is
            errors.append(error)
            stop.set()

    before = torch.get_num_threads()
    threads = [threading.Thread(target=worker, daemon=True) for _ in range(min(workers, len(items)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    except BaseException:
        stop.set()
        for thread in threads:
            thread.join()
        raise
    finally:
        torch.set_num_threads(before)
    if errors:
        raise errors[0]
