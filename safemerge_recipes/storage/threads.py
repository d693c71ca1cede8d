"""A thread that can be waited for, whatever signal comes meanwhile: what workers, seal and digests are made of.

Up to Python 3.12, a `threading.Thread.join` that Ctrl-C or SIGTERM breaks off takes the thread for ended, and every
later `join` returns at once. A run would then close its files, and the program end, while threads still write.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

LOOK = 0.2
"""Seconds after which a waiting thread looks for signals."""


class Thread(threading.Thread):
    """A daemon thread; subclasses give `work`, or it is given here."""

    def __init__(self, work: Callable[[], None] | None = None, name: str | None = None) -> None:
        super().__init__(name=name, daemon=True)
        self._work, self._over, self._rung = work, False, threading.Lock()
        self._rung.acquire()

    def work(self) -> None:
        """What is done in the thread."""
        if self._work is not None:
            self._work()

    def run(self) -> None:
        """See `threading.Thread`."""
        try:
            self.work()
        finally:
            self._over = True
            self._rung.release()

    def join(self, timeout: float | None = None) -> None:
        """Waits until the work is over, without a limit: an interrupted wait can be taken up again."""
        while not self._over:
            self._rung.acquire(timeout=LOOK)
