"""The k-th largest magnitude of a streamed tensor, exactly, without sorting it.

A first look at a few evenly spread elements brackets the threshold; one pass counts what lies above the
bracket and collects what lies inside; the answer is found among the collected. Where the bracket misses
(the look was misleading), or too much lies inside, another pass goes on with what is known then. Whatever the
way, the answer is the exact order statistic.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

    from safemerge_recipes.blocks import Arena
    from safemerge_recipes.methods import Blocks, Trim

LOOKS = 1 << 16, 1 << 19
"""Elements of a tensor that are looked at first, about: the least, and the most; between them one of 512."""
GLANCE = 8
"""Where looking takes reading, only every so-many-th block is read for it."""
SLACK = 6.0
"""Half-width of the bracket in standard deviations of the looked-at quantile."""
HELD = 1 << 22
"""Elements collected of one side at most; where more lie inside the bracket, evenly spread ones narrow it."""


class Selection:
    """The search for one side's threshold: feed it blocks, pass by pass, until `trim` is known."""

    def __init__(self, keep: int, numel: int) -> None:
        self.keep, self.numel = keep, numel
        self.low, self.high = 0.0, math.inf
        self.trim: Trim | None = None
        self._looked: list[np.ndarray] = []
        self._slack = SLACK
        self._around = (0.0, math.inf)  # the bracket, while `low` = `high` is one value tried inside it
        self._sure = (0.0, math.inf)  # what surely holds the threshold ...
        self._place = keep / numel  # ... and how much of what lies there is above it
        self._restart()

    def _restart(self) -> None:
        self._above = self._equal = self._within = self._held = 0
        self._stride = 1
        self._inside: list[np.ndarray] = []

    def look(self, x: torch.Tensor) -> None:
        """Takes every so-many-th element of a block into the sample."""
        looks = min(max(LOOKS[0], self.numel >> 9), LOOKS[1])
        stride = max(1, self.numel // (GLANCE * looks)) | 1  # odd, so that it does not walk along columns
        self._looked.append(x[::stride].abs().cpu().numpy())

    def bracket(self) -> None:
        """Sets the magnitudes between which the threshold lies almost surely; wider at each further call."""
        import numpy as np

        ordered = np.sort(np.concatenate(self._looked))
        self._looked = [ordered]
        n, fraction = len(ordered), self._place
        slack = self._slack * math.sqrt(n * fraction * (1 - fraction)) + 2
        low, high = int((1 - fraction) * n - slack), int((1 - fraction) * n + slack)
        self.low = float(ordered[low]) if low >= 0 else self._sure[0]
        self.high = float(ordered[high]) if high < n else self._sure[1]
        self._slack *= 8
        self._around = self.low, self.high
        values, counts = np.unique(ordered[max(low, 0) : high + 1], return_counts=True)
        if (low >= 0 or high < n) and 4 * int(counts.max()) >= int(counts.sum()):
            # Differences of rounded weights take few values; a common one is tried by counting alone.
            self.low = self.high = float(values[counts.argmax()])

    def count(self, x: torch.Tensor, arena: Arena) -> None:
        """Counts what lies above the bracket and collects what lies inside, ends included."""
        import numpy as np
        import torch

        # numpy compares and compresses several times faster than torch
        size = torch.abs(x, out=arena.take("size", x.numel(), x.dtype)).cpu().numpy()
        above, inside = (arena.take(s, x.numel(), torch.bool, device="cpu").numpy() for s in ("above", "inside"))
        if self.high < math.inf:
            self._above += int(np.count_nonzero(np.greater(size, size.dtype.type(self.high), out=above)))
        if self.low == self.high:  # one value fills the bracket: counting it is enough
            self._equal += int(np.count_nonzero(np.equal(size, size.dtype.type(self.low), out=inside)))
            return
        np.greater_equal(size, size.dtype.type(self.low), out=inside)
        if self.high < math.inf:
            np.not_equal(inside, above, out=inside)  # what is above is also at least `low`
        found = size[inside]
        self._within += len(found)
        self._inside.append(found[:: self._stride])
        self._held += len(self._inside[-1])
        if self._held > HELD:
            self._inside = [np.concatenate(self._inside)[::2].copy()]
            self._held, self._stride = len(self._inside[0]), 2 * self._stride

    def _narrow(self, spread: np.ndarray, place: float) -> None:
        """Goes on between `low` and `high`, which surely hold the threshold, from elements spread over what lies there.

        Where that was tried and brought nothing, one value splits the rest.
        """
        again = self._sure == (self.low, self.high)
        self._sure, self._place, self._slack, self._looked = (self.low, self.high), place, SLACK, [spread]
        if not again:
            self.bracket()
            return
        self._around = self._sure
        spread.sort()
        self.low = self.high = float(spread[min(int((1 - place) * len(spread)), len(spread) - 1)])

    def settle(self) -> None:
        """Sets `trim` from what was collected, or a wider bracket if the threshold was missed."""
        import numpy as np

        from safemerge_recipes.methods import Trim

        wanted, equal, within, stride = self.keep - self._above, self._equal, self._within, self._stride
        inside = np.concatenate(self._inside) if self._inside else np.full(0, self.low)
        self._restart()
        if not 1 <= wanted <= within + equal:
            low, high = self._around
            if self.low == 0 and self.high == math.inf:  # all was counted: the rest compares with nothing, it is NaN
                self.trim = Trim(math.nan, math.inf)
            elif self.low == self.high and low < high:
                value = self._looked[0].dtype.type(self.low)
                up, down = float(np.nextafter(value, np.inf)), float(np.nextafter(value, -np.inf))
                self.low, self.high = (up, high) if wanted < 1 else (low, down)
                self._around = self.low, self.high
            else:
                self.bracket()
            return
        if stride > 1:
            self._narrow(inside, wanted / within)
            return
        threshold, ties = self.low, wanted
        if not equal:
            place = within - wanted
            inside.partition(place)
            threshold = float(inside[place])
            ties = wanted - int(np.count_nonzero(inside > threshold))
            equal = int(np.count_nonzero(inside == threshold))
        self.trim = Trim(math.nan if threshold == math.inf else threshold, math.inf if ties == equal else ties)


def trims(keep: int, numel: int, blocks: Blocks, arena: Arena) -> tuple[Trim, Trim]:
    """What keeps the `keep` largest magnitudes of x and of y, each exactly.

    Args:
        keep: elements to keep of each, 0 to `numel`.
        numel: elements of the tensor.
        blocks: passes over the pair.
        arena: the worker's buffers.
    """
    from safemerge_recipes.methods import Trim

    if keep <= 0:
        return Trim(math.inf, 0), Trim(math.inf, 0)
    if keep >= numel:
        return Trim(0.0, 0), Trim(0.0, 0)
    sides = Selection(keep, numel), Selection(keep, numel)
    for _, *pair in blocks(every=GLANCE):
        for side, block in zip(sides, pair, strict=True):
            side.look(block)
    for side in sides:
        side.bracket()
    while any(side.trim is None for side in sides):
        for _, *pair in blocks():
            for side, block in zip(sides, pair, strict=True):
                if side.trim is None:
                    side.count(block, arena)
        for side in sides:
            if side.trim is None:
                side.settle()
    first, second = (side.trim for side in sides)
    assert first is not None
    assert second is not None
    return first, second
