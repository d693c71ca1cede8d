"""recipe.lock.yaml: the commit, size and sha256 of every file a recipe reads, and where its plugins come from.

A run that finds a lock takes hub sources at the locked commit and refuses files that are others, before anything is
measured. An output is its own lock: its manifest holds the sha256 of what it was made from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safemerge_recipes.engine.folder import MANIFEST_FILE, RECIPE_FILE
from safemerge_recipes.engine.manifest import read_manifest
from safemerge_recipes.errors import RecipeError, SourceError
from safemerge_recipes.planning.prepared import Resolved
from safemerge_recipes.recipe.loading import STANDARD_INPUT, LoadedRecipe
from safemerge_recipes.recipe.model import Source
from safemerge_recipes.recipe.yaml_text import YamlError, read_yaml, write_yaml
from safemerge_recipes.sources.provenance import origin
from safemerge_recipes.storage.digests import file_digest
from safemerge_recipes.storage.files import remove_left, text_of, write_file
from safemerge_recipes.storage.identity import FileIdentity
from safemerge_recipes.storage.layout import INDEX_FILE

FORMAT = 1
MAX_BYTES = 1_000_000
_HEAD = "# What "
"""How a lock begins, by which it is known."""
CONFIGS = ("config.json", "adapter_config.json", INDEX_FILE)
"""Files of a source, beside its weights, that decide what is merged; tokenizers are side files."""


@dataclass(frozen=True, slots=True)
class Lock:
    """What a recipe may read.

    Attributes:
        label: how messages call it.
        names: what each role named when it was locked, such as `org/chat@main`.
        revisions: the commit of each role that has one.
        files: role -> file -> (bytes, sha256).
        plugins: `kind name` -> where it came from.
    """

    label: str
    names: Mapping[str, str]
    revisions: Mapping[str, str]
    files: Mapping[str, Mapping[str, tuple[int, str]]]
    plugins: Mapping[str, str]


def lock_path(recipe: Path) -> Path:
    """Where a recipe's lock lies: beside it."""
    return recipe.with_name(f"{recipe.stem}.lock.yaml")


def find_lock(loaded: LoadedRecipe) -> Lock | None:
    """The lock of a recipe, or of an output's recipe its manifest; None without either.

    Raises:
        RecipeError: the lock cannot be read, or is none.
        CheckError: the manifest is not as it was written.
    """
    if loaded.path.name == RECIPE_FILE and (loaded.directory / MANIFEST_FILE).is_file():
        return _of_output(loaded.directory)
    path = loaded.directory / lock_path(loaded.path).name
    there = os.path.lexists(path) and loaded.path != STANDARD_INPUT  # whatever it is: what cannot be read is refused
    return _read(path) if there else None


def _of_output(folder: Path) -> Lock:
    files: dict[str, dict[str, tuple[int, str]]] = {}
    for (role, name), stamp in read_manifest(folder).inputs.items():
        files.setdefault(role, {})[name] = (stamp.size, stamp.sha256)
    files.pop("mask", None)
    return Lock(str(folder / MANIFEST_FILE), {}, {}, files, {})


def _read(path: Path) -> Lock:
    try:
        value = read_yaml(text_of(path, MAX_BYTES, "any")).value
        if value["format"] != FORMAT:
            raise ValueError(f"format {str(value['format'])[:40]}")
        sources = value["sources"]
        return Lock(
            str(path),
            {role: str(one["names"]) for role, one in sources.items()},
            {role: str(one["revision"]) for role, one in sources.items() if one.get("revision")},
            {
                role: {name: (int(f["size"]), str(f["sha256"])) for name, f in one["files"].items()}
                for role, one in sources.items()
            },
            dict(value.get("plugins") or {}),
        )
    except (OSError, SourceError, ValueError, OverflowError, KeyError, TypeError, AttributeError, YamlError) as error:
        raise RecipeError(
            f"{path}: not a lock of this program ({type(error).__name__}: {str(error)[:200]}); "
            "say --update-lock to write a damaged one anew, or remove it"
        ) from None


def pinned(loaded: LoadedRecipe, lock: Lock) -> LoadedRecipe:
    """The recipe with every hub source at its locked commit.

    Raises:
        RecipeError: it names other sources than when it was locked.
    """
    given: dict[str, Source] = {str(role): source for role, source in loaded.recipe.sources.roles().items()}
    changed = [
        f"sources.{role}: the recipe names {given.get(role, 'none')}, the lock {lock.names.get(role, 'none')}"
        for role in dict.fromkeys((*given, *lock.names))
        if lock.names and _renamed(loaded, given.get(role), lock.names.get(role))
    ]
    if changed:
        raise RecipeError("\n".join([f"{lock.label}: the lock of another recipe; say --update-lock", *changed]))
    pins = {
        role: source.model_copy(update={"revision": lock.revisions[role]})
        for role, source in given.items()
        if role in lock.revisions and loaded.local(source) is None
    }
    sources = loaded.recipe.sources.changed(pins)
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"sources": sources}))


