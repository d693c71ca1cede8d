"""What tells an unchanged file from a changed one without reading it whole; asked again when a run ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safemerge_recipes.errors import SourceError
from safemerge_recipes.storage.files import reading
from safemerge_recipes.storage.remote import is_url, look

_END = 1 << 18
"""Bytes looked at from either end by `fingerprint`."""
_SPOTS, _SPOT = 16, 1 << 12
"""How many places between, evenly spread, and bytes of each: another training changes them all."""


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells an unchanged file from a changed one: sizes in bytes, times in ns.

    Attributes:
        path: where it lies.
        size: bytes.
        content: xxh3 of its ends and of places between, see `fingerprint`; of an object what its store says.
        mtime_ns: when it was written, as it says itself.
        ctime_ns: when it was changed, as this machine sees it; cannot be set back by ordinary means.
        inode: its number, as this machine sees it.
        device: this machine and the mount, on which times of change and inodes may be compared.
    """

    path: str
    size: int
    content: str
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: str

    @classmethod
    def of(cls, path: str | Path) -> FileIdentity:
        """The identity of the file as it is now. Raises SourceError when it is gone."""
        try:
            if is_url(path):
                return cls.of_object(path)
            with reading(path) as file:
                return cls.of_open(path, file.fileno())
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror}; it was expected to stay while the recipe runs") from None

    @classmethod
    def of_open(cls, path: str | Path, number: int) -> FileIdentity:
        """The identity of a file that is open under a descriptor. Raises OSError."""
        stat = os.fstat(number)
        content, device = _content(number, stat.st_size), f"{socket.gethostname()}:{stat.st_dev}"
        return cls(str(path), stat.st_size, content, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, device)

    @classmethod
    def of_object(cls, url: str) -> FileIdentity:
        """The identity of an object, as its store tells it. Raises OSError."""
        return cls(url, *look(url), 0, 0, 0, "")

    @property
    def key(self) -> str:
        """The identity as one line that holds on every machine that mounts the file, whatever its path there."""
        return f"{self.size}:{self.mtime_ns}:{self.content}"

    @property
    def here(self) -> str:
        """What this machine sees besides, as one line: a file rewritten with its old times differs in it."""
        return f"{self.device}:{self.ctime_ns}:{self.inode}"


def differs_here(before: str, now: str) -> bool:
    """Whether two `here` of one path, seen from one machine and mount, are of two files."""
    device = now.rsplit(":", 2)[0]
    return before.rsplit(":", 2)[0] == device and before != now


def fingerprint(path: str) -> tuple[int, str]:
    """(size in bytes, xxh3 of the ends and of places between): what a file is wherever it lies, at little cost.

    A safetensors file begins with its header. Of an object in a store: what that says of it. Raises OSError, or
    SourceError for what is no regular file.
    """
    if is_url(path):
        return look(path)
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        return size, _content(file.fileno(), size)


def _content(number: int, size: int) -> str:
    import xxhash

    found = xxhash.xxh3_128(os.pread(number, _END, 0))
    if size > 2 * _END:
        for spot in range(1, _SPOTS + 1):
            found.update(os.pread(number, _SPOT, size * spot // (_SPOTS + 1)))
    found.update(os.pread(number, _END, max(0, size - _END)))
    return str(found.hexdigest())


def check_unchanged(identities: Sequence[FileIdentity]) -> None:
    """Raises SourceError when an input is not what it was when the plan was made."""
    for identity in identities:
        if FileIdentity.of(identity.path) != identity:
            raise SourceError(
                f"{identity.path}: changed while the recipe ran; expected inputs that stay as they are. "
                "Run again when it has settled (--force starts over)"
            )
