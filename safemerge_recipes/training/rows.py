"""Rows of training data: read from chat messages or Alpaca's keys, told apart as harmful, harmless or task.

A row is one request and one answer. Knows no model and no tokenizer; reads no more than the files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safemerge_recipes.errors import RecipeError
from safemerge_recipes.storage.files import MAX_BYTES, content_of, remove_left, write_file

Kind = Literal["harmful", "harmless", "task"]


@dataclass(frozen=True, slots=True)
class Row:
    """A request and its answer. `system` and `turns` are what stood before it; `where` names its line."""

    prompt: str
    answer: str
    where: str
    kind: Kind | None = None
    system: str | None = None
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """The sha256 of the normalised text: it decides the split and the order."""
        parts = [self.system or "", *(text for turn in self.turns for text in turn), self.prompt, self.answer]
        return hashlib.sha256("\0".join(" ".join(part.split()) for part in parts).encode()).hexdigest()

    def messages(self) -> list[dict[str, str]]:
        """What stands before the answer, as a chat template reads it."""
        before = [{"role": "system", "content": self.system}] if self.system else []
        said = [{"role": role, "content": text} for role, text in self.turns]
        return [*before, *said, {"role": "user", "content": self.prompt}]

    def as_json(self) -> dict[str, Any]:
        """The row as it is written."""
        answer = {"role": "assistant", "content": self.answer}
        return {"messages": [*self.messages(), answer], **({"kind": self.kind} if self.kind else {})}


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """Every row of JSONL or JSON files, in order; a row that repeats another word for word is left out.

    A row has `messages` (the last by the assistant) or `instruction`, `input` (may be empty or missing) and `output`;
    `prompt` with `completion`, `response` or `answer` will do too. `kind` may be harmful, harmless or task.

    Raises:
        RecipeError: a file is no such thing, with the numbers of the rows.
    """
    rows: dict[str, Row] = {}
    problems: list[str] = []
    for path in paths:
        for number, value in _values(path):
            try:
                row = _row(value, f"{path.name}:{number}")
            except ValueError as error:
                problems.append(f"{path}:{number}: {error}")
            else:
                rows.setdefault(row.key, row)
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise RecipeError("\n".join(problems[:10] + more))
    return list(rows.values())


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = content_of(path, MAX_BYTES, "any").decode("utf-8-sig")
        if path.suffix == ".json" or text.lstrip().startswith("["):
            yield from enumerate(json.loads(text), 1)
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, json.loads(line)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RecipeError(f"{path}: {error}; expected JSONL, a row of training data a line") from None


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError("no mapping; expected a row with `messages`, or with `instruction` and `output`")
    kind = value.get("kind")
    if kind not in (None, "harmful", "harmless", "task"):
        raise ValueError(f"kind {kind!r}; expected harmful, harmless or task")
    if "messages" in value:
        return _of_messages(value["messages"], where, kind)
    prompt = value.get("instruction", value.get("prompt"))
    answer = next((value[key] for key in ("output", "completion", "response", "answer") if key in value), None)
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise ValueError("expected `messages`, or `instruction` and `output`, as text")
    extra = value.get("input") or ""
    if not isinstance(extra, str):
        raise ValueError("`input` is no text")
    prompt = f"{prompt.strip()}\n\n{extra.strip()}" if extra.strip() else prompt.strip()
    return _checked(Row(prompt, answer.strip(), where, kind))


def _of_messages(messages: Any, where: str, kind: Kind | None) -> Row:
    said: list[tuple[str, str]] = []
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError("a message without `role` and `content` as text")
        said.append((str(message.get("role")), message["content"].strip()))
    system = said.pop(0)[1] if said and said[0][0] == "system" else None
    roles = [role for role, _ in said]
    if len(said) < 2 or roles != ["user", "assistant"] * (len(said) // 2):
        raise ValueError("expected `messages` that alternate between user and assistant and end with the assistant")
    return _checked(Row(said[-2][1], said[-1][1], where, kind, system, tuple(said[:-2])))


def _checked(row: Row) -> Row:
    if not row.prompt or not row.answer:
        raise ValueError("an empty request or an empty answer")
    if re.search(
        r"[\ud800-\udfff]", "".join(text for message in row.messages() for text in message.values()) + row.answer
    ):
        raise ValueError("half a surrogate pair, which no file can hold")
    return row


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows as JSONL."""
    remove_left(path.parent, [path.name])
    write_file(path, "".join(json.dumps(row.as_json(), ensure_ascii=False) + "\n" for row in rows))


