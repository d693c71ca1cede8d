"""LoRA factors as torch tensors: read whole, as they are small, and joined or blended into one pair."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.algebra import Blend, Factored, LowRank, Weight
from safemerge_recipes.weights.draw import Draw

if TYPE_CHECKING:
    import torch


def working_dtype(*weights: Weight) -> torch.dtype:
    """float64 if any stored tensor is float64, else float32."""
    import torch

    wide = any(ref.dtype == "F64" for weight in weights for ref in weight.refs)
    return torch.float64 if wide else torch.float32


def load(reader: Reader, ref: TensorRef, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """A whole stored tensor in the given dtype. For LoRA factors and other small things only."""
    arena = Arena(device)
    return reader.read(ref, 0, ref.numel, arena, "load").reshape(ref.shape).to(dtype)


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
            right.append((a.double() * (float(coefficient) * operand.scale)).to(dtype))
    return (torch.cat(left, dim=1), torch.cat(right, dim=0)) if left else None


def add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """out `(rows, columns)` += left `(rows, rank)` @ right `(rank, columns)`, as the compiled kernels add it.

    On a CPU in float32, each product is summed from zero over rank in order by fused multiply-adds, which is what
    `add_` with a factor does, and then added: the same bytes as merge.c gives, slower. Elsewhere the library's own
    order of additions holds, which a result's key says.
    """
    import torch

    if out.device.type != "cpu" or out.dtype != torch.float32:
        out.addmm_(left, right)
        return
    row = torch.empty_like(out[0])
    for place, coefficients in enumerate(left.tolist()):
        row.zero_()
        for coefficient, factor in zip(coefficients, right, strict=True):
            row.add_(factor, alpha=coefficient)
        out[place].add_(row)


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
    sums = []
    for factor in ("b", "a"):
        total = None
        for side, (on_b, on_a, low_rank) in enumerate(operand.parts):
            b, a = stored_factors(low_rank, reader, dtype, device)
            one = b * on_b if factor == "b" else a * on_a
            if operand.draw is not None:
                density, seed, name = operand.draw
                draw = Draw(density, seed)
                sides = len(operand.parts)
                kept = draw.keep(f"{name}:lora_{factor.upper()}", 0, one.numel(), Arena(device), sides)[side]
                one = one * kept.view(one.shape) * draw.rescale
            total = one if total is None else total + one
        assert total is not None  # a blend has parts
        sums.append(total)
    return sums[0], sums[1]
