"""The outcome of every prompt of every model of a family, as the JSON lines that ship under docs/evidence/outcomes.

The first line says what the family is and under which settings it was scored. Then a line for each task with the ids of
its prompts, and a line for each model and task with its outcomes in that order: `refusal` and `degenerate` (0 or 1),
`acc`, and `likelihood`, the natural logarithm of the probability that an answer begins as a refusal. No answers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safemerge_recipes.evaluation.scores import TaskScores
from safemerge_recipes.evaluation.separation import Sides
from safemerge_recipes.storage.files import write_file

LIKELIHOOD = "likelihood"
LEFT_OUT = ("compliance",)
"""Metrics that others say already."""


@dataclass
class Outcomes:
    """What is known of a family.

    Attributes:
        head: The first line.
        ids: task -> ids of its prompts.
        models: (model, task) -> outcome name -> values by place.
    """

    head: dict[str, Any]
    ids: dict[str, list[str]] = field(default_factory=dict)
    models: dict[tuple[str, str], dict[str, list[float]]] = field(default_factory=dict)

    def take(self, model: str, tasks: Mapping[str, TaskScores]) -> None:
        """Takes what a model scored."""
        for task, scores in tasks.items():
            columns = {name: metric.outcomes for name, metric in scores.metrics.items() if name not in LEFT_OUT}
            if scores.likelihoods:
                columns[LIKELIHOOD] = scores.likelihoods
            columns = {name: values for name, values in columns.items() if values}
            ids = self.ids.setdefault(task, list(next(iter(columns.values()))))
            for name, values in columns.items():
                if list(values) != ids:
                    raise ValueError(f"{model}, {task}, {name}: other prompts than those of the models before it")
            self.models[model, task] = {name: [_short(v) for v in values.values()] for name, values in columns.items()}

    def values(self, model: str, task: str, name: str) -> dict[str, float]:
        """One outcome by prompt id; without the prompts that are near a training row."""
        near = set(self.head.get("near_training", ()))
        found = self.models[model, task][name]
        return {key: value for key, value in zip(self.ids[task], found, strict=True) if f"{task}/{key}" not in near}

    def has(self, model: str, tasks: Collection[str], name: str) -> bool:
        return all(name in self.models.get((model, task), ()) for task in tasks)

    def sides(self, model: str, name: str, harmful: Collection[str], harmless: Collection[str]) -> Sides:
        """An outcome of all harmful and of all harmless prompts."""
        return Sides(*(self._together(model, name, tasks) for tasks in (harmful, harmless)))

    def _together(self, model: str, name: str, tasks: Collection[str]) -> dict[str, float]:
        return {f"{task}/{key}": v for task in tasks for key, v in self.values(model, task, name).items()}

    def write(self, path: Path) -> None:
        lines: list[Any] = [self.head]
        lines += [{"task": task, "ids": ids} for task, ids in self.ids.items()]
        lines += [{"model": model, "task": task, **columns} for (model, task), columns in self.models.items()]
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(
            json.dumps(line, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n" for line in lines
        )
        write_file(path, text)


def outcomes_beside(results: Path) -> Path:
    """Where the outcomes of families lie that the comparisons leave out."""
    return results.with_name("beside")


def read(path: Path) -> Outcomes:
    """The outcomes of a file."""
    head, *lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    found = Outcomes(head)
    for line in lines:
        task = line.pop("task")
        if "ids" in line:
            found.ids[task] = line["ids"]
        else:
            found.models[line.pop("model"), task] = line
    return found


def _short(value: float) -> float:
    return int(value) if value == int(value) else round(value, 4)
