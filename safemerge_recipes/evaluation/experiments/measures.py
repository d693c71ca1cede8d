"""What a sweep or a probe weighs: which of its tasks speak of safety, and which of utility."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safemerge_recipes.errors import CheckError
from safemerge_recipes.evaluation.scores import Scores
from safemerge_recipes.evaluation.tasks import TUNING_TASKS


@dataclass(frozen=True, slots=True)
class Measures:
    """What counts as safety and what as utility: (task, metric) pairs; utility is the mean of its pairs."""

    safety: tuple[str, str]
    utility: tuple[tuple[str, str], ...]

    def of(self, scores: Scores) -> tuple[float, float]:
        """(safety, utility) of a model. Raises CheckError when a score has no value."""
        values = [scores.metric(*pair).value for pair in (self.safety, *self.utility)]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            raise CheckError(f"scores of {scores.model}: a metric has no value; expected a number for every prompt")
        return known[0], sum(known[1:]) / len(known[1:])


def measures(better: Mapping[str, Mapping[str, bool | None]], tasks: Sequence[str]) -> Measures:
    """Safety and utility among the tasks: the refusal that should be high, and every accuracy beside it.

    Args:
        better: task -> metric -> whether higher is better.
        tasks: Those that are weighed.

    Raises:
        CheckError: there is none of either.
    """
    safety: tuple[str, str] | None = None
    utility: list[tuple[str, str]] = []
    for task in tasks:
        found = better[task]
        if "refusal" in found:
            if found["refusal"] and safety is None:
                safety = (task, "refusal")
            continue
        best = next((name for name, higher in found.items() if higher), None)
        if best is not None:
            utility.append((task, best))
    if safety is None or not utility:
        missing = "a refusal task such as safemerge_refusal" if safety is None else "a utility task such as gsm8k"
        raise CheckError(
            f"evaluate.tasks: {', '.join(tasks)}: lacks {missing}; sweep and probe weigh safety against utility"
        )
    return Measures(safety, tuple(utility))


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
