"""What callers of the API give, as the phases take it: recipes by file, overrides as texts, memory in bytes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes.errors import PlanError, RecipeError

if TYPE_CHECKING:
    from safemerge_recipes.recipe.loading import LoadedRecipe
    from safemerge_recipes.storage.workers import Resources

    RecipeLike = LoadedRecipe | str | Path

LEAST = 64_000_000
"""Bytes below which no run is tried."""

Overrides = Mapping[str, Any] | Sequence[str]


def load_recipe(
    path: str | Path, overrides: Overrides = (), *, sources: Mapping[str, str | Path] | Sequence[str] = ()
) -> LoadedRecipe:
    """Loads and checks a recipe. Opens no source.

    Args:
        path: the YAML file, the folder of an output, `-` for standard input, or on the hub `org/model[@revision]` or
            `hf://org/repo/file.yaml[@revision]`; `safemerge:NAME` is one that is shipped.
        overrides: values by dotted key, such as `{"gate.tau": 0.3}`, or `KEY=VALUE` texts; applied in order.
        sources: a folder or hub id by role, such as `{"finetuned": "my-lora"}`, or `ROLE=PLACE` texts; stands in for
            what the recipe names.

    Raises:
        RecipeError: the file cannot be read, or with every problem in it, a line each.
    """
    from safemerge_recipes.planning.load import load
    from safemerge_recipes.sharing.places import abroad, open_place

    file, place = open_place(path)
    return load(file, texts_of(overrides), stand_ins=_stand_ins(sources), place=place, abroad=abroad)


def _stand_ins(sources: Mapping[str, str | Path] | Sequence[str]) -> dict[str, str]:
    from safemerge_recipes.recipe.builtins import ROLES

    if isinstance(sources, Mapping):
        given = [(role, str(place)) for role, place in sources.items()]
    else:
        given = [(role, place) for role, _, place in (text.partition("=") for text in sources)]
    for role, place in given:
        if not (role in ROLES or re.fullmatch(r"[A-Za-z][\w-]{0,49}", role)) or not place:
            raise RecipeError(f"--source {role}={place}: expected ROLE=PLACE, with a role of {', '.join(ROLES)}")
    return dict(given)


def loaded_of(recipe: RecipeLike) -> LoadedRecipe:
    """A recipe, loaded where only its file is given. Raises RecipeError as `load_recipe` does."""
    return load_recipe(recipe) if isinstance(recipe, str | Path) else recipe


def texts_of(overrides: Overrides) -> tuple[str, ...]:
    """Overrides as `KEY=VALUE` texts."""
    if not isinstance(overrides, Mapping):
        return tuple(overrides)
    return tuple(f"{key}={json.dumps(value, default=os.fspath)}" for key, value in overrides.items())


def is_recipe(path: str | Path) -> bool:
    """Whether a path names a recipe rather than a folder, by its name alone."""
    return Path(path).suffix in (".yaml", ".yml") and not Path(path).is_dir()


def target_of(loaded: LoadedRecipe, output: str | Path | None) -> Path | str:
    """The output's folder or URL.

    Raises:
        RecipeError: neither the caller nor the recipe says it.
        PlanError: a URL that cannot be written.
    """
    from safemerge_recipes.storage.remote import check_url, is_url

    named = output if output is not None else loaded.recipe.output.path
    if is_url(named):
        return check_url(named, f"--output {named}" if output is not None else f"output.path: {named}")
    if output is not None:
        return Path.cwd() / output
    if loaded.recipe.output.path is not None:
        return loaded.resolve(loaded.recipe.output.path)
    raise RecipeError(f"{loaded.path}: output.path: missing; expected it there, or --output DIR")


def resources_of(device: str, workers: int | None, max_memory: str | int) -> Resources:
    """The means of a run: what a GPU has free bounds the memory too, as a worker's buffers lie on both.

    Raises:
        RecipeError: too little memory.
        PlanError: a device that is not there, or is full.
    """
    memory = memory_of(max_memory)
    from safemerge_recipes.pipeline.preparing import choose_device
    from safemerge_recipes.storage.machine import device_room
    from safemerge_recipes.storage.workers import Resources

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = choose_device(device)
    room = device_room(chosen)
    if room is not None and room < LEAST:
        raise PlanError(f"--device {chosen}: {room >> 20} MiB are free there; expected {LEAST >> 20}; try --device cpu")
    return Resources(workers or cores, memory if room is None else min(memory, room), chosen)


def memory_of(given: str | int) -> int:
    """Bytes of a size. Raises RecipeError for what is none, or less than 64 MB."""
    from safemerge_recipes.recipe.model import parse_size

    try:
        size = parse_size(given)
    except ValueError as error:
        raise RecipeError(f"--max-memory {given}: {error}") from None
    if not isinstance(size, int) or size < LEAST:
        raise RecipeError(f"--max-memory {given}: too little; expected at least 64MB")
    return size
