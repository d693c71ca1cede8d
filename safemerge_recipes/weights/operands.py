"""Operands beyond stored tensors and low-rank products: what rarer adapters and vocabularies make of a weight.

Each is a frozen description that can be compared, like the two in `algebra`; `torch_operands` evaluates them.
Knows nothing of files' names, roles or PEFT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.algebra import LowRank, Naming, Operand, Stored, Weight


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
