"""`slerp`: spherical interpolation from Δf to Δs at 1−α, over the flattened tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from safemerge_recipes.methods.base import Method, Sides, always
from safemerge_recipes.methods.kernel import CompiledKernel, Dot, Pieces
from safemerge_recipes.methods.work import Apply
from safemerge_recipes.recipe.merge import Merge
from safemerge_recipes.recipe.merge_keys import Alpha, Space
from safemerge_recipes.recipe.numbers import exact
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.weights import compiled
from safemerge_recipes.weights.algebra import Weight

if TYPE_CHECKING:
    import torch

    from safemerge_recipes.methods.compiled_tensor import Tensor


class Slerp(Merge):
    """Spherical interpolation."""

    method: Literal["slerp"]
    alpha: Alpha = 0.8
    space: Space = "delta"


@dataclass(frozen=True, slots=True)
class SlerpKernel(CompiledKernel):
    """Spherical interpolation from x to y at t, over the flattened tensor.

    Straight interpolation where the two are nearly parallel (|cos| > 0.9995) or one is zero, as is usual.
    """

    t: float

    def scan(self, name: str, numel: int, pieces: Pieces, arena: Arena) -> tuple[float, float]:
        """The coefficients of x and y."""
        import torch

        xx = yy = xy = 0.0
        for _, *pair in pieces():
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

    def as_sum(self, inputs: tuple[Weight, ...], dot: Dot) -> Weight:
        """a·x + b·y, whose coefficients follow from inner products."""
        x, y = inputs
        first, second = self.coefficients(dot(x, x), dot(y, y), dot(x, y))
        return exact(first) * x + exact(second) * y

    def set_up(self, tensor: Tensor) -> None:
        """One pass for the dot products; then it is a weighted sum."""
        tensor.merge.method = compiled.BLEND
        tensor.share(self.coefficients(*tensor.dots()))


def work(merge: Slerp, sides: Sides) -> Apply:
    """From x to y at 1 − α."""
    origin, x, y = sides.pair(merge.space)
    return Apply(origin, (x, y), SlerpKernel(float(1 - exact(merge.alpha))))


SLERP = Method(
    work,
    keys=Slerp,
    formula="spherical interpolation from Δf to Δs at 1−α, over the flattened tensor",
    needs=("safety",),
    link="https://en.wikipedia.org/wiki/Slerp",
    low_rank=True,
    alike=always,
)
