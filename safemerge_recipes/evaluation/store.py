"""What was ever scored, in a JSONL file: results of whole tasks, and single answers of a task that was cut short.

Entries are found again by the bytes of the model and the settings, so equal models are scored once whatever they are
called, and the same command goes on where it stopped. A line begins with a digest of the rest of it: one that was torn
or changed is not believed, and scored again. Knows nothing of how scores are made.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from safemerge_recipes.errors import CheckError, PlanError
from safemerge_recipes.evaluation.scores import Scores
from safemerge_recipes.storage.cache import cache_folder
from safemerge_recipes.storage.files import MAX_BYTES, content_of, own_file

_LINE = re.compile(r'\{"digest": "([0-9a-f]{32})", (.*\})', re.DOTALL)
_EARLIER = '{"key": '
"""How a line begins that an earlier version wrote, without a digest."""


def scores_folder() -> Path:
    """Where results are kept that belong to no sweep: `scores` in $SAFEMERGE_CACHE, else ~/.cache/safemerge-recipes."""
    try:
        return cache_folder() / "scores"
    except FileNotFoundError:
        raise PlanError("scores: found no home folder to keep them in; expected one, or SAFEMERGE_CACHE=DIR") from None


def key_of(*parts: Any) -> str:
    """A name for what a result depends on; equal parts give equal names."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def lines_of(content: bytes) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(number from 1, entry) of every line of a store; None for one that is not as it was written."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if line:
            yield number, _entry(line)


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        text = line.decode("utf-8")
        found = _LINE.fullmatch(text)
        if found is not None and _digest("{" + found[2]) != found[1]:
            return None
        if found is None and not text.startswith(_EARLIER):
            return None
        entry = json.loads(text)
        return entry if isinstance(entry, dict) else None
    except (ValueError, RecursionError):
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Store:
    """Kept results of one file.

    Args:
        path: The file; made when something is kept.

    Raises:
        PlanError: it is there and cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._scores: dict[str, Scores] = {}
        self._answers: dict[str, dict[str, Any]] = {}
        try:
            content = content_of(path, MAX_BYTES, "any")
        except FileNotFoundError:
            return
        except OSError as error:
            raise PlanError(f"{path}: {error.strerror}; expected a file of scores or none") from None
        for _, entry in lines_of(content):
            if entry is None:
                continue  # torn by an interruption, or changed: scored again
            try:
                if "answer" in entry:
                    self._answers.setdefault(entry["key"], {})[entry["request"]] = entry["answer"]
                else:
                    self._scores[entry["key"]] = Scores.from_json(json.dumps(entry["scores"]))
            except (ValueError, KeyError, TypeError, CheckError):
                continue  # a format of another version: scored again

    def get(self, key: str) -> Scores | None:
        """The scores of one model on one task, if they are there."""
        return self._scores.get(key)

    def keep(self, key: str, label: str, scores: Scores) -> None:
        """Keeps the scores of one model on one task."""
        self._scores[key] = scores
        self._append({"key": key, "label": label, "scores": json.loads(scores.to_json())}, sync=True)

    def answers(self, key: str) -> dict[str, Any]:
        """What was answered of a task that was not finished, by request."""
        return dict(self._answers.get(key, {}))

    def keep_answer(self, key: str, request: str, answer: Any) -> None:
        """Keeps one answer of a task that is not finished yet."""
        self._answers.setdefault(key, {})[request] = answer
        self._append({"key": key, "request": request, "answer": answer})

    def _append(self, entry: dict[str, Any], sync: bool = False) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(entry, ensure_ascii=False, allow_nan=False)
        line = f'{{"digest": "{_digest(text)}", {text[1:]}\n'
        with os.fdopen(own_file(self.path), "rb+") as file:
            with suppress(OSError):  # a file system without locks: nothing better is to be had there
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(_end_of_lines(file))
            file.truncate()
            file.write(line.encode())
            if sync:
                file.flush()
                os.fsync(file.fileno())


def _end_of_lines(file: IO[bytes]) -> int:
    """Where the last whole line ends, in bytes: what follows was torn by an interruption."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - 65536)
        file.seek(begin)
        if b"\n" in (tail := file.read(end - begin)):
            return begin + tail.rindex(b"\n") + 1
        end = begin
    return 0
