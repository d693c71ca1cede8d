"""Where bytes came from and went: sha256 of every input file, versions, the manifest.

A file's digest is remembered under its identity (size, times, inode) in the user's cache, so unchanged
inputs are hashed once, not once a run; the hub's own cache already names its files by their sha256.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safemerge_recipes import __version__
from safemerge_recipes.errors import ReadError, SourceError
from safemerge_recipes.sources.checkpoint import FileIdentity
from safemerge_recipes.weights import compiled

CHUNK = 1 << 22
"""Bytes hashed at once."""
SETTLED_NS = 100_000_000
"""Age in nanoseconds at which a file's times tell it from a later version, whatever the clock of its disk."""


def cache_folder() -> Path:
    """The user's cache for this program; safe to delete at any time."""
    root = os.environ.get("SAFEMERGE_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safemerge-recipes"


def remember(kind: str, key: str, value: Any) -> None:
    """Stores a small JSON value under a key; failing to is no error."""
    path = _entry(kind, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            temporary.write_text(json.dumps({"key": key, "value": value, "check": _check(value)}))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError:
        pass


def recall(kind: str, key: str) -> Any:
    """What was stored under the key, or None. Damaged entries count as absent."""
    try:
        entry = json.loads(_entry(kind, key).read_text())
        return entry["value"] if entry["key"] == key and entry["check"] == _check(entry["value"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _check(value: Any) -> str:
    """Detects a damaged entry: a flipped digit of a stored number would be JSON all the same."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _entry(kind: str, key: str) -> Path:
    name = hashlib.sha256(key.encode()).hexdigest()
    return cache_folder() / kind / name[:2] / f"{name[2:]}.json"


def file_digest(identity: FileIdentity, stop: threading.Event | None = None) -> str:
    """sha256 of a file, from the hub's file name, the cache, or its bytes."""
    blob = Path(os.path.realpath(identity.path))
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    known = recall("digests", _digest_key(identity))
    if isinstance(known, str) and re.fullmatch(r"[0-9a-f]{64}", known):
        return known
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    with open(identity.path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            if stop is not None and stop.is_set():
                return ""
    check_unchanged([identity])
    remember_digest(identity, digest.hexdigest())
    return digest.hexdigest()


def _digest_key(identity: FileIdentity) -> str:
    return f"{os.path.realpath(identity.path)}:{identity.key}"


def remember_digest(identity: FileIdentity, digest: str) -> None:
    """Remembers a file's sha256, unless it is so young that another write could leave the same times behind."""
    if time.time_ns() - max(identity.mtime_ns, identity.ctime_ns) > SETTLED_NS:
        remember("digests", _digest_key(identity), digest)


class Digests(threading.Thread):
    """Hashes files in the background while other work goes on."""

    def __init__(self, identities: Sequence[FileIdentity]) -> None:
        super().__init__(daemon=True)
        self._identities = identities
        self._found: dict[str, str] = {}
        self._error: BaseException | None = None
        self.cancelled = threading.Event()
        self.start()

    def run(self) -> None:
        """Hashes one file after the other."""
        try:
            for identity in self._identities:
                self._found[identity.path] = file_digest(identity, self.cancelled)
        except (OSError, SourceError) as error:
            self._error = error

    def result(self) -> dict[str, str]:
        """path -> sha256, when all are known. Raises SourceError when a file went away or changed."""
        self.join()
        if isinstance(self._error, OSError):
            raise ReadError(f"{self._error.filename}: {self._error.strerror}; it was readable when planned")
        if self._error is not None:
            raise self._error
        return self._found


def check_unchanged(identities: Sequence[FileIdentity]) -> None:
    """Raises SourceError when an input is not what it was when the plan was made."""
    for identity in identities:
        if FileIdentity.of(identity.path) != identity:
            raise SourceError(
                f"{identity.path}: changed while the recipe ran; expected inputs that stay as they are. "
                "Run again when it has settled (--force starts over)"
            )


def versions() -> dict[str, str]:
    """Versions of everything that takes part in the arithmetic."""
    from importlib.metadata import version

    found = {"safemerge-recipes": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "safetensors", "xxhash", "huggingface_hub"):
        found[name] = version(name)
    found["native"] = str(compiled.VERSION) if compiled.LIBRARY is not None else "not built"
    return found
