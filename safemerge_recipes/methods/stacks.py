"""Transforms of one matrix `(d_out, d_in)`, done for what is stored otherwise: stacks of experts, Conv1D.

Between a method, which knows one matrix, and the engine, which knows tensors as they are stored. Experts are taken one
after the other, each as if it were alone; the name that seeds an iteration is that of measuring, `tensor[expert]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from safemerge_recipes.methods.kernel import Rows, Transform
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.methods.work import Prepare, Work
from safemerge_recipes.storage.cut import largest
from safemerge_recipes.weights.algebra import Weight
from safemerge_recipes.weights.operands import member, transposed

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Each(Transform):
    """A transform of every matrix of a stack, or of one matrix; `turned`: they are stored `(d_in, d_out)`.

    A turned matrix and its result are held whole, since the rows that are written are columns of the formula.
    """

    inner: Transform
    turned: bool
    matrices: ClassVar[str] = "matrix"

    def memory(self, inputs: tuple[Weight, ...], shape: tuple[int, ...]) -> int:
        """Bytes for the matrix that takes most; a turned one's transposes, and its result both ways."""
        return max(self._memory(self._inputs(inputs, shape, number), shape) for number in range(_count(shape)))

    def prepare(self, name: str, inputs: tuple[Weight, ...], shape: tuple[int, ...], tools: Tools) -> Rows:
        """Rows of one matrix after the other; asked for in order, so that one is prepared at a time."""
        import torch

        height = shape[-2]
        at: tuple[int, Rows | None] = (-1, None)

        def of(number: int) -> Rows:
            nonlocal at
            if at[0] != number or at[1] is None:
                at = number, None  # what the one before holds can go first
                own = name if len(shape) == 2 else f"{name}[{number}]"
                at = number, self._one(own, self._inputs(inputs, shape, number), shape, tools)
            assert at[1] is not None
            return at[1]

        def rows(first: int, last: int) -> torch.Tensor:
            pieces: list[torch.Tensor] = []
            while first < last:
                number, row = divmod(first, height)
                end = min(height, row + last - first)
                piece = of(number)(row, end)
                pieces.append(piece if end - row == last - first and not pieces else piece.clone())
                first += end - row
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

        return rows

    def _inputs(self, inputs: tuple[Weight, ...], shape: tuple[int, ...], number: int) -> tuple[Weight, ...]:
        own = inputs if len(shape) == 2 else tuple(member(weight, number) for weight in inputs)
        return tuple(transposed(weight) for weight in own) if self.turned else own

    def _memory(self, inputs: tuple[Weight, ...], shape: tuple[int, ...]) -> int:
        one = self._shape(shape)
        own = self.inner.memory(inputs, one)
        if not self.turned:
            return own
        piece = largest(one)
        return own + sum(weight.memory(piece) for weight in inputs) + 2 * 8 * math.prod(one)

    def _shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[-1], shape[-2]) if self.turned else shape[-2:]

    def _one(self, name: str, inputs: tuple[Weight, ...], shape: tuple[int, ...], tools: Tools) -> Rows:
        import torch

        one = self._shape(shape)
        rows = self.inner.prepare(name, inputs, one, tools)
        if not self.turned:
            return rows
        step = max(1, largest(one) // one[1])
        whole = torch.cat([rows(first, min(first + step, one[0])).clone() for first in range(0, one[0], step)])
        back = whole.T.contiguous()
        return lambda first, last: back[first:last]


def _count(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 3 else 1


def each_matrix(work: Work, shape: tuple[int, ...], input_first: bool) -> Work:
    """The work with its transform done for every matrix of the tensor, the way round that the transform expects.

    Args:
        work: any work; only transforms of matrices are changed.
        shape: of the tensor, 2-D or 3-D.
        input_first: whether its matrices are stored `(d_in, d_out)`.
    """
    turned = input_first and work.matrices == "oriented"
    if not isinstance(work, Prepare) or not work.matrices or (len(shape) == 2 and not turned):
        return work
    return replace(work, transform=Each(work.transform, turned))
