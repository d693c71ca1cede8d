"""Vocabularies: which tensors have a row for every token, and which token has which row.

Rows of models with different vocabularies are matched by token where both tokenizers can be read
(tokenizer.json, or vocab.json with added_tokens.json), else by position. Knows nothing of merging.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safemerge_recipes.sources.checkpoint import read_object
from safemerge_recipes.sources.model_config import setting
from safemerge_recipes.storage.files import content_of
from safemerge_recipes.tensor_names import block_of
from safemerge_recipes.weights.algebra import Weight
from safemerge_recipes.weights.operands import Rows

MAX_TOKENIZER_BYTES = 64_000_000
"""Largest tokenizer file read, in bytes; those of the largest vocabularies have half of that."""
MAX_TOKENIZER_VALUES = 4_000_000
"""Most values in one: a vocabulary of 300 000 tokens and as many merges stays below a third of it."""
SHOWN = 5
"""How many differing tokens a message shows."""


def is_head(name: str) -> bool:
    """Whether a tensor outside the blocks belongs to the output head."""
    module = name.rpartition(".")[0].split(".")[-1]
    return ("head" in module or module in ("embed_out", "output")) and block_of(name) is None


def embedding_of(weights: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """The input embedding: the only matrix outside the blocks, save the head, with a row for every token.

    Args:
        weights: anything with a shape, by tensor name.
        config: the model's config.json.
    """
    size = setting(config, "vocab_size")
    found = [
        name
        for name, weight in weights.items()
        if len(weight.shape) == 2 and weight.shape[0] == size and block_of(name) is None and not is_head(name)
    ]
    return found[0] if len(found) == 1 else None


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, MAX_TOKENIZER_BYTES, MAX_TOKENIZER_VALUES)


def read_tokens(folder: Path) -> dict[str, int] | None:
    """Token -> row, from a folder's tokenizer files; None where there are none that can be read.

    Raises:
        SourceError: a file is there but is not sound JSON.
    """
    names = ("tokenizer.json", "vocab.json", "added_tokens.json")
    return _tokens({name: folder / name for name in names if (folder / name).exists()})


def _tokens(files: Mapping[str, Path]) -> dict[str, int] | None:
    if "tokenizer.json" in files:
        value = _read(files["tokenizer.json"])
        model = value.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocab, list):  # Unigram: pairs of token and score
            vocab = {entry[0]: number for number, entry in enumerate(vocab) if isinstance(entry, list) and entry}
        tokens = dict(vocab) if isinstance(vocab, dict) else {}
        added = value.get("added_tokens")
        for entry in added if isinstance(added, list) else ():
            if isinstance(entry, dict):
                tokens[entry.get("content")] = entry.get("id")
    elif "vocab.json" in files:
        tokens = dict(_read(files["vocab.json"]))
    else:
        return None
    if "added_tokens.json" in files and "tokenizer.json" not in files:
        tokens.update(_read(files["added_tokens.json"]))
    return _sound(tokens) or None


def _sound(tokens: Mapping[Any, Any]) -> dict[str, int]:
    return {t: i for t, i in tokens.items() if isinstance(t, str) and type(i) is int and i >= 0}


def tokens_without_a_row(files: Mapping[str, Path], rows: int) -> dict[str, int]:
    """Token -> the row that it would have, for tokens of a tokenizer behind the last of an embedding's rows.

    Args:
        files: the tokenizer's, by name. Of a vocabulary that is no JSON (tokenizer.model) only added tokens are seen.
        rows: of the embedding.

    Raises:
        SourceError: a file is not sound JSON.
    """
    tokens = _tokens(files)
    if tokens is None:
        tokens = _sound(_read(files["added_tokens.json"])) if "added_tokens.json" in files else {}
    config = _read(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    added = config.get("added_tokens_decoder")
    for row, entry in added.items() if isinstance(added, dict) else ():
        token = entry.get("content") if isinstance(entry, dict) else None
        if isinstance(token, str) and re.fullmatch("[0-9]{1,18}", row):
            tokens.setdefault(token, int(row))
    return {token: row for token, row in tokens.items() if row >= rows}


def rowless(tokens: Mapping[str, int], rows: int) -> str:
    """What is wrong with tokens that an embedding has no row for, in words."""
    token, row = max(tokens.items(), key=lambda item: item[1])
    some = "a token has" if len(tokens) == 1 else f"{len(tokens)} tokens have"
    return f"tokenizer: {some} no row in the embedding: {token[:40]!r} is token {row}, the last row is {rows - 1}"


def same_tokenizer(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tokenizer files, byte for byte."""
    names = ("tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer.model")

    def content(folder: Path) -> list[bytes | None]:
        return [content_of(folder / n, MAX_TOKENIZER_BYTES) if (folder / n).exists() else None for n in names]

    return one == other or content(one) == content(other)


def difference(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """What a vocabulary changed beyond appending: tokens that are gone or moved, as text."""
    changed = []
    by_row = {row: token for token, row in after.items()}
    for token, row in before.items():
        if after.get(token) != row:
            now = f"row {after[token]}" if token in after else "none"
            changed.append(f"{token!r}: row {row} before, {now} after (row {row} is now {by_row.get(row)!r})")
    return changed


def rows_of(own: Mapping[str, int] | None, size: int, wanted: Mapping[str, int] | None, count: int) -> list[int | None]:
    """For each of `count` wanted rows, the row of a model with `size` rows that is for the same token.

    None where the model has no such token. Rows without a token (padding) and unknown vocabularies are
    matched by position.
    """
    if own is None or wanted is None or own == wanted:
        return [row if row < size else None for row in range(count)]
    token_at = {row: token for token, row in wanted.items()}
    taken = set(own.values())
    found: list[int | None] = []
    for row in range(count):
        token = token_at.get(row)
        if token is None:
            found.append(row if row < size and row not in taken else None)
        else:
            at = own.get(token)
            found.append(at if at is not None and at < size else None)
    return found


def match_rows(weight: Weight, filler: Weight, rows: list[int | None]) -> Weight:
    """The weight with its rows rearranged; rows it has not are the filler's at that place."""
    if rows == list(range(weight.shape[0])):
        return weight
    runs: list[tuple[int, int, int]] = []
    for place, row in enumerate(rows):
        part, first = (1, place) if row is None else (0, row)
        if runs and runs[-1][0] == part and runs[-1][1] + runs[-1][2] == first:
            runs[-1] = (part, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((part, first, 1))
    used = (weight, filler) if any(part for part, _, _ in runs) else (weight,)
    return Weight.of(Rows(used, tuple(runs)))
