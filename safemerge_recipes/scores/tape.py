"""Hidden states of all prompts between the blocks, in a file without a name, so that memory holds but one prompt's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from safemerge_recipes.storage.arena import torch_bytes
from safemerge_recipes.storage.files import write_bytes

if TYPE_CHECKING:
    import torch


class Tape:
    """float32 states `(tokens, width)` of every prompt, at every level.

    Args:
        lengths: tokens of each prompt.
        device: where states are computed.
    """

    def __init__(self, lengths: Sequence[int], device: str) -> None:
        self.lengths, self.device = lengths, device
        self._starts = list(accumulate(lengths, initial=0))
        self._file = tempfile.TemporaryFile(prefix="safemerge-")  # noqa: SIM115  # closed by `close`
        self._width = 0

    def write(self, level: int, number: int, states: torch.Tensor) -> None:
        """Stores a prompt's states."""
        states = states.detach().float().contiguous()
        self._width = states.shape[-1]
        write_bytes(self._file.fileno(), torch_bytes(states), self._at(level, number))

    def read(self, level: int, number: int) -> torch.Tensor:
        """A prompt's states `(1, tokens, width)`, in memory of their own."""
        import torch

        states = torch.empty(1, self.lengths[number], self._width)
        view, at = torch_bytes(states), self._at(level, number)
        done = 0
        while done < len(view):
            done += os.preadv(self._file.fileno(), [view[done:]], at + done)
        return states.to(self.device)

    def _at(self, level: int, number: int) -> int:
        return 4 * self._width * (level * self._starts[-1] + self._starts[number])

    def close(self) -> None:
        """Gives the disk back."""
        self._file.close()
