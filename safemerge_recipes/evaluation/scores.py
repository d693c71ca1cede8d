"""Scores of a model: plain, frozen values with the outcome of every prompt, and their JSON.

What `harness` finds and what `statistics`, reports and experiments read. Knows no lm-eval and no model.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from safemerge_recipes.errors import CheckError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of one task.

    `value` is lm-eval's aggregate, `stderr` its standard error (None where it has none). `outcomes` holds
    the score of every prompt by prompt id, in task order; empty for metrics that are not a mean over prompts.
    """

    value: float | None
    stderr: float | None
    n: int
    higher_is_better: bool | None = None
    outcomes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskScores:
    """The metrics of one task by name; lm-eval's filter follows after a comma where the task has several.

    `answers` holds what the model wrote, by prompt id, when it was asked to be kept; `likelihoods` the logarithm of the
    probability that an answer begins as a refusal, of harmful and harmless requests; `source` says title, licence,
    origin and number of rows of a published benchmark.
    """

    version: str
    metrics: dict[str, Metric]
    answers: dict[str, str] = field(default_factory=dict)
    likelihoods: dict[str, float] = field(default_factory=dict)
    source: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """What one model scored. `settings` says under which conditions; `seconds` is wall time with loading."""

    model: str
    tasks: dict[str, TaskScores]
    settings: dict[str, Any]
    seconds: float

    def metric(self, task: str, metric: str) -> Metric:
        """Return one metric.

        Raises:
            CheckError: The task was not run, or has no such metric.
        """
        if task not in self.tasks:
            raise CheckError(f"scores of {self.model}: no task {task!r}; there are {', '.join(self.tasks)}")
        if metric not in self.tasks[task].metrics:
            known = ", ".join(self.tasks[task].metrics)
            raise CheckError(f"scores of {self.model}, task {task}: no metric {metric!r}; there are {known}")
        return self.tasks[task].metrics[metric]

    def without_answers(self) -> Scores:
        """The same scores without what the model wrote."""
        return replace(self, tasks={name: replace(one, answers={}) for name, one in self.tasks.items()})

    def to_json(self) -> str:
        """Return strict JSON: no NaN, no infinities."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Scores:
        """Return the scores that `to_json` wrote.

        Raises:
            CheckError: The text is not such a file.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError(f"this version reads format {FORMAT}")
            tasks = {
                name: TaskScores(
                    version=task["version"],
                    metrics={key: Metric(**metric) for key, metric in task["metrics"].items()},
                    answers=task["answers"],
                    likelihoods=task.get("likelihoods", {}),
                    source=task.get("source"),
                )
                for name, task in data.pop("tasks").items()
            }
            return cls(tasks=tasks, **data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckError(f"scores: not a safemerge scores file ({type(error).__name__}: {error})") from error
