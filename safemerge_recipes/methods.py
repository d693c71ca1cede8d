"""Merge methods: what Δ a selected tensor gets from Δf (fine-tuned) and Δs (safety).

Two kinds. A *form* is linear in the weights and stays symbolic (`FORMS`): the engine evaluates it with
whatever cancels already gone. A *kernel* is not linear (`KERNELS`): it may scan all blocks of both deltas,
then maps them block by block. Both see only the deltas (or the weights, with `space: weights`); adding W_aligned
and rounding is the engine's. Kernels compute in the blocks' dtype (float32 or wider), sums in float64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from safemerge_recipes.algebra import Weight, exact
from safemerge_recipes.blocks import Arena
from safemerge_recipes.lanes import bits, choose, spread_sign, zero_where_dropped
from safemerge_recipes.recipe import Merge

if TYPE_CHECKING:
    import torch

LEVELS = 1 << 16
"""Distinct draws of a DARE choice: densities are kept to 1/65536, and rescaled by what was really kept."""

Blocks = Callable[[], Iterator["tuple[int, torch.Tensor, torch.Tensor]"]]
"""A fresh pass over (first element, block of x, block of y)."""

LINKS: Mapping[str, str] = {
    "linear": "https://arxiv.org/abs/2503.17239",
    "slerp": "https://en.wikipedia.org/wiki/Slerp",
    "ties": "https://arxiv.org/abs/2306.01708",
    "dare_linear": "https://arxiv.org/abs/2311.03099",
    "dare_ties": "https://arxiv.org/abs/2311.03099",
    "task_arithmetic": "https://arxiv.org/abs/2212.04089",
    "add_safety_vector": "https://arxiv.org/abs/2402.11746",
    "project": "https://arxiv.org/abs/2405.16833",
}
"""Where each method comes from; carried into the report and the model card."""


# Forms: linear in the weights


def _linear(m: Merge, x: Weight, y: Weight, v: Weight) -> Weight:
    """αΔf + (1−α)Δs (SafeMERGE)."""
    alpha = exact(m.alpha)
    return alpha * x + (1 - alpha) * y


def _task_arithmetic(m: Merge, x: Weight, y: Weight, v: Weight) -> Weight:
    return m.lambda_finetuned * x + m.lambda_safety * y


def _replace(m: Merge, x: Weight, y: Weight, v: Weight) -> Weight:
    return y


def _drop(m: Merge, x: Weight, y: Weight, v: Weight) -> Weight:
    return Weight()


def _add_safety_vector(m: Merge, x: Weight, y: Weight, v: Weight) -> Weight:
    """Δf + γV (RESTA)."""
    return x + m.gamma * v


FORMS: Mapping[str, Callable[[Merge, Weight, Weight, Weight], Weight]] = {
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
    "replace": _replace,
    "drop": _drop,
    "add_safety_vector": _add_safety_vector,
}
"""Symbolic methods: (parameters, Δf, Δs, V) -> Δ."""


# Kernels: everything else


class Kernel(Protocol):
    """A nonlinear method bound to its parameters. Frozen; a run's state is what `scan` returns."""

    def scan(self, name: str, numel: int, blocks: Blocks, arena: Arena) -> Any:
        """Whatever `apply` needs to know of the whole tensor; makes as many passes as it must."""

    def apply(self, state: Any, start: int, x: torch.Tensor, y: torch.Tensor, arena: Arena) -> torch.Tensor:
        """The merged block. May overwrite x and y. Called in the order of the blocks."""


