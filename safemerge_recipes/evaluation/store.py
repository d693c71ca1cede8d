"""What was ever scored, in a JSONL file: results of whole tasks, and single answers of a task that was cut short.

Entries are found again by the bytes of the model and the settings, so equal models are scored once whatever they are
called, and the same command goes on where it stopped. A line is written whole or not at all; a torn one is ignored.
Knows nothing of how scores are made.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import CheckError, PlanError
from safemerge_recipes.evaluation.scores import Scores
from safemerge_recipes.storage.cache import cache_folder
from safemerge_recipes.storage.files import MAX_BYTES, own_file, text_of


def scores_folder() -> Path:
    """Where results are kept that belong to no sweep: `scores` in $SAFEMERGE_CACHE, else ~/.cache/safemerge-recipes."""
    try:
        return cache_folder() / "scores"
    except FileNotFoundError:
        raise PlanError("scores: found no home folder to keep them in; expected one, or SAFEMERGE_CACHE=DIR") from None


def key_of(*parts: Any) -> str:
    """A name for what a result depends on; equal parts give equal names."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


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
            lines = text_of(path, MAX_BYTES, "any").splitlines()
        except FileNotFoundError:
            return
        except OSError as error:
            raise PlanError(f"{path}: {error.strerror}; expected a file of scores or none") from None
        for line in lines:
            try:
                entry = json.loads(line)
                if "answer" in entry:
                    self._answers.setdefault(entry["key"], {})[entry["request"]] = entry["answer"]
                else:
                    self._scores[entry["key"]] = Scores.from_json(json.dumps(entry["scores"]))
            except (ValueError, KeyError, TypeError, CheckError):
                continue  # a torn last line, or a format of another version: scored again

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
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"
        with os.fdopen(own_file(self.path, os.O_APPEND), "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # torn by an interruption
                    line = "\n" + line
            file.write(line.encode())
            if sync:
                file.flush()
                os.fsync(file.fileno())
