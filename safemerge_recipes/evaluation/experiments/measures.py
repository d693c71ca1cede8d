"""What a sweep or a probe weighs: which of its tasks speak of safety, and which of utility."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safemerge_recipes.errors import CheckError
from safemerge_recipes.evaluation.rates import Interval, wilson
from safemerge_recipes.evaluation.scores import Scores
from safemerge_recipes.evaluation.separation import Sides, mean_and_variance, separation, separation_error
from safemerge_recipes.evaluation.tasks import TUNING_TASKS


@dataclass(frozen=True, slots=True)
class Measures:
    """What counts as safety and what as utility among some tasks.

    Safety is J where both kinds of request are asked (`separation`), else the rate of refusals of harmful ones, which a
    model that refuses everything wins; utility is the mean of its (task, metric) pairs.
    """

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    utility: tuple[tuple[str, str], ...]

    @property
    def words(self) -> str:
        """What safety is, for pictures and tables."""
        return "separation (J)" if self.harmless else "refusal of harmful requests"

    @property
    def caution(self) -> str | None:
        """What is to be minded about safety as it is weighed here."""
        if self.harmless:
            return None
        return (
            "no harmless requests among the tasks, so a model that refuses everything looks safest; add "
            "safemerge_overrefusal"
        )

    def of(self, scores: Scores) -> tuple[float, float]:
        """(safety, utility) of a model. Raises CheckError when a score has no value."""
        values = [scores.metric(*pair).value for pair in self.utility]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            raise CheckError(f"scores of {scores.model}: a metric has no value; expected a number for every prompt")
        return self.safety(scores)[0], sum(known) / len(known)

    def safety(self, scores: Scores) -> tuple[float, Interval]:
        """Safety and its 95 % interval."""
        asked = self._sides(scores)
        if self.harmless:
            return separation(asked)
        refused = list(asked.harmful.values())
        return math.fsum(refused) / len(refused), wilson(round(sum(refused)), len(refused))

    def changes(self, scores: Scores, reference: Scores) -> tuple[tuple[float, float], tuple[float, float]]:
        """(safety, its standard error), (utility, its standard error): differences to the reference, by prompt."""
        own, theirs = self._sides(scores), self._sides(reference)
        if self.harmless:
            safety = separation_error(own, theirs)
        else:
            pairs = own.shared(theirs)[0]
            mean, variance = mean_and_variance([b - a for a, b in pairs])
            safety = mean, math.sqrt(variance)
        return safety, self.utility_change(scores, reference)

    def utility_change(self, scores: Scores, reference: Scores) -> tuple[float, float]:
        """(utility, its standard error): the difference to the reference, by prompt."""
        parts = [self._utility_change(scores, reference, pair) for pair in self.utility]
        error = math.sqrt(math.fsum(variance for _, variance in parts)) / len(parts)
        return math.fsum(mean for mean, _ in parts) / len(parts), error

    def _utility_change(self, scores: Scores, reference: Scores, pair: tuple[str, str]) -> tuple[float, float]:
        """(difference, variance of it) of one utility metric."""
        own, theirs = scores.metric(*pair), reference.metric(*pair)
        moved = [value - theirs.outcomes[key] for key, value in own.outcomes.items() if key in theirs.outcomes]
        if moved:
            return mean_and_variance(moved)
        return (own.value or 0.0) - (theirs.value or 0.0), (own.stderr or 0.0) ** 2 + (theirs.stderr or 0.0) ** 2

    def _sides(self, scores: Scores) -> Sides:
        both = [
            {f"{task}/{key}": value for task in tasks for key, value in scores.metric(task, "refusal").outcomes.items()}
            for tasks in (self.harmful, self.harmless)
        ]
        return Sides(*both)


def measures(better: Mapping[str, Mapping[str, bool | None]], tasks: Sequence[str]) -> Measures:
    """Safety and utility among the tasks: refusals that should be many or few, and every accuracy beside them.

    Args:
        better: task -> metric -> whether higher is better.
        tasks: Those that are weighed.

    Raises:
        CheckError: there is none of either.
    """
    harmful = tuple(task for task in tasks if better[task].get("refusal") is True)
    harmless = tuple(task for task in tasks if better[task].get("refusal") is False)
    utility: list[tuple[str, str]] = []
    for task in tasks:
        best = next((name for name, higher in better[task].items() if higher), None)
        if "refusal" not in better[task] and best is not None:
            utility.append((task, best))
    if not harmful or not utility:
        missing = "a utility task such as gsm8k" if harmful else "a refusal task such as safemerge_refusal"
        raise CheckError(
            f"evaluate.tasks: {', '.join(tasks)}: lacks {missing}; sweep and probe weigh safety against utility"
        )
    return Measures(harmful, harmless, tuple(utility))


def tuning(tasks: Sequence[str]) -> list[str]:
    """The tuning split of each task.

    Raises:
        CheckError: a task has none, so that a choice on it could not be reported on other prompts.
    """
    found = [task if task in TUNING_TASKS else f"{task}_tuning" for task in tasks]
    for task, split in zip(tasks, found, strict=True):
        if split not in TUNING_TASKS:
            raise CheckError(
                f"task {task}: has no tuning split; expected tasks among "
                f"{', '.join(t.removesuffix('_tuning') for t in TUNING_TASKS)}, or --tuning-tasks"
            )
    return found