@dataclass(frozen=True, slots=True)
class Slerp:
    """Spherical interpolation from x to y at t, over the flattened tensor.

    Straight interpolation where the two are nearly parallel (|cos| > 0.9995) or one is zero, as is usual.
    """

    t: float

    def scan(self, name: str, numel: int, blocks: Blocks, arena: Arena) -> tuple[float, float]:
        """The coefficients of x and y."""
        xx = yy = xy = 0.0
        for _, x, y in blocks():
            product = arena.take("product", x.numel(), x.dtype)
            for_sum = product.view(-1)
            import torch

            xx += float(torch.mul(x, x, out=for_sum).sum())
            yy += float(torch.mul(y, y, out=for_sum).sum())
            xy += float(torch.mul(x, y, out=for_sum).sum())
        return self.coefficients(xx, yy, xy)

    def coefficients(self, xx: float, yy: float, xy: float) -> tuple[float, float]:
        """(a, b) of a·x + b·y from ‖x‖², ‖y‖² and x·y, in float64."""
        norms = math.sqrt(xx) * math.sqrt(yy)
        cosine = xy / norms if norms else 1.0
        if abs(cosine) > 0.9995:
            return 1 - self.t, self.t
        theta = math.acos(cosine)
        return math.sin((1 - self.t) * theta) / math.sin(theta), math.sin(self.t * theta) / math.sin(theta)

    def apply(
        self, state: tuple[float, float], start: int, x: torch.Tensor, y: torch.Tensor, arena: Arena
    ) -> torch.Tensor:
        """a·x + b·y."""
        return x.mul_(state[0]).add_(y, alpha=state[1])


