"""Leases: a worker says that it does a piece of work, and keeps saying so; whoever falls silent has lost it.

They save work and promise nothing: bytes and offsets are fixed, so that two may well do the same. Silence is measured
by the observer's own steady clock, between two looks at the same word; clocks that jump or differ do not matter. A
process of this machine that is no more is not waited for.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

from safemerge_recipes.storage.place import Place
from safemerge_recipes.storage.threads import Thread

BEAT, SILENCE = 5.0, 30.0
"""Seconds between two words of a holder, and after which it counts as gone."""
_FOLDER = "leases"


class Leases:
    """The leases of one place as one worker takes and sees them."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._me = f"{_holder(os.getpid())} {os.urandom(4).hex()}"
        self._heard: dict[str, tuple[bytes, float]] = {}

    def is_free(self, unit: str) -> bool:
        """Whether nobody holds a unit, as far as this worker has heard."""
        word = self._place.read(f"{_FOLDER}/{unit}")
        if word is None or _is_gone(word):
            return True
        before, since = self._heard.get(unit, (b"", 0.0))
        if word != before:
            self._heard[unit] = word, time.monotonic()
            return False
        return time.monotonic() - since > SILENCE

    @contextlib.contextmanager
    def held(self, unit: str) -> Iterator[None]:
        """Holds a unit while the body runs."""
        over = threading.Event()

        def speak() -> None:
            count = 0
            while not over.wait(BEAT):
                count += 1
                with contextlib.suppress(OSError):  # what cannot be said is heard as silence
                    self._place.write(f"{_FOLDER}/{unit}", f"{self._me} {count}".encode())

        self._place.write(f"{_FOLDER}/{unit}", f"{self._me} 0".encode())
        speaker = Thread(speak)
        speaker.start()
        try:
            yield
        finally:
            over.set()
            speaker.join()
            with contextlib.suppress(OSError):
                self._place.remove(f"{_FOLDER}/{unit}")


def _holder(pid: int) -> str:
    """How a process of this machine is called; containers that share a host's name are told apart where they can be."""
    with contextlib.suppress(OSError):
        return f"process {pid} of {os.readlink('/proc/self/ns/pid')} on {socket.gethostname()}"
    return f"process {pid} on {socket.gethostname()}"


def _is_gone(word: bytes) -> bool:
    """Whether a word is of a process of this machine that has ended."""
    said = word.split()
    if len(said) < 2 or not said[1].isdigit() or not 0 < int(said[1]) < 2**31:
        return False
    pid = int(said[1])
    if not word.startswith(f"{_holder(pid)} ".encode()):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        pass
    return False
