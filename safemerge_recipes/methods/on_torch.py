"""A task's values from torch, piece by piece: on a GPU, for methods and operands that are not compiled, in float64."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import singledispatch
from typing import TYPE_CHECKING, Any

from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.methods.work import Apply, Prepare, Sum, Work
from safemerge_recipes.storage.arena import torch_bytes, torch_dtype
from safemerge_recipes.storage.cut import ranges
from safemerge_recipes.storage.finite import refuse_non_finite
from safemerge_recipes.storage.layout import Slot
from safemerge_recipes.storage.workers import check
from safemerge_recipes.weights.algebra import has_factors
from safemerge_recipes.weights.torch_factors import working_dtype
from safemerge_recipes.weights.torch_rows import Evaluator

if TYPE_CHECKING:
    import torch


def rounded(work: Work, slot: Slot, tools: Tools, stop: threading.Event, allow_overflow: bool) -> Iterator[memoryview]:
    """The tensor's bytes, piece by piece, each valid until the next.

    Raises:
        SourceError: values are not finite, or do not fit the dtype and `allow_overflow` is not set.
    """
    dtype = torch_dtype(slot.dtype)
    for piece in values(work, slot, tools, stop):
        out = piece
        if piece.dtype != dtype:
            out = tools.arena.take("out", piece.numel(), dtype).copy_(piece)
        if not bool(out.sum().isfinite()):  # one cheap pass; what it suspects is counted
            refuse(work, slot, piece, out, allow_overflow)
        yield torch_bytes(out)


def refuse(work: Work, slot: Slot, before: torch.Tensor, after: torch.Tensor, allow_overflow: bool) -> None:
    """Raises SourceError where values are not finite after rounding, if there are any."""
    infinite = ~after.isfinite()
    bad = int(infinite.sum())
    if bad:
        overflows = int((infinite & before.isfinite()).sum())
        refuse_non_finite(slot.name, slot.dtype, work.refs, bad, overflows, allow_overflow)


@singledispatch
def values(work: Work, slot: Slot, tools: Tools, stop: threading.Event) -> Iterator[torch.Tensor]:
    """The tensor's values before rounding: flat pieces in the dtype of the arithmetic, each valid until the next."""
    raise TypeError(f"{type(work).__name__} has no values")  # copies are never computed


@values.register(Sum)
def _summed(work: Sum, slot: Slot, tools: Tools, stop: threading.Event) -> Iterator[torch.Tensor]:
    evaluate = Evaluator((work.weight,), tools.reader, tools.arena, "sum", working_dtype(work.weight))
    for first, last in ranges(slot.shape, has_factors(work.weight)):
        check(stop)
        yield evaluate(first, last)[0]


@values.register(Prepare)
def _prepared(work: Prepare, slot: Slot, tools: Tools, stop: threading.Event) -> Iterator[torch.Tensor]:
    shape = slot.shape
    columns = shape[-1]
    rows = work.transform.prepare(slot.name, work.inputs, shape, tools)
    dtype = working_dtype(work.origin, *work.inputs)
    origin = None if work.origin.is_zero else Evaluator((work.origin,), tools.reader, tools.arena, "sum", dtype)
    for first, last in ranges(shape, True):
        check(stop)
        piece = rows(first // columns, last // columns).reshape(-1)
        yield piece if origin is None else origin(first, last)[0].add_(piece)


@values.register(Apply)
def _applied(work: Apply, slot: Slot, tools: Tools, stop: threading.Event) -> Iterator[torch.Tensor]:
    kernel, arena = work.kernel, tools.arena
    weights = (*work.inputs, work.origin)
    dtype = working_dtype(*weights)
    cut = list(ranges(slot.shape, kernel.whole_rows or any(map(has_factors, weights))))
    inputs = Evaluator(work.inputs, tools.reader, arena, "inputs", dtype)

    def passes(every: int = 1) -> Iterator[tuple[Any, ...]]:
        """Reads again what was read: from the page cache that costs less than keeping it as float32."""
        for first, last in cut[::every]:
            check(stop)
            yield first, *inputs(first, last)

    state = kernel.scan(slot.name, cut[-1][1], passes, arena)
    if work.origin.is_zero:
        for first, *found in passes():
            yield kernel.apply(state, first, *found, arena)
        return
    every = Evaluator(weights, tools.reader, arena, "all", dtype)
    for first, last in cut:
        check(stop)
        *found, origin = every(first, last)
        yield kernel.apply(state, first, *found, arena).add_(origin)
