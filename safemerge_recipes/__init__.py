"""Safety-restoring merges of language models, declared as recipes (SafeMERGE, arXiv 2503.17239).

    import safemerge_recipes as sm

    recipe = sm.load_recipe("recipe.yaml", {"gate.tau": 0.3})
    plan = sm.plan(recipe)
    result = sm.run(plan, "out")

The names of `__all__` are promises; everything else is private. Each is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from safemerge_recipes._version import __version__ as __version__

if TYPE_CHECKING:
    from safemerge_recipes import plugins
    from safemerge_recipes.api import compare, evaluate, load_recipe, plan, run, sweep, verify
    from safemerge_recipes.errors import (
        CheckError,
        PlanError,
        ReadError,
        RecipeError,
        SafemergeError,
        SourceError,
        WriteError,
    )

__all__ = [
    "CheckError", "PlanError", "ReadError", "RecipeError", "SafemergeError", "SourceError", "WriteError",
    "__version__", "compare", "evaluate", "load_recipe", "plan", "plugins", "run", "sweep", "verify",
]  # fmt: skip

_HOMES = {
    name: "errors" if name.endswith("Error") else "api" for name in __all__ if name not in ("__version__", "plugins")
}


def __getattr__(name: str) -> Any:
    if name == "plugins":
        return import_module("safemerge_recipes.plugins")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