def with_kind(rows: Sequence[Row], kind: Kind) -> list[Row]:
    """The rows; those that say no kind are of this one."""
    return [row if row.kind else replace(row, kind=kind) for row in rows]


# Closeness

_STOP = frozenset(
    re.findall(
        r"\w+",
        """
        a an the and or but of to in on at by for with without from as is are was were be been do does did how what
        which who why when where can could would should will may might i me my we our you your he she it its they them
        their this that these those some any one so if than then not no give tell explain describe write make help show
        """,
    )
)


def content(text: str) -> frozenset[str]:
    """The words of a text that carry its content, in lower case, without a plural's s; all where there is none."""
    words = frozenset(re.findall(r"[a-z0-9]+", re.sub(r"['’]s?\b", "", text.lower())))
    return frozenset(word.rstrip("s") if len(word) > 3 else word for word in words - _STOP or words)


class Near:
    """Texts to be close to: finds one that shares at least a part of its content words (Jaccard) with another."""

    def __init__(self, overlap: float = 0.6) -> None:
        self.overlap = overlap
        self._texts: list[str] = []
        self._words: list[frozenset[str]] = []
        self._having: dict[str, list[int]] = {}

    def add(self, text: str) -> None:
        """One more text to be close to."""
        words = content(text)
        for word in words:
            self._having.setdefault(word, []).append(len(self._texts))
        self._texts.append(text)
        self._words.append(words)

    def find(self, text: str) -> str | None:
        """The closest known text that is at least that close, or None."""
        words = content(text)
        shared: dict[int, int] = {}
        for word in words:
            for place in self._having.get(word, ()):
                shared[place] = shared.get(place, 0) + 1
        best = max(shared, key=lambda p: shared[p] / len(words | self._words[p]), default=None)
        if best is None or shared[best] < self.overlap * len(words | self._words[best]):
            return None
        return self._texts[best]


def without_copies(rows: Sequence[Row], overlap: float = 0.6) -> tuple[list[Row], list[Row]]:
    """(rows that are not close to an earlier one, those that are), by their requests.

    Rows of a task are all kept: sums resemble each other, and are meant to.
    """
    near, kept, dropped = Near(overlap), [], []
    for row in rows:
        if row.kind == "task":
            kept.append(row)
        elif near.find(row.prompt) is None:
            near.add(row.prompt)
            kept.append(row)
        else:
            dropped.append(row)
    return kept, dropped


def nested(rows: Sequence[Row], seed: int, share: float | None) -> list[Row]:
    """Rows in an order whose every beginning has this share of harmless rows; with None all rows, in their own share.

    Rows of a task count as harmless.

    The order within a kind is that of a hash of seed and row, so that it does not hang on the file's.
    """

    def place(row: Row) -> str:
        return hashlib.sha256(f"{seed}:{row.key}".encode()).hexdigest()

    harmless = sorted((row for row in rows if row.kind in ("harmless", "task")), key=place)
    others = sorted((row for row in rows if row.kind not in ("harmless", "task")), key=place)
    if not harmless or not others:
        return harmless + others
    total = len(rows)
    if share is None:
        share = len(harmless) / total
    elif 0 < share < 1:
        total = min(total, int(len(harmless) / share), int(len(others) / (1 - share)))
    elif share == 0:
        total = len(others)
    found: list[Row] = []
    taken = 0
    for count in range(1, total + 1):
        wanted = taken < min(len(harmless), round(count * share)) or count - taken > len(others)
        found.append(harmless[taken] if wanted else others[count - 1 - taken])
        taken += wanted
    return found
