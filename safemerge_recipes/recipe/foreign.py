"""What a recipe from elsewhere may say: sources and numbers, nothing of this machine. Asked before it is checked."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safemerge_recipes.recipe.composed import Own
from safemerge_recipes.recipe.plain_values import has_text, mapping, paths_of
from safemerge_recipes.recipe.source import source_holders
from safemerge_recipes.recipe.yaml_text import Keys

_ASKS = ("verdict", "llama-guard-3", "harmbench", "strongreject")
"""What a judge may be asked by name; anything else is a file."""


def check_foreign(
    value: dict[str, Any], stand_ins: Mapping[str, str], here: Path | None, own: Own | None
) -> list[tuple[Keys, str]]:
    """What a recipe from elsewhere may not say: no file, folder or server of this machine. Its output is ours.

    `here` is the folder of the recipe of this machine that extends it, where a hub id may not lead. A folder beside the
    recipe in its `own` repository is that folder of the repository.
    """
    mapping(value.get("output")).pop("path", None)
    found: list[tuple[Keys, str]] = []
    for _, key in paths_of(value):
        found.append(((key,), "names a file; a recipe from elsewhere may name none: copy it here first"))
    judge = mapping(mapping(value.get("evaluate")).get("judge"))
    asked, model = judge.get("prompt"), judge.get("model")
    if judge.get("url") is not None or (asked is not None and asked not in _ASKS) or (model and _is_folder(model)):
        message = "names a server, a file or a folder; a recipe from elsewhere may name none: copy it here first"
        found.append((("evaluate", "judge"), message))
    for sources, role in source_holders(value.get("sources")):
        source = sources[role]
        given = mapping(source)
        named = [given[k] for k in ("model", "adapter", "location", "train") if has_text(given, k)]
        where = source if isinstance(source, str) else next(iter(named), "")
        inside = posixpath.normpath(posixpath.join(where, str(given.get("subfolder") or "")))
        beside = where.startswith("./") and "train" not in given
        if own is not None and beside and inside.partition("/")[0] in own.folders:
            key = next((key for key in ("model", "adapter") if key in given), "location")
            kept = {"on": given["on"]} if "on" in given else {}
            subfolder = posixpath.join(own.folder, inside)
            sources[role] = {key: own.repository, "revision": own.commit, "subfolder": subfolder, **kept}
            continue
        if role not in stand_ins and ("train" in given or _is_folder(where)):
            message = f"names {where[:200]!r}, a folder of its author's; say --source {role}=PLACE for one that is here"
            found.append((("sources", role), message))
        elif role not in stand_ins and here is not None and (here / where.partition("@")[0]).exists():
            message = f"names {where[:200]!r} on the hub, and a folder here has that name; say --source {role}=PLACE"
            found.append((("sources", role), message))
    return found


def _is_folder(where: object) -> bool:
    """Whether a source is a path, where a hub id is the only other thing it may be."""
    text = str(where)
    return text.startswith((".", "/", "~")) or "\\" in text or text.partition("@")[0].count("/") != 1
