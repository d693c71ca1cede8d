"""Operands beyond stored tensors and low-rank products: what rarer adapters and vocabularies make of a weight.

Each is a frozen description that can be compared, like the two in `algebra`; `torch_operands` evaluates them.
Knows nothing of files' names, roles or PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.algebra import LowRank, Naming, Operand, Stored, Weight
from safemerge_recipes.weights.quantised import Quantised


def _sources(weight: Weight, piece: int) -> int:
    """Bytes that evaluating a weight inside an operand takes: its pieces and whatever its operands hold."""
    return 4 * 8 * piece + weight.memory(piece)


@dataclass(frozen=True, slots=True)
class LowRankStack(Operand):
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

    def member(self, number: int, rows: tuple[int, int] | None = None) -> LowRank:
        """The product of one expert, or (first row, number of rows) of it."""
        rank = self.a.shape[0] // self.count
        b = self.b if rows is None else self.b.part(*rows)
        return LowRank(b, self.a.part(number * rank, rank), self.scale, self.transposed, columns=(number, self.count))

    def entry(self, number: int) -> Weight:
        """The product of one expert."""
        return Weight.of(self.member(number))

    def describe(self, name: Naming) -> str:
        """Factors, scale and layout."""
        return f"LowRankStack({name(self.b)},{name(self.a)}*{self.scale!r}T{self.transposed}N{self.count})"

    def memory(self, piece: int) -> int:
        """The factors in float32, twice, and one piece."""
        return 8 * (self.b.numel + self.a.numel) + 8 * piece


@dataclass(frozen=True, slots=True)
class Rescaled(Operand):
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

    @property
    def inside(self) -> tuple[Weight, ...]:
        """The weight, and the magnitudes."""
        return (self.weight, Weight.of(Stored(self.magnitude)))

    def describe(self, name: Naming) -> str:
        """Weight, magnitudes and orientation."""
        return f"Rescaled({self.weight.describe(name)},{name(self.magnitude)}C{self.columns})"

    def memory(self, piece: int) -> int:
        """The weight's own, and one factor a row or column."""
        return _sources(self.weight, piece) + 4 * 8 * self.magnitude.numel


@dataclass(frozen=True, slots=True)
class Rows(Operand):
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

    @property
    def inside(self) -> tuple[Weight, ...]:
        """The parts."""
        return self.parts

    def describe(self, name: Naming) -> str:
        """The parts and the runs."""
        return f"Rows({';'.join(part.describe(name) for part in self.parts)}|{self.runs})"

    def memory(self, piece: int) -> int:
        """One piece, and the parts' own."""
        return 8 * piece + sum(_sources(part, piece) for part in self.parts) + 64 * len(self.runs)


@dataclass(frozen=True, slots=True)
class Fused(Operand):
    """Matrices `(rows, columns)` one below the other as one tensor, such as the experts of a mixture.

    Attributes:
        whole: shape of the tensor; all but its last dimension count the rows.
        parts: (number of rows, what stands there) in order, together all rows; an empty sum stands for zeros.
    """

    whole: tuple[int, ...]
    parts: tuple[tuple[int, Weight], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return self.whole

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Those of all parts."""
        return tuple(dict.fromkeys(ref for _, part in self.parts for ref in part.refs))

    @property
    def inside(self) -> tuple[Weight, ...]:
        """The parts."""
        return tuple(part for _, part in self.parts)

    def describe(self, name: Naming) -> str:
        """The parts and where they stand."""
        return f"Fused({self.shape}:{';'.join(f'{rows}:{part.describe(name)}' for rows, part in self.parts)})"

    def memory(self, piece: int) -> int:
        """One piece, and the greatest part's own, as one is open at a time."""
        most = max((_sources(part, piece) for _, part in self.parts if part.terms), default=0)
        return 8 * piece + most + 64 * len(self.parts)

    def entry(self, number: int) -> Weight:
        """The parts that stand there."""
        rows = math.prod(self.shape[1:-1])
        first, found = 0, []
        for count, part in self.parts:
            if number * rows <= first < (number + 1) * rows:
                found.append((count, part))
            first += count
        if len(found) == 1:
            return found[0][1]
        return Weight.of(Fused(self.shape[1:], tuple(found))) if any(part.terms for _, part in found) else Weight()


@dataclass(frozen=True, slots=True)
class Transposed(Operand):
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

    @property
    def inside(self) -> tuple[Weight, ...]:
        """The matrix."""
        return (Weight.of(self.operand),)

    def transpose(self) -> Operand:
        """The matrix."""
        return self.operand

    def describe(self, name: Naming) -> str:
        """The matrix."""
        return f"Transposed({self.operand.describe(name)})"

    def memory(self, piece: int) -> int:
        """The matrix and its transpose."""
        return 2 * 8 * math.prod(self.shape) + _sources(Weight.of(self.operand), piece)


def transposed(weight: Weight) -> Weight:
    """The transpose of a matrix."""
    return Weight(tuple((coefficient, operand.transpose() or Transposed(operand)) for coefficient, operand in weight))


def member(weight: Weight, number: int) -> Weight:
    """One matrix of a stack `(n, rows, columns)`, as a weight `(rows, columns)`."""
    return sum((operand.entry(number) * coefficient for coefficient, operand in weight), Weight())


def leaves(weight: Weight) -> Iterator[Operand]:
    """The operands that a weight is made of in the end: none that holds others."""
    for _, operand in weight:
        if not operand.inside:
            yield operand
        for part in operand.inside:
            yield from leaves(part)


def plain_refs(weight: Weight) -> tuple[TensorRef, ...]:
    """The stored tensors of a weight whose elements are its numbers: no codes, and no scales of codes."""
    found = (operand for operand in leaves(weight) if not isinstance(operand, Quantised))
    return tuple(dict.fromkeys(ref for operand in found for ref in operand.refs))
