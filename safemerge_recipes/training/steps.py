"""How many optimizer steps rows take, for plans and for training."""

from __future__ import annotations

import math

from safemerge_recipes.recipe.training import Schedule


def steps_of(rows: int, schedule: Schedule) -> int:
    """Optimizer steps of a run over so many rows."""
    micros = math.ceil(rows / schedule.micro)
    an_epoch = max(1, math.ceil(micros / (schedule.batch // schedule.micro)))
    return math.ceil(an_epoch * schedule.epochs)
