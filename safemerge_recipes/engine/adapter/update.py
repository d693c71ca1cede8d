"""A task as an update of the aligned model, symbolically, so that what cancels is never computed; and its values."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from safemerge_recipes.errors import PlanError
from safemerge_recipes.methods import on_torch
from safemerge_recipes.methods.kernel import Tools
from safemerge_recipes.methods.slerp import SlerpKernel
from safemerge_recipes.methods.work import Apply, Work
from safemerge_recipes.planning.graph import Task
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.weights.algebra import Weight, exact
from safemerge_recipes.weights.operands import LowRankStack, Rescaled
from safemerge_recipes.weights.torch_factors import joined_factors

if TYPE_CHECKING:
    import torch


def weights_of(work: Work) -> tuple[Weight, ...]:
    """Every weight of an update that is not zero."""
    return tuple(weight for weight in work.weights if not weight.is_zero)


def thin(*weights: Weight) -> bool:
    """Whether all of them are sums of LoRA products, or zero."""
    return all(weight.is_zero or weight.low_rank for weight in weights)


def slerp(work: Apply, reader: Reader, arena: Arena) -> Weight:
    """Slerp of two low-rank updates as a sum: its coefficients follow from the factors' inner products."""
    import torch

    kernel = work.kernel
    assert isinstance(kernel, SlerpKernel)
    left, right = work.inputs
    x, y = (joined_factors(weight, reader, torch.float64, arena.device) for weight in work.inputs)

    def inner(one: tuple[torch.Tensor, torch.Tensor] | None, other: tuple[torch.Tensor, torch.Tensor] | None) -> float:
        if one is None or other is None:  # zero
            return 0.0
        return float(((one[0].T @ other[0]) * (one[1] @ other[1].T)).sum())

    first, second = kernel.coefficients(inner(x, x), inner(y, y), inner(x, y))
    return exact(first) * left + exact(second) * right


def refuse_unfit(name: str, weight: Weight) -> None:
    """Raises PlanError where an update has no plain-LoRA form."""
    for _, operand in weight:
        if isinstance(operand, Rescaled):
            raise PlanError(
                f"output.format: adapter: {name}: a DoRA update has no plain-LoRA equivalent; say `format: full`"
            )
        if isinstance(operand, LowRankStack) or ".experts." in f".{name}.":
            raise PlanError(
                f"output.format: adapter: {name}: updates of experts are not written as adapters; say `format: full`"
            )


def evaluated(task: Task, work: Work, reader: Reader, arena: Arena) -> torch.Tensor:
    """All values of a task's work, float32, in the tensor's shape."""
    import torch

    parts = []
    for block in on_torch.values(work, task.slot, Tools(reader, arena, 0), threading.Event()):
        if not bool(block.sum().isfinite()):
            on_torch.refuse(work, task.slot, block, block, False)
        parts.append(block.float().clone())
    return torch.cat(parts).view(task.slot.shape)
