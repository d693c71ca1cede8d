"""What an output tells of its sources: name, kind, commit, licence, what an adapter was trained on. No local path.

Read from the folders themselves: the front matter of README.md, adapter_config.json, config.json. Whatever
cannot be read is left out; nothing here stops a merge. Knows neither report nor card.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import SourceError
from safemerge_recipes.recipe.mask_files import mask_holders
from safemerge_recipes.recipe.source import source_holders
from safemerge_recipes.recipe.yaml_text import YamlError, read_yaml, write_yaml
from safemerge_recipes.sources.checkpoint import read_object
from safemerge_recipes.sources.family import Family
from safemerge_recipes.sources.locate import Folder
from safemerge_recipes.sources.trained import RECORD_FILE
from safemerge_recipes.storage.files import inside, text_of

MAX_README = 1_000_000
"""Bytes of a README.md that is read for its front matter."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def sources_of(family: Family, directory: Path) -> dict[str, dict[str, Any]]:
    """Label, kind, revision, licence and base model of every role.

    Args:
        family: the opened sources.
        directory: the recipe's folder, where a path that looks like a hub id may lead.
    """
    return {role: describe(model.folder, directory) for role, model in family.models.items()}


def describe(folder: Folder, directory: Path) -> dict[str, Any]:
    """The same of one source."""
    label, revision = origin(folder)
    base = _trained_on(folder.path, directory) if folder.kind == "adapter" else None
    found = {
        "label": label,
        "kind": folder.kind,
        "revision": revision,
        "license": licence_in(folder.path),
        "base_model": base,
    }
    known = {**found, "trained": _training_record(folder.path)}
    return {key: value for key, value in known.items() if value is not None or key == "revision"}


def _training_record(folder: Path) -> dict[str, Any] | None:
    """What `train-adapter` recorded of an adapter, in brief: key, data, settings' name, scores."""
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    record = read_object(path)
    return {key: record[key] for key in ("key", "rows", "data", "scores") if record.get(key) is not None}


def origin(folder: Folder) -> tuple[str, str | None]:
    """A source's name and commit: a hub id with its commit, or the name of a folder without its place.

    A folder that is a snapshot in the hub's cache is that repository at that commit.
    """
    if folder.revision is not None:
        return folder.label, folder.revision
    path = Path(os.path.abspath(folder.path))
    store = path.parent.parent.name
    if path.parent.name == "snapshots" and store.startswith("models--") and _COMMIT.fullmatch(path.name):
        name = store.removeprefix("models--").replace("--", "/", 1)
        if _ID.fullmatch(name):
            return name, path.name
    return path.name, None


def licence_in(folder: Path) -> str | None:
    """The licence that a folder's README.md states in its front matter: the hub's identifier, or a name for others."""
    try:
        text = text_of(folder / "README.md", MAX_README).removeprefix("\ufeff")
        front = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
        values = read_yaml(front[1]).value if front else None
    except (OSError, ValueError, SourceError, YamlError):
        return None
    if not isinstance(values, dict):
        return None
    stated, name = values.get("license"), values.get("license_name")
    if isinstance(stated, list) and len(stated) == 1:
        stated = stated[0]
    if stated == "other" and isinstance(name, str):
        stated = name
    return stated[:100] if isinstance(stated, str) and stated.strip() else None


def _trained_on(folder: Path, directory: Path) -> str | None:
    """The hub id that an adapter says it was trained on; None where that may as well be a local path."""
    try:
        base = read_object(inside(folder, "adapter_config.json")).get("base_model_name_or_path")
    except (OSError, SourceError):
        return None
    if not isinstance(base, str) or not _ID.fullmatch(base):
        return None
    return None if any((place / base).exists() for place in (directory, folder.parent, Path.cwd())) else base


def pipeline_tag(config: Mapping[str, Any]) -> str | None:
    """What the hub calls the task of a model, from the architecture in its config.json."""
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "text-generation"
    if architecture.endswith("ForConditionalGeneration"):
        return "image-text-to-text" if "vision_config" in config else "text2text-generation"
    return "text-classification" if architecture.endswith("ForSequenceClassification") else None


def portable(recipe: str, sources: Mapping[str, Mapping[str, Any]]) -> str:
    """A recipe's YAML as anybody may read it: hub ids pinned, of every local path only the last name."""
    values = read_yaml(recipe).value
    for holder, role in source_holders(values.get("sources")):
        holder[role] = _portable(holder[role], sources.get(role, {}))
    for part in (values, *(values.get("rules") or ())):
        for mask in mask_holders(part.get("merge")):
            mask["path"] = _last(mask["path"])
    if (evaluate := values.get("evaluate") or {}).get("task_path"):
        evaluate["task_path"] = _last(evaluate["task_path"])
    (values.get("output") or {}).pop("path", None)
    return write_yaml({key: value for key, value in values.items() if value != {}})


def _portable(source: Any, known: Mapping[str, Any]) -> Any:
    parts = dict(source) if isinstance(source, Mapping) else {"location": source}
    key = next((key for key in ("model", "adapter", "location") if parts.get(key)), None)
    if key is None:
        return source
    label = str(known.get("label") or _last(parts[key]))
    if known.get("revision"):
        parts |= {key: label, "revision": known["revision"]}
    elif not parts.get("revision"):
        parts[key] = _last(label)
        parts.pop("subfolder", None)
    return parts[key] if set(parts) == {"location"} else parts


def _last(path: object) -> str:
    return f"./{Path(str(path)).name}"
