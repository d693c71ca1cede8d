"""A tensor as the compiled kernels see it: its pieces, and the structure of native/merge.c that points to them."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safemerge_recipes.methods.threshold import Bracket, Magnitudes
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.storage.cut import ranges
from safemerge_recipes.storage.dtypes import itemsize
from safemerge_recipes.storage.layout import Slot
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.workers import check
from safemerge_recipes.weights import compiled
from safemerge_recipes.weights.algebra import LowRank, Stored, Weight, has_factors
from safemerge_recipes.weights.dequantise import Pieces
from safemerge_recipes.weights.quantised import Quantised, Read

if TYPE_CHECKING:
    import numpy as np


def streamed(weights: tuple[Weight, ...]) -> tuple[Stored | Quantised, ...]:
    """Every tensor that is read piece by piece, once."""
    operands = (operand for weight in weights for _, operand in weight)
    return tuple(dict.fromkeys(operand for operand in operands if isinstance(operand, Read)))


class Tensor:
    """A tensor's pieces of all weights: where their bytes go, and the structure of native/merge.c that points there.

    A kernel's `set_up` sets the rest of the structure, `merge`, from passes over the pieces.
    """

    def __init__(self, weights: tuple[Weight, ...], slot: Slot, tools: Tools, stop: threading.Event) -> None:
        import numpy as np

        assert compiled.LIBRARY is not None  # callers have asked `fits`
        self.compiled, arena = compiled.LIBRARY, tools.arena
        shape, dtype = slot.shape, slot.dtype
        self.name, self.numel, self.stop = slot.name, math.prod(shape), stop
        self.ranges = list(ranges(shape, any(map(has_factors, weights))))
        self.columns = shape[-1] if shape else 1
        most = max((last - first for first, last in self.ranges), default=0)
        self.read = streamed(weights)
        self.pieces = [
            Pieces(operand, tools.reader, arena, f"raw {number}", most) for number, operand in enumerate(self.read)
        ]
        self.merge = compiled.Merge()
        self.merge.dtype = compiled.DTYPES[dtype]
        self._kept: list[Any] = []  # what the structure points to
        self._left: list[tuple[compiled.Sum, int]] = []
        origin, sides = (None, weights) if len(weights) == 1 else (weights[0], weights[1:])
        placed = (compiled.Sum * len(sides))()
        self.merge.sides, self.merge.count = placed, len(sides)
        for place, weight in zip(placed, sides, strict=True):
            self._point(place, weight, tools.reader)
        if origin is not None:
            self._point(self.merge.origin, origin, tools.reader)
        self._kept.append(placed)
        rows = any(one.rank for one in (*placed, self.merge.origin))
        strip = compiled.strip(self.columns if rows else None)
        self.scratch = arena.array("strips", compiled.strips(len(sides)) * strip, np.float32)
        self.found = arena.array("found", most if len(weights) > 1 else 0, np.float32)
        self.out = arena.array("out", most * itemsize(dtype), np.uint8)

    def _point(self, place: compiled.Sum, weight: Weight, reader: Reader) -> None:
        read = [(float(c), self.pieces[self.read.index(one)]) for c, one in weight if isinstance(one, Read)]
        terms = compiled.terms([(c, pieces.dtype, pieces.raw.ctypes.data) for c, pieces in read])
        place.terms, place.count = terms, len(read)
        self._kept.append(terms)
        low_rank = Weight(tuple((c, operand) for c, operand in weight if isinstance(operand, LowRank)))
        if low_rank.terms:
            import numpy as np

            from safemerge_recipes.weights.numpy_rows import numpy_factors

            left, right = numpy_factors(low_rank, reader)
            left, tiles = np.ascontiguousarray(left, np.float32), compiled.tiled(right)
            self._kept += [left, tiles]
            place.right, place.rank, place.columns = tiles.ctypes.data, right.shape[0], self.columns
            self._left.append((place, left.ctypes.data))

    def _held(self, kind: Any, values: Sequence[Any]) -> Any:
        """An array that the structure may point to."""
        array = (kind * len(values))(*values)
        self._kept.append(array)
        return array

    def share(self, shares: Sequence[float]) -> None:
        """Sets what each side is multiplied by in a sum or an election."""
        self.merge.shares = self._held(ctypes.c_float, shares)

    def trim(self, trims: Sequence[compiled.Trim]) -> None:
        """Sets what trimming keeps of each side."""
        self.merge.trims = self._held(compiled.Trim, trims)

    def draw(self, draws: Sequence[compiled.Draw]) -> None:
        """Sets the random choice of each pair of sides."""
        self.merge.draws = self._held(compiled.Draw, draws)

    def scale(self, scales: Sequence[float]) -> None:
        """Sets what each side is multiplied by after dropping."""
        self.merge.scales = self._held(ctypes.c_float, scales)

    def __call__(self, every: int = 1) -> Iterator[tuple[int, int]]:
        """Reads piece after piece; (its first element, its number of elements)."""
        for first, last in self.ranges[::every]:
            check(self.stop)
            count = last - first
            for pieces in self.pieces:
                pieces.read(first, last)
            for place, left in self._left:
                place.left = left + first // self.columns * place.rank * 4
            yield first, count

    def dots(self) -> tuple[float, float, float]:
        """‖x‖², ‖y‖² and x·y in float64: one pass."""
        found = (ctypes.c_double * 3)()
        for _, count in self():
            self.compiled.sm_dots(self.merge, count, found, self.scratch.ctypes.data)
        return found[0], found[1], found[2]

    def sizes(self) -> list[tuple[float, float]]:
        """(the sum of the magnitudes, that of those which the draw keeps) of each side, in float64: one pass."""
        found = (ctypes.c_double * (2 * self.merge.count))()
        for first, count in self():
            self.compiled.sm_sizes(self.merge, first, count, found, self.scratch.ctypes.data)
        return list(zip(found[::2], found[1::2], strict=True))

    def magnitudes(self) -> Magnitudes:
        """The sides' magnitudes, for the search of their thresholds."""
        return _Magnitudes(self)


@dataclass(frozen=True, slots=True)
class _Magnitudes:
    """The sides' magnitudes for the search of their thresholds."""

    tensor: Tensor

    def look(self, every: int, stride: int) -> Iterator[tuple[int, np.ndarray]]:
        """(side, every stride-th magnitude of a piece)."""
        b = self.tensor
        for _, count in b(every):
            for side in range(b.merge.count):
                number = b.compiled.sm_look(b.merge, side, count, stride, b.found.ctypes.data, b.scratch.ctypes.data)
                yield side, b.found[:number].copy()

    def count(self, brackets: Sequence[Bracket | None]) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """(side, magnitudes above the bracket, inside it, those unless it is one value) of piece after piece."""
        b, counts = self.tensor, (ctypes.c_int64 * 2)()
        for _, count in b():
            for side, bracket in enumerate(brackets):
                if bracket is not None:
                    b.compiled.sm_count(
                        b.merge, side, count, *bracket, counts, b.found.ctypes.data, b.scratch.ctypes.data
                    )
                    yield side, counts[0], counts[1], b.found[: 0 if bracket[0] == bracket[1] else counts[1]]
