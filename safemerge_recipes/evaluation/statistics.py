"""Do two models differ on the same prompts? Intervals, paired tests and a verdict that claims no more.

Everything is paired by prompt id: two models are compared on the prompts both answered. Standard library
only. Knows nothing of models or tasks beyond their scores.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from safemerge_recipes.errors import CheckError
from safemerge_recipes.evaluation.scores import Scores


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a rate (Wilson 1927); unlike ±1.96 se it holds near 0 and 1.

    Raises:
        ValueError: Not 0 ≤ successes ≤ n, or n is 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}: expected 0 <= successes <= n and n > 0")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / n
    centre = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and n the exact bound is the end of the scale; rounding must not cross it.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p of McNemar's exact test.

    Args:
        only_first: Prompts on which only the first model scored 1.
        only_second: Prompts on which only the second did.
    """
    n = only_first + only_second
    if n == 0:
        return 1.0
    # Twice the smaller tail of Binomial(n, 1/2), in integers.
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / (1 << n))


def paired_bootstrap(
    differences: Sequence[float], *, confidence: float = 0.95, draws: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean difference over prompts.

    Args:
        differences: Second model's score minus the first's, one for each prompt.
        confidence: Of the interval.
        draws: Resamples of the prompts.
        seed: Of the resampling; the same seed gives the same interval.

    Raises:
        ValueError: There are no differences.
    """
    n = len(differences)
    if n == 0:
        raise ValueError("no differences")
    rng = random.Random(seed)
    means = sorted(math.fsum(rng.choices(differences, k=n)) / n for _ in range(draws))
    return _quantile(means, (1 - confidence) / 2), _quantile(means, (1 + confidence) / 2)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of one model against the reference, on the n prompts both answered.

    `low` and `high` are the 95 % bootstrap interval of `difference` (model minus reference), `p` is paired
    (exact McNemar for scores of 0 and 1, else a sign-flip test), `p_holm` is corrected over all differences
    of the comparison.
    """

    model: str
    reference: str
    task: str
    metric: str
    n: int
    value: float
    reference_value: float
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    higher_is_better: bool | None

    @property
    def detected(self) -> bool:
        """Whether the corrected test detects a difference at the 5 % level."""
        return self.p_holm < 0.05

    @property
    def verdict(self) -> str:
        """The finding in words, with the numbers it rests on."""
        numbers = (
            f"{self.value:.1%} against {self.reference_value:.1%}, n={self.n}, difference "
            f"{100 * self.difference:+.1f} points, 95 % CI {100 * self.low:+.1f} to {100 * self.high:+.1f}, "
            f"p{_p(self.p_holm)} after Holm"
        )
        if not self.detected:
            return f"no difference detected ({numbers})"
        word = "higher" if self.difference > 0 else "lower"
        if self.higher_is_better is None:
            return f"{word} ({numbers})"
        better = (self.difference > 0) == self.higher_is_better
        return f"{word}, which is {'better' if better else 'worse'} ({numbers})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """All differences to the reference, and what about the scores may not be comparable."""

    reference: str
    differences: tuple[Difference, ...]
    cautions: tuple[str, ...]

    def of(self, model: str, task: str, metric: str) -> Difference:
        """Return one difference; KeyError when it was not compared."""
        for difference in self.differences:
            if (difference.model, difference.task, difference.metric) == (model, task, metric):
                return difference
        raise KeyError((model, task, metric))


def compare(scores: Mapping[str, Scores], reference: str, *, seed: int = 0) -> Comparison:
    """Compare every model with the reference on every metric both have, prompt by prompt.

    Args:
        scores: By the name each model goes by in the comparison.
        reference: One of those names.
        seed: Of the resampling.

    Raises:
        CheckError: The reference is not among the scores.
    """
    if reference not in scores:
        raise CheckError(f"comparison: no scores named {reference!r}; there are {', '.join(scores)}")
    first = scores[reference]
    found: list[Difference] = []
    cautions: list[str] = []
    for model, second in scores.items():
        if model == reference:
            continue
        cautions += _setting_differences(model, second, reference, first)
        for task, metrics in second.tasks.items():
            if task not in first.tasks:
                cautions.append(f"{model}: {task} was not run on {reference}")
                continue
            for name, metric in metrics.metrics.items():
                other = first.tasks[task].metrics.get(name)
                if other is None or not metric.outcomes or not other.outcomes:
                    continue
                shared = [key for key in other.outcomes if key in metric.outcomes]
                if len(shared) < max(len(other.outcomes), len(metric.outcomes)):
                    cautions.append(f"{model}: {task} is compared on the {len(shared)} prompts both answered")
                if shared:
                    pairs = [(other.outcomes[key], metric.outcomes[key]) for key in shared]
                    better = metric.higher_is_better
                    found.append(_difference(model, reference, task, name, pairs, better, seed))
    adjusted = holm([d.p for d in found])
    corrected = tuple(_with_holm(d, p) for d, p in zip(found, adjusted, strict=True))
    return Comparison(reference, corrected, tuple(dict.fromkeys(cautions)))


def _difference(
    model: str,
    reference: str,
    task: str,
    metric: str,
    pairs: Sequence[tuple[float, float]],
    higher_is_better: bool | None,
    seed: int,
) -> Difference:
    n = len(pairs)
    differences = [second - first for first, second in pairs]
    low, high = paired_bootstrap(differences, seed=seed)
    if all(value in (0.0, 1.0) for pair in pairs for value in pair):
        p = mcnemar(sum(d < 0 for d in differences), sum(d > 0 for d in differences))
    else:
        p = _sign_flip(differences, seed)
    return Difference(
        model=model,
        reference=reference,
        task=task,
        metric=metric,
        n=n,
        value=math.fsum(second for _, second in pairs) / n,
        reference_value=math.fsum(first for first, _ in pairs) / n,
        difference=math.fsum(differences) / n,
        low=low,
        high=high,
        p=p,
        p_holm=p,
        higher_is_better=higher_is_better,
    )


def _with_holm(difference: Difference, p: float) -> Difference:
    from dataclasses import replace

    return replace(difference, p_holm=p)


def _sign_flip(differences: Sequence[float], seed: int, draws: int = 9999) -> float:
    """Return the two-sided p of the sign-flip permutation test of a zero mean."""
    rng = random.Random(seed)
    observed = abs(math.fsum(differences)) * (1 - 1e-12)
    extreme = sum(
        abs(math.fsum(d if rng.random() < 0.5 else -d for d in differences)) >= observed for _ in range(draws)
    )
    return (extreme + 1) / (draws + 1)


# What must agree for two scores to be comparable, in the words of a caution.
_COMPARABLE = {
    "chat_template_sha256": "chat template",
    "dtype": "dtype",
    "batch_size": "batch size",
    "refusal_matcher": "refusal matcher version",
    "versions": "software versions",
}


def _setting_differences(model: str, second: Scores, reference: str, first: Scores) -> list[str]:
    cautions = [
        f"{model} and {reference} were scored with a different {word}"
        for key, word in _COMPARABLE.items()
        if first.settings.get(key) != second.settings.get(key)
    ]
    for task in second.tasks:
        if task in first.tasks and first.tasks[task].version != second.tasks[task].version:
            cautions.append(f"{model} and {reference} were scored with different versions of {task}")
    return cautions


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Return the q-quantile with linear interpolation, as numpy does by default."""
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"={p:.3f}"


def ranks(values: Sequence[float]) -> list[float]:
    """Return the ranks of the values from 1; tied values share the mean of their ranks."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for index in order[start:stop]:
            found[index] = (start + stop + 1) / 2
        start = stop
    return found


def spearman(first: Sequence[float], second: Sequence[float], draws: int = 9999, seed: int = 0) -> tuple[float, float]:
    """Return Spearman's rank correlation and its two-sided permutation p, (1 + #extreme) / (draws + 1).

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
    one, two = ([rank - (n + 1) / 2 for rank in ranks(side)] for side in (first, second))
    scale = math.sqrt(math.fsum(x * x for x in one) * math.fsum(x * x for x in two))
    if not scale:
        raise ValueError("a side is constant: its ranks say nothing")
    observed = math.fsum(x * y for x, y in zip(one, two, strict=True)) / scale
    rng, shuffled, extreme = random.Random(seed), list(two), 0
    bound = abs(observed) * scale * (1 - 1e-12)
    for _ in range(draws):
        rng.shuffle(shuffled)
        extreme += abs(math.fsum(x * y for x, y in zip(one, shuffled, strict=True))) >= bound
    return observed, (extreme + 1) / (draws + 1)
