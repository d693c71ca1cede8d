"""What a sweep or a probe leaves: a record that is written last, sealed, and holds the sha256 of what lies beside it.

So a folder of results tells its state: without a record it is unfinished, and its store of points is all it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safemerge_recipes.engine.manifest import object_of, seal_of, sealed
from safemerge_recipes.errors import CheckError, SourceError
from safemerge_recipes.evaluation.store import lines_of
from safemerge_recipes.storage.files import MAX_BYTES, content_of, remove_left, write_file

FORMAT = 2
STORE_FILE = "safemerge_points.jsonl"
RECORDS = ("safemerge_sweep.json", "safemerge_probe.json")


def write_results(folder: Path, name: str, content: Mapping[str, Any], beside: Mapping[str, str]) -> dict[str, Any]:
    """Writes the files `beside` and then the record `name`; returns the record's content."""
    remove_left(folder, (*beside, name))
    for file, text in beside.items():
        write_file(folder / file, text)
    stamps = {file: hashlib.sha256(text.encode()).hexdigest() for file, text in beside.items()}
    text = sealed({**content, "files": stamps}, FORMAT)
    write_file(folder / name, text)
    return object_of(folder / name, text.encode())


def is_results(folder: Path) -> bool:
    """Whether a folder is one of results rather than an output."""
    return any((folder / name).is_file() for name in (STORE_FILE, *RECORDS))


def check_results(folder: Path) -> dict[str, Any]:
    """Checks a folder of results: every line of its store, and, where it is finished, its record and what it names.

    Returns:
        What was `checked` and what not, and the numbers of `files` and of `lines`.

    Raises:
        CheckError: something is not as it was written.
    """
    problems: list[str] = []
    checked = [f"{STORE_FILE}: a digest of every line"]
    files = lines = 0
    try:
        if (folder / STORE_FILE).exists():
            content = content_of(folder / STORE_FILE, MAX_BYTES)
            files += 1
            whole, _, torn = content.rpartition(b"\n")  # of the line at which a run was cut short, and no other
            cut = [(0, None)] if any(entry for _, entry in lines_of(torn[:-1])) else []  # its line break changed
            for number, entry in [*lines_of(whole), *cut]:
                lines += 1
                if entry is None:
                    problems.append(f"{STORE_FILE}: {f'line {number}' if number else 'its last line'} changed")
        for name in RECORDS:
            if (folder / name).exists():
                named = _named(folder / name)
                files += 1 + len(named)
                checked.append(f"{name}, by its digest of itself, and the files that it names")
                problems += [f"{file}: changed" for file, sha256 in named.items() if _sha256(folder / file) != sha256]
    except (SourceError, OSError) as error:
        problems.append(str(error))
    if problems:
        raise CheckError(
            f"{folder}: not as it was written; run the same command again, which scores anew what is damaged\n  "
            + "\n  ".join(problems[:20])
        )
    unchecked = ["scores: only scoring again shows them"]
    return {"checked": checked, "unchecked": unchecked, "files": files, "lines": lines}


def _named(path: Path) -> dict[str, str]:
    content = content_of(path, MAX_BYTES)
    if seal_of(content) != (FORMAT, True):
        raise SourceError(f"{path.name}: changed since it was written (its digest of itself differs)")
    named = object_of(path, content).get("files")
    if not isinstance(named, dict):
        raise SourceError(f"{path.name}: names no files")
    return {str(file): str(sha256) for file, sha256 in named.items()}


def _sha256(path: Path) -> str:
    return hashlib.sha256(content_of(path, MAX_BYTES)).hexdigest()
