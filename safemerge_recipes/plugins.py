"""All that the author of a plugin imports: metrics, selectors and merge methods of one's own are made of these names.

    from safemerge_recipes.plugins import Apply, Kernel, Method, RecipeError, Sides

Each is imported when it is first used. `docs/add-a-method.md` walks through a method; `plugins/` holds an example of
each kind. The names of `__all__` are promises like the keys of a recipe.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safemerge_recipes.errors import PlanError, RecipeError, SafemergeError, SourceError
    from safemerge_recipes.gate.decide import check, decide, unsettled
    from safemerge_recipes.gate.metrics import Metric
    from safemerge_recipes.gate.moments import Moments
    from safemerge_recipes.gate.selectors import Candidate, Decision, Question, Selector
    from safemerge_recipes.methods.base import Method, Sides
    from safemerge_recipes.methods.kernel import Blocks, Kernel, Pieces, Rows, Transform
    from safemerge_recipes.methods.tools import Tools
    from safemerge_recipes.methods.work import Apply, Prepare, Sum
    from safemerge_recipes.recipe.gate import Gate
    from safemerge_recipes.recipe.merge import Custom, Merge
    from safemerge_recipes.storage.arena import Arena
    from safemerge_recipes.weights.algebra import Weight

_HOMES = {
    "errors": ("PlanError", "RecipeError", "SafemergeError", "SourceError"),
    "gate.decide": ("check", "decide", "unsettled"),
    "gate.metrics": ("Metric",),
    "gate.moments": ("Moments",),
    "gate.selectors": ("Candidate", "Decision", "Question", "Selector"),
    "methods.base": ("Method", "Sides"),
    "methods.kernel": ("Blocks", "Kernel", "Pieces", "Rows", "Transform"),
    "methods.tools": ("Tools",),
    "methods.work": ("Apply", "Prepare", "Sum"),
    "recipe.gate": ("Gate",),
    "recipe.merge": ("Custom", "Merge"),
    "storage.arena": ("Arena",),
    "weights.algebra": ("Weight",),
}  # fmt: skip

__all__ = [
    "Apply", "Arena", "Blocks", "Candidate", "Custom", "Decision", "Gate", "Kernel", "Merge", "Method",
    "Metric", "Moments", "Pieces", "PlanError", "Prepare", "Question", "RecipeError", "Rows", "SafemergeError",
    "Selector", "Sides", "SourceError", "Sum", "Tools", "Transform", "Weight", "check", "decide", "unsettled",
]  # fmt: skip

_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"safemerge_recipes.{_HOME[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
