"""Turns symbolic weights into torch tensors, a piece at a time.

Sums are evaluated in float32 (float64 where a float64 tensor takes part); rounding to the output dtype is the
caller's, once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safemerge_recipes.recipe.numbers import Rational
from safemerge_recipes.storage.arena import Arena, torch_bytes
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.weights import compiled
from safemerge_recipes.weights.algebra import Factored, Operand, Stored, Weight
from safemerge_recipes.weights.dequantise import Dequantiser
from safemerge_recipes.weights.quantised import Quantised, Read
from safemerge_recipes.weights.torch_factors import add_product, joined_factors
from safemerge_recipes.weights.torch_operands import OPENED, Opening, Piece

if TYPE_CHECKING:
    import torch


class Evaluator:
    """Evaluates several weights of one tensor together, piece by piece, reading each stored piece once.

    Args:
        weights: the sums to evaluate, all of one shape.
        reader: open files.
        arena: the worker's buffers; `slot` keeps two evaluators of one worker apart.
        dtype: dtype of the arithmetic.
    """

    def __init__(
        self, weights: tuple[Weight, ...], reader: Reader, arena: Arena, slot: str, dtype: torch.dtype
    ) -> None:
        import torch

        self.reader, self.arena, self.slot, self.dtype = reader, arena, slot, dtype
        self.stored = [
            [(float(coefficient), operand) for coefficient, operand in weight if isinstance(operand, Read)]
            for weight in weights
        ]
        self.factors = [joined_factors(weight, reader, dtype, arena.device) for weight in weights]
        self.computed = [
            [
                (float(coefficient), _opened(operand, reader, arena, f"{slot}:{number}.{place}", dtype))
                for place, (coefficient, operand) in enumerate(weight)
                if not isinstance(operand, (*Read, *Factored))
            ]
            for number, weight in enumerate(weights)
        ]
        self.read = tuple(dict.fromkeys(operand for terms in self.stored for _, operand in terms))
        self.last = {operand: number for number, terms in enumerate(self.stored) for _, operand in terms}
        self.codes = {
            operand: Dequantiser(operand, reader, arena, f"{slot}:codes{number}")
            for number, operand in enumerate(self.read)
            if isinstance(operand, Quantised)
        }
        self.compiled = (
            compiled.LIBRARY is not None and len(weights) == 1 and arena.device == "cpu" and dtype == torch.float32
            and all(_is_difference(term) for term in weights[0])
        )  # fmt: skip

    def __call__(self, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        """Elements [start, stop) of each flattened weight, in `dtype`, valid until the next call."""
        count = stop - start
        if self.compiled:
            return (self._difference(start, count),)
        pieces: dict[Operand, torch.Tensor] = {}
        for number, operand in enumerate(self.read):
            if isinstance(operand, Stored):
                raw = self.reader.read(operand.ref, start, count, self.arena, f"{self.slot}:raw")
            else:
                raw = self._dequantised(operand, start, stop)
            pieces[operand] = self.arena.take(f"{self.slot}:{number}", count, self.dtype).copy_(raw)
        return tuple(self._sum(number, pieces, start, stop) for number in range(len(self.stored)))

    def _difference(self, start: int, count: int) -> torch.Tensor:
        """The same values in one pass: V and Δ of full checkpoints, which a gate looks at again and again."""
        raw = [
            (coefficient, operand, self.reader.read(operand.ref, start, count, self.arena, f"{self.slot}:raw{number}"))
            for number, (coefficient, operand) in enumerate(self.stored[0])
            if isinstance(operand, Stored)
        ]
        out = self.arena.take(f"{self.slot}:0", count, self.dtype)
        terms = compiled.terms([(coefficient, operand.ref.dtype, x.data_ptr()) for coefficient, operand, x in raw])
        assert compiled.LIBRARY is not None
        compiled.LIBRARY.sm_evaluate(compiled.Sum(terms, len(terms)), count, out.data_ptr())
        return out

    def _dequantised(self, operand: Quantised, start: int, stop: int) -> torch.Tensor:
        """Values in float32: always made on the CPU, so that every device has the same."""
        import numpy as np
        import torch

        def fill(view: memoryview) -> None:
            self.codes[operand].fill(start, stop, np.frombuffer(view, np.float32))

        slot, count = f"{self.slot}:values", stop - start
        if self.arena.device != "cpu":
            return self.arena.upload(slot, count, torch.float32, fill)
        values = self.arena.take(slot, count, torch.float32)
        fill(torch_bytes(values))
        return values

    def _sum(self, number: int, pieces: dict[Operand, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        terms = self.stored[number]
        if not terms:
            out = self.arena.take(f"{self.slot}:sum{number}", stop - start, self.dtype).zero_()
        for place, (coefficient, operand) in enumerate(terms):
            if place:
                out.add_(pieces[operand], alpha=coefficient)
                continue
            out = pieces[operand]
            if self.last[operand] != number:  # a later sum needs it as it is
                out = self.arena.take(f"{self.slot}:sum{number}", stop - start, self.dtype).copy_(out)
            if coefficient != 1:
                out.mul_(coefficient)
        pair = self.factors[number]
        if pair is not None:
            columns = pair[1].shape[1]
            add_product(out.view(-1, columns), pair[0][start // columns : stop // columns], pair[1])
        for coefficient, piece in self.computed[number]:
            out.add_(piece(start, stop), alpha=coefficient)
        return out


def _is_difference(term: tuple[Rational, Operand]) -> bool:
    """Whether a stored tensor is added or taken away as it is, so that no product is rounded."""
    coefficient, operand = term
    return isinstance(operand, Stored) and operand.ref.dtype in compiled.DTYPES and abs(coefficient) == 1


def _opened(operand: Operand, reader: Reader, arena: Arena, slot: str, dtype: torch.dtype) -> Piece:
    """An operand that is neither stored nor a product of factors, ready to give its values."""

    def evaluate(weight: Weight, place: str) -> Piece:
        inside = Evaluator((weight,), reader, arena, f"{slot}:{place}", dtype)
        return lambda start, stop: inside(start, stop)[0]

    return OPENED[type(operand)](operand, Opening(reader, arena, slot, dtype, evaluate))
