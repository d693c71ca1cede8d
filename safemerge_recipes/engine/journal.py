"""What a run has finished so far, so that the same command can go on after any interruption.

A text file beside the shards: a first line that says for which inputs the work was done, then a line for
every finished tensor with its result key and the digest of its bytes. Nothing in it is believed blindly:
a tensor counts as finished only if its key is the one wanted now and its bytes still have that digest.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safemerge_recipes.errors import SourceError
from safemerge_recipes.storage.files import own_file, reading, write_file

JOURNAL_FILE = "safemerge_journal.jsonl"
MAX_BYTES = 128_000_000
"""Largest journal read, in bytes: about half a million tensors."""

Entries = dict[str, tuple[str, str | None]]
"""Tensor -> (result key, digest of its bytes). Digest None: its bytes are those of its source."""


class Notes(Protocol):
    """Where a run notes what is finished: a journal in a folder of its own, receipts where writers share one."""

    def done(self, name: str, key: str, digest: str | None) -> None:
        """Notes a finished tensor. Raises OSError."""

    def sealed(self, file: str, sha256: str) -> None:
        """Notes a sealed file, all of whose tensors were noted before. Raises OSError."""

    def close(self) -> None:
        """Lets go of everything."""


class Journal:
    """Appends lines, each in one write, from any thread."""

    def __init__(self, path: Path, header: Mapping[str, Any], entries: Mapping[str, tuple[str, str | None]]) -> None:
        """Starts a journal that already holds `entries`; an older one at `path` stays until this one is whole."""
        lines = [header, *(_entry(name, key, digest) for name, (key, digest) in entries.items())]
        write_file(path, b"".join(map(_line, lines)))
        self._file = own_file(path, os.O_APPEND)
        self._lock = threading.Lock()

    def done(self, name: str, key: str, digest: str | None) -> None:
        """Notes a finished tensor. Raises OSError when the disk is full."""
        line = _line(_entry(name, key, digest))
        with self._lock:
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sealed(self, file: str, sha256: str) -> None:
        """See `Notes`: that a file has its final name says it."""

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def _entry(name: str, key: str, digest: str | None) -> dict[str, Any]:
    return {"tensor": name, "key": key, "digest": digest}


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value) + "\n").encode()


def is_journal(path: Path) -> bool:
    """Whether a file is the journal of a run: a regular file whose first line is a header of this program."""
    header, _ = read_journal(path)
    return header is not None and "engine" in header and "inputs" in header


def read_journal(path: Path) -> tuple[dict[str, Any] | None, Entries]:
    """(header, entries). A torn line ends the reading; whatever is not a journal is none."""
    header: dict[str, Any] | None = None
    done: Entries = {}
    try:
        with reading(path, MAX_BYTES, links="none") as file:
            for number, line in enumerate(file):
                value = json.loads(line) if line.endswith(b"\n") else None
                if not isinstance(value, dict):
                    break
                if number == 0:
                    header = value
                    continue
                name, key, digest = value["tensor"], value["key"], value["digest"]
                if not (isinstance(name, str) and isinstance(key, str) and isinstance(digest, str | None)):
                    break
                done[name] = key, digest
    except (OSError, SourceError, ValueError, KeyError, RecursionError):
        pass
    return header, done
