"""Do two models differ on the same prompts? Paired differences with intervals and a verdict that claims no more.

Everything is paired by prompt id: two models are compared on the prompts both answered. Knows nothing of models or
tasks beyond their scores; formulas are in `rates` and `separation`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from safemerge_recipes.errors import CheckError
from safemerge_recipes.evaluation.rates import Interval, holm, mcnemar, mean_interval, paired_rates, sign_flip
from safemerge_recipes.evaluation.scores import Metric, Scores
from safemerge_recipes.evaluation.separation import Sides, auroc, auroc_change, separation, separation_change, sides
from safemerge_recipes.text import percent, points

MARGIN = 0.05
"""A difference below this is none that matters: five points."""
SECONDARY = ("refusal", "compliance", "degenerate", "auroc", "unsafe", "unjudged", "margin")
"""Metrics beside the ones that a verdict rests on, corrected for chance among themselves."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of one model against the reference, on the n prompts both answered.

    `low` and `high` are the 95 % interval of `difference` (model minus reference): Tango's for scores of 0 and 1,
    Student's for others, see `separation` for J and AUROC. `p` is paired (exact McNemar for scores of 0 and 1, else a
    sign-flip test); `p_holm` is corrected over the comparison's primary or its secondary metrics (`SECONDARY`).
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
    def equivalent(self) -> bool:
        """Whether the whole interval lies within the margin, so that no difference that matters was found absent."""
        return self.low > -MARGIN and self.high < MARGIN

    @property
    def verdict(self) -> str:
        """The finding in words, with the numbers it rests on."""
        numbers = (
            f"{percent(self.value)} against {percent(self.reference_value)}, n={self.n}, difference "
            f"{points(self.difference)} points, 95 % CI {points(self.low)} to {points(self.high)}, "
            f"p{_p(self.p_holm)} after Holm"
        )
        if self.equivalent:
            return f"equivalent within {100 * MARGIN:g} points ({numbers})"
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


def compare(scores: Mapping[str, Scores], reference: str) -> Comparison:
    """Compare every model with the reference on every metric both have, prompt by prompt.

    Args:
        scores: By the name each model goes by in the comparison.
        reference: One of those names.

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
        found += _separations(model, second, reference, first)
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
                    found.append(_difference(model, reference, task, name, metric, other, shared))
    return Comparison(reference, tuple(corrected(found)), tuple(dict.fromkeys(cautions)))


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The differences with Holm's correction, over primary and over secondary metrics each."""
    found = list(differences)
    for secondary in (False, True):
        places = [i for i, d in enumerate(found) if (d.metric in SECONDARY) == secondary]
        for place, p in zip(places, holm([found[i].p for i in places]), strict=True):
            found[place] = replace(found[place], p_holm=p)
    return found


def _separations(model: str, second: Scores, reference: str, first: Scores) -> Iterator[Difference]:
    """J and AUROC, of each split where both models answered both kinds of request."""
    for metric, change in (("separation", separation_change), ("auroc", auroc_change)):
        own, theirs = (sides(one, likelihoods=metric == "auroc") for one in (second, first))
        for task in own:
            if task not in theirs:
                continue
            try:
                value, interval, p = change(own[task], theirs[task])
            except ValueError:  # other prompts: what is shared is too little
                continue
            now, before = (_level(metric, one[task]) for one in (own, theirs))
            n = len(own[task].harmful) + len(own[task].harmless)
            yield Difference(model, reference, task, metric, n, now, before, value, *interval, p, p, True)


def _level(metric: str, one: Sides) -> float:
    return (separation if metric == "separation" else auroc)(one)[0]


def _difference(
    model: str, reference: str, task: str, name: str, metric: Metric, other: Metric, shared: Sequence[str]
) -> Difference:
    pairs = [(other.outcomes[key], metric.outcomes[key]) for key in shared]
    n = len(pairs)
    differences = [second - first for first, second in pairs]
    interval: Interval
    if all(value in (0.0, 1.0) for pair in pairs for value in pair):
        lost, won = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
        interval, p = paired_rates(lost, won, n), mcnemar(lost, won)
    else:
        interval, p = mean_interval(differences), sign_flip(differences)
    return Difference(
        model=model,
        reference=reference,
        task=task,
        metric=name,
        n=n,
        value=math.fsum(second for _, second in pairs) / n,
        reference_value=math.fsum(first for first, _ in pairs) / n,
        difference=math.fsum(differences) / n,
        low=interval[0],
        high=interval[1],
        p=p,
        p_holm=p,
        higher_is_better=metric.higher_is_better,
    )


# What must agree for two scores to be comparable, in the words of a caution.
_COMPARABLE = {
    "chat_template_sha256": "chat template",
    "dtype": "dtype",
    "batch_size": "batch size",
    "refusal_matcher": "refusal matcher version",
    "answer_tokens": "length of answers",
    "judge": "judge",
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


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"={p:.3f}"
