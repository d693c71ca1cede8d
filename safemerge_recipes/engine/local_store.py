"""The store of a local or mounted folder: `.part` files of full size from the start, renamed when they are sealed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from safemerge_recipes.errors import PlanError, SourceError, WriteError
from safemerge_recipes.storage.descriptors import Descriptors
from safemerge_recipes.storage.files import open_file, own_file, reading, sync_folder, write_bytes
from safemerge_recipes.storage.layout import Layout
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import TensorRef

_WRITE = 2
"""SYNC_FILE_RANGE_WRITE of Linux."""


def _system_call(name: str, *arguments: type[ctypes._SimpleCData[int]]) -> Callable[..., int] | None:
    """A function of the C library that Python does not offer, where there is one."""
    found = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if found is not None:
        found.argtypes = arguments
    return found


_start_writing = _system_call("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class LocalStore:
    """The `Store` of a folder, which exists.

    Writers take turns at a file, as the kernel lets one at a time write to it and has the others spin.
    """

    tries = 1
    """A disk that fails is not asked again."""
    held = 0
    """See `Store`."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        self._turns = [threading.Lock() for _ in layout.files]
        self._files = Descriptors(self._opened)

    def __reduce__(self) -> tuple[type[LocalStore], tuple[Path, Layout]]:
        return LocalStore, (self.folder, self.layout)

    def alone(self, shard: int) -> LocalStore:
        """See `Store`."""
        return LocalStore(self.folder, self.layout.alone(shard))

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.folder)

    def _working(self, shard: int) -> Path:
        return self.folder / f"{self.layout.files[shard]}.part"

    def _left(self, shard: int) -> Path | None:
        """The file of an earlier run, sealed or not, if it has this layout's size and opening bytes."""
        header = self.layout.headers[shard]
        for path in (self._working(shard), self.folder / self.layout.files[shard]):
            if path.is_file() and not path.is_symlink() and path.stat().st_size == self.layout.sizes[shard]:
                with reading(path, links="none") as file:
                    return path if file.read(len(header)) == header else None
        return None

    def list(self) -> frozenset[int]:
        """See `Store`."""
        return frozenset(shard for shard in range(len(self.layout.files)) if self._left(shard) is not None)

    def open(self) -> None:
        """See `Store`. Raises PlanError when the disk has no room for all of it."""
        self.close()
        for shard, name in enumerate(self.layout.files):
            if (self.folder / name).exists() and not self._working(shard).exists():
                os.rename(self.folder / name, self._working(shard))
        self._check_room()
        self._make_all()

    def _make_all(self) -> None:
        """Files of full size with their opening bytes. Raises PlanError."""
        try:
            for shard in range(len(self.layout.files)):
                self._make(shard)
        except SourceError as error:
            raise PlanError(f"{error}; remove it, or choose another --output") from None
        except OSError as error:
            raise PlanError(f"{self.folder}: {error.strerror}; free some space or choose another --output") from None

    def _check_room(self) -> None:
        """A full disk shows now, before anything is computed; nothing is reserved, as that slows writing down."""
        there = 0
        for shard, size in enumerate(self.layout.sizes):
            with contextlib.suppress(FileNotFoundError):
                there += min(size, os.stat(self._working(shard)).st_blocks * 512)
        disk = os.statvfs(self.folder)
        needed, free = sum(self.layout.sizes) - there, disk.f_bavail * disk.f_frsize
        if needed > free:
            raise PlanError(
                f"{self.folder}: {needed} bytes are needed, {free} are free; free some space or choose another --output"
            )

    def _make(self, shard: int) -> None:
        file = own_file(self._working(shard))
        try:
            os.ftruncate(file, self.layout.sizes[shard])
            write_bytes(file, memoryview(self.layout.headers[shard]), 0)
        finally:
            os.close(file)

    def write(self, shard: int, offset: int, view: memoryview) -> None:
        """See `Store`."""
        with self._turns[shard], self._files.use(shard) as file:
            write_bytes(file, view, offset)

    def copy(self, shard: int, offset: int, ref: TensorRef, reader: Reader) -> Iterator[int]:
        """See `Store`. Inside the kernel where it can."""
        with self._files.use(shard) as file:
            yield from reader.copy_bytes(ref.path, ref.offset, ref.nbytes, file, offset)

    def read_back(self, shard: int, offset: int, view: memoryview) -> None:
        """See `Store`."""
        done = 0
        with self._files.use(shard) as file:
            while done < len(view):
                got = os.preadv(file, [view[done:]], offset + done)
                if not got:
                    raise WriteError(
                        "a weight file became shorter while it was written; is another program changing it?"
                    )
                done += got

    def _opened(self, shard: int) -> int:
        """The file as it is being written, or as an earlier run left it."""
        found = self._left(shard) or self._working(shard)
        return own_file(found) if os.access(found, os.W_OK) else open_file(found, "none")

    def flush(self, shard: int, start: int, end: int) -> None:
        """See `Store`."""
        if _start_writing is not None:
            with self._files.use(shard) as file:
                _start_writing(file, start, end - start, _WRITE)

    def seal(self, shard: int) -> None:
        """See `Store`: flushed, then renamed."""
        final = self.folder / self.layout.files[shard]
        with self._files.use(shard) as file:
            os.fsync(file)
            try:
                os.rename(self._working(shard), final)
            except FileNotFoundError:  # somebody else who wrote the same bytes was faster
                if not os.path.samestat(os.stat(final), os.fstat(file)):
                    raise

    def commit(self) -> None:
        """See `Store`."""
        sync_folder(self.folder)

    def close(self) -> None:
        """See `Store`."""
        self._files.close()
