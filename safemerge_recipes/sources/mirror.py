"""A source in object storage: its small files mirrored in the user's cache, its weights left where they are.

Config, tokenizer, licence and the like are fetched when they changed and read as from any folder. Weight files are
only listed; their tensors are read by ranges from the URL (`storage.remote`). Knows nothing of roles and recipes.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import PlanError, SourceError
from safemerge_recipes.storage.cache import cache_folder
from safemerge_recipes.storage.files import content_of, inside, write_file
from safemerge_recipes.storage.remote import check_url, fetch, filesystem, persistently, tag_of

PLACE = "sources"
"""Folder of the cache that holds the mirrors. Only there a listing is believed: a stranger's folder may hold one."""
LISTING = "listing.json"
"""Beside a mirror: its URL, and size and tag of every file there."""
MOST, LARGEST = 200, 200_000_000
"""Small files of a source, and bytes of one, at most."""
_FOLDERS = ("additional_chat_templates",)


def mirror(url: str, label: str, small: tuple[str, ...]) -> Path:
    """The folder that stands for a URL here.

    Args:
        url: a folder in object storage.
        label: how messages call it.
        small: patterns of the files to fetch; weights are not among them.

    Raises:
        SourceError: there is nothing, or it is not given.
    """
    try:
        url = check_url(url, label)
        listed = _listed(url)
    except PlanError as error:
        raise SourceError(str(error)) from None
    except OSError as error:
        raise SourceError(
            f"{label}: {error.strerror}; expected a folder there that may be listed, with credentials in the "
            "environment or profile of its library"
        ) from None
    if not listed:
        raise SourceError(f"{label}: nothing is there; check the URL")
    home = cache_folder() / PLACE / hashlib.sha256(url.encode()).hexdigest()[:16]
    folder = home / url.rpartition("/")[2]
    known = _listing(folder).get("files", {})
    wanted = {name for name in listed if _is_small(name, small)}
    if len(wanted) > MOST:
        raise SourceError(f"{label}: {len(wanted)} small files; expected the folder of one model")
    for name in sorted(wanted):
        size, _ = listed[name]
        if size > LARGEST:
            raise SourceError(f"{label}: {name} has {size} bytes; expected an ordinary file of its kind")
        if known.get(name) != list(listed[name]) or not (folder / name).is_file():
            _fetch(url, name, size, folder)
    for path in folder.rglob("*") if folder.is_dir() else ():
        if path.is_file() and path.relative_to(folder).as_posix() not in wanted:
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_file(home / LISTING, json.dumps({"url": url, "files": listed}), durable=False)
    return folder


def _listed(url: str) -> dict[str, tuple[int, str]]:
    """Name -> (size, tag) of the files of a folder. Raises OSError."""
    fs, root = filesystem(url)
    found: dict[str, tuple[int, str]] = {}
    for one in persistently(url, lambda: fs.ls(root, detail=True)):
        name = one["name"].rstrip("/").rpartition("/")[2]
        if one.get("type") == "directory" and name in _FOLDERS:
            for other in persistently(url, lambda one=one: fs.ls(one["name"], detail=True)):
                found[f"{name}/{other['name'].rpartition('/')[2]}"] = (int(other["size"] or 0), tag_of(other))
        elif one.get("type") != "directory" and name:
            found[name] = (int(one["size"] or 0), tag_of(one))
    return {name: value for name, value in found.items() if name.isprintable() and ".." not in name.split("/")}


def _is_small(name: str, small: tuple[str, ...]) -> bool:
    return not name.endswith(".safetensors") and any(fnmatch.fnmatch(name, pattern) for pattern in small)


def _fetch(url: str, name: str, size: int, folder: Path) -> None:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, fetch(f"{url}/{name}", 0, size) if size else b"", durable=False)
    os.utime(target, (0, 0))  # its identity is the same on every machine that mirrors it


def _listing(folder: Path) -> dict[str, Any]:
    """What was listed for a mirror; empty for every other folder."""
    try:
        if folder.parent.parent != cache_folder() / PLACE:
            return {}
        found = json.loads(content_of(folder.parent / LISTING, LARGEST))
    except (OSError, SourceError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else {}


def origin_url(folder: Path) -> str | None:
    """The URL that a folder mirrors; None for every other folder."""
    found = _listing(folder).get("url")
    return found if isinstance(found, str) else None


def weight_files(folder: Path) -> Mapping[str, str]:
    """Name -> URL of the weight files of a mirror, which lie elsewhere; empty for every other folder."""
    url = origin_url(folder)
    return {} if url is None else {
        name: f"{url}/{name}" for name in _listing(folder)["files"] if name.endswith(".safetensors")
    }  # fmt: skip


def weight_path(folder: Path, name: str) -> str | Path:
    """Where a weight file of a folder lies, be it there or not. Raises SourceError as `inside`."""
    return weight_files(folder).get(name) or inside(folder, name)


def is_there(path: str | Path) -> bool:
    """Whether a weight file is there: a URL was listed."""
    return isinstance(path, str) or path.exists()
