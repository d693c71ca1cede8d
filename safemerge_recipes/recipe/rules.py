"""The rules of a recipe, and what holds for the tensors of each: its policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import SerializeAsAny, model_validator

from safemerge_recipes.recipe.fields import Patterns, Strict
from safemerge_recipes.recipe.gate import Gate, GateChange
from safemerge_recipes.recipe.merge import Merge
from safemerge_recipes.recipe.merge_change import MergeChange


class Rule(Strict):
    """An exception for some tensors. The first rule that matches a tensor wins."""

    tensors: Patterns
    """Patterns of tensor names: globs with braces, or `/regular expressions/`. A rule that matches nothing
    is an error."""
    gate: GateChange | None = None
    """What changes in the gate."""
    merge: SerializeAsAny[MergeChange] | None = None
    """What changes in the merge."""
    keep: Literal["finetuned", "aligned", "safety"] | None = None
    """Take these tensors from a source as they are, without gate and merge."""

    @model_validator(mode="after")
    def _check(self) -> Rule:
        changes = [key for key in ("gate", "merge") if getattr(self, key) is not None]
        if self.keep is None and not changes:
            raise ValueError("found a rule that changes nothing; expected gate, merge or keep")
        if self.keep is not None and changes:
            raise ValueError(f"found keep and {' and '.join(changes)}; expected keep alone, or gate and merge")
        return self


@dataclass(frozen=True, slots=True)
class Policy:
    """What holds for the tensors of one rule, or, with `rule` None, for all tensors that no rule matches."""

    patterns: tuple[str, ...]
    keep: Literal["finetuned", "aligned", "safety"] | None
    gate: Gate
    merge: Merge
    rule: int | None
