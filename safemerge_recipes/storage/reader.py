"""Reads ranges of stored tensors: positioned reads into reused buffers, and copies inside the kernel.

One reader serves all workers of a run, as positioned reads need no lock. Knows dtypes, but no mathematics.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from safemerge_recipes.errors import ReadError, SourceError
from safemerge_recipes.storage.arena import Arena, torch_bytes, torch_dtype
from safemerge_recipes.storage.dtypes import itemsize
from safemerge_recipes.storage.files import write_bytes
from safemerge_recipes.storage.safetensors import TensorRef

if TYPE_CHECKING:
    import torch

COPY_CHUNK = 1 << 26
"""Bytes asked of the kernel at once by `copy_bytes`."""


class Reader:
    """Reads ranges of stored tensors. Safe to share between threads."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._opening = threading.Lock()

    def _descriptor(self, path: str) -> int:
        with self._opening:
            found = self._files.get(path)
            if found is None:
                try:
                    found = self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise ReadError(
                        f"{path}: cannot be opened: {error.strerror}; it was readable when planned"
                    ) from None
            return found

    def read(self, ref: TensorRef, start: int, count: int, arena: Arena, slot: str) -> torch.Tensor:
        """Elements [start, start + count) of the flattened tensor, in its stored dtype, on the arena's device.

        Raises:
            SourceError: the file ended early or the disk failed.
        """
        dtype, at = torch_dtype(ref.dtype), ref.offset + start * itemsize(ref.dtype)
        if arena.device != "cpu":
            return arena.upload(slot, count, dtype, lambda view: self.read_bytes(ref.path, at, view))
        raw = arena.take(slot, count, dtype)
        self.read_bytes(ref.path, at, torch_bytes(raw))
        return raw

    def read_bytes(self, path: str, offset: int, view: memoryview) -> None:
        """Fills `view` from byte `offset` of the file; short reads are continued, an early end is an error."""
        file, done = self._descriptor(path), 0
        while done < len(view):
            try:
                got = os.preadv(file, [view[done:]], offset + done)
            except OSError as error:
                raise ReadError(f"{path}: byte {offset + done}: {error.strerror}; is the disk failing?") from None
            if not got:
                raise SourceError(
                    f"{path}: ends at byte {offset + done}, {len(view) - done} bytes early; was it changed?"
                )
            done += got

    def copy_bytes(self, path: str, offset: int, count: int, target: int, at: int) -> Iterator[int]:
        """Copies bytes between files inside the kernel, yielding the size of each finished piece."""
        source = self._descriptor(path)
        while count:
            try:
                done = os.copy_file_range(source, target, min(count, COPY_CHUNK), offset, at)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                view = memoryview(bytearray(min(count, 1 << 22)))
                self.read_bytes(path, offset, view)
                write_bytes(target, view, at)
                done = len(view)
            if not done:
                raise SourceError(f"{path}: ends at byte {offset}, {count} bytes early; was it changed meanwhile?")
            offset, at, count = offset + done, at + done, count - done
            yield done

    def close(self) -> None:
        """Closes every file."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                os.close(file)
        self._files.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
