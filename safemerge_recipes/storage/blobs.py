"""What the hub's cache says of a file by its name, compared with its bytes while they are read anyway.

The cache keeps files as `blobs/NAME`, and NAME is what the hub told: the sha256 of a large file, git's sha1 of a small
one. A disk may have changed a blob since, and a stranger may name a file as he likes, so no name is believed.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from safemerge_recipes.errors import SourceError


class BlobClaim:
    """The digest that a blob's name promises, and the one that its bytes have so far."""

    def __init__(self, path: Path | str, name: str, size: int) -> None:
        """`size` is the file's in bytes: git hashes it first."""
        self._path, self._name = path, name
        self.sha256 = len(name) == 64
        """Whether it is the sha256 that is promised."""
        self._digest = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

    @classmethod
    def of(cls, path: Path | str, size: int) -> BlobClaim | None:
        """The claim of a file, by where its links lead; None for one that is no blob."""
        real = Path(os.path.realpath(path))
        named = real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", real.name)
        return cls(path, real.name, size) if named else None

    def update(self, piece: bytes | memoryview) -> None:
        """Takes the next bytes of the file."""
        self._digest.update(piece)

    def check(self, found: str = "") -> None:
        """After the last byte: raises SourceError where the file, or its digest `found`, is not what its name says."""
        found = found or self._digest.hexdigest()
        if found != self._name:
            raise SourceError(
                f"{self._path}: has the digest {found}, and the hub's cache names it {self._name}; "
                "it is damaged or was changed, download it again"
            )
