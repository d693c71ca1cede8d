"""A task's bytes from the compiled kernels: reads each block once a pass, and merges and rounds it in one go."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safemerge_recipes.methods.base import Apply, Kernel, Sum, Tools, Work
from safemerge_recipes.methods.kernels import Consensus, Dare, Slerp, Ties
from safemerge_recipes.methods.threshold import Bracket, Trim, trims
from safemerge_recipes.storage.cut import ranges
from safemerge_recipes.storage.dtypes import itemsize
from safemerge_recipes.storage.finite import refuse_non_finite
from safemerge_recipes.storage.layout import Slot
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.storage.workers import check
from safemerge_recipes.weights import compiled as native
from safemerge_recipes.weights.algebra import LowRank, Stored, Weight, has_factors
from safemerge_recipes.weights.draw import Draw

if TYPE_CHECKING:
    import numpy as np

KERNELS = (Slerp, Ties, Dare)
"""Methods that are compiled."""


def fits(work: Work, dtype: str) -> bool:
    """Whether the compiled kernels are there and can do this work, in float32, with an output of the dtype."""
    if native.LIBRARY is None or dtype not in native.DTYPES:
        return False
    if not (isinstance(work, Sum) or (isinstance(work, Apply) and isinstance(work.kernel, KERNELS))):
        return False
    return all(
        isinstance(operand, Stored | LowRank) and all(ref.dtype in native.DTYPES for ref in operand.refs)
        for weight in _weights(work)
        for _, operand in weight
    )


def memory(work: Sum | Apply, slot: Slot, block: int) -> int:
    """Bytes for work that `fits`, with blocks of `block` elements: as stored and as written, factors and strips."""
    width = sum(itemsize(ref.dtype) for ref in _stored(work)) + itemsize(slot.dtype)
    factors = 4 * sum(weight.memory(block) for weight in _weights(work))
    columns = slot.shape[-1] if slot.shape else 1
    strips = 3 * 4 * native.strip(columns if any(map(has_factors, _weights(work))) else None)
    found = 4 * block if isinstance(work, Apply) else 0
    return block * width + factors + strips + found


def _weights(work: Sum | Apply) -> tuple[Weight, ...]:
    return (work.weight,) if isinstance(work, Sum) else (*work.inputs, work.origin)


def _stored(work: Sum | Apply) -> tuple[TensorRef, ...]:
    """Every tensor that is read block by block, once."""
    operands = (operand for weight in _weights(work) for _, operand in weight)
    return tuple(dict.fromkeys(operand.ref for operand in operands if isinstance(operand, Stored)))


class _Blocks:
    """A tensor's blocks of all weights: where their bytes go, and the structure that points there."""

    def __init__(self, work: Sum | Apply, slot: Slot, tools: Tools) -> None:
        import numpy as np

        assert native.LIBRARY is not None  # callers have asked `fits`
        self.compiled, self.reader, arena = native.LIBRARY, tools.reader, tools.arena
        weights, shape, dtype = _weights(work), slot.shape, slot.dtype
        self.ranges = list(ranges(shape, any(map(has_factors, weights))))
        self.columns = shape[-1] if shape else 1
        largest = max((last - first for first, last in self.ranges), default=0)
        self.refs = _stored(work)
        self.raw = [
            arena.array(f"raw {number}", largest * itemsize(ref.dtype), np.uint8)
            for number, ref in enumerate(self.refs)
        ]
        self.merge = native.Merge()
        self.merge.dtype = native.DTYPES[dtype]
        self._kept: list[Any] = []  # what the structure points to
        self._left: list[tuple[native.Sum, int]] = []
        for field, weight in zip(("x",) if isinstance(work, Sum) else ("x", "y", "origin"), weights, strict=True):
            self._point(getattr(self.merge, field), weight)
        rows = any(one.rank for one in (self.merge.x, self.merge.y, self.merge.origin))
        self.scratch = arena.array("strips", 3 * native.strip(self.columns if rows else None), np.float32)
        self.found = arena.array("found", largest if isinstance(work, Apply) else 0, np.float32)
        self.out = arena.array("out", largest * itemsize(dtype), np.uint8)

    def _point(self, place: native.Sum, weight: Weight) -> None:
        stored = [(float(c), operand.ref) for c, operand in weight if isinstance(operand, Stored)]
        terms = native.terms([(c, ref.dtype, self.raw[self.refs.index(ref)].ctypes.data) for c, ref in stored])
        place.terms, place.count = terms, len(stored)
        self._kept.append(terms)
        thin = Weight(tuple((c, operand) for c, operand in weight if isinstance(operand, LowRank)))
        if thin.terms:
            import numpy as np

            from safemerge_recipes.weights.numpy_rows import plain_factors

            left, right = plain_factors(thin, self.reader)
            left, tiles = np.ascontiguousarray(left, np.float32), native.tiled(right)
            self._kept += [left, tiles]
            place.right, place.rank, place.columns = tiles.ctypes.data, right.shape[0], self.columns
            self._left.append((place, left.ctypes.data))

    def __call__(self, stop: threading.Event, every: int = 1) -> Iterator[tuple[int, int]]:
        """Reads block after block; (its first element, its number of elements)."""
        for first, last in self.ranges[::every]:
            check(stop)
            count = last - first
            for ref, raw in zip(self.refs, self.raw, strict=True):
                width = itemsize(ref.dtype)
                self.reader.read_bytes(ref.path, ref.offset + first * width, raw[: count * width].data)
            for place, left in self._left:
                place.left = left + first // self.columns * place.rank * 4
            yield first, count


