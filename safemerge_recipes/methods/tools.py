"""What work is done with; an executor makes it, a worker at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safemerge_recipes.storage.arena import Arena
    from safemerge_recipes.storage.reader import Reader


@dataclass(frozen=True, slots=True)
class Tools:
    """What work is done with: open files, the worker's buffers, bytes it may hold between passes."""

    reader: Reader
    arena: Arena
    room: int
