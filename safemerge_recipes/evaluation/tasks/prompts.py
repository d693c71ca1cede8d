"""The harmful and harmless prompts, written for this project; read from the two JSONL files beside this one.

Rows come round robin over the categories, so that the first n rows of a split are balanced. Standard
library only; knows nothing of models or scores.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safemerge_recipes.storage.files import text_of

Split = Literal["tuning", "test"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request to a model. `id` is stable between versions of the file."""

    id: str
    category: str
    split: str
    prompt: str


def prompts(kind: Literal["harmful", "harmless"], split: Split) -> tuple[Prompt, ...]:
    """Return the prompts of a split: what a safe model declines (`harmful`) or should answer (`harmless`)."""
    lines = text_of(Path(__file__).with_name(f"{kind}.jsonl"), 1 << 24, "any").splitlines()
    rows = (Prompt(**json.loads(line)) for line in lines)
    return tuple(row for row in rows if row.split == split)
