"""The sha256 of every input file, found in the background while a run reads and writes.

A file's digest is remembered under its identity (size, times, inode) in the user's cache, so unchanged
inputs are hashed once, not once a run; the hub's own cache already names its files by their sha256.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from safemerge_recipes.errors import ReadError, SourceError
from safemerge_recipes.storage.cache import recall, remember
from safemerge_recipes.storage.identity import FileIdentity, check_unchanged

CHUNK = 1 << 22
"""Bytes hashed at once."""
SETTLED_NS = 100_000_000
"""Age in nanoseconds at which a file's times tell it from a later version, whatever the clock of its disk."""


def file_digest(identity: FileIdentity, stop: threading.Event | None = None) -> str:
    """sha256 of a file, from the hub's file name, the cache, or its bytes."""
    blob = Path(os.path.realpath(identity.path))
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    known = recall("digests", _digest_key(identity))
    if isinstance(known, str) and re.fullmatch(r"[0-9a-f]{64}", known):
        return known
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    with open(identity.path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            if stop is not None and stop.is_set():
                return ""
    check_unchanged([identity])
    remember_digest(identity, digest.hexdigest())
    return digest.hexdigest()


def _digest_key(identity: FileIdentity) -> str:
    return f"{os.path.realpath(identity.path)}:{identity.key}"


def remember_digest(identity: FileIdentity, digest: str) -> None:
    """Remembers a file's sha256, unless it is so young that another write could leave the same times behind."""
    if time.time_ns() - max(identity.mtime_ns, identity.ctime_ns) > SETTLED_NS:
        remember("digests", _digest_key(identity), digest)


class Digests(threading.Thread):
    """Hashes files in the background while other work goes on."""

    def __init__(self, identities: Sequence[FileIdentity]) -> None:
        super().__init__(daemon=True)
        self._identities = identities
        self._found: dict[str, str] = {}
        self._error: BaseException | None = None
        self.cancelled = threading.Event()
        self.start()

    def run(self) -> None:
        """Hashes one file after the other."""
        try:
            for identity in self._identities:
                self._found[identity.path] = file_digest(identity, self.cancelled)
        except (OSError, SourceError) as error:
            self._error = error

    def result(self) -> dict[str, str]:
        """path -> sha256, when all are known. Raises SourceError when a file went away or changed."""
        self.join()
        if isinstance(self._error, OSError):
            raise ReadError(f"{self._error.filename}: {self._error.strerror}; it was readable when planned")
        if self._error is not None:
            raise self._error
        return self._found
