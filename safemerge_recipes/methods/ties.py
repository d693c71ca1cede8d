"""`ties` (arXiv 2306.01708): of Δf and Δs the largest elements each, signs elected, the mean of what agrees.

The thresholds are exact order statistics, found without sorting (`threshold`); numbers are chosen lane by lane without
branches (`branchless`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from safemerge_recipes.methods.base import Method, Sides, always
from safemerge_recipes.methods.branchless import bits, choose, spread_sign
from safemerge_recipes.methods.kernel import CompiledKernel, Pieces
from safemerge_recipes.methods.threshold import HELD, LOOKS, Bracket, Trim, trims
from safemerge_recipes.methods.work import Apply
from safemerge_recipes.recipe.merge import Merge
from safemerge_recipes.recipe.merge_keys import Alpha, Density, Lambda, Normalize, Space
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.weights import compiled
from safemerge_recipes.weights.algebra import exact

if TYPE_CHECKING:
    import numpy as np
    import torch

    from safemerge_recipes.methods.compiled_tensor import Tensor


class Ties(Merge):
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
    """|x| and |y| of torch pieces, for the search of their thresholds."""

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

    weights: tuple[float, float]
    normalize: bool
    scale: float

    def __call__(self, x: torch.Tensor, y: torch.Tensor, arena: Arena) -> torch.Tensor:
        """Merges two pieces. For two inputs, what agrees is both of them, or the larger or the smaller one."""
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
        """Itself as the twin has it."""
        alpha, beta = self.weights
        return compiled.Consensus(alpha, beta, alpha + beta, self.scale, self.normalize)


@dataclass(frozen=True, slots=True)
class TiesKernel(CompiledKernel):
    """TIES over two deltas: trim each to ⌊density·n⌋, elect signs, merge what agrees, times lambda."""

    density: float
    consensus: Consensus

    def kept(self, numel: int) -> int:
        """How many elements of each side stay."""
        return int(exact(self.density) * numel)

    def scan(self, name: str, numel: int, pieces: Pieces, arena: Arena) -> tuple[Trimmer, Trimmer]:
        """The two trims: exact thresholds, found without sorting the tensor."""
        first, second = trims(self.kept(numel), numel, Sizes(pieces, arena))
        return Trimmer(first), Trimmer(second)

    def apply(
        self, state: tuple[Trimmer, Trimmer], start: int, x: torch.Tensor, y: torch.Tensor, arena: Arena
    ) -> torch.Tensor:
        """Trim, then consensus."""
        trim_x, trim_y = state
        return self.consensus(trim_x(x, arena), trim_y(y, arena), arena)

    def held(self, numel: int, piece: int) -> int:
        """Both sides as collected parts, one of them joined; and what was looked at first."""
        return 3 * min(HELD + piece, numel) + 4 * min(LOOKS[-1], numel)

    def set_up(self, tensor: Tensor) -> None:
        """The two thresholds."""
        merge = tensor.merge
        merge.method, merge.consensus = compiled.TIES, self.consensus.compiled
        for side, trim in enumerate(trims(self.kept(tensor.numel), tensor.numel, tensor.magnitudes())):
            merge.trims[side] = _as_twin(trim)


def _as_twin(trim: Trim) -> compiled.Trim:
    if trim.threshold == math.inf:
        return compiled.Trim(0, 0.0, compiled.KEEP_NONE)
    if trim.keeps_all:
        return compiled.Trim(0, 0.0, compiled.KEEP_ALL)
    return compiled.Trim(-1 if trim.ties == math.inf else int(trim.ties), trim.threshold, compiled.KEEP_LARGEST)


def consensus(alpha: float, normalize: bool, scale: float) -> Consensus:
    """What is left to do after trimming."""
    share = exact(alpha)
    return Consensus((float(share), float(1 - share)), normalize, scale)


def work(merge: Ties, sides: Sides) -> Apply:
    """TIES over x and y."""
    origin, x, y = sides.pair(merge.space)
    return Apply(origin, (x, y), TiesKernel(merge.density, consensus(merge.alpha, merge.normalize, merge.lambda_)))


TIES = Method(
    work,
    keys=Ties,
    formula="of Δf and Δs the largest ⌊density·n⌋ each, signs elected by α : 1−α, the mean of what agrees, "
    "times lambda",
    needs=("safety",),
    link="https://arxiv.org/abs/2306.01708",
    alike=always,
)
