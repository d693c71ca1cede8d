"""The sources of a recipe, opened: at their locked commits and, from the hub, headers before gigabytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safemerge_recipes.events import Listener, Note

if TYPE_CHECKING:
    from safemerge_recipes.planning.prepared import Resolved
    from safemerge_recipes.recipe.loading import LoadedRecipe


def opened(loaded: LoadedRecipe, on_event: Listener, *, planned: bool = False) -> Resolved:
    """Opens the sources; with a lock, at its commits and with its files and no others.

    Of models on the hub the headers are read first, so that sources that do not fit are told before gigabytes are
    fetched. What is only `planned` then needs what its gate reads, a run needs everything.

    Raises:
        SourceError: a source is missing, broken, does not fit the others, or is not the locked one.
        RecipeError: the lock is that of another recipe.
    """
    from safemerge_recipes.pipeline.opening import measured_away, open_sources

    def wanted(resolved: Resolved) -> tuple[str, ...] | None:
        read = measured_away(resolved) if planned else None
        for line in _told(resolved, read):
            on_event(Note(line))
        return read

    return open_sources(loaded, on_event, wanted=wanted)


def _told(resolved: Resolved, read: tuple[str, ...] | None) -> list[str]:
    """Of an output's recipe, or one from the hub, where it lies and what it reads; of any, what is fetched."""
    from safemerge_recipes.engine.folder import RECIPE_FILE
    from safemerge_recipes.text import size

    place, family = resolved.loaded.place, resolved.family
    found = place is not None and (place.directory is None or resolved.loaded.path.name == RECIPE_FILE)
    lines = [f"Recipe: {place.label}"] if place is not None and found else []
    for role, model in family.models.items():
        folder = model.folder
        away = sum(one.size for one in folder.away.values())
        if away or found:
            commit = f" at {folder.revision[:12]}" if folder.revision else ""
            there = f", {size(away)} of weights to fetch" if away else ", all of it here"
            lines.append(f"sources.{role}: {folder.label}{commit}{there}")
    if family.away:
        lines.append(f"A run fetches {size(family.bytes_away())} of weights from the hub.")
    if read:
        lines.append(f"The gate reads {size(family.bytes_away(read))} of them to decide, which are fetched now.")
    return lines
