"""A bounded pool of open files: as many as are in use, and as many more as the system's limit lets stay open."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key")

MOST = 256
"""Files that stay open for the next use, at most."""


def raise_limit() -> None:
    """Raises the process's soft limit of open files to its hard one; where that is refused, fewer stay open."""
    with contextlib.suppress(OSError, ValueError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def room() -> int:
    """Files that one pool keeps open: an eighth of the limit, as there are several pools and other files."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST if soft == resource.RLIM_INFINITY else max(1, min(MOST, soft // 8))


class Descriptors(Generic[Key]):
    """Open files by key, each opened when it is first used and again after it was closed. Safe to share.

    Args:
        opened: opens the file of a key.
    """

    def __init__(self, opened: Callable[[Key], int]) -> None:
        self._opened, self._room = opened, room()
        self._files: OrderedDict[Key, int] = OrderedDict()  # the one used last at the end
        self._users: dict[Key, int] = {}
        self._lock = threading.RLock()  # a forgotten generator may end anywhere

    @contextlib.contextmanager
    def use(self, key: Key) -> Iterator[int]:
        """The descriptor of a file, which stays open inside. Raises what opening it raises."""
        with self._lock:
            if key not in self._files:
                self._close_down_to(self._room - 1)
                self._files[key] = self._opened(key)
            self._files.move_to_end(key)
            self._users[key] = self._users.get(key, 0) + 1
            file = self._files[key]
        try:
            yield file
        finally:
            with self._lock:
                self._users[key] -= 1
                if not self._users[key]:
                    del self._users[key]

    def _close_down_to(self, count: int) -> None:
        for key in [key for key in self._files if key not in self._users][: max(0, len(self._files) - count)]:
            os.close(self._files.pop(key))

    def close(self) -> None:
        """Closes every file; nobody may be using one."""
        with self._lock:
            for file in self._files.values():
                with contextlib.suppress(OSError):
                    os.close(file)
            self._files.clear()
