"""Choosing between numbers lane by lane without branches: the sign bit of a float, spread over an integer.

On a CPU these take a fraction of the time of comparisons that make bool tensors, and they give the same
bits on every device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from safemerge_recipes.storage.arena import Arena


def bits(x: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as integers of the same width, sharing memory."""
    import torch

    return x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)


def spread_sign(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """All ones where the sign bit of integer `x` is set, else all zeros."""
    import torch

    return torch.bitwise_right_shift(x, x.element_size() * 8 - 1, out=out)


def choose(mask: torch.Tensor, a: torch.Tensor, b: torch.Tensor, arena: Arena) -> torch.Tensor:
    """a where the integer mask is all ones, b where it is zero. Overwrites b, which it returns."""
    import torch

    difference = torch.bitwise_xor(bits(a), bits(b), out=arena.take("difference", a.numel(), mask.dtype))
    bits(b).bitwise_xor_(difference.bitwise_and_(mask))
    return b


def zero_where_dropped(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """x where `keep` (bool) holds, ±0 elsewhere, in place."""
    if x.device.type == "cpu":
        import numpy as np

        with np.errstate(invalid="ignore"):  # a dropped infinity becomes NaN, which the engine refuses
            np.multiply(x.numpy(), keep.numpy(), out=x.numpy())
        return x
    return x.mul_(keep)
