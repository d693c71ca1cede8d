"""What a merge method is, and what it sees of a tensor.

A method looks at the symbolic weights of one tensor and says what is to be done (`work`); it reads headers only, so
whatever it refuses is refused before anything is measured. One file each holds all that is to be known of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from safemerge_recipes.errors import RecipeError
from safemerge_recipes.methods.work import Work
from safemerge_recipes.recipe.builtins import Role
from safemerge_recipes.recipe.merge import Custom, Merge
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.algebra import Weight


@dataclass(frozen=True, slots=True)
class Sides:
    """The weights of one tensor that a method may use; a role the recipe does not give is None.

    Attributes:
        name: the tensor.
        shape: its shape.
        weights: role -> weight.
        masks: tensors of the recipe's mask files, by path and name.
    """

    name: str
    shape: tuple[int, ...]
    weights: Mapping[Role, Weight]
    masks: Mapping[str, Mapping[str, TensorRef]] = field(default_factory=dict)

    def need(self, role: Role) -> Weight:
        """The role's weight. Raises RecipeError where the recipe does not give it."""
        if role not in self.weights:
            raise RecipeError(f"sources.{role}: missing; the merge of {self.name} needs it")
        return self.weights[role]

    @property
    def aligned(self) -> Weight:
        """W_a."""
        return self.weights["aligned"]

    @property
    def finetuned(self) -> Weight:
        """W_f."""
        return self.weights["finetuned"]

    @property
    def delta(self) -> Weight:
        """Δf = W_f − W_a."""
        return self.finetuned - self.aligned

    @property
    def safety_delta(self) -> Weight:
        """Δs = W_s − W_a; zero where the recipe gives no safety model."""
        return self.weights["safety"] - self.aligned if "safety" in self.weights else Weight()

    @property
    def v(self) -> Weight:
        """V = W_a − W_b. Raises RecipeError where the recipe gives no base."""
        return self.aligned - self.need("base")

    def weighed(self, roles: Iterable[Role], space: str) -> tuple[Weight, tuple[Weight, ...]]:
        """(origin, what a method sees of each role): the deltas of the roles, or their weights with origin 0.

        Raises:
            RecipeError: the recipe does not give a role.
        """
        if space == "weights":
            return Weight(), tuple(self.need(role) for role in roles)
        return self.aligned, tuple(self.need(role) - self.aligned for role in roles)

    def pair(self, space: str) -> tuple[Weight, Weight, Weight]:
        """(origin, x, y): what a method of two sides adds to, and what it sees, by the space it works in."""
        if space == "weights":
            return Weight(), self.finetuned, self.weights.get("safety", Weight())
        return self.aligned, self.delta, self.safety_delta


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method; what the entry-point group `safemerge.methods` names.

    Attributes:
        work: from the recipe's `merge` and a selected tensor's sides to what is to be done. Raises RecipeError or
            SourceError for what cannot be.
        needs: the roles it needs besides `aligned` and `finetuned`.
        link: where it comes from; carried into the report and the model card.
        alike: whether it fits every tensor if it fits one (no mask, no ranks to agree), so that one is enough to try.
        keys: what `merge:` holds for it; those of a plugin are `options`.
        formula: the Δ that a selected tensor gets, in words or signs.
        low_rank: whether its result has an exact small rank when its deltas do.
    """

    work: Callable[[Any, Sides], Work]
    needs: tuple[Role, ...] = ()
    link: str = ""
    alike: Callable[[Any], bool] = lambda merge: False
    keys: type[Merge] = Custom
    formula: str = ""
    low_rank: bool = False


def always(merge: Any) -> bool:
    """For methods that fit every tensor if they fit one, whatever their parameters."""
    return True
