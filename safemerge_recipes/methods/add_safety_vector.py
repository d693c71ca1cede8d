"""`add_safety_vector` (RESTA, arXiv 2402.11746): the safety vector V = W_aligned − W_base added to Δf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from safemerge_recipes.methods.base import Method, Sides
from safemerge_recipes.methods.branchless import zero_where_dropped
from safemerge_recipes.methods.kernel import Kernel
from safemerge_recipes.methods.work import Apply, Sum
from safemerge_recipes.recipe.fields import Seed, Strict, read_onto, tell_onto
from safemerge_recipes.recipe.merge import Merge
from safemerge_recipes.recipe.merge_keys import Gamma
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.weights.algebra import Weight
from safemerge_recipes.weights.draw import Draw

if TYPE_CHECKING:
    import torch


class Dare(Strict):
    """DARE for `add_safety_vector`: elements dropped at random, the rest divided by `density`."""

    model_config = ConfigDict(json_schema_extra=tell_onto)

    on: Literal["vector", "delta"] = "vector"
    """What is thinned out: the safety vector V, or the fine-tuned delta Δf."""
    density: float = Field(default=0.5, gt=0, le=1)
    """The part of the elements that stays."""
    seed: Seed = 0
    """Seed of the choice."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return read_onto(value)


class AddSafetyVector(Merge):
    """Δf and the safety vector."""

    method: Literal["add_safety_vector"]
    gamma: Gamma = 1.0
    dare: Dare | None = None
    """Thin out V or Δf at random before they are added (`add_safety_vector`)."""


@dataclass(frozen=True, slots=True)
class ThinnedSum(Kernel):
    """x + γ·y with DARE on one of them: elements dropped at random, the rest divided by the density."""

    gamma: float
    draw: Draw
    on: str

    def apply(self, name: str, start: int, x: torch.Tensor, y: torch.Tensor, arena: Arena) -> torch.Tensor:
        """The piece's sum."""
        keep_x, keep_y = self.draw.keep(name, start, x.numel(), arena)
        if self.on == "delta":
            return zero_where_dropped(x, keep_x).mul_(self.draw.rescale).add_(y, alpha=self.gamma)
        return x.add_(zero_where_dropped(y, keep_y), alpha=self.gamma * self.draw.rescale)


def added(merge: AddSafetyVector, sides: Sides) -> Apply | Sum:
    """W_f + γV, or with DARE on one of them."""
    if merge.dare is None:
        return Sum(sides.finetuned + merge.gamma * sides.v)
    kernel = ThinnedSum(merge.gamma, Draw(merge.dare.density, merge.dare.seed), merge.dare.on)
    if merge.dare.on == "delta":
        return Apply(sides.aligned, (sides.delta, sides.v), kernel)
    return Apply(Weight(), (sides.finetuned, sides.v), kernel)


ADD_SAFETY_VECTOR = Method(
    added, keys=AddSafetyVector, formula="Δf + γV", needs=("base",), link="https://arxiv.org/abs/2402.11746"
)
