"""How many optimizer steps rows take, and what a training run tells after some of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from safemerge_recipes.recipe.training import Schedule


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """How far one training run is. `loss` is the mean of the last steps, in nats a token."""

    rows: int
    done: int
    total: int
    loss: float | None = None


Listen = Callable[[TrainingStep], None]


def steps_of(rows: int, schedule: Schedule) -> int:
    """Optimizer steps of a run over so many rows."""
    micros = math.ceil(rows / schedule.micro)
    an_epoch = max(1, math.ceil(micros / (schedule.batch // schedule.micro)))
    return math.ceil(an_epoch * schedule.epochs)
