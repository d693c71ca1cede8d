"""Selectors: which candidates of a gate are merged, each with the reason. One file a way to choose."""

from __future__ import annotations

from collections.abc import Mapping

from safemerge_recipes.gate.selectors.base import Candidate, Decision, Question, Selector, ask
from safemerge_recipes.recipe import builtins

__all__ = ["SELECTORS", "Candidate", "Decision", "Question", "Selector", "ask"]

SELECTORS: Mapping[str, Selector] = builtins.load(builtins.SELECTORS)
"""The built-in selectors, by their key in a gate."""
