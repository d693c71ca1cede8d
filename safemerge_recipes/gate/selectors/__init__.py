"""Selectors: which candidates of a gate are merged, each with the reason. One file a way to choose."""

from __future__ import annotations

from safemerge_recipes.gate.selectors.base import Candidate, Decision, Question, Selector, ask
from safemerge_recipes.recipe.builtins import SELECTORS

__all__ = ["SELECTORS", "Candidate", "Decision", "Question", "Selector", "ask"]
