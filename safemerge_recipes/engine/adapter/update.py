"""A task as an update of the aligned model, symbolically, so that what cancels is never computed; and its values."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from safemerge_recipes.methods import on_torch
from safemerge_recipes.methods.kernel import Dot
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.methods.work import Work
from safemerge_recipes.planning.graph import Task
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.weights.algebra import Weight
from safemerge_recipes.weights.torch_factors import joined_factors

if TYPE_CHECKING:
    import torch


def inner_products(reader: Reader, arena: Arena) -> Dot:
    """What finds the inner product of two low-rank updates, from their factors."""
    import torch

    def dot(one: Weight, other: Weight) -> float:
        left, right = (joined_factors(weight, reader, torch.float64, arena.device) for weight in (one, other))
        if left is None or right is None:  # zero
            return 0.0
        return float(((left[0].T @ right[0]) * (left[1] @ right[1].T)).sum())

    return dot


def evaluated(task: Task, work: Work, reader: Reader, arena: Arena) -> torch.Tensor:
    """All values of a task's work, float32, in the tensor's shape."""
    import torch

    parts = []
    for piece in on_torch.values(work, task.slot, Tools(reader, arena, 0), threading.Event()):
        if not bool(piece.sum().isfinite()):
            on_torch.refuse(work, task.slot, piece, piece, False)
        parts.append(piece.float().clone())
    return torch.cat(parts).view(task.slot.shape)
