"""Merge methods: what Δ a selected tensor gets from Δf (fine-tuned) and Δs (safety).

Two kinds. A *form* is linear in the weights and stays symbolic (`FORMS`): the engine evaluates it with
whatever cancels already gone. A *kernel* is not linear (`KERNELS`): it may scan all blocks of both deltas,
then maps them block by block. Both see only the deltas (or the weights, with `space: weights`); adding W_aligned
and rounding is the engine's. Kernels compute in the blocks' dtype (float32 or wider), sums in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safemerge_recipes.methods.branchless import bits, choose, spread_sign, zero_where_dropped
from safemerge_recipes.methods.threshold import Bracket, Trim, trims
from safemerge_recipes.recipe.model import Merge
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.weights.algebra import Weight, exact
from safemerge_recipes.weights.draw import Draw

if TYPE_CHECKING:
    import numpy as np
    import torch

    from safemerge_recipes.methods.base import Kernel

Blocks = Callable[..., Iterator["tuple[int, torch.Tensor, torch.Tensor]"]]
"""A fresh pass over (first element, block of x, block of y). `every=n`: a glance at every n-th block is enough."""


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


@dataclass(frozen=True, slots=True)
class Slerp:
    """Spherical interpolation from x to y at t, over the flattened tensor.

    Straight interpolation where the two are nearly parallel (|cos| > 0.9995) or one is zero, as is usual.
    """

    t: float

    def scan(self, name: str, numel: int, blocks: Blocks, arena: Arena) -> tuple[float, float]:
        """The coefficients of x and y."""
        import torch

        xx = yy = xy = 0.0
        for _, *pair in blocks():
            x, y = (one.double() for one in pair)
            xx += float(torch.dot(x, x))
            yy += float(torch.dot(y, y))
            xy += float(torch.dot(x, y))
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


class Trimmer:
    """Trims block after block, in order, as ties go by position; what is left of them is the only state."""

    def __init__(self, trim: Trim) -> None:
        self.trim, self.ties = trim, trim.ties

    def __call__(self, x: torch.Tensor, arena: Arena) -> torch.Tensor:
        """Trims one block in place: float32 or float64, dropped elements become 0."""
        import numpy as np
        import torch

        if self.trim.threshold == math.inf:
            return x.zero_()
        if self.trim.keeps_all:
            return x  # what is at the threshold is 0 anyway; what is not finite stays, for the engine to refuse
        floor = self.trim.threshold
        if self.ties == math.inf:
            floor = _below(floor, x.dtype)
        elif self.ties:
            equal = self._equal(x, arena)
            count = int(np.count_nonzero(equal))
            if count <= self.ties:
                floor = _below(floor, x.dtype)
                self.ties -= count
            else:
                kept = torch.from_numpy(np.flatnonzero(equal)[: int(self.ties)]).to(x.device)
                values = x[kept]
                self.ties = 0
                torch.ops.aten.hardshrink.out(x, floor, out=x)
                x[kept] = values
                return x
        return torch.ops.aten.hardshrink.out(x, floor, out=x)

    def _equal(self, x: torch.Tensor, arena: Arena) -> np.ndarray:
        """Which magnitudes are at the threshold."""
        import numpy as np
        import torch

        size = torch.abs(x, out=arena.take("size", x.numel(), x.dtype)).cpu().numpy()
        found = arena.take("equal", x.numel(), torch.bool, device="cpu").numpy()
        return np.equal(size, size.dtype.type(self.trim.threshold), out=found)


@dataclass(frozen=True, slots=True)
class Sizes:
    """|x| and |y| of torch blocks, for the search of their thresholds."""

    blocks: Blocks
    arena: Arena

    def look(self, every: int, stride: int) -> Iterator[tuple[int, np.ndarray]]:
        """(side, every stride-th magnitude of a block)."""
        for _, *pair in self.blocks(every=every):
            for side, x in enumerate(pair):
                yield side, x[::stride].abs().cpu().numpy()

    def count(self, brackets: Sequence[Bracket | None]) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """(side, magnitudes above the bracket, inside it, those) of block after block; numpy compares fastest."""
        import numpy as np
        import torch

        for _, *pair in self.blocks():
            for side, (x, bracket) in enumerate(zip(pair, brackets, strict=True)):
                if bracket is None:
                    continue
                size = torch.abs(x, out=self.arena.take("size", x.numel(), x.dtype)).cpu().numpy()
                low, high = (size.dtype.type(end) for end in bracket)
                above, inside = (
                    self.arena.take(slot, x.numel(), torch.bool, device="cpu").numpy() for slot in ("above", "inside")
                )
                np.greater(size, high, out=above)
                if low == high:
                    np.equal(size, low, out=inside)
                else:
                    np.greater_equal(size, low, out=inside)
                    np.not_equal(inside, above, out=inside)  # what is above is also at least `low`
                found = size[inside] if low != high else size[:0]
                yield side, int(np.count_nonzero(above)), int(np.count_nonzero(inside)), found


def _below(value: float, dtype: torch.dtype) -> float:
    """The greatest number of the dtype below a positive one."""
    import numpy as np
    import torch

    kind = np.float64 if dtype == torch.float64 else np.float32
    return float(np.nextafter(kind(value), kind(0)))


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

    def kept(self, numel: int) -> int:
        """How many elements of each side stay."""
        return int(exact(self.density) * numel)

    def scan(self, name: str, numel: int, blocks: Blocks, arena: Arena) -> tuple[Trimmer, Trimmer]:
        """The two trims: exact thresholds, found without sorting the tensor."""
        first, second = trims(self.kept(numel), numel, Sizes(blocks, arena))
        return Trimmer(first), Trimmer(second)

    def apply(
        self, state: tuple[Trimmer, Trimmer], start: int, x: torch.Tensor, y: torch.Tensor, arena: Arena
    ) -> torch.Tensor:
        """Trim, then consensus."""
        trim_x, trim_y = state
        return self.consensus(trim_x(x, arena), trim_y(y, arena), arena)


@dataclass(frozen=True, slots=True)
class Dare:
    """DARE on both deltas, then their weighted sum (`then` None) or their consensus."""

    draw: Draw
    l1: bool
    weights: tuple[float, float]
    then: Consensus | None

    def scan(self, name: str, numel: int, blocks: Blocks, arena: Arena) -> tuple[str, float, float]:
        """(tensor name, rescaling of x, rescaling of y)."""
        sums = [0.0, 0.0, 0.0, 0.0]
        if self.l1:
            for start, *pair in blocks():
                kept = self.draw.keep(name, start, pair[0].numel(), arena)
                for side, (block, keep) in enumerate(zip(pair, kept, strict=True)):
                    size = block.abs().double()
                    sums[2 * side] += float(size.sum())
                    sums[2 * side + 1] += float(zero_where_dropped(size, keep).sum())
        return name, *self.rescaling(*sums)

    def rescaling(self, x: float, kept_x: float, y: float, kept_y: float) -> tuple[float, float]:
        """What x and y are multiplied by, from the sums of all and of the kept magnitudes, where l1 asks for them."""
        if not self.l1:
            return self.draw.rescale, self.draw.rescale
        return x / kept_x if kept_x else 0.0, y / kept_y if kept_y else 0.0

    def apply(
        self, state: tuple[str, float, float], start: int, x: torch.Tensor, y: torch.Tensor, arena: Arena
    ) -> torch.Tensor:
        """Drop, rescale, merge."""
        name, scale_x, scale_y = state
        keep_x, keep_y = self.draw.keep(name, start, x.numel(), arena)
        zero_where_dropped(x, keep_x)
        zero_where_dropped(y, keep_y)
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
    "dare_linear": lambda m: Dare(Draw(m.density, m.seed), m.rescale == "l1", _weights(m), None),
    "dare_ties": lambda m: Dare(Draw(m.density, m.seed), m.rescale == "l1", _weights(m), _consensus(m)),
}
"""Methods that are not linear in the weights, by name, made from a recipe's `merge`."""
