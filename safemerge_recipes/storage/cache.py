"""What a run remembers for the next: small JSON values in the user's cache, each checked when it is recalled."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import SourceError
from safemerge_recipes.storage.files import content_of, write_file

MAX_ENTRY_BYTES = 64_000_000
"""Largest entry read, in bytes: the moments of 100 000 tensors stay below it."""
STALE = 3600
"""Seconds after which a file that is no entry is one that a killed writer left."""


def cache_folder() -> Path:
    """The user's cache for this program; safe to delete at any time.

    Raises:
        FileNotFoundError: the user has no home folder, as in some containers, and SAFEMERGE_CACHE is not set.
    """
    root = os.environ.get("SAFEMERGE_CACHE")
    if root:
        return Path(root)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safemerge-recipes"
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "no home folder; set SAFEMERGE_CACHE", "cache") from None


def remember(kind: str, key: str, value: Any) -> None:
    """Stores a small JSON value under a key; failing to is no error."""
    try:
        path = _entry(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps({"key": key, "value": value, "check": _check(value)}), durable=False)
        _clean(path.parent)
    except OSError:
        pass


def _clean(folder: Path) -> None:
    """Removes what killed writers left in a folder of entries: no write takes an hour."""
    for path in folder.iterdir():
        if path.suffix != ".json" and time.time() - path.lstat().st_mtime > STALE:
            path.unlink(missing_ok=True)


def recall(kind: str, key: str) -> Any:
    """What was stored under the key, or None. Damaged entries count as absent."""
    try:
        entry = json.loads(content_of(_entry(kind, key), MAX_ENTRY_BYTES))
        return entry["value"] if entry["key"] == key and entry["check"] == _check(entry["value"]) else None
    except (OSError, SourceError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _check(value: Any) -> str:
    """Detects a damaged entry: a flipped digit of a stored number would be JSON all the same."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _entry(kind: str, key: str) -> Path:
    name = hashlib.sha256(key.encode()).hexdigest()
    return cache_folder() / kind / name[:2] / f"{name[2:]}.json"
