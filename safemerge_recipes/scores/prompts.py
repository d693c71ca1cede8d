"""The prompts that a model is scored on: rows or lines as tokens, and which of them count.

Knows tokenizers and rows, but no model.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safemerge_recipes.errors import CheckError, RecipeError
from safemerge_recipes.storage.files import MAX_BYTES, content_of
from safemerge_recipes.training.rows import Row, read_rows

Tokens = Literal["all", "answer"]


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt: its tokens, of which those from `first` on count; `where` names its line."""

    where: str
    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for: files of rows (JSONL, JSON) or of plain lines (.txt), and how they are read.

    Attributes:
        files: the files.
        tokens: which tokens count.
        limit: so many prompts, drawn by the seed; None: all.
        seed: of the draw.
        max_length: longer prompts are cut to so many tokens.
    """

    files: tuple[Path, ...]
    tokens: Tokens
    limit: int | None
    seed: int
    max_length: int


def read_prompts(asked: Asked) -> list[Row | tuple[str, str]]:
    """The drawn rows, and lines as (where, text).

    Raises:
        RecipeError: a file cannot be read, holds no prompt, or lines where answers count.
    """
    plain = [path for path in asked.files if path.suffix == ".txt"]
    if plain and asked.tokens == "answer":
        raise RecipeError(f"{plain[0]}: holds lines without answers; expected rows with answers, or --tokens all")
    found: list[Row | tuple[str, str]] = []
    found += read_rows([path for path in asked.files if path.suffix != ".txt"])
    for path in plain:
        try:
            lines = content_of(path, MAX_BYTES, "any").decode("utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path}: {error}; expected text, a prompt a line") from None
        found += [(f"{path.name}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise RecipeError(f"{asked.files[0]}: holds no prompt; expected one a line")
    if asked.limit is not None and asked.limit < len(found):
        drawn = sorted(random.Random(asked.seed).sample(range(len(found)), asked.limit))
        found = [found[place] for place in drawn]
    return found


def examples(rows: Sequence[Row | tuple[str, str]], tokenizer: Any, asked: Asked) -> list[Example]:
    """The prompts as tokens, cut to length; those whose counted tokens are all cut off are left out.

    Rows go through the tokenizer's chat template; without one, request and answer are joined by an empty line.

    Raises:
        CheckError: the template does not put the answer after the request, or nothing is left.
    """
    found = []
    for row in rows:
        if isinstance(row, tuple):
            where, before, after = row[0], "", row[1]
        else:
            where, (before, after) = row.where, _parts(row, tokenizer)
        special = not (isinstance(row, Row) and tokenizer.chat_template)
        head = tokenizer(before, add_special_tokens=special).input_ids if before else []
        tail = tokenizer(after, add_special_tokens=special and not before).input_ids
        first = len(head) if asked.tokens == "answer" else 0
        ids = tuple([*head, *tail][: asked.max_length])
        if len(ids) > max(first, 1):
            found.append(Example(where, ids, first))
    if not found:
        raise CheckError(
            f"{asked.files[0]}: none of {len(rows)} prompts has counted tokens among its first {asked.max_length}; "
            "expected shorter requests, try --max-length"
        )
    return found


def _parts(row: Row, tokenizer: Any) -> tuple[str, str]:
    if not tokenizer.chat_template:
        return f"{row.prompt}\n\n", row.answer
    turns = row.messages()
    try:
        before = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": row.answer}], tokenize=False)
    except Exception as error:  # a template is a stranger's program
        raise CheckError(f"{row.where}: the chat template fails on it: {error}") from None
    if not whole.startswith(before):
        raise CheckError(f"{row.where}: the chat template does not put the answer after the request")
    return before, whole[len(before) :]


def record(asked: Asked, used: Sequence[Example], read: int) -> dict[str, Any]:
    """What a score file says of its prompts."""
    digests = {path.name: hashlib.sha256(content_of(path, MAX_BYTES, "any")).hexdigest() for path in asked.files}
    return {
        "files": digests,
        "prompts": len(used),
        "left_out": read - len(used),
        "counted_tokens": sum(len(one.ids) - one.first for one in used),
        "tokens": asked.tokens,
        "limit": asked.limit,
        "seed": asked.seed,
        "max_length": asked.max_length,
    }