def _renamed(loaded: LoadedRecipe, source: Source | None, name: str | None) -> bool:
    """Whether a role is new or gone, or names something else on the hub; of folders, their files tell."""
    if source is None or name is None:
        return True
    return loaded.local(source) is None and str(source) != name


def make_lock(resolved: Resolved) -> str:
    """The text of a lock: every file that the recipe reads now is hashed.

    Raises:
        SourceError: a file went away or changed.
    """
    given = resolved.recipe.sources.roles()
    sources = {}
    for role, model in resolved.family.models.items():
        revision = origin(model.folder)[1]
        files = {name: {"size": size, "sha256": digest} for name, size, digest in _stamps(resolved, role)}
        sources[role] = {"names": str(given[role]), **({"revision": revision} if revision else {}), "files": files}
    content: dict[str, Any] = {"format": FORMAT, "sources": sources}
    if plugins := _plugins(resolved):
        content["plugins"] = plugins
    return f"{_HEAD}{resolved.loaded.path.name} reads. Written by `safemerge lock`.\n{write_yaml(content)}"


def check_place(loaded: LoadedRecipe) -> None:
    """Refuses to lock what has no place here, or whose place somebody else's file has. Raises RecipeError."""
    foreign = loaded.place is not None and loaded.place.directory is None
    if foreign or loaded.path == STANDARD_INPUT:
        raise RecipeError(f"{loaded.path}: has no folder here that could hold its lock; copy it into a file first")
    path = lock_path(loaded.path)
    if os.path.lexists(path):
        try:
            ours = text_of(path, MAX_BYTES, "any").startswith((_HEAD, f"format: {FORMAT}"))
        except (OSError, SourceError, ValueError):
            ours = False
        if not ours:
            raise RecipeError(f"{path}: is no lock of this program and not replaced; expected nothing there, move it")


def write_lock(resolved: Resolved) -> Path:
    """Writes a recipe's lock beside it and returns where."""
    path = lock_path(resolved.loaded.path)
    text = make_lock(resolved)
    remove_left(path.parent, [path.name])
    write_file(path, text)
    return path


def check_lock(resolved: Resolved, lock: Lock) -> None:
    """Refuses files and plugins that are not the locked ones, with a line for each.

    Raises:
        SourceError: anything is different.
    """
    changed: list[str] = []
    for role in resolved.family.models:
        wanted = lock.files.get(role, {})
        found = {name: (size, digest) for name, size, digest in _stamps(resolved, role) if name in wanted or lock.names}
        for name in dict.fromkeys((*wanted, *found)):
            if name not in found:
                changed.append(f"sources.{role}: {name} is gone")
            elif name not in wanted:
                changed.append(f"sources.{role}: {name} is new")
            elif found[name] != wanted[name]:
                before, now = wanted[name][0], found[name][0]
                what = f"{before} bytes, now {now}" if before != now else "as many bytes, but others"
                changed.append(f"sources.{role}: {name} has changed: {what}")
    if lock.names:
        used = _plugins(resolved)
        changed += [
            f"plugins: {name}: {lock.plugins.get(name, 'not locked')}, now {used.get(name, 'not used')}"
            for name in dict.fromkeys((*lock.plugins, *used))
            if lock.plugins.get(name) != used.get(name)
        ]
    if changed:
        hint = "say --update-lock if that is meant" if lock.names else "copy the recipe elsewhere to merge other files"
        raise SourceError("\n".join([f"{lock.label}: other files than were locked; {hint}", *changed]))


def _stamps(resolved: Resolved, role: Any) -> Iterator[tuple[str, int, str]]:
    """(name, bytes, sha256) of a role's files: weights, configs, and what an output has from it beside them.

    Of weights that are still on the hub it is what the hub says.
    """
    folder = resolved.family.models[role].folder
    weights = {Path(file) for file in resolved.family.models[role].files} - {one.header for one in folder.away.values()}
    yield from ((name, one.size, one.sha256 or "") for name, one in folder.away.items())
    configs = {folder.path / name for name in CONFIGS if (folder.path / name).is_file()}
    beside = {path for path in resolved.side_files.values() if path.is_relative_to(folder.path)}
    for file in sorted(weights | configs | beside):
        identity = FileIdentity.of(file)
        found = file_digest(identity)
        assert found is not None  # nobody stops it
        yield file.relative_to(folder.path).as_posix(), identity.size, found.sha256


def _plugins(resolved: Resolved) -> dict[str, str]:
    """`kind name` -> origin of the metrics, selectors and methods in use that are not built in."""
    used: dict[str, str] = {}
    for policy in resolved.recipe.policies():
        for kind, name in (
            ("metrics", policy.gate.metric),
            ("selectors", policy.gate.selector[0]),
            ("methods", policy.merge.method),
        ):
            if where := resolved.registry.origin(kind, name):  # type: ignore[arg-type]  # its kinds
                used[f"{kind} {name}"] = where
    return used
