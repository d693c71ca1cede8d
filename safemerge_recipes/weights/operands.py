"""Operands beyond stored tensors and low-rank products: what rarer adapters and vocabularies make of a weight.

Each is a frozen description that can be compared, like the two in `algebra`, and knows how to evaluate
itself block by block: `open` does what has to be done once (norms, factors) and returns a function from a
range of whole rows to their values. Knows nothing of files' names, roles or PEFT.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

from safemerge_recipes.storage.cut import ranges
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.algebra import LowRank, Naming, Operand, Stored, Weight

if TYPE_CHECKING:
    import torch

    from safemerge_recipes.storage.arena import Arena, Reader

Block = Callable[[int, int], "torch.Tensor"]
"""(start, stop) of whole rows of the flattened tensor -> the values, valid until the next call."""


class Computed(Operand, Protocol):
    """An operand that evaluates itself."""

    def open(self, reader: Reader, arena: Arena, slot: str, dtype: torch.dtype) -> Block:
        """Prepares the evaluation in `dtype`; buffers of the arena are named after `slot`."""


def _sources(weight: Weight, block: int) -> int:
    """Bytes that evaluating a weight inside an operand takes: its blocks and whatever its operands hold."""
    return 4 * 8 * block + weight.memory(block)


@dataclass(frozen=True, slots=True)
class LowRankStack:
    """`scale`·B_e·A_e for every expert e of a fused tensor `(count, d_out, d_in)`, or `(count, d_in, d_out)`.

    Stored as PEFT does for `target_parameters`: A `(count·r, d_in)` one expert after the other, B
    `(d_out, r·count)` with the experts interleaved.
    """

    b: TensorRef
    a: TensorRef
    scale: float
    count: int
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the fused tensor."""
        shape = (self.b.shape[0], self.a.shape[1])
        return (self.count, *(shape[::-1] if self.transposed else shape))

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Both factors."""
        return (self.b, self.a)

    def member(self, number: int) -> LowRank:
        """The product of one expert."""
        rank = self.a.shape[0] // self.count
        return LowRank(
            self.b, self.a.part(number * rank, rank), self.scale, self.transposed, columns=(number, self.count)
        )

    def describe(self, name: Naming) -> str:
        """Factors, scale and layout."""
        return f"LowRankStack({name(self.b)},{name(self.a)}*{self.scale!r}T{self.transposed}N{self.count})"

    def memory(self, block: int) -> int:
        """The factors in float32, twice, and one block."""
        return 8 * (self.b.numel + self.a.numel) + 8 * block

    def open(self, reader: Reader, arena: Arena, slot: str, dtype: torch.dtype) -> Block:
        """Rows of one expert after the other; a block may begin and end inside experts."""
        from safemerge_recipes.weights.torch_rows import load

        a = load(reader, self.a, dtype, arena.device).view(self.count, -1, self.a.shape[1]) * self.scale
        b = load(reader, self.b, dtype, arena.device).view(self.b.shape[0], -1, self.count).permute(2, 0, 1)
        left, right = (a.transpose(1, 2), b.transpose(1, 2)) if self.transposed else (b, a)
        _, rows, columns = self.shape

        def block(start: int, stop: int) -> torch.Tensor:
            out = arena.take(slot, stop - start, dtype)
            first, last = start // columns, stop // columns
            while first < last:
                expert, row = divmod(first, rows)
                count = min(rows - row, last - first)
                at = first * columns - start
                view = out[at : at + count * columns].view(count, columns)
                view.copy_(left[expert, row : row + count] @ right[expert])
                first += count
            return out

        return block


@dataclass(frozen=True, slots=True)
class Rescaled:
    """A weight with every row (or column) scaled to a stored length: DoRA (arXiv 2402.09353).

    W' = m · W / ‖W‖ by row, W `(d_out, d_in)` and m `(d_out,)`; by column where `columns` is set.
    """

    weight: Weight
    magnitude: TensorRef
    columns: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return self.weight.shape

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The weight's tensors and the magnitudes."""
        return (*self.weight.refs, self.magnitude)

    def describe(self, name: Naming) -> str:
        """Weight, magnitudes and orientation."""
        return f"Rescaled({self.weight.describe(name)},{name(self.magnitude)}C{self.columns})"

    def memory(self, block: int) -> int:
        """The weight's own, and one factor a row or column."""
        return _sources(self.weight, block) + 4 * 8 * self.magnitude.numel

    def open(self, reader: Reader, arena: Arena, slot: str, dtype: torch.dtype) -> Block:
        """Norms first, in one pass over the weight; sums of squares in float64."""
        import torch

        from safemerge_recipes.weights.torch_rows import Evaluator, load

        evaluate = Evaluator((self.weight,), reader, arena, f"{slot}:in", dtype)
        width = self.shape[-1]
        squares = torch.zeros(self.magnitude.numel, dtype=torch.float64, device=arena.device)
        for start, stop in ranges(self.shape, whole_rows=True):
            part = evaluate(start, stop)[0].view(-1, width)
            if self.columns:
                squares += (part * part).double().sum(dim=0)
            else:
                squares[start // width : stop // width] = (part * part).double().sum(dim=1)
        magnitude = load(reader, self.magnitude, torch.float64, arena.device).flatten()
        factor = (magnitude / squares.sqrt()).to(dtype)

        def block(start: int, stop: int) -> torch.Tensor:
            (out,) = evaluate(start, stop)
            rows = factor if self.columns else factor[start // width : stop // width, None]
            out.view(-1, width).mul_(rows)
            return out

        return block


@dataclass(frozen=True, slots=True)
class Rows:
    """A tensor put together from rows of others: `runs` holds (part, first row there, number of rows), in order."""

    parts: tuple[Weight, ...]
    runs: tuple[tuple[int, int, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """All rows of the runs, as wide as the parts."""
        return (sum(count for _, _, count in self.runs), *self.parts[0].shape[1:])

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Those of all parts."""
        return tuple(dict.fromkeys(ref for part in self.parts for ref in part.refs))

    def describe(self, name: Naming) -> str:
        """The parts and the runs."""
        return f"Rows({';'.join(part.describe(name) for part in self.parts)}|{self.runs})"

    def memory(self, block: int) -> int:
        """One block, and the parts' own."""
        return 8 * block + sum(_sources(part, block) for part in self.parts) + 64 * len(self.runs)

    def open(self, reader: Reader, arena: Arena, slot: str, dtype: torch.dtype) -> Block:
        """Rows are taken from run to run."""
        from safemerge_recipes.weights.torch_rows import Evaluator

        sources = [
            Evaluator((part,), reader, arena, f"{slot}:{number}", dtype) for number, part in enumerate(self.parts)
        ]
        width = math.prod(self.shape[1:])
        starts = list(accumulate((count for _, _, count in self.runs), initial=0))

        def block(start: int, stop: int) -> torch.Tensor:
            out = arena.take(slot, stop - start, dtype)
            row, last = start // width, stop // width
            at = bisect_right(starts, row) - 1
            while row < last:
                part, first, count = self.runs[at]
                skip = row - starts[at]
                take = min(count - skip, last - row)
                begin = (first + skip) * width
                place = row * width - start
                out[place : place + take * width] = sources[part](begin, begin + take * width)[0]
                row, at = row + take, at + 1
            return out

        return block


@dataclass(frozen=True, slots=True)
class Transposed:
    """The transpose of a matrix, held in memory whole: for measuring layers that are stored `(d_in, d_out)`."""

    operand: Operand

    @property
    def shape(self) -> tuple[int, ...]:
        """The other way round."""
        return self.operand.shape[::-1]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Those of the matrix."""
        return self.operand.refs

    def describe(self, name: Naming) -> str:
        """The matrix."""
        return f"Transposed({self.operand.describe(name)})"

    def memory(self, block: int) -> int:
        """The matrix and its transpose."""
        return 2 * 8 * math.prod(self.shape) + _sources(Weight.of(self.operand), block)

    def open(self, reader: Reader, arena: Arena, slot: str, dtype: torch.dtype) -> Block:
        """Evaluates the whole matrix at once."""
        import torch

        from safemerge_recipes.weights.torch_rows import Evaluator

        evaluate = Evaluator((Weight.of(self.operand),), reader, arena, f"{slot}:in", dtype)
        whole = torch.empty(self.operand.shape, dtype=dtype, device=arena.device)
        for start, stop in ranges(self.operand.shape, whole_rows=True):
            whole.view(-1)[start:stop] = evaluate(start, stop)[0]
        flat = whole.T.contiguous().view(-1)
        return lambda start, stop: flat[start:stop]


def transposed(weight: Weight) -> Weight:
    """The transpose of a matrix."""

    def turn(operand: Operand) -> Operand:
        if isinstance(operand, LowRank):
            return replace(operand, transposed=not operand.transposed)
        return operand.operand if isinstance(operand, Transposed) else Transposed(operand)

    return Weight(tuple((coefficient, turn(operand)) for coefficient, operand in weight))


def member(weight: Weight, number: int) -> Weight:
    """One matrix of a stack `(n, rows, columns)`, as a weight `(rows, columns)`."""

    def pick(operand: Operand) -> Operand:
        if isinstance(operand, LowRankStack):
            return operand.member(number)
        assert isinstance(operand, Stored), operand  # nothing else is stacked
        return Stored(operand.ref.part(number))

    return Weight(tuple((coefficient, pick(operand)) for coefficient, operand in weight))