class Trim:
    """Keeps the k elements of largest magnitude, ties in magnitude by position; the rest become 0."""

    def __init__(self, threshold: float, ties: int | None) -> None:
        self.threshold = threshold
        self.ties = ties  # how many elements exactly at the threshold are still to be kept; None: all

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Trims one block in place; blocks come in order, since ties are kept by position."""
        import torch

        if self.threshold == math.inf:
            return x.zero_()
        if self.threshold <= 0:
            return x
        if self.ties is not None:
            at = x.abs().eq_(self.threshold).nonzero().flatten()
            if len(at):
                x[at[self.ties :]] = 0
                self.ties -= min(self.ties, len(at))
        below = math.nextafter(self.threshold, 0) if x.dtype == torch.float64 else _below32(self.threshold)
        torch.ops.aten.hardshrink.out(x, below, out=x)
        return x


def _below32(value: float) -> float:
    """The greatest float32 below a positive float32."""
    import struct

    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    return float(struct.unpack("<f", struct.pack("<i", bits - 1))[0])


@dataclass(frozen=True, slots=True)
class Consensus:
    """TIES after trimming: weighted sum of what agrees with the sign of the weighted sum (0 counts as +)."""

    weights: tuple[float, float]
    normalize: bool
    scale: float

    def __call__(self, x: torch.Tensor, y: torch.Tensor, arena: Arena) -> torch.Tensor:
        """Merges two blocks. For two inputs, what agrees is both of them, or the larger or the smaller one."""
        import torch

        alpha, beta = self.weights
        if not self.normalize:
            x.mul_(alpha)
            y.mul_(beta)
            total = torch.add(x, y, out=arena.take("total", x.numel(), x.dtype))
        else:
            if not alpha or not beta:  # a side without weight neither votes nor counts
                return (x if alpha else y).mul_(self.scale)
            total = torch.mul(x, alpha, out=arena.take("total", x.numel(), x.dtype)).add_(y, alpha=beta)
            if alpha + beta != 1:
                total.div_(alpha + beta)
        high = torch.maximum(x, y, out=arena.take("high", x.numel(), x.dtype)).add_(0.0)  # −0 becomes 0
        low = torch.minimum(x, y, out=arena.take("low", x.numel(), x.dtype)).add_(0.0)
        integers = bits(total).dtype
        mask, other = arena.take("mask", x.numel(), integers), arena.take("other", x.numel(), integers)
        spread_sign(torch.neg(bits(low), out=mask), out=mask)  # both positive
        mask.bitwise_or_(spread_sign(bits(high), out=other))  # or both negative
        one = choose(spread_sign(bits(total), out=other), low, high, arena)
        return choose(mask, total, one, arena).mul_(self.scale)


@dataclass(frozen=True, slots=True)
class Ties:
    """TIES over two deltas: trim each to ⌊density·n⌋, elect signs, merge what agrees, times lambda."""

    density: float
    consensus: Consensus

    def scan(self, name: str, numel: int, blocks: Blocks, arena: Arena) -> tuple[Trim, Trim]:
        """The two trims: exact thresholds, found without sorting the tensor."""
        from safemerge_recipes.threshold import trims

        return trims(int(self.density * numel + 1e-9), numel, blocks)

    def apply(
        self, state: tuple[Trim, Trim], start: int, x: torch.Tensor, y: torch.Tensor, arena: Arena
    ) -> torch.Tensor:
        """Trim, then consensus."""
        trim_x, trim_y = state
        return self.consensus(trim_x(x), trim_y(y), arena)


@dataclass(frozen=True, slots=True)
class Drop:
    """DARE's random choice: element i of tensor `name` stays with probability `density`.

    Counter-based (Philox keyed by seed, side and tensor name, counter by element), so a block's choice does
    not depend on blocks, threads or order.
    """

    density: float
    seed: int
    side: str

    def key(self, name: str) -> int:
        """The generator's 128-bit key."""
        text = f"{self.seed}\0{self.side}\0{name}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:16], "little")

    @property
    def limit(self) -> int:
        """How many of the `LEVELS` equally likely draws keep an element."""
        return max(1, round(self.density * LEVELS))

    @property
    def rescale(self) -> float:
        """What makes the expectation whole again: 1 / the probability that an element stays."""
        return LEVELS / self.limit

    def keep(self, name: str, start: int, count: int, device: str) -> torch.Tensor:
        """A bool tensor `(count,)`: which of the elements from `start` on stay."""
        import numpy as np
        import torch

        generator = np.random.Philox(key=self.key(name))
        generator.advance(start // 16)  # a step makes four 64-bit numbers, each serves four elements
        first = start % 16
        raw = generator.random_raw(-(-(first + count) // 4)).view(np.uint16)[first : first + count]
        return torch.from_numpy(raw < self.limit if self.limit < LEVELS else np.ones(count, bool)).to(device)


@dataclass(frozen=True, slots=True)
class Dare:
    """DARE on both deltas, then their weighted sum (`then` None) or their consensus."""

    density: float
    seed: int
    l1: bool
    weights: tuple[float, float]
    then: Consensus | None

    def _drops(self) -> tuple[Drop, Drop]:
        return Drop(self.density, self.seed, "finetuned"), Drop(self.density, self.seed, "safety")

    def scan(self, name: str, numel: int, blocks: Blocks, arena: Arena) -> tuple[str, float, float]:
        """(tensor name, rescaling of x, rescaling of y)."""
        if not self.l1:
            return name, self._drops()[0].rescale, self._drops()[1].rescale
        sums = [0.0, 0.0, 0.0, 0.0]
        for start, *pair in blocks():
            for side, (drop, block) in enumerate(zip(self._drops(), pair, strict=True)):
                size = block.abs()
                sums[2 * side] += float(size.sum())
                sums[2 * side + 1] += float(size.mul_(drop.keep(name, start, block.numel(), arena.device)).sum())
        return name, sums[0] / sums[1] if sums[1] else 0.0, sums[2] / sums[3] if sums[3] else 0.0

    def apply(
        self, state: tuple[str, float, float], start: int, x: torch.Tensor, y: torch.Tensor, arena: Arena
    ) -> torch.Tensor:
        """Drop, rescale, merge."""
        name, scale_x, scale_y = state
        drop_x, drop_y = self._drops()
        zero_where_dropped(x, drop_x.keep(name, start, x.numel(), arena.device))
        zero_where_dropped(y, drop_y.keep(name, start, y.numel(), arena.device))
        if self.then is None:
            return x.mul_(self.weights[0] * scale_x).add_(y, alpha=self.weights[1] * scale_y)
        return self.then(x.mul_(scale_x), y.mul_(scale_y), arena)


def _weights(m: Merge) -> tuple[float, float]:
    alpha = exact(m.alpha)
    return float(alpha), float(1 - alpha)


def _consensus(m: Merge) -> Consensus:
    return Consensus(_weights(m), bool(m.normalize), m.lambda_)


KERNELS: Mapping[str, Callable[[Merge], Kernel]] = {
    "slerp": lambda m: Slerp(_weights(m)[1]),
    "ties": lambda m: Ties(m.density, _consensus(m)),
    "dare_linear": lambda m: Dare(m.density, m.seed, m.rescale == "l1", _weights(m), None),
    "dare_ties": lambda m: Dare(m.density, m.seed, m.rescale == "l1", _weights(m), _consensus(m)),
}
"""Methods that are not linear in the weights, by name, made from a recipe's `merge`."""
