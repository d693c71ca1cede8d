"""What tells an unchanged file from a changed one without reading it; asked again when a run ends."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safemerge_recipes.errors import SourceError
from safemerge_recipes.storage.files import reading

_END = 1 << 20
"""Bytes looked at from either end by `fingerprint`."""


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells an unchanged file from a changed one without reading it: sizes in bytes, times in ns.

    The change time cannot be set back by ordinary means, so a rewritten file never keeps its identity.
    """

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: str | Path) -> FileIdentity:
        """The identity of the file as it is now. Raises SourceError when it is gone."""
        try:
            stat = os.stat(path)
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror}; it was expected to stay while the recipe runs") from None
        return cls(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)

    @property
    def key(self) -> str:
        """The identity as one line, without the path: a renamed or linked file stays the same file."""
        return f"{self.size}:{self.mtime_ns}:{self.ctime_ns}:{self.inode}"


def fingerprint(path: str) -> tuple[int, str]:
    """(size in bytes, xxh3 of the first and the last MiB): what a file is wherever it is mounted, at little cost.

    A safetensors file begins with its header. Raises OSError, or SourceError for what is no regular file.
    """
    import xxhash

    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        ends = xxhash.xxh3_128(os.pread(file.fileno(), _END, 0))
        ends.update(os.pread(file.fileno(), _END, max(0, size - _END)))
    return size, ends.hexdigest()


def check_unchanged(identities: Sequence[FileIdentity]) -> None:
    """Raises SourceError when an input is not what it was when the plan was made."""
    for identity in identities:
        if FileIdentity.of(identity.path) != identity:
            raise SourceError(
                f"{identity.path}: changed while the recipe ran; expected inputs that stay as they are. "
                "Run again when it has settled (--force starts over)"
            )
