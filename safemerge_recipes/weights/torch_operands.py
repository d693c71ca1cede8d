"""How the rarer operands become torch tensors: each is opened once, then gives the values of ranges of whole rows.

What stands inside an operand is evaluated by whoever opens it, so that this knows nothing of sums.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.cut import ranges
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.weights.algebra import Weight
from safemerge_recipes.weights.operands import Fused, LowRankStack, Rescaled, Rows, Transposed
from safemerge_recipes.weights.torch_factors import load

if TYPE_CHECKING:
    import torch

Piece = Callable[[int, int], "torch.Tensor"]
"""(start, stop) of whole rows of the flattened tensor -> the values, valid until the next call."""


@dataclass(frozen=True, slots=True)
class Opening:
    """What an operand is opened with.

    Attributes:
        reader: open files.
        arena: the worker's buffers.
        slot: names the operand's buffers there.
        dtype: dtype of the arithmetic.
        evaluate: (weight inside the operand, name of its buffers) -> its values.
    """

    reader: Reader
    arena: Arena
    slot: str
    dtype: torch.dtype
    evaluate: Callable[[Weight, str], Piece]


def _stack(operand: LowRankStack, how: Opening) -> Piece:
    """Rows of one expert after the other; a piece may begin and end inside experts."""
    a, b = (load(how.reader, ref, how.dtype, how.arena.device) for ref in (operand.a, operand.b))
    a = a.view(operand.count, -1, a.shape[1]) * operand.scale
    b = b.view(b.shape[0], -1, operand.count).permute(2, 0, 1)
    left, right = (a.transpose(1, 2), b.transpose(1, 2)) if operand.transposed else (b, a)
    _, rows, columns = operand.shape

    def piece(start: int, stop: int) -> torch.Tensor:
        out = how.arena.take(how.slot, stop - start, how.dtype)
        first, last = start // columns, stop // columns
        while first < last:
            expert, row = divmod(first, rows)
            count = min(rows - row, last - first)
            at = first * columns - start
            view = out[at : at + count * columns].view(count, columns)
            view.copy_(left[expert, row : row + count] @ right[expert])
            first += count
        return out

    return piece


def _rescaled(operand: Rescaled, how: Opening) -> Piece:
    """Norms first, in one pass over the weight; sums of squares in float64."""
    import torch

    evaluate = how.evaluate(operand.weight, "in")
    width = operand.shape[-1]
    squares = torch.zeros(operand.magnitude.numel, dtype=torch.float64, device=how.arena.device)
    for start, stop in ranges(operand.shape, whole_rows=True):
        part = evaluate(start, stop).view(-1, width)
        if operand.columns:
            squares += (part * part).double().sum(dim=0)
        else:
            squares[start // width : stop // width] = (part * part).double().sum(dim=1)
    magnitude = load(how.reader, operand.magnitude, torch.float64, how.arena.device).flatten()
    factor = (magnitude / squares.sqrt()).to(how.dtype)

    def piece(start: int, stop: int) -> torch.Tensor:
        out = evaluate(start, stop)
        rows = factor if operand.columns else factor[start // width : stop // width, None]
        out.view(-1, width).mul_(rows)
        return out

    return piece


def _rows(operand: Rows, how: Opening) -> Piece:
    """Rows are taken from run to run."""
    sources = [how.evaluate(part, str(number)) for number, part in enumerate(operand.parts)]
    width = math.prod(operand.shape[1:])
    starts = list(accumulate((count for _, _, count in operand.runs), initial=0))

    def piece(start: int, stop: int) -> torch.Tensor:
        out = how.arena.take(how.slot, stop - start, how.dtype)
        row, last = start // width, stop // width
        at = bisect_right(starts, row) - 1
        while row < last:
            part, first, count = operand.runs[at]
            skip = row - starts[at]
            take = min(count - skip, last - row)
            begin = (first + skip) * width
            place = row * width - start
            out[place : place + take * width] = sources[part](begin, begin + take * width)
            row, at = row + take, at + 1
        return out

    return piece


def _fused(operand: Fused, how: Opening) -> Piece:
    """Parts follow one another; a piece may begin and end inside parts. Only the part at hand is open."""
    width = operand.shape[-1]
    starts = list(accumulate((count for count, _ in operand.parts), initial=0))
    opened: tuple[int, Piece | None] = (-1, None)

    def piece(start: int, stop: int) -> torch.Tensor:
        nonlocal opened
        out = how.arena.take(how.slot, stop - start, how.dtype)
        row, last = start // width, stop // width
        while row < last:
            at = bisect_right(starts, row) - 1
            count, part = operand.parts[at]
            if opened[0] != at:
                opened = at, how.evaluate(part, "in") if part.terms else None
            skip = row - starts[at]
            take = min(count - skip, last - row)
            place = row * width - start
            view = out[place : place + take * width]
            if opened[1] is None:
                view.zero_()
            else:
                view.copy_(opened[1](skip * width, (skip + take) * width))
            row += take
        return out

    return piece


def _transposed(operand: Transposed, how: Opening) -> Piece:
    """Evaluates the whole matrix at once."""
    import torch

    evaluate = how.evaluate(Weight.of(operand.operand), "in")
    whole = torch.empty(operand.operand.shape, dtype=how.dtype, device=how.arena.device)
    for start, stop in ranges(operand.operand.shape, whole_rows=True):
        whole.view(-1)[start:stop] = evaluate(start, stop)
    flat = whole.T.contiguous().view(-1)
    return lambda start, stop: flat[start:stop]


OPENED: Mapping[type[Any], Callable[[Any, Opening], Piece]] = {
    Fused: _fused,
    LowRankStack: _stack,
    Rescaled: _rescaled,
    Rows: _rows,
    Transposed: _transposed,
}
"""Every operand that is neither stored nor a product of factors, and what opens it."""
