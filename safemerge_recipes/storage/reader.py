"""Reads ranges of stored tensors: positioned reads into reused buffers, and copies inside the kernel.

One reader serves all workers of a run, as positioned reads need no lock. Knows dtypes, but no mathematics.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import nullcontext
from types import TracebackType
from typing import TYPE_CHECKING

from safemerge_recipes.errors import ReadError, SourceError
from safemerge_recipes.storage.arena import Arena, torch_bytes, torch_dtype
from safemerge_recipes.storage.descriptors import Descriptors
from safemerge_recipes.storage.dtypes import itemsize
from safemerge_recipes.storage.files import open_file, write_bytes
from safemerge_recipes.storage.remote import CHUNKS, Ranges, is_url
from safemerge_recipes.storage.safetensors import TensorRef

if TYPE_CHECKING:
    import numpy as np
    import torch

COPY_CHUNK = 1 << 26
"""Bytes asked of the kernel at once by `copy_bytes`."""


class Reader:
    """Reads ranges of stored tensors. Safe to share between threads."""

    def __init__(self, workers: int = 1) -> None:
        """`workers`: threads that will read; bounds what is held of files in object storage."""
        self._files = Descriptors(_opened)
        self._ranges = Ranges(CHUNKS * workers)

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
        if is_url(path):
            return self._ranges.read(path, offset, view)
        done = 0
        with self._files.use(path) as file:
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
        return None

    def whole(self, ref: TensorRef) -> np.ndarray:
        """All bytes of a tensor that is small, uint8."""
        import numpy as np

        raw = np.empty(ref.nbytes, np.uint8)
        self.read_bytes(ref.path, ref.offset, raw.data)
        return raw

    def copy_bytes(self, path: str, offset: int, count: int, target: int, at: int) -> Iterator[int]:
        """Copies bytes between files inside the kernel, yielding the size of each finished piece."""
        with nullcontext() if is_url(path) else self._files.use(path) as source:
            while count:
                done = 0 if source is None else _copied(source, target, min(count, COPY_CHUNK), offset, at)
                if not done:
                    view = memoryview(bytearray(min(count, 1 << 22)))
                    self.read_bytes(path, offset, view)
                    write_bytes(target, view, at)
                    done = len(view)
                offset, at, count = offset + done, at + done, count - done
                yield done

    def close(self) -> None:
        """Closes every file."""
        self._files.close()
        self._ranges.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _opened(path: str) -> int:
    try:
        return open_file(path)
    except OSError as error:
        raise ReadError(f"{path}: cannot be opened: {error.strerror}; it was readable when planned") from None


def _copied(source: int, target: int, count: int, offset: int, at: int) -> int:
    """Bytes copied by the kernel; 0 where it cannot, as between some file systems, or where the source ends."""
    try:
        return os.copy_file_range(source, target, count, offset, at)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return 0
