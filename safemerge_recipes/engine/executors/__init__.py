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


def find(name: str, address: str | None = None) -> Executor:
    """The executor of that name, for the cluster at an address.

    Raises:
        RecipeError: there is none of that name, or its module cannot be imported.
        PlanError: what it needs is not installed.
    """
    points = {point.name: point for point in entry_points(group="safemerge.executors")}
    points |= {known: EntryPoint(known, target, "safemerge.executors") for known, target in BUILTIN.items()}
    if name not in points:
        raise RecipeError(f"--executor {name}: not available; expected {', '.join(sorted(points))}")
    try:
        made: Executor = points[name].load()(address)
    except (ImportError, AttributeError) as error:  # of a plugin
        raise RecipeError(f"--executor {name}: {points[name].value} cannot be loaded: {error}") from None
    return made
