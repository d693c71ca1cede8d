"""The highest scores of a streamed tensor, of each of its rows or of each of its columns, exactly.

In a tensor the threshold is found without sorting (`threshold`), in rows a piece at a time, in columns a panel of them
at a time, each panel in one pass. Ties go by position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from safemerge_recipes.errors import SourceError
from safemerge_recipes.methods.kernel import Pieces
from safemerge_recipes.methods.threshold import HELD, LOOKS, Trim, trims
from safemerge_recipes.methods.ties import Sizes
from safemerge_recipes.recipe.numbers import exact
from safemerge_recipes.storage.arena import Arena

if TYPE_CHECKING:
    import torch

Chooser = Callable[[int, "torch.Tensor"], "torch.Tensor"]
"""(first element, a piece of scores) -> which of them are chosen; pieces come in order."""


@dataclass(frozen=True, slots=True)
class Top:
    """The ⌊part·n⌋ highest scores of the n elements of a tensor, row or column; `columns` is the length of a row."""

    part: float
    per: Literal["tensor", "row", "column"]
    columns: int

    def count(self, n: int) -> int:
        """How many of n elements are chosen."""
        return int(exact(self.part) * n)

    def held(self, numel: int, piece: int) -> int:
        """Numbers held while thresholds are sought: collected parts, sorted rows, or a panel of columns, sorted."""
        if self.per == "tensor":
            return 2 * min(HELD + piece, numel) + 4 * min(LOOKS[-1], numel)
        return 6 * piece if self.per == "row" else 4 * min(max(HELD, numel // self.columns), numel) + 4 * self.columns


def chooser(top: Top, name: str, numel: int, pieces: Pieces, arena: Arena) -> Chooser:
    """What chooses the highest scores, piece after piece.

    Raises:
        SourceError: a score of a tensor that is ranked as a whole is negative or NaN.
    """
    if top.per == "row":
        return lambda start, scores: _in_rows(scores.view(-1, top.columns), top.count(top.columns)).view(-1)
    if top.per == "column":
        return _InColumns(top, numel // top.columns, pieces)

    def checked(every: int = 1) -> Iterator[tuple[Any, ...]]:
        for start, scores in pieces(every=every):
            if not bool((scores >= 0).all()):  # the search for the threshold goes by magnitude
                raise SourceError(f"{name}: the mask holds negative scores or NaN; merge.mask.top expects scores ≥ 0")
            yield start, scores

    (trim,) = trims([top.count(numel)], numel, Sizes(checked, arena))
    return _InTensor(trim)


class _InTensor:
    """Above the tensor's threshold, and the first of those at it."""

    def __init__(self, trim: Trim) -> None:
        self.threshold, self.ties = trim.threshold, trim.ties
        self.all = trim.keeps_all and not math.isnan(trim.threshold) and trim.ties in (0, math.inf)

    def __call__(self, start: int, scores: torch.Tensor) -> torch.Tensor:
        import torch

        if self.all:
            return torch.ones_like(scores, dtype=torch.bool)
        chosen = scores > self.threshold
        if self.ties:
            equal = scores == self.threshold
            count = int(equal.sum())
            if count > self.ties:
                equal &= equal.cumsum(0) <= self.ties
            self.ties -= min(count, self.ties)
            chosen |= equal
        return chosen


def _in_rows(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` highest of each row `(rows, columns)`: sorted stably, so that ties go by position."""
    import torch

    chosen = torch.zeros_like(scores, dtype=torch.bool)
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :count]
    return chosen.scatter_(1, order, True)


class _InColumns:
    """Above each column's threshold, and the first of those at it."""

    def __init__(self, top: Top, rows: int, pieces: Pieces) -> None:
        import torch

        self.columns, count = top.columns, top.count(rows)
        if count == 0:
            self.threshold = torch.full((top.columns,), math.inf, dtype=torch.float64)
            self.left = torch.zeros(top.columns, dtype=torch.int64)
            return
        width = max(1, HELD // max(rows, 1))
        found, left = [], []
        for first in range(0, top.columns, width):
            panel = torch.cat(
                [scores.view(-1, top.columns)[:, first : first + width].clone() for _, scores in pieces()]
            )
            threshold = panel.sort(dim=0, descending=True).values[count - 1].clone()
            left.append(count - (panel > threshold).sum(0))
            found.append(threshold)
        self.threshold, self.left = torch.cat(found), torch.cat(left)

    def __call__(self, start: int, scores: torch.Tensor) -> torch.Tensor:
        rows = scores.view(-1, self.columns)
        threshold = self.threshold.to(rows.device, rows.dtype)
        self.left = self.left.to(rows.device)
        equal = rows == threshold
        chosen = (rows > threshold) | (equal & (equal.cumsum(0) <= self.left))
        self.left = (self.left - equal.sum(0)).clamp_(min=0)
        return chosen.view(-1)
