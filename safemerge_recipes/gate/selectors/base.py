"""What every selector is: candidates in, a decision with its reason for each out.

A candidate is a tensor, or a group of tensors decided together, with its value and the half-width of the
interval the value is known to. A selector answers for all candidates of a gate at once; before anything is
measured it may refuse what cannot be satisfied, and between measuring and deciding it names the candidates
whose interval leaves the answer open. Pure; knows no tensor and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from safemerge_recipes.errors import RecipeError
from safemerge_recipes.tensor_names import module_type

if TYPE_CHECKING:
    from safemerge_recipes.recipe.gate import Gate


@dataclass(frozen=True, slots=True)
class Candidate:
    """One decision to make. `value` None: the metric is undefined (`why`) or was not measured."""

    name: str
    value: float | None
    error: float = 0.0
    why: str | None = None

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return (self.value or 0.0) - self.error

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return (self.value or 0.0) + self.error


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a tensor is merged, and why."""

    merge: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Question:
    """What a selector is asked.

    Attributes:
        gate: the gate, for its metric and direction.
        key: the key of the recipe that holds the selector, for messages.
        value: what the recipe says there (a plugin's selector gets its options, a dict).
        per: "module" where candidates are ranked within their module type.
        candidates: all of them; with values unless the gate needs no metric or nothing is measured yet.
        selectors: every selector by key, for those that are made of others.
    """

    gate: Gate
    key: str
    value: Any
    per: str | None
    candidates: Sequence[Candidate]
    selectors: Mapping[str, Selector]

    @property
    def above(self) -> bool:
        """Whether high values are chosen."""
        return self.gate.direction == "above"

    def families(self) -> list[list[Candidate]]:
        """The candidates that are ranked against each other."""
        return list(by_type(self.candidates).values()) if self.per == "module" else [list(self.candidates)]


def every_interval(question: Question) -> set[str]:
    """Every candidate that is not known exactly: right for any selector, if costly."""
    return {c.name for c in question.candidates if c.error}


def no_check(question: Question) -> None:
    """Refuses nothing."""


@dataclass(frozen=True, slots=True)
class Selector:
    """A way to choose; what the entry-point group `safemerge.selectors` names.

    Attributes:
        decide: a decision for every candidate of the question.
        unsettled: names of the candidates whose interval leaves the decisions open.
        check: asked before anything is measured, with candidates that have no values yet; raises PlanError
            or RecipeError for what cannot be satisfied.
        measured: whether it decides by the metric, which may need `sources.base`.
    """

    decide: Callable[[Question], Mapping[str, Decision]]
    unsettled: Callable[[Question], set[str]] = every_interval
    check: Callable[[Question], None] = no_check
    measured: bool = True


def by_type(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """The candidates of each module type."""
    found: dict[str, list[Candidate]] = {}
    for one in candidates:
        found.setdefault(module_type(one.name), []).append(one)
    return found


def ask(gate: Gate, candidates: Sequence[Candidate], selectors: Mapping[str, Selector]) -> tuple[Selector, Question]:
    """The selector of a gate and its question. Raises RecipeError when a plugin's selector is not known."""
    return ask_of(gate, gate, "gate", candidates, selectors)


def ask_of(
    gate: Gate, holder: Any, place: str, candidates: Sequence[Candidate], selectors: Mapping[str, Selector]
) -> tuple[Selector, Question]:
    """The selector that a gate, or another selector, holds under a key of the recipe, and its question."""
    key, value = holder.selector
    question = Question(gate, f"{place}.{key}", value, getattr(holder, "per", None), candidates, selectors)
    if key != "plugin":
        return selectors[key], question
    if value.name not in selectors:
        raise RecipeError(
            f"{place}.plugin.name: {value.name!r} is not known; expected one of {', '.join(selectors)}; "
            "`safemerge plugins` lists them"
        )
    return selectors[value.name], replace(question, value=dict(value.options))
