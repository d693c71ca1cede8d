"""Buffers that a worker uses again and again, so that a run's memory does not grow with the number of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from safemerge_recipes.storage.dtypes import DTYPES

if TYPE_CHECKING:
    import numpy as np
    import torch


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a dtype that may take part in arithmetic, or be a mask."""
    import torch

    found = DTYPES[name].torch
    assert found is not None, name  # the others are only copied
    dtype: torch.dtype = getattr(torch, found)
    return dtype


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

        The copy is started, not waited for: two staging buffers take turns, so the next piece is read while this
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


def torch_bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's bytes; shared where it lies on the CPU."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).cpu().numpy().data
