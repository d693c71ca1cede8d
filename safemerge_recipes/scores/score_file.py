"""A score file while it is written: a safetensors file whose header says how the scores were made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes.errors import RecipeError, SourceError, WriteError
from safemerge_recipes.sources.masks import RECORD
from safemerge_recipes.storage.arena import torch_bytes
from safemerge_recipes.storage.files import write_bytes, written
from safemerge_recipes.storage.safetensors import header_bytes, open_header

if TYPE_CHECKING:
    import torch


def check_target(path: Path) -> None:
    """Refuses to write a score file where something else lies than an earlier one.

    Raises:
        RecipeError: it does.
    """
    if not os.path.lexists(path):
        return
    try:
        ours = RECORD in open_header(path).metadata
    except SourceError:
        ours = False
    if not ours:
        raise RecipeError(f"--output {path}: is no file of scores and not replaced; choose another name")


class ScoreFile:
    """Takes scores in any order of tensors, float32."""

    def __init__(self, file: int, starts: Mapping[str, int]) -> None:
        self._file, self._starts = file, starts

    def put(self, name: str, first: int, scores: torch.Tensor) -> None:
        """Writes the scores of a tensor's elements from `first` on."""
        write_bytes(self._file, torch_bytes(scores.float().contiguous()), self._starts[name] + 4 * first)


@contextmanager
def score_file(path: Path, shapes: Mapping[str, tuple[int, ...]], record: Mapping[str, Any]) -> Iterator[ScoreFile]:
    """A score file that appears under its name when all of it is there.

    Raises:
        WriteError: it cannot be written.
    """
    places: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    end = 0
    for name, shape in shapes.items():
        count = 1
        for length in shape:
            count *= length
        places[name] = ("F32", shape, end, end + 4 * count)
        end += 4 * count
    header = header_bytes(places, {RECORD: json.dumps(record, ensure_ascii=False, sort_keys=True)})
    try:
        with written(path) as file:
            file.write(header)
            file.flush()
            os.truncate(file.fileno(), len(header) + end)
            yield ScoreFile(file.fileno(), {name: len(header) + place[2] for name, place in places.items()})
    except OSError as error:
        raise WriteError(f"{path}: {error.strerror}; nothing is left there") from None
