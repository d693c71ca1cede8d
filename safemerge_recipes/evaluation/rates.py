"""Intervals and tests of rates and means, paired and not: formulas with their sources, from scipy where it has them.

Everything takes plain numbers and knows nothing of models. scipy comes with the `eval` extra and is imported when a
function is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

Interval = tuple[float, float]


def quantile(confidence: float) -> float:
    """z of a two-sided interval."""
    from scipy.stats import norm

    return float(norm.ppf(0.5 + confidence / 2))


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a rate (Wilson 1927); unlike ±1.96 se it holds near 0 and 1.

    Raises:
        ValueError: Not 0 ≤ successes ≤ n, or n is 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}: expected 0 <= successes <= n and n > 0")
    from scipy.stats import binomtest

    found = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p of McNemar's exact test.

    Args:
        only_first: Prompts on which only the first model scored 1.
        only_second: Prompts on which only the second did.
    """
    if only_first + only_second == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(only_first, only_first + only_second).pvalue)


def paired_rates(only_first: int, only_second: int, n: int, confidence: float = 0.95) -> Interval:
    """Tango's score interval of the second rate minus the first, of n pairs (Tango 1998, Stat. Med. 17:891).

    Wide enough also where few pairs differ, where a bootstrap has nothing to resample.

    Args:
        only_first: Pairs of which only the first is 1.
        only_second: Pairs of which only the second is 1.
        n: Pairs.
        confidence: Of the interval.

    Raises:
        ValueError: More pairs differ than there are.
    """
    if n < 1 or min(only_first, only_second) < 0 or only_first + only_second > n:
        raise ValueError(f"{only_first} and {only_second} of {n} pairs differ: expected no more than there are")
    from scipy.optimize import brentq

    z = quantile(confidence)
    found = (only_second - only_first) / n

    def score(difference: float) -> float:
        # q: the likeliest share of pairs of which only the first is 1, given the difference
        a = 2 * n
        b = -only_first - only_second + (2 * n - only_second + only_first) * difference
        c = -only_first * difference * (1 - difference)
        q = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = n * (2 * q + difference * (1 - difference))
        distance = only_second - only_first - n * difference
        if abs(distance) < 1e-12 * n:
            return 0.0
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    def end(side: float) -> float:
        limit = side * (1 - 1e-12)
        if found * side > 1 - 1e-9:
            return side
        return float(brentq(lambda d: max(-1e9, min(1e9, score(d) + side * z)), found, limit, xtol=1e-12))

    return end(-1.0), end(1.0)


def independent_rates(first: tuple[int, int], second: tuple[int, int], confidence: float = 0.95) -> Interval:
    """Newcombe's hybrid score interval of the first rate minus the second (1998, Stat. Med. 17:873, method 10).

    Args:
        first: Successes and n.
        second: Successes and n of other prompts.
        confidence: Of the interval.
    """
    rates = [successes / n for successes, n in (first, second)]
    return difference_of(rates[0], wilson(*first, confidence), rates[1], wilson(*second, confidence))


def difference_of(first: float, of_first: Interval, second: float, of_second: Interval) -> Interval:
    """The interval of first − second from those of two independent estimates (MOVER, Zou & Donner 2008)."""
    below = math.hypot(first - of_first[0], of_second[1] - second)
    above = math.hypot(of_first[1] - first, second - of_second[0])
    return first - second - below, first - second + above


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's interval of a mean; the whole line for one value.

    Raises:
        ValueError: There are no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values")
    if n == 1:
        return -math.inf, math.inf
    from scipy.stats import t

    mean = math.fsum(values) / n
    se = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = float(t.ppf(0.5 + confidence / 2, n - 1)) * se
    return mean - half, mean + half


def sign_flip(differences: Sequence[float], seed: int = 0, draws: int = 9999) -> float:
    """The two-sided p of the sign-flip permutation test of a zero sum; exact where few differences are not zero."""
    moved = [value for value in differences if value]
    if len(moved) < 2:  # either sign of one is as far from zero
        return 1.0
    import numpy as np
    from scipy.stats import permutation_test

    def total(values: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.sum(values, axis=axis)

    found = permutation_test(
        (np.array(moved),), total, permutation_type="samples", n_resamples=draws, rng=np.random.default_rng(seed)
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def spearman(first: Sequence[float], second: Sequence[float], draws: int = 9999, seed: int = 0) -> tuple[float, float]:
    """Spearman's rank correlation and its two-sided permutation p; exact where there are few orders.

    Args:
        first: At least three values, not all equal.
        second: As many values, not all equal.
        draws: Permutations drawn.
        seed: Of the drawing.

    Raises:
        ValueError: The lengths differ, are below three, or a side is constant.
    """
    n = len(first)
    if n != len(second) or n < 3:
        raise ValueError(f"{n} and {len(second)} values: expected as many of each, at least three")
    if len(set(first)) == 1 or len(set(second)) == 1:
        raise ValueError("a side is constant: its ranks say nothing")
    import numpy as np
    from scipy.stats import permutation_test, rankdata

    one, two = (rankdata(side) - (n + 1) / 2 for side in (first, second))
    scale = math.sqrt(float(one @ one) * float(two @ two))

    def correlation(values: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.sum(values * two, axis=axis) / scale

    found = permutation_test(
        (one,), correlation, permutation_type="pairings", n_resamples=draws, rng=np.random.default_rng(seed)
    )
    return float(found.statistic), float(found.pvalue)


def cluster_bootstrap(
    families: Mapping[str, Sequence[float]],
    statistic: Callable[[Sequence[float]], float] | None = None,
    *,
    confidence: float = 0.95,
    draws: int = 4000,
    seed: int = 0,
) -> Interval:
    """The percentile interval of a mean over families, drawing families and then prompts within them.

    Families of one set of prompts are no independent draws of prompts: what holds for all of them is only as sure as
    the families are many.

    Args:
        families: Differences of every prompt, by family.
        statistic: Of one family's differences; their mean unless said.
        confidence: Of the interval.
        draws: Resamples.
        seed: Of the resampling.

    Raises:
        ValueError: There is no family, or an empty one.
    """
    import numpy as np

    if not families or not all(len(values) for values in families.values()):
        raise ValueError("expected families with differences")
    draw = np.random.default_rng(seed)
    arrays = [np.asarray(values, dtype=float) for values in families.values()]
    means = np.empty(draws)
    for i in range(draws):
        chosen = draw.integers(len(arrays), size=len(arrays))
        parts = [arrays[c][draw.integers(len(arrays[c]), size=len(arrays[c]))] for c in chosen]
        means[i] = np.mean([part.mean() if statistic is None else statistic(part.tolist()) for part in parts])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
