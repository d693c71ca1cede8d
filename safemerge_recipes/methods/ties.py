"""`ties` (arXiv 2306.01708): of Δf and Δs the largest elements each, signs elected, the mean of what agrees.

The thresholds are exact order statistics, found without sorting (`threshold`); numbers are chosen lane by lane without
branches (`branchless`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from safemerge_recipes.methods.base import Method, Sides, always
from safemerge_recipes.methods.branchless import bits, choose, spread_sign
from safemerge_recipes.methods.kernel import CompiledKernel, Pieces
from safemerge_recipes.methods.threshold import HELD, LOOKS, Bracket, Trim, trims
from safemerge_recipes.methods.work import Apply
from safemerge_recipes.recipe.merge import Weighted
from safemerge_recipes.recipe.merge_keys import Alpha, Density, Lambda, Normalize, Space
from safemerge_recipes.recipe.numbers import exact
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.weights import compiled

if TYPE_CHECKING:
    import numpy as np
    import torch

    from safemerge_recipes.methods.compiled_tensor import Tensor


class Ties(Weighted):
    """The largest elements of each side, where their signs agree."""

    method: Literal["ties"]
    alpha: Alpha = 0.8
    density: Density = 0.5
    lambda_: Lambda = 1.0
    normalize: Normalize = True
    space: Space = "delta"


class Trimmer:
    """Trims piece after piece, in order, as ties go by position; what is left of them is the only state."""

    def __init__(self, trim: Trim) -> None:
        self.trim, self.ties = trim, trim.ties

    def __call__(self, x: torch.Tensor, arena: Arena) -> torch.Tensor:
        """Trims one piece in place: float32 or float64, dropped elements become 0."""
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
    """The magnitudes of torch pieces, for the search of their thresholds."""

    pieces: Pieces
    arena: Arena

    def look(self, every: int, stride: int) -> Iterator[tuple[int, np.ndarray]]:
        """(side, every stride-th magnitude of a piece)."""
        for _, *pair in self.pieces(every=every):
            for side, x in enumerate(pair):
                yield side, x[::stride].abs().cpu().numpy()

    def count(self, brackets: Sequence[Bracket | None]) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """(side, magnitudes above the bracket, inside it, those) of piece after piece; numpy compares fastest."""
        import numpy as np
        import torch

        for _, *pair in self.pieces():
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

    weights: tuple[float, ...]
    normalize: bool
    scale: float

    @property
    def is_pair(self) -> bool:
        """Whether it takes the short way for two: what agrees is both, or the larger or the smaller one."""
        return len(self.weights) == 2 and (not self.normalize or min(self.weights) >= 0)

    def __call__(self, sides: Sequence[torch.Tensor], arena: Arena) -> torch.Tensor:
        """Merges a piece of each side; overwrites them."""
        return self._pair(sides[0], sides[1], arena) if self.is_pair else self._any(sides, arena)

    def _any(self, sides: Sequence[torch.Tensor], arena: Arena) -> torch.Tensor:
        """The sum of weight·x over what has the sign of the whole sum; divided by those weights, unless they cancel."""
        import torch

        first = sides[0]
        total, merged, divisor, zero = (
            arena.take(slot, first.numel(), first.dtype).zero_() for slot in ("total", "merged", "divisor", "zero")
        )
        for number, (x, weight) in enumerate(zip(sides, self.weights, strict=True)):
            x.mul_(weight)
            total.copy_(x) if number == 0 else total.add_(x)
        negative = total < 0
        for x, weight in zip(sides, self.weights, strict=True):
            agrees = torch.where(negative, ~(x >= 0), ~(x <= 0))  # what is no number stays, for the engine to refuse
            merged.add_(torch.where(agrees, x, zero))
            if self.normalize:
                divisor.add_(agrees, alpha=weight)
        if self.normalize:
            merged.div_(divisor.masked_fill_(divisor.abs() < CANCELLED, 1.0))
        return merged.mul_(self.scale)

    def _pair(self, x: torch.Tensor, y: torch.Tensor, arena: Arena) -> torch.Tensor:
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

    @property
    def compiled(self) -> compiled.Consensus:
        """Itself as the twin has it; the weights are the merge's shares."""
        total = self.weights[0] + self.weights[1] if self.is_pair else 0.0
        return compiled.Consensus(total, self.scale, self.normalize, self.is_pair)


CANCELLED = 1e-8
"""Weights that agree and sum to less than this divide nothing, as in mergekit."""


@dataclass(frozen=True, slots=True)
class TiesKernel(CompiledKernel):
    """TIES over any number of deltas: trim each to ⌊density·n⌋, elect signs, merge what agrees, times lambda."""

    density: float
    consensus: Consensus

    def kept(self, numel: int) -> list[int]:
        """How many elements of each side stay."""
        return [int(exact(self.density) * numel)] * len(self.consensus.weights)

    def scan(self, name: str, numel: int, pieces: Pieces, arena: Arena) -> list[Trimmer]:
        """The trims: exact thresholds, found without sorting the tensor."""
        return [Trimmer(trim) for trim in trims(self.kept(numel), numel, Sizes(pieces, arena))]

    def apply(self, state: list[Trimmer], start: int, *given: Any) -> torch.Tensor:
        """Trim, then consensus."""
        *sides, arena = given
        return self.consensus([trim(x, arena) for trim, x in zip(state, sides, strict=True)], arena)

    def held(self, numel: int, piece: int) -> int:
        """All sides as collected parts, one of them joined; and what was looked at first."""
        sides = len(self.consensus.weights)
        return (sides + 1) * min(HELD + piece, numel) + 2 * sides * min(LOOKS[-1], numel)

    def set_up(self, tensor: Tensor) -> None:
        """The thresholds."""
        tensor.merge.method, tensor.merge.consensus = compiled.TIES, self.consensus.compiled
        tensor.share(self.consensus.weights)
        found = trims(self.kept(tensor.numel), tensor.numel, tensor.magnitudes())
        tensor.trim([_as_twin(trim) for trim in found])


def _as_twin(trim: Trim) -> compiled.Trim:
    if trim.threshold == math.inf:
        return compiled.Trim(0, 0.0, compiled.KEEP_NONE)
    if trim.keeps_all:
        return compiled.Trim(0, 0.0, compiled.KEEP_ALL)
    return compiled.Trim(-1 if trim.ties == math.inf else int(trim.ties), trim.threshold, compiled.KEEP_LARGEST)


def consensus(merge: Weighted, normalize: bool, scale: float) -> Consensus:
    """What is left to do after trimming or dropping."""
    return Consensus(tuple(float(share) for share in merge.shares().values()), normalize, scale)


def work(merge: Ties, sides: Sides) -> Apply:
    """TIES over all deltas."""
    origin, deltas = sides.weighed(merge.shares(), merge.space)
    return Apply(origin, deltas, TiesKernel(merge.density, consensus(merge, merge.normalize, merge.lambda_)))


TIES = Method(
    work,
    keys=Ties,
    formula="of Δf and Δs (or all of `weights`) the largest ⌊density·n⌋ each, signs elected by α : 1−α, the mean of "
    "what agrees, "
    "times lambda",
    needs=("safety",),
    link="https://arxiv.org/abs/2306.01708",
    alike=always,
)
