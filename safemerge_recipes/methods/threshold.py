"""The k-th largest magnitude of a streamed tensor, exactly, without sorting it.

A first look at a few evenly spread elements brackets the threshold; one pass counts what lies above the
bracket and collects what lies inside; the answer is found among the collected. Where the bracket misses
(the look was misleading), or too much lies inside, another pass goes on with what is known then. Whatever the
way, the answer is the exact order statistic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from safemerge_recipes.storage.cut import PIECE

if TYPE_CHECKING:
    import numpy as np

Bracket = tuple[float, float]
"""Two magnitudes, ends included, between which a threshold is sought; equal where one value is tried."""

LOOKS = 1 << 12, 1 << 16, 1 << 19
"""Elements of a tensor that are looked at first, about: from the first on one of 32, from the second on one of 512, at
most the last. Sorting them must not take longer than what a narrower bracket saves."""
GLANCE = 8
"""Where looking takes reading, only every so-many-th piece is read for it."""
SLACK = 6.0
"""Half-width of the bracket in standard deviations of the looked-at quantile."""
HELD = 1 << 22
"""Elements collected of one side at most; where more lie inside the bracket, evenly spread ones narrow it."""


@dataclass(frozen=True, slots=True)
class Trim:
    """What keeps the largest magnitudes: all above `threshold`, and the first `ties` of those at it, by position.

    Threshold inf keeps nothing, `ties` inf all of those at it.
    """

    threshold: float
    ties: float

    @property
    def keeps_all(self) -> bool:
        """At 0 or below only zeros could go; NaN, where the k-th magnitude is not finite, keeps everything."""
        return self.threshold <= 0 or math.isnan(self.threshold)


class Magnitudes(Protocol):
    """The magnitudes of a tensor's sides, piece by piece; the sides are 0, 1 ..."""

    def look(self, every: int, stride: int) -> Iterator[tuple[int, np.ndarray]]:
        """(side, every stride-th magnitude of a piece), of every so-many-th piece."""

    def count(self, brackets: Sequence[Bracket | None]) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """(side, magnitudes of a piece above the bracket, number inside it, those unless its ends are equal).

        For the sides that have a bracket; what it holds is valid until the next.
        """


class Selection:
    """The search for one side's threshold: feed it pieces, pass by pass, until `trim` is known."""

    def __init__(self, keep: int, numel: int) -> None:
        self.keep, self.numel = keep, numel
        self.low, self.high = 0.0, math.inf
        self.trim: Trim | None = None
        if keep <= 0:
            self.trim = Trim(math.inf, 0)
        elif keep >= numel:
            self.trim = Trim(0.0, 0)
        self._looked: list[np.ndarray] = []
        self._slack = SLACK
        self._around = (0.0, math.inf)  # the bracket, while `low` = `high` is one value tried inside it
        self._sure = (0.0, math.inf)  # what surely holds the threshold ...
        self._place = keep / max(numel, 1)  # ... and how much of what lies there is above it
        self._restart()

    def _restart(self) -> None:
        self._above = self._equal = self._within = self._held = 0
        self._stride = 1
        self._inside: list[np.ndarray] = []

    @property
    def stride(self) -> int:
        """Distance of the elements that are looked at; odd, so that it does not walk along columns."""
        least, middle, most = LOOKS
        looks = min(max(least, min(self.numel >> 5, middle), self.numel >> 9), most)
        seen = max(self.numel // GLANCE, min(self.numel, PIECE))  # a single piece is seen whole
        return max(1, seen // looks) | 1

    def look(self, magnitudes: np.ndarray) -> None:
        """Takes some of a piece's magnitudes into the sample."""
        self._looked.append(magnitudes)

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

    def count(self, above: int, inside: int, found: np.ndarray) -> None:
        """Takes a piece's counts, and what lies inside the bracket."""
        import numpy as np

        self._above += above
        if self.low == self.high:  # one value fills the bracket: counting it is enough
            self._equal += inside
            return
        self._within += inside
        self._inside.append(found[:: self._stride].copy())
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


def trims(keeps: Sequence[int], numel: int, tensor: Magnitudes) -> tuple[Trim, ...]:
    """What keeps the largest magnitudes of each side, exactly.

    Args:
        keeps: elements to keep of each side, 0 to `numel`.
        numel: elements of the tensor.
        tensor: passes over the sides.
    """
    sides = [Selection(keep, numel) for keep in keeps]
    if all(one.trim for one in sides):
        return tuple(one.trim for one in sides if one.trim)
    for side, magnitudes in tensor.look(GLANCE, sides[0].stride):
        if sides[side].trim is None:
            sides[side].look(magnitudes)
    for one in sides:
        if one.trim is None:
            one.bracket()
    while True:
        brackets = [None if one.trim else (one.low, one.high) for one in sides]
        for side, above, inside, found in tensor.count(brackets):
            sides[side].count(above, inside, found)
        for one in sides:
            if one.trim is None:
                one.settle()
        found_trims = tuple(one.trim for one in sides if one.trim is not None)
        if len(found_trims) == len(sides):
            return found_trims
