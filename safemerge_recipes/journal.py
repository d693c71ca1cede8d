"""What a run has finished so far, so that the same command can go on after any interruption.

A text file beside the shards: a first line that says for which inputs the work was done, then a line for
every finished tensor with its result key and the digest of its bytes. Nothing in it is believed blindly:
a tensor counts as finished only if its key is the one wanted now and its bytes still have that digest.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

JOURNAL_FILE = "safemerge_journal.jsonl"


class Journal:
    """Appends lines, each in one write, from any thread."""

    def __init__(self, path: Path, header: Mapping[str, Any], resume: bool) -> None:
        """Opens the journal; unless `resume`, starts it anew with `header`."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if resume else os.O_TRUNC)
        self._file = os.open(path, flags, 0o666)
        self._lock = threading.Lock()
        if not resume:
            self._line(header)

    def _line(self, value: Mapping[str, Any]) -> None:
        with self._lock:
            os.write(self._file, (json.dumps(value) + "\n").encode())

    def done(self, name: str, key: str, digest: str | None) -> None:
        """Notes a finished tensor. `digest` None: its bytes are those of its source."""
        self._line({"tensor": name, "key": key, "digest": digest})

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def read_journal(path: Path) -> tuple[dict[str, Any] | None, dict[str, tuple[str, str | None]]]:
    """(header, tensor -> (key, digest)). A torn last line is ignored, as is whatever is not a journal."""
    header: dict[str, Any] | None = None
    done: dict[str, tuple[str, str | None]] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return None, {}
    for number, line in enumerate(lines[:-1]):
        try:
            value = json.loads(line)
            if number == 0:
                header = value if isinstance(value, dict) else None
            else:
                done[value["tensor"]] = (value["key"], value["digest"])
        except (ValueError, KeyError, TypeError, RecursionError):
            break
    return header, done
