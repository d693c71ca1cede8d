"""What `names` and `names_file` share: merged is what a list of patterns names."""

from __future__ import annotations

from safemerge_recipes.errors import RecipeError
from safemerge_recipes.gate.selectors.base import Decision, Question, Selector
from safemerge_recipes.recipe.patterns import compile_patterns


def _named(question: Question) -> dict[str, Decision]:
    matcher = compile_patterns(question.value)
    found = {c.name: matcher(c.name) for c in question.candidates}
    words = {True: f"named by {question.key}", False: f"not named by {question.key}"}
    return {name: Decision(matches, words[matches]) for name, matches in found.items()}


def _named_check(question: Question) -> None:
    if question.candidates and not any(decision.merge for decision in _named(question).values()):
        raise RecipeError(
            f"{question.key}: matches none of the {len(question.candidates)} gated tensors; check the patterns, "
            f"expected names such as {question.candidates[0].name!r}"
        )


def named() -> Selector:
    """The selector."""
    return Selector(_named, lambda question: set(), _named_check, measured=False)