@dataclass(frozen=True, slots=True)
class _Magnitudes:
    """|x| and |y| for the search of their thresholds."""

    blocks: _Blocks
    stop: threading.Event

    def look(self, every: int, stride: int) -> Iterator[tuple[int, np.ndarray]]:
        """(side, every stride-th magnitude of a block)."""
        b = self.blocks
        for _, count in b(self.stop, every):
            for side in (0, 1):
                number = b.compiled.sm_look(b.merge, side, count, stride, b.found.ctypes.data, b.scratch.ctypes.data)
                yield side, b.found[:number].copy()

    def count(self, brackets: Sequence[Bracket | None]) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """(side, magnitudes above the bracket, inside it, those unless it is one value) of block after block."""
        b, counts = self.blocks, (ctypes.c_int64 * 2)()
        for _, count in b(self.stop):
            for side, bracket in enumerate(brackets):
                if bracket is not None:
                    b.compiled.sm_count(
                        b.merge, side, count, *bracket, counts, b.found.ctypes.data, b.scratch.ctypes.data
                    )
                    yield side, counts[0], counts[1], b.found[: 0 if bracket[0] == bracket[1] else counts[1]]


def rounded(
    work: Sum | Apply, slot: Slot, tools: Tools, stop: threading.Event, allow_overflow: bool
) -> Iterator[memoryview]:
    """The tensor's bytes, block by block, each valid until the next.

    Raises:
        SourceError: values are not finite, or do not fit the dtype and `allow_overflow` is not set.
    """
    b = _Blocks(work, slot, tools)
    if isinstance(work, Apply):
        _prepare(b, work.kernel, slot.name, math.prod(slot.shape), stop)
    bad, width = (ctypes.c_int64 * 2)(), itemsize(slot.dtype)
    for first, count in b(stop):
        b.compiled.sm_merge(b.merge, first, count, b.out.ctypes.data, b.scratch.ctypes.data, bad)
        if bad[0]:
            refuse_non_finite(slot.name, slot.dtype, work.refs, bad[0], bad[1], allow_overflow)
            bad[0] = bad[1] = 0
        yield b.out[: count * width].data


def _prepare(b: _Blocks, kernel: Kernel, name: str, numel: int, stop: threading.Event) -> None:
    """Sets what the method needs to know of the whole tensor, in as many passes as that takes."""
    m = b.merge
    if isinstance(kernel, Slerp):
        dots = (ctypes.c_double * 3)()
        for _, count in b(stop):
            b.compiled.sm_dots(m, count, dots, b.scratch.ctypes.data)
        m.method = native.BLEND
        m.a, m.b = kernel.coefficients(*dots)
    elif isinstance(kernel, Ties):
        m.method, m.consensus = native.TIES, _consensus(kernel.consensus)
        for side, trim in enumerate(trims(kernel.kept(numel), numel, _Magnitudes(b, stop))):
            m.trims[side] = _trim(trim)
    else:
        assert isinstance(kernel, Dare)  # `fits` lets no other through
        m.method = native.DARE_LINEAR if kernel.then is None else native.DARE_TIES
        m.draw = _draw(kernel.draw, name)
        sums = (ctypes.c_double * 4)()
        if kernel.l1:
            for first, count in b(stop):
                b.compiled.sm_sizes(m, first, count, sums, b.scratch.ctypes.data)
        scales = kernel.rescaling(*sums)
        if kernel.then is None:
            m.a, m.b = (weight * scale for weight, scale in zip(kernel.weights, scales, strict=True))
        else:
            m.scales[0], m.scales[1], m.consensus = *scales, _consensus(kernel.then)


def _draw(draw: Draw, name: str) -> native.Draw:
    return native.Draw(*draw.key(name), draw.limit)


def _consensus(one: Consensus) -> native.Consensus:
    alpha, beta = one.weights
    return native.Consensus(alpha, beta, alpha + beta, one.scale, one.normalize)


def _trim(trim: Trim) -> native.Trim:
    if trim.threshold == math.inf:
        return native.Trim(0, 0.0, native.KEEP_NONE)
    if trim.keeps_all:
        return native.Trim(0, 0.0, native.KEEP_ALL)
    return native.Trim(-1 if trim.ties == math.inf else int(trim.ties), trim.threshold, native.KEEP_LARGEST)
