"""Turns symbolic weights into torch tensors, a block at a time.

Sums are evaluated in float32 (float64 where a float64 tensor takes part); rounding to the output dtype is the
caller's, once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from safemerge_recipes.storage.arena import Arena, Reader
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.algebra import Blend, Factored, LowRank, Stored, Weight

if TYPE_CHECKING:
    import torch

    from safemerge_recipes.weights.operands import Computed


def working_dtype(*weights: Weight) -> torch.dtype:
    """float64 if any stored tensor is float64, else float32."""
    import torch

    wide = any(ref.dtype == "F64" for weight in weights for ref in weight.refs)
    return torch.float64 if wide else torch.float32


def load(reader: Reader, ref: TensorRef, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """A whole stored tensor in the given dtype. For LoRA factors and other small things only."""
    arena = Arena(device)
    return reader.read(ref, 0, ref.numel, arena, "load").reshape(ref.shape).to(dtype)


class Evaluator:
    """Evaluates several weights of one tensor together, block by block, reading each stored block once.

    Args:
        weights: the sums to evaluate, all of one shape.
        reader: open files.
        arena: the worker's buffers; `slot` keeps two evaluators of one worker apart.
        dtype: dtype of the arithmetic.
    """

    def __init__(
        self, weights: tuple[Weight, ...], reader: Reader, arena: Arena, slot: str, dtype: torch.dtype
    ) -> None:
        self.reader, self.arena, self.slot, self.dtype = reader, arena, slot, dtype
        self.stored = [
            [(float(coefficient), operand.ref) for coefficient, operand in weight if isinstance(operand, Stored)]
            for weight in weights
        ]
        self.factors = [joined_factors(weight, reader, dtype, arena.device) for weight in weights]
        self.computed = [
            [
                (float(coefficient), cast("Computed", operand).open(reader, arena, f"{slot}:{number}.{place}", dtype))
                for place, (coefficient, operand) in enumerate(weight)
                if not isinstance(operand, (Stored, *Factored))
            ]
            for number, weight in enumerate(weights)
        ]
        self.refs = tuple(dict.fromkeys(ref for terms in self.stored for _, ref in terms))
        self.last = {ref: number for number, terms in enumerate(self.stored) for _, ref in terms}

    def __call__(self, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        """Elements [start, stop) of each flattened weight, in `dtype`, valid until the next call."""
        count = stop - start
        blocks = {}
        for number, ref in enumerate(self.refs):
            raw = self.reader.read(ref, start, count, self.arena, f"{self.slot}:raw")
            blocks[ref] = self.arena.take(f"{self.slot}:{number}", count, self.dtype).copy_(raw)
        return tuple(self._sum(number, blocks, start, stop) for number in range(len(self.stored)))

    def _sum(self, number: int, blocks: dict[TensorRef, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        terms = self.stored[number]
        if not terms:
            out = self.arena.take(f"{self.slot}:sum{number}", stop - start, self.dtype).zero_()
        for place, (coefficient, ref) in enumerate(terms):
            if place:
                out.add_(blocks[ref], alpha=coefficient)
                continue
            out = blocks[ref]
            if self.last[ref] != number:  # a later sum needs it as it is
                out = self.arena.take(f"{self.slot}:sum{number}", stop - start, self.dtype).copy_(out)
            if coefficient != 1:
                out.mul_(coefficient)
        pair = self.factors[number]
        if pair is not None:
            columns = pair[1].shape[1]
            out.view(-1, columns).addmm_(pair[0][start // columns : stop // columns], pair[1])
        for coefficient, block in self.computed[number]:
            out.add_(block(start, stop), alpha=coefficient)
        return out


def joined_factors(
    weight: Weight, reader: Reader, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(B, A) whose product is the sum of all low-rank terms, scales and coefficients folded into A."""
    import torch

    left, right = [], []
    for coefficient, operand in weight:
        if isinstance(operand, Factored):
            b, a = factors(operand, reader, dtype, device)
            left.append(b)
            right.append(a * (float(coefficient) * operand.scale))
    return (torch.cat(left, dim=1), torch.cat(right, dim=0)) if left else None


def factors(
    operand: LowRank | Blend, reader: Reader, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(left, right) with left @ right == B·A or its transpose, without the scale, in `dtype`."""
    if isinstance(operand, Blend):
        b, a = blended(operand, reader, dtype, device)
    else:
        b, a = stored_factors(operand, reader, dtype, device)
    return (a.T.contiguous(), b.T.contiguous()) if operand.transposed else (b, a)


def stored_factors(
    operand: LowRank, reader: Reader, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, A) as stored, in `dtype`."""
    b, a = load(reader, operand.b, dtype, device), load(reader, operand.a, dtype, device)
    first, step = operand.columns
    return (b[:, first::step] if step > 1 else b), a


def blended(operand: Blend, reader: Reader, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ bᵢ·Bᵢ, Σ aᵢ·Aᵢ) as stored, before any transposition, in `dtype`: a LoRA of scale 1."""
    from safemerge_recipes.methods.kernels import Draw

    sums = []
    for factor in ("b", "a"):
        total = None
        for side, (on_b, on_a, low_rank) in enumerate(operand.parts):
            b, a = stored_factors(low_rank, reader, dtype, device)
            one = b * on_b if factor == "b" else a * on_a
            if operand.draw is not None:
                density, seed, name = operand.draw
                draw = Draw(density, seed)
                kept = draw.keep(f"{name}:lora_{factor.upper()}", 0, one.numel(), Arena(device))[side]
                one = one * kept.view(one.shape) * draw.rescale
            total = one if total is None else total + one
        assert total is not None  # a blend has parts
        sums.append(total)
    return sums[0], sums[1]
