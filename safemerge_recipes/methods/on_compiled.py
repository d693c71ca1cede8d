"""A task's bytes from the compiled kernels: reads each piece once a pass, and merges and rounds it in one go."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator

from safemerge_recipes.methods.compiled_tensor import Tensor, streamed
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.methods.work import Work
from safemerge_recipes.storage.cut import largest
from safemerge_recipes.storage.dtypes import itemsize
from safemerge_recipes.storage.finite import refuse_non_finite
from safemerge_recipes.storage.layout import Slot
from safemerge_recipes.weights import compiled
from safemerge_recipes.weights.algebra import LowRank, Stored, has_factors
from safemerge_recipes.weights.quantised import Quantised


def fits(work: Work, dtype: str) -> bool:
    """Whether the compiled kernels are there and can do this work, in float32, with an output of the dtype."""
    if compiled.LIBRARY is None or dtype not in compiled.DTYPES or not work.is_compiled:
        return False
    return all(
        isinstance(operand, Quantised)
        or (isinstance(operand, Stored | LowRank) and all(ref.dtype in compiled.DTYPES for ref in operand.refs))
        for weight in work.weights
        for _, operand in weight
    )


def memory(work: Work, slot: Slot) -> int:
    """Bytes for work that `fits`, with what a search holds: pieces as stored and as written, factors, strips."""
    piece = largest(slot.shape)
    read = [one for one in streamed(work.weights) if isinstance(one, Stored)]
    width = sum(itemsize(one.ref.dtype) for one in read) + itemsize(slot.dtype)
    operands = [operand for weight in work.weights for _, operand in weight]
    factors = sum(one.memory(piece) * (1 if isinstance(one, Quantised) else 4) for one in operands)
    columns = slot.shape[-1] if slot.shape else 1
    strip = compiled.strip(columns if any(map(has_factors, work.weights)) else None)
    strips = 4 * strip * compiled.strips(len(work.weights) - 1)
    found = 4 * piece if len(work.weights) > 1 else 0
    return piece * width + factors + strips + found + work.held(slot)


def rounded(work: Work, slot: Slot, tools: Tools, stop: threading.Event, allow_overflow: bool) -> Iterator[memoryview]:
    """The tensor's bytes, piece by piece, each valid until the next.

    Raises:
        SourceError: values are not finite, or do not fit the dtype and `allow_overflow` is not set.
    """
    b = Tensor(work.weights, slot, tools, stop)
    work.set_up(b)
    bad, width = (ctypes.c_int64 * 2)(), itemsize(slot.dtype)
    for first, count in b():
        b.compiled.sm_merge(b.merge, first, count, b.out.ctypes.data, b.scratch.ctypes.data, bad)
        if bad[0]:
            refuse_non_finite(slot.name, slot.dtype, work.refs, bad[0], bad[1], allow_overflow)
            bad[0] = bad[1] = 0
        yield b.out[: count * width].data
