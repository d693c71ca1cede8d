"""A recipe's sources, found, fetched and opened: headers first, weights where a later phase reads them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from safemerge_recipes.errors import SourceError
from safemerge_recipes.events import Listener
from safemerge_recipes.pipeline.lock import check_lock, find_lock, pinned
from safemerge_recipes.planning.decisions import check_gates, survey
from safemerge_recipes.planning.graph import check_merges
from safemerge_recipes.planning.plugins import read_registry
from safemerge_recipes.planning.prepared import Resolved
from safemerge_recipes.recipe.loading import LoadedRecipe
from safemerge_recipes.recipe.model import Role
from safemerge_recipes.sources.family import Family, open_family
from safemerge_recipes.sources.locate import Folder, complete
from safemerge_recipes.sources.side_files import check_tokens, half_a_tokenizer, no_tokenizer, side_files
from safemerge_recipes.sources.trained import settled


def resolve(
    loaded: LoadedRecipe,
    family: Family | None = None,
    *,
    headers: bool = False,
    folders: Mapping[Role, Folder] | None = None,
) -> Resolved:
    """Finds, fetches and opens the sources. Reads headers only.

    Args:
        loaded: the recipe.
        family: its sources, where another recipe with the same ones has opened them.
        headers: of models on the hub fetch the headers alone; `fetch` gets the rest.
        folders: where the sources lie, if that is known.

    Raises:
        SafemergeError: a source is missing, unsound, or does not fit the others or what the recipe does with it.
    """
    loaded, notes = settled(loaded)
    recipe, opened = loaded.recipe, family is not None
    family = family or open_family(recipe, loaded.directory, headers=headers, folders=folders)
    family = replace(family, warnings=tuple(dict.fromkeys((*family.warnings, *notes))))
    registry = read_registry()
    outlooks = survey(recipe, family, registry.metrics)
    check_gates(outlooks, registry.selectors)
    check_merges(outlooks, family, registry.methods)
    beside = side_files(family)
    lacking = no_tokenizer(beside)
    if lacking and lacking not in family.warnings:
        family = replace(family, warnings=(*family.warnings, lacking))
    half = half_a_tokenizer(beside) if recipe.output.format == "full" else None
    if half:
        raise SourceError(f"{beside[half.partition(':')[0]].parent}: {half}; add what is missing, or remove that file")
    beyond = None if opened else check_tokens(family, beside, recipe.output.format == "full")
    if beyond:
        family = replace(family, warnings=(*family.warnings, beyond))
    return Resolved(loaded, family, beside, outlooks, registry)


def fetch(resolved: Resolved, files: Collection[str] | None, on_event: Listener) -> Resolved:
    """The same with weight files fetched that are still on the hub, at the commits that were resolved.

    Args:
        resolved: as `resolve` found it.
        files: which, by the paths of their headers; None: all.
        on_event: is told of bytes.

    Raises:
        SourceError: the hub does not give one.
    """
    away = resolved.family.away
    wanted = [away[path][1] for path in away if files is None or path in files]
    if not wanted:
        return resolved
    folders = {}
    for role, model in resolved.family.models.items():
        own = [name for name, one in model.folder.away.items() if files is None or str(one.header) in files]
        folders[role] = complete(model.folder, own, on_event)
    return resolve(resolved.loaded, folders=folders)


def open_sources(
    loaded: LoadedRecipe,
    on_event: Listener,
    *,
    locked: bool = True,
    wanted: Callable[[Resolved], Collection[str] | None] = lambda resolved: None,
) -> Resolved:
    """Opens the sources: headers of all of them first, then what is `wanted` of what is still on the hub.

    Args:
        loaded: the recipe.
        on_event: is told of bytes.
        locked: where the recipe has a lock, at its commits and with its files and no others.
        wanted: the files to fetch, by the paths of their headers, once headers are known; None: all.

    Raises:
        SourceError: as `resolve` does, or a source is not the locked one.
        RecipeError: the lock is that of another recipe, or cannot be read.
    """
    found = find_lock(loaded) if locked else None
    resolved = resolve(loaded if found is None else pinned(loaded, found), headers=True)
    resolved = fetch(resolved, wanted(resolved), on_event)
    if found is not None:
        check_lock(resolved, found)
    return resolved


def measured_away(resolved: Resolved) -> tuple[str, ...]:
    """The files on the hub, by the paths of their headers, that a gate must read before it can decide."""
    family = resolved.family
    away = family.away
    if not away or "base" not in family.models:
        return ()
    found = (
        path
        for outlook in resolved.outlooks
        if outlook.policy is not None and outlook.policy.gate.needs_metric
        for path in measured_files(family, outlook.name)
        if path in away
    )
    return tuple(dict.fromkeys(found))


def measured_files(family: Family, name: str) -> tuple[str, ...]:
    """The files that measuring a tensor reads: those of V and Δf."""
    v = family.v(name)
    return tuple(ref.path for weight in (v, family.delta("finetuned", name)) if weight for ref in weight.refs)
