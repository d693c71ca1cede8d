"""Executors by name: what is built in, and what installed distributions register as `safemerge.executors`."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from safemerge_recipes.engine.executor import Executor
from safemerge_recipes.errors import RecipeError

BUILTIN = {
    "local": "safemerge_recipes.engine.executors.threads:local",
    "ray": "safemerge_recipes.engine.executors.ray:on_ray",
}
"""name -> module:attribute of a function that makes the executor from an address, None where none was given."""

GROUP = "safemerge.executors"


def find(name: str, address: str | None = None) -> Executor:
    """The executor of that name, for the cluster at an address.

    Raises:
        RecipeError: there is none of that name, or its module cannot be imported.
        PlanError: what it needs is not installed.
    """
    if name in BUILTIN:  # whatever others register; looking for them reads every installed distribution
        point = EntryPoint(name, BUILTIN[name], GROUP)
    else:
        points = {point.name: point for point in entry_points(group=GROUP)}
        if name not in points:
            raise RecipeError(f"--executor {name}: not available; expected {', '.join(sorted({*points, *BUILTIN}))}")
        point = points[name]
    try:
        made: Executor = point.load()(address)
    except (ImportError, AttributeError) as error:  # of a plugin
        raise RecipeError(f"--executor {name}: {point.value} cannot be loaded: {error}") from None
    return made
