"""The score files that a merge names, in its plain values: the mask's own and those it is combined with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

COMBINED = ("minus", "and", "or")
"""Keys of a mask that hold another score file."""


def mask_holders(merge: object) -> Iterator[dict[str, Any]]:
    """The plain mappings of a merge that have a `path` to a score file."""
    mask = merge.get("mask") if isinstance(merge, Mapping) else None
    for holder in (mask, *(mask.get(key) for key in COMBINED)) if isinstance(mask, dict) else ():
        if isinstance(holder, dict) and isinstance(holder.get("path"), str):
            yield holder
