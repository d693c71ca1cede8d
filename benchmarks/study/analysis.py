"""The analysis of docs/preregistration.md: differences by family, ranks among random draws, Holm over the comparisons.

Plain numbers in, plain numbers out; fixed before anything was scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safemerge_recipes.evaluation.rates import Interval, cluster_bootstrap, holm, mean_interval, sign_flip
from safemerge_recipes.evaluation.separation import Sides
from safemerge_recipes.evaluation.statistics import MARGIN

DRAWS = 100_000
FEWEST = 3
"""Families of which equivalence or non-inferiority is said: two that happen to agree have a t-interval of no width."""


@dataclass(frozen=True)
class Pooled:
    """A difference in J over families: mean, 95 % t-interval, cluster bootstrap, exact p."""

    families: int
    mean: float
    interval: Interval
    bootstrap: Interval
    p: float

    @property
    def equivalent(self) -> bool:
        return self.families >= FEWEST and self.interval[0] > -MARGIN and self.interval[1] < MARGIN


def weighted(one: Sides, reference: Sides) -> list[float]:
    """Each shared prompt's part in the difference in J, times the number of prompts, so that their mean is it."""
    harmful, harmless = one.shared(reference)
    n = len(harmful) + len(harmless)
    return [(b - a) * n / len(harmful) for a, b in harmful] + [(a - b) * n / len(harmless) for a, b in harmless]


def pooled(families: Mapping[str, tuple[Sides, Sides]]) -> Pooled:
    """The difference of (this, against) over families.

    Raises:
        ValueError: There are fewer than two families.
    """
    if len(families) < 2:
        raise ValueError("expected at least two families")
    parts = {name: weighted(this, against) for name, (this, against) in families.items()}
    means = [math.fsum(values) / len(values) for values in parts.values()]
    mean = math.fsum(means) / len(means)
    return Pooled(len(means), mean, mean_interval(means), cluster_bootstrap(parts), sign_flip(means))


def rank_p(values: Mapping[str, tuple[float, Sequence[float]]], seed: int = 0) -> float:
    """One-sided p of the mean rank of each family's choice among its random draws, drawn within families.

    Args:
        values: Family -> (J of the choice, J of its draws). Ties count half.
        seed: Of the drawing.
    """
    import numpy as np

    draw, found, total = np.random.default_rng(seed), 0.0, np.zeros(DRAWS)
    for chosen, others in values.values():
        every = np.array([chosen, *others])
        ranks = np.array([(every < one).sum() + 0.5 * ((every == one).sum() - 1) for one in every])
        found += ranks[0]
        total += ranks[draw.integers(len(ranks), size=DRAWS)]
    return float((1 + (total >= found - 1e-9).sum()) / (1 + DRAWS))


def corrected(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm over the comparisons."""
    return dict(zip(p_values, holm(list(p_values.values())), strict=True))
