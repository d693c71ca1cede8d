"""The sha256 of every input file, found in the background while a run reads and writes.

A file's digest is remembered under its identity (size, times, inode) in the user's cache, so unchanged
inputs are hashed once, not once a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safemerge_recipes.errors import ReadError, SourceError
from safemerge_recipes.storage.cache import recall, remember
from safemerge_recipes.storage.files import reading
from safemerge_recipes.storage.identity import FileIdentity, check_unchanged

CHUNK = 1 << 22
"""Bytes hashed at once."""
SETTLED_NS = 100_000_000
"""Age in nanoseconds at which a file's times tell it from a later version, whatever the clock of its disk."""


@dataclass(frozen=True, slots=True)
class InputDigest:
    """A file's sha256, and whether this run read the file for it (`now`) or an earlier one did (`earlier`)."""

    sha256: str
    when: Literal["now", "earlier"]


def file_digest(
    identity: FileIdentity, stop: threading.Event | None = None, *, use_cache: bool = True
) -> InputDigest | None:
    """The digest of a file, from the cache under its identity, or from its bytes; None when stopped.

    A blob of the hub's cache is named by what the hub says of it (the sha256 of a large file, git's sha1 of a small
    one); that is compared and not believed.

    Raises:
        SourceError: the file changed meanwhile, or a blob is not what its name says.
    """
    known = recall("digests", _digest_key(identity)) if use_cache else None
    if isinstance(known, str) and re.fullmatch(r"[0-9a-f]{64}", known):
        return InputDigest(known, "earlier")
    blob = Path(os.path.realpath(identity.path))
    named = blob.name if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name) else ""
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    git = hashlib.sha1(b"blob %d\0" % identity.size, usedforsecurity=False) if len(named) == 40 else None
    with reading(identity.path) as file:
        while count := file.readinto(buffer):
            piece = memoryview(buffer)[:count]
            digest.update(piece)
            if git is not None:
                git.update(piece)
            if stop is not None and stop.is_set():
                return None
    check_unchanged([identity])
    found = digest.hexdigest()
    if named and (git.hexdigest() if git is not None else found) != named:
        raise SourceError(
            f"{identity.path}: the hub's cache names it {named}, and its bytes have sha256 {found}; the file is "
            "damaged or was changed: remove it from the cache and download it again"
        )
    remember_digest(identity, found)
    return InputDigest(found, "now")


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
        self._found: dict[str, InputDigest] = {}
        self._error: BaseException | None = None
        self.cancelled = threading.Event()
        with contextlib.suppress(RuntimeError):  # no more threads: `result` does it
            self.start()

    def run(self) -> None:
        """Hashes one file after the other."""
        try:
            for identity in self._identities:
                found = file_digest(identity, self.cancelled)
                if found is None:
                    return
                self._found[identity.path] = found
        except (OSError, SourceError) as error:
            self._error = error

    def result(self) -> dict[str, InputDigest]:
        """path -> digest, when all are known. Raises SourceError when a file went away or changed."""
        if self.ident is None:
            self.run()
        else:
            self.join()
        if isinstance(self._error, OSError):
            raise ReadError(f"{self._error.filename}: {self._error.strerror}; it was readable when planned")
        if self._error is not None:
            raise self._error
        return self._found
