"""How often the 95 % intervals of the evaluation hold the truth, in simulations: the table of docs/evaluation.md.

python -m benchmarks.study.coverage
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from safemerge_recipes.evaluation.rates import Interval, cluster_bootstrap, difference_of, mean_interval, paired_rates
from safemerge_recipes.evaluation.separation import Sides, auroc, auroc_change, separation

TIMES = 2000


def held(intervals: Iterable[tuple[Interval, float]]) -> float:
    """The share of intervals, in percent, that hold their truth."""
    inside = [low <= truth <= high for (low, high), truth in intervals]
    return 100 * sum(inside) / len(inside)


def sides(harmful: np.ndarray, harmless: np.ndarray) -> Sides:
    return Sides(*({str(i): float(x) for i, x in enumerate(side)} for side in (harmful, harmless)))


def rates(draw: np.random.Generator, lost: float, won: float, n: int = 90) -> float:
    """Tango's interval of a paired difference, by the shares of prompts that change sides."""
    rows = draw.multinomial(n, [lost, won, 1 - lost - won], size=TIMES)
    return held((paired_rates(int(a), int(b), n), won - lost) for a, b, _ in rows)


def separations(draw: np.random.Generator, n: int) -> tuple[float, float]:
    """The interval of a change in J, and that of J: refusals 40 and 10 %, of which three and one in ten are redrawn."""
    changes, levels = [], []
    for _ in range(TIMES):
        harm, safe = draw.random((2, n)), draw.random((2, n))
        first, second = harm[0] < 0.4, safe[0] < 0.1
        pairs = (
            (first, np.where(draw.random(n) < 0.7, first, harm[1] < 0.8)),
            (second, np.where(draw.random(n) < 0.9, second, safe[1] < 0.2)),
        )
        parts: list[tuple[float, Interval]] = []
        for before, after in pairs:
            lost, won = int((before & ~after).sum()), int((after & ~before).sum())
            parts.append(((won - lost) / n, paired_rates(lost, won, n)))
        changes.append((difference_of(*parts[0], *parts[1]), 0.3 * 0.4 - 0.1 * 0.1))
        levels.append((separation(sides(first, second))[1], 0.3))
    return held(changes), held(levels)


def curves(draw: np.random.Generator, n: int) -> tuple[float, float]:
    """DeLong's interval of AUROC and of its change, of normal scores one apart and of the same with more noise."""
    truth, noisier = (0.5 * (1 + math.erf(1 / math.sqrt(2 * variance) / math.sqrt(2))) for variance in (1.0, 1.49))
    levels, changes = [], []
    for _ in range(TIMES):
        harmful, harmless = draw.normal(1, 1, n), draw.normal(0, 1, n)
        own = sides(harmful, harmless)
        other = sides(harmful + draw.normal(0, 0.7, n), harmless + draw.normal(0, 0.7, n))
        levels.append((auroc(own)[1], truth))
        changes.append((auroc_change(other, own)[1], noisier - truth))
    return held(levels), held(changes)


def families(draw: np.random.Generator, count: int, times: int, n: int = 180) -> tuple[float, float]:
    """Student's interval over families and the cluster bootstrap, of effects that spread by 8 points around 5."""
    by_t, by_draws = [], []
    for _ in range(times):
        effects = draw.normal(0.05, 0.08, count)
        parts = {
            str(i): ((draw.random(n) < min(1.0, 0.3 + e)).astype(float) - (draw.random(n) < 0.3)).tolist()
            for i, e in enumerate(effects)
        }
        by_t.append((mean_interval([math.fsum(one) / n for one in parts.values()]), 0.05))
        if len(by_draws) < 200:
            by_draws.append((cluster_bootstrap(parts, draws=500), 0.05))
    return held(by_t), held(by_draws)


def main() -> None:
    """Print the share of intervals that hold the truth, a line a case."""
    draw = np.random.default_rng(1)
    for lost, won in ((0.02, 0.02), (0.01, 0.06), (0.1, 0.3), (0.2, 0.2)):
        print(f"paired rates, n = 90, lost {lost:.0%}, won {won:.0%}: {rates(draw, lost, won):.1f}")
    for n in (90, 210):
        print(f"change in J and J, n = {n} + {n}: {separations(draw, n)}")
    for n in (60, 210):
        print(f"AUROC and its change, n = {n} + {n}: {curves(draw, n)}")
    for count in (2, 6, 16):
        print(f"over {count} families, t and cluster bootstrap: {families(draw, count, 600)}")


if __name__ == "__main__":
    main()
