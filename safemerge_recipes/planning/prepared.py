"""What is known before the first byte is written: a recipe whose sources are found, then its plan and its work.

Frozen values that one phase hands to the next; they do nothing themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safemerge_recipes.planning.graph import Graph
from safemerge_recipes.planning.plan import Outlook, Plan
from safemerge_recipes.planning.plugins import Registry
from safemerge_recipes.planning.stored import side_edits, stale_files
from safemerge_recipes.recipe.loading import LoadedRecipe
from safemerge_recipes.recipe.model import Recipe
from safemerge_recipes.sources.family import Family
from safemerge_recipes.storage.identity import FileIdentity
from safemerge_recipes.storage.workers import Resources


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe whose sources are found and fit together; only headers were read. Needs no torch."""

    loaded: LoadedRecipe
    family: Family
    side_files: Mapping[str, Path]
    outlooks: tuple[Outlook, ...]
    registry: Registry

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.loaded.recipe

    @property
    def identities(self) -> tuple[FileIdentity, ...]:
        """Those of every file of the sources, as they were when their headers were read."""
        return self.family.identities


@dataclass(frozen=True, slots=True, repr=False)
class Prepared:
    """Everything that is decided before the first byte is written."""

    resolved: Resolved
    plan: Plan
    graph: Graph
    resources: Resources
    peak_memory: int
    timings: Mapping[str, float]

    @property
    def recipe(self) -> Recipe:
        """The recipe that was planned."""
        return self.plan.recipe

    @property
    def family(self) -> Family:
        """Its sources."""
        return self.resolved.family

    @property
    def identities(self) -> tuple[FileIdentity, ...]:
        """Those of every file of the sources, as they were when their headers were read."""
        return self.family.identities

    @property
    def side_edits(self) -> Mapping[str, Mapping[str, Any]]:
        """File beside the weights -> what it must say otherwise than the source's."""
        return side_edits(self.plan.tensors, self.family)

    @property
    def stale_files(self) -> frozenset[str]:
        """Side files of the sources that would be untrue beside these weights."""
        return stale_files(self.plan.tensors, self.family)

    def plan_json(self) -> dict[str, Any]:
        """The content of safemerge_plan.json."""
        summary = {
            **self.plan.summary(),
            "bytes_read": self.graph.bytes_read,
            "bytes_written": self.graph.bytes_written,
            "peak_memory": self.peak_memory,
        }
        if self.family.away:  # a plan that was made from headers on the hub
            summary["bytes_to_fetch"] = self.family.bytes_away()
        return {
            "recipe": json.loads(recipe_json(self.recipe)),
            "summary": summary,
            "warnings": list(self.plan.warnings),
            "tensors": [tensor.as_json() for tensor in self.plan.tensors],
        }

    def __repr__(self) -> str:
        counts = self.plan.summary()
        found = f"{counts['merged']} of {counts['gated']} gated tensors merge, {counts['tensors']} in all"
        return f"<plan of {self.resolved.loaded.path.name}: {found}>"

    def _repr_html_(self) -> str:
        """How a notebook shows the plan: a table by module type, and ρ by block as a picture."""
        from safemerge_recipes.report.notebook import plan_html

        return plan_html(self.plan_json())


def recipe_json(recipe: Recipe) -> str:
    """A recipe as JSON: what its file says, also where that is null, as in a rule that lifts `gate.scope`."""
    return recipe.model_dump_json(by_alias=True, exclude_unset=True)
