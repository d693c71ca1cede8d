"""The k-th largest magnitude of a streamed tensor, exactly, without sorting it.

A first look at a few evenly spread elements brackets the threshold; one pass counts what lies above the
bracket and collects what lies inside; the answer is found among the collected. Where the bracket misses
(the look was misleading), another pass searches the side it was missed on. Whatever the way, the answer is
the exact order statistic.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

    from safemerge_recipes.methods import Blocks, Trim

LOOKS = 1 << 15
"""Elements of a tensor that are looked at first, about."""
SLACK = 6.0
"""Half-width of the bracket in standard deviations of the looked-at quantile."""


class Selection:
    """The search for one side's threshold: feed it blocks, pass by pass, until `trim` is known."""

    def __init__(self, keep: int, numel: int) -> None:
        self.keep, self.numel = keep, numel
        self.low, self.high = 0.0, math.inf
        self.trim: Trim | None = None
        self._looked: list[torch.Tensor] = []
        self._slack = SLACK
        self._above = 0
        self._equal = 0
        self._inside: list[np.ndarray] = []

    def look(self, x: torch.Tensor) -> None:
        """Takes every so-many-th element of a block into the sample."""
        stride = max(1, self.numel // LOOKS) | 1  # odd, so that it does not walk along columns
        self._looked.append(x[::stride].abs())

    def bracket(self) -> None:
        """Sets the magnitudes between which the threshold lies almost surely; wider at each further call."""
        import torch

        ordered = torch.cat(self._looked).sort().values
        self._looked = [ordered]
        n, fraction = len(ordered), self.keep / self.numel
        slack = self._slack * math.sqrt(n * fraction * (1 - fraction)) + 2
        low, high = int((1 - fraction) * n - slack), int((1 - fraction) * n + slack)
        self.low = float(ordered[low]) if low >= 0 else 0.0
        self.high = float(ordered[high]) if high < n else math.inf
        self._slack *= 8

    def count(self, x: torch.Tensor) -> None:
        """Counts what lies above the bracket and collects what lies inside, ends included."""
        import numpy as np

        size = np.abs(x.cpu().numpy())  # numpy compares and compresses several times faster than torch
        if self.high < math.inf:
            self._above += int(np.count_nonzero(size > self.high))
        if self.low == self.high:  # one value fills the bracket: counting it is enough
            self._equal += int(np.count_nonzero(size == self.low))
            return
        inside = size >= self.low
        if self.high < math.inf:
            inside &= size <= self.high
        self._inside.append(size[inside])

    def settle(self) -> None:
        """Sets `trim` from what was collected, or a wider bracket if the threshold was missed."""
        import numpy as np

        from safemerge_recipes.methods import Trim

        wanted, equal = self.keep - self._above, self._equal
        inside = np.concatenate(self._inside) if self._inside else np.full(0, self.low)
        self._inside.clear()
        self._above = self._equal = 0
        if not 1 <= wanted <= len(inside) + equal:
            self.bracket()
            return
        threshold, ties = self.low, wanted
        if not equal:
            threshold = float(np.partition(inside, len(inside) - wanted)[len(inside) - wanted])
            ties = wanted - int(np.count_nonzero(inside > threshold))
            equal = int(np.count_nonzero(inside == threshold))
        self.trim = Trim(threshold, None if ties == equal else ties)


def trims(keep: int, numel: int, blocks: Blocks) -> tuple[Trim, Trim]:
    """What keeps the `keep` largest magnitudes of x and of y, each exactly.

    Args:
        keep: elements to keep of each, 0 to `numel`.
        numel: elements of the tensor.
        blocks: passes over the pair.
    """
    from safemerge_recipes.methods import Trim

    if keep <= 0:
        return Trim(math.inf, None), Trim(math.inf, None)
    if keep >= numel:
        return Trim(0.0, None), Trim(0.0, None)
    sides = Selection(keep, numel), Selection(keep, numel)
    for _, *pair in blocks():
        for side, block in zip(sides, pair, strict=True):
            side.look(block)
    for side in sides:
        side.bracket()
    while any(side.trim is None for side in sides):
        for _, *pair in blocks():
            for side, block in zip(sides, pair, strict=True):
                if side.trim is None:
                    side.count(block)
        for side in sides:
            if side.trim is None:
                side.settle()
    first, second = (side.trim for side in sides)
    assert first is not None
    assert second is not None
    return first, second
