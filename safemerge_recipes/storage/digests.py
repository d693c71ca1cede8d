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
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from safemerge_recipes.errors import ReadError, SafemergeError
from safemerge_recipes.storage.blobs import BlobClaim
from safemerge_recipes.storage.cache import recall, remember
from safemerge_recipes.storage.files import reading
from safemerge_recipes.storage.identity import FileIdentity, check_unchanged
from safemerge_recipes.storage.remote import is_url, pieces
from safemerge_recipes.storage.threads import Thread

CHUNK = 1 << 20
"""Bytes hashed at once."""
HELD = 1 << 23
"""Bytes that reading a file for it holds at most: two ranges of an object in a store."""
SETTLED_NS = 100_000_000
"""Age in nanoseconds at which a file's times tell it from a later version, whatever the clock of its disk."""


@dataclass(frozen=True, slots=True)
class InputDigest:
    """A file's sha256, and whether this run read the file for it (`now`) or an earlier one did (`earlier`)."""

    sha256: str
    when: Literal["now", "earlier"]


def known_digest(identity: FileIdentity) -> InputDigest | None:
    """The digest that an earlier run remembered of a file."""
    known = recall("digests", _digest_key(identity))
    return InputDigest(known, "earlier") if isinstance(known, str) and re.fullmatch(r"[0-9a-f]{64}", known) else None


def file_digest(
    identity: FileIdentity, stop: threading.Event | None = None, *, use_cache: bool = True
) -> InputDigest | None:
    """The digest of a file, from the cache under its identity, or from its bytes; None when stopped.

    What the hub's cache calls a blob is compared and not believed, see `blobs`.

    Raises:
        SourceError: the file changed meanwhile, or a blob is not what its name says.
    """
    known = known_digest(identity) if use_cache else None
    if known is not None:
        return known
    claim = None if is_url(identity.path) else BlobClaim.of(identity.path, identity.size)
    digest = hashlib.sha256()
    with closing(_pieces(identity.path)) as all_of_it:
        for piece in all_of_it:
            digest.update(piece)
            if claim is not None and not claim.sha256:
                claim.update(piece)
            if stop is not None and stop.is_set():
                return None
    check_unchanged([identity])
    found = digest.hexdigest()
    if claim is not None:
        claim.check(found if claim.sha256 else "")
    remember_digest(identity, found)
    return InputDigest(found, "now")


def _pieces(path: str) -> Generator[memoryview, None, None]:
    """A file's bytes in order."""
    if is_url(path):
        yield from pieces(path)
        return
    buffer = bytearray(CHUNK)
    with reading(path) as file:
        while count := file.readinto(buffer):
            yield memoryview(buffer)[:count]


def _digest_key(identity: FileIdentity) -> str:
    times = f"{identity.mtime_ns}:{identity.ctime_ns}:{identity.inode}"
    where = identity.path if is_url(identity.path) else os.path.realpath(identity.path)
    return f"{where}:{identity.size}:{times}:{identity.content if is_url(identity.path) else ''}"


def remember_digest(identity: FileIdentity, digest: str) -> None:
    """Remembers a file's sha256, unless it is so young that another write could leave the same times behind."""
    if time.time_ns() - max(identity.mtime_ns, identity.ctime_ns) > SETTLED_NS:
        remember("digests", _digest_key(identity), digest)


class Digests:
    """Hashes files in the background while other work goes on, several at a time.

    Args:
        identities: of the files.
        known: path -> digest of those that somebody else has read for this run.
        threads: files that are read at a time, see `threads_for`.
    """

    def __init__(
        self, identities: Sequence[FileIdentity], known: Mapping[str, InputDigest] | None = None, threads: int = 1
    ) -> None:
        known = known or {}
        self._found: dict[str, InputDigest | None] = {one.path: known.get(one.path) for one in identities}
        self._left = deque((n, one) for n, one in enumerate(identities) if one.path not in known)
        self._errors: dict[int, OSError | SafemergeError] = {}
        self.cancelled = threading.Event()
        self._threads: list[Thread] = []
        for _ in range(min(threads, len(self._left))):
            thread = Thread(self._work, "hash")
            with contextlib.suppress(RuntimeError):  # no more threads: the others do it, or `result`
                thread.start()
                self._threads.append(thread)

    def _work(self) -> None:
        """Hashes one file after the other until none is left."""
        while not self.cancelled.is_set():
            try:
                number, identity = self._left.popleft()
            except IndexError:
                return
            try:
                self._found[identity.path] = self._digest(identity)
            except (OSError, SafemergeError) as error:
                self._errors[number] = error
                self._left.clear()  # those before it are under way

    def _digest(self, identity: FileIdentity) -> InputDigest | None:
        """The digest of one file; None when cancelled."""
        return file_digest(identity, self.cancelled)

    def result(self) -> dict[str, InputDigest]:
        """path -> digest, when all are known. Raises SourceError when a file went away or changed."""
        for thread in self._threads:
            thread.join()
        self._work()
        error = self._errors[min(self._errors)] if self._errors else None
        if isinstance(error, OSError):
            raise ReadError(f"{error.filename}: {error.strerror}; it was readable when planned")
        if error is not None:
            raise error
        return {path: digest for path, digest in self._found.items() if digest is not None}

    def close(self) -> None:
        """Leaves what is not known yet."""
        self.cancelled.set()


def threads_for(workers: int, memory: int) -> int:
    """Files that are hashed at a time beside so many workers: reading them holds an eighth of the memory at most."""
    return max(1, min(workers, memory // (8 * HELD)))
