"""What is scored: the gated tensors of one of a recipe's models, by a kind of score."""

from __future__ import annotations

from dataclasses import dataclass

from safemerge_recipes.errors import PlanError, RecipeError
from safemerge_recipes.pipeline.lock import check_lock, find_lock, pinned
from safemerge_recipes.planning.decisions import survey
from safemerge_recipes.planning.plugins import read_registry
from safemerge_recipes.planning.prepared import Resolved
from safemerge_recipes.recipe.loading import LoadedRecipe
from safemerge_recipes.recipe.model import Role
from safemerge_recipes.scores.kinds import KINDS, Kind
from safemerge_recipes.sources.family import Family, open_family
from safemerge_recipes.sources.side_files import side_files
from safemerge_recipes.sources.trained import settled
from safemerge_recipes.weights.algebra import Weight


@dataclass(frozen=True, slots=True)
class Subject:
    """What is scored: a role's tensors of a family, by a kind of score."""

    family: Family
    role: Role
    by: str
    names: tuple[str, ...]

    @property
    def kind(self) -> Kind:
        """The kind."""
        return KINDS[self.by]

    @property
    def runs(self) -> Role:
        """The role whose model runs on the prompts."""
        return "aligned" if self.kind.aligned else self.role

    def weight(self, name: str) -> Weight:
        """What is scored of a tensor: the weight, or the update."""
        return self.family.delta(self.role, name) if self.kind.delta else self.family.weight(self.role, name)

    def opposed_to(self, name: str) -> tuple[Weight, ...]:
        """The safety model's update, where the kind looks at it."""
        return (self.family.delta("safety", name),) if self.kind.opposed else ()

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self.family.inventory[name].shape

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles that the scores depend on."""
        others = ("aligned",) * self.kind.delta + ("safety",) * self.kind.opposed
        return tuple(dict.fromkeys((self.role, *others)))


def subject_of(loaded: LoadedRecipe, by: str, role: str) -> Subject:
    """Opens a recipe's sources and says what is to be scored: every tensor that its gate may pick. Reads headers only.

    The recipe's masks are not opened, as they may be what is to be made; its lock holds as in `open_sources`.

    Raises:
        RecipeError: the kind or the role is not known, or there is no update to score; the lock of another recipe.
        SourceError: a source does not fit, or is not the locked one.
        PlanError: nothing is gated.
    """
    if by not in KINDS:
        raise RecipeError(f"--by {by}: expected one of {', '.join(KINDS)}")
    loaded, _ = settled(loaded)
    lock = find_lock(loaded)
    loaded = loaded if lock is None else pinned(loaded, lock)
    family = open_family(loaded.recipe, loaded.directory, masks=False)
    if role not in family.models:
        raise RecipeError(f"--of {role}: the recipe has no such source; expected one of {', '.join(family.models)}")
    if KINDS[by].delta and role == "aligned":
        raise RecipeError(f"--by {by}: is a score of an update, and the aligned model has none; try --of finetuned")
    if KINDS[by].opposed and ("safety" not in family.models or role == "safety"):
        raise RecipeError(f"--by {by}: compares with sources.safety; expected it in the recipe, and another --of")
    registry = read_registry()
    outlooks = survey(loaded.recipe, family, registry.metrics)
    if lock is not None:
        check_lock(Resolved(loaded, family, side_files(family), outlooks, registry), lock)
    names = tuple(outlook.name for outlook in outlooks if outlook.policy is not None)
    if not names:
        raise PlanError("no tensor is gated, so there is nothing to score; check the sources and gate.scope")
    return Subject(family, role, by, names)
