"""Small named objects that processes on several machines share: in a folder, or in object storage.

An object is there whole or not at all. Nothing is locked, renamed over or appended to; of two who offer the same name
the first wins where the store can tell, and whoever reads afterwards reads what all others read.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from safemerge_recipes.errors import SourceError
from safemerge_recipes.storage.files import content_of, write_file
from safemerge_recipes.storage.remote import filesystem, persistently

MOST = 64_000_000
"""Bytes of an object, at most."""


class Place(Protocol):
    """Objects by name; a name may have folders in it. Methods raise OSError."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def read(self, name: str) -> bytes | None:
        """An object, None where there is none."""

    def write(self, name: str, content: bytes) -> None:
        """Puts an object there, in the place of an older one."""

    def offer(self, name: str, content: bytes) -> bytes:
        """Puts an object there unless there is one; returns the one that is there."""

    def names(self, folder: str) -> list[str]:
        """The names of the objects in a folder."""

    def remove(self, name: str) -> None:
        """Removes an object, be it there or not."""


class FolderPlace:
    """A folder, which is made where it is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        """See `Place`."""
        return str(self.folder)

    def read(self, name: str) -> bytes | None:
        """See `Place`."""
        try:
            return content_of(self.folder / name, MOST, "none")
        except FileNotFoundError:
            return None
        except SourceError as error:
            raise OSError(errno.EINVAL, str(error)) from None

    def write(self, name: str, content: bytes) -> None:
        """See `Place`."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)

    def offer(self, name: str, content: bytes) -> bytes:
        """See `Place`. By a hard link, which fails where the name is taken; without links the last one wins."""
        own = f"{name}.{os.urandom(8).hex()}.tmp"
        self.write(own, content)
        try:
            os.link(self.folder / own, self.folder / name)
        except FileExistsError:
            pass
        except OSError:
            if self.read(name) is None:
                self.write(name, content)
        finally:
            self.remove(own)
        return self.read(name) or content

    def names(self, folder: str) -> list[str]:
        """See `Place`."""
        try:
            found = sorted(os.listdir(self.folder / folder))
        except FileNotFoundError:
            return []
        return [name for name in found if not name.endswith(".tmp")]

    def remove(self, name: str) -> None:
        """See `Place`."""
        with suppress(FileNotFoundError):
            os.unlink(self.folder / name)


class UrlPlace:
    """Objects below a URL."""

    def __init__(self, url: str) -> None:
        self.url = url

    @property
    def name(self) -> str:
        """See `Place`."""
        return self.url

    def read(self, name: str) -> bytes | None:
        """See `Place`."""
        fs, path = filesystem(f"{self.url}/{name}")
        try:
            return bytes(persistently(self.url, lambda: fs.cat_file(path)))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """See `Place`."""
        fs, path = filesystem(f"{self.url}/{name}")
        persistently(self.url, lambda: fs.pipe_file(path, content))

    def offer(self, name: str, content: bytes) -> bytes:
        """See `Place`."""
        fs, path = filesystem(f"{self.url}/{name}")

        def ask() -> None:
            with suppress(FileExistsError):
                fs.pipe_file(path, content, mode="create")

        persistently(self.url, ask)
        return self.read(name) or content

    def names(self, folder: str) -> list[str]:
        """See `Place`."""
        fs, path = filesystem(f"{self.url}/{folder}" if folder else self.url)
        try:
            listed = persistently(self.url, lambda: fs.ls(path, detail=True))
        except FileNotFoundError:
            return []
        return sorted(one["name"].rpartition("/")[2] for one in listed if one.get("type") != "directory")

    def remove(self, name: str) -> None:
        """See `Place`."""
        fs, path = filesystem(f"{self.url}/{name}")
        with suppress(FileNotFoundError):
            persistently(self.url, lambda: fs.rm_file(path))
