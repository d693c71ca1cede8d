"""DARE's random choice, which also thins LoRA factors that are combined one by one: which elements stay."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safemerge_recipes.storage.arena import Arena

if TYPE_CHECKING:
    import torch

LEVELS = 1 << 16
"""Distinct draws of a DARE choice: densities are kept to 1/65536, and rescaled by what was really kept."""

SPREAD = 0x9E3779B9
"""2³² over the golden ratio: spreads neighbouring counters apart before the key comes in."""


def _count(x: torch.Tensor) -> None:
    """Fills an int32 tensor with i·SPREAD modulo 2³²."""
    import numpy as np

    x.numpy().view(np.uint32)[:] = np.arange(x.numel(), dtype=np.uint32) * np.uint32(SPREAD)


@dataclass(frozen=True, slots=True)
class Draw:
    """DARE's random choice: each element stays with probability `density`, for each side independently.

    A counter-based generator: the draw of element i is a hash (Wellons' lowbias32 of the counter, keyed by
    seed and tensor name) whose upper 16 bits serve one side and whose lower 16 bits serve the next; every two sides
    have a key of their own. So a choice does not depend on pieces, threads, order or device.
    """

    density: float
    seed: int

    @property
    def limit(self) -> int:
        """How many of the `LEVELS` equally likely draws keep an element."""
        return max(1, round(self.density * LEVELS))

    @property
    def rescale(self) -> float:
        """What makes the expectation whole again: 1 / the probability that an element stays."""
        return LEVELS / self.limit

    def key(self, name: str, pair: int = 0) -> tuple[int, int]:
        """Two 32-bit numbers from seed and tensor name, and from the second pair of sides on from its number."""
        text = f"{self.seed}\0{name}" + (f"\0{pair}" if pair else "")
        digest = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")

    def hashes(self, name: str, start: int, count: int, arena: Arena, pair: int = 0) -> Any:
        """uint32 array `(count,)` for the elements from `start` on."""
        import numpy as np
        import torch

        first, second = self.key(name, pair)
        x, shifted = (
            arena.take(slot, count, torch.int32, device="cpu").numpy().view(np.uint32) for slot in ("hash", "shifted")
        )
        origin = (start * SPREAD + first) % 2**32
        counters = arena.take("counters", count, torch.int32, device="cpu", fill=_count)
        np.add(counters.numpy().view(np.uint32), np.uint32(origin), out=x)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x ^= np.right_shift(x, np.uint32(shift), out=shifted)
            x *= np.uint32(factor)
            x += np.uint32(second)
        x ^= np.right_shift(x, np.uint32(16), out=shifted)
        return x

    def keep(self, name: str, start: int, count: int, arena: Arena, sides: int = 2) -> tuple[torch.Tensor, ...]:
        """A bool tensor `(count,)` for each side: which of its elements from `start` on stay."""
        import numpy as np
        import torch

        kept = [arena.take(f"kept {side}", count, torch.bool, device="cpu") for side in range(sides)]
        if self.limit == LEVELS:
            return tuple(one.fill_(True) for one in kept)
        for pair in range(0, sides, 2):
            x = self.hashes(name, start, count, arena, pair // 2)
            np.less(x, np.uint32(self.limit << 16), out=kept[pair].numpy())
            if pair + 1 < sides:
                x &= np.uint32(LEVELS - 1)
                np.less(x, np.uint32(self.limit), out=kept[pair + 1].numpy())
        return tuple(one.to(arena.device) for one in kept)
