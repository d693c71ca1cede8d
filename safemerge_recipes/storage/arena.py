"""Bytes in and out: positioned reads into reused buffers, positioned writes, in-kernel copies.

One `Reader` serves all workers of a run (positioned reads need no lock); each worker has its own `Arena` of
buffers, so a run's memory does not grow with the number of tensors. Knows dtypes, but no mathematics.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from safemerge_recipes.errors import ReadError, SourceError
from safemerge_recipes.storage.safetensors import DTYPE_BITS, TensorRef

if TYPE_CHECKING:
    import numpy as np
    import torch

COPY_CHUNK = 1 << 26
"""Bytes asked of the kernel at once by `copy_bytes`."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name: of one that may take part in arithmetic, or be a mask."""
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
        "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    }[name]  # fmt: skip


class Arena:
    """Reusable buffers of one worker, by slot name; a slot grows to the largest request and stays."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._slots: dict[tuple[str, Any], torch.Tensor] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._sent: dict[str, Any] = {}  # staging buffer -> the event after its copy
        self._turns: dict[str, int] = {}

    def array(self, slot: str, count: int, dtype: Any) -> np.ndarray:
        """A flat numpy array of `count` elements, as `take` does it: fresh memory costs as much as reading it."""
        import numpy as np

        nbytes = count * np.dtype(dtype).itemsize
        found = self._arrays.get(slot)
        if found is None or len(found) < nbytes:
            found = self._arrays[slot] = np.empty(nbytes, np.uint8)
        return found[:nbytes].view(dtype)

    def take(
        self,
        slot: str,
        numel: int,
        dtype: torch.dtype,
        device: str | None = None,
        fill: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """A flat tensor of `numel` elements, valid until the slot is taken again.

        Its contents are undefined, or what `fill` put there when the buffer was made: for constants that nobody
        writes to.
        """
        import torch

        where = device or self.device
        found = self._slots.get((slot, dtype))
        if found is None or found.numel() < numel:
            pinned = where == "cpu" and self.device.startswith("cuda")  # staging memory for the GPU
            found = torch.empty(numel, dtype=dtype, device=where, pin_memory=pinned)
            self._slots[slot, dtype] = found
            if fill is not None:
                fill(found)
        return found[:numel]

    def upload(self, slot: str, numel: int, dtype: torch.dtype, fill: Callable[[memoryview], None]) -> torch.Tensor:
        """A tensor on the device whose bytes `fill` puts into staging memory of the host.

        The copy is started, not waited for: two staging buffers take turns, so the next block is read while this
        one travels. What is computed from it comes later on the same stream.
        """
        import torch

        turn = self._turns[slot] = 1 - self._turns.get(slot, 1)
        staging = f"{slot}:staging{turn}"
        if staging in self._sent:
            self._sent[staging].synchronize()
        raw = self.take(staging, numel, dtype, device="cpu")
        fill(raw.view(torch.uint8).numpy().data)
        found = self.take(f"{slot}:device", numel, dtype).copy_(raw, non_blocking=True)
        if self.device.startswith("cuda"):
            self._sent[staging] = torch.cuda.Event()
            self._sent[staging].record()
        return found


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
        dtype = torch_dtype(ref.dtype)
        width = DTYPE_BITS[ref.dtype] // 8
        at = ref.offset + start * width
        if arena.device != "cpu":
            return arena.upload(slot, count, dtype, lambda view: self.read_bytes(ref.path, at, view))
        raw = arena.take(slot, count, dtype)
        self.read_bytes(ref.path, at, raw.view(_bytes()).numpy().data)
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


def _bytes() -> torch.dtype:
    import torch

    return torch.uint8


def write_bytes(file: int, view: memoryview, at: int) -> None:
    """Writes all of `view` at byte `at`; short writes are continued."""
    done = 0
    while done < len(view):
        done += os.pwrite(file, view[done:], at + done)


def torch_bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's bytes; shared where it lies on the CPU."""
    return tensor.reshape(-1).view(_bytes()).cpu().numpy().data
