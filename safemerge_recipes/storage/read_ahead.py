"""The next item is made by a thread of its own while the last one is used."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

from safemerge_recipes.storage.threads import Thread
from safemerge_recipes.storage.workers import StoppedError, check

Item = TypeVar("Item")

AHEAD = 3
"""Items that exist at a time: one in use, one waiting, one being made. So many buffers may take turns."""


def ahead(items: Iterator[Item], stop: threading.Event) -> Iterator[Item]:
    """The same items in the same order, and what is raised when making them.

    Raises:
        StoppedError: `stop` was set.
    """
    over = threading.Event()
    made: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(maxsize=1)

    def put(item: Item | None, error: BaseException | None) -> None:
        while not (stop.is_set() or over.is_set()):
            with contextlib.suppress(queue.Full):
                return made.put((item, error), timeout=0.2)
        raise StoppedError

    def make() -> None:
        with contextlib.suppress(StoppedError):  # nobody listens any more
            try:
                for item in items:
                    put(item, None)
            except BaseException as error:  # raised where the items are used
                put(None, error)
            else:
                put(None, None)

    maker = Thread(make, "ahead")
    try:
        maker.start()
    except RuntimeError:  # no more threads: one after the other
        for one in items:
            check(stop)
            yield one
        return
    try:
        while True:
            try:
                item, error = made.get(timeout=0.2)
            except queue.Empty:
                check(stop)
                continue
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:  # what the items are made of may be closed now
        over.set()
        maker.join()
