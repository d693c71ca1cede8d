"""Scores of an evaluation, flattened for display: one row a model, task and metric. Knows no lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safemerge_recipes.text import clean, figure, number

ORDER = ("base", "aligned", "finetuned", "safety", "merged")
"""Models in the order in which they are shown; others follow."""


@dataclass(frozen=True, slots=True)
class Score:
    """One value with its 95 % interval, where that is known. `n` counts examples."""

    model: str
    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int | None
    higher_is_better: bool | None

    @property
    def label(self) -> str:
        """Task and metric; lm-eval's filter in brackets unless it is `none`."""
        name, _, kept = self.metric.partition(",")
        return f"{self.task}: {name}" + (f" ({kept})" if kept and kept != "none" else "")


def read_scores(scores: Mapping[str, Any] | None) -> dict[str, list[Score]]:
    """Scores by task and metric, models in a fixed order. What has no value is left out."""
    models = scores.get("models") if isinstance(scores, Mapping) else None
    if not isinstance(models, Mapping):
        return {}
    ranked = sorted(models, key=lambda model: ORDER.index(model) if model in ORDER else len(ORDER))
    found: dict[str, list[Score]] = {}
    for model in ranked:
        tasks = models[model]
        for task, metrics in tasks.items() if isinstance(tasks, Mapping) else ():
            for metric, entry in metrics.items() if isinstance(metrics, Mapping) else ():
                score = _score(model, task, metric, entry)
                if score is not None:
                    found.setdefault(score.label, []).append(score)
    return found


def _score(model: object, task: object, metric: object, entry: object) -> Score | None:
    given: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {"value": entry}
    value = number(given.get("value"))
    if value is None:
        return None
    low, high, n = number(given.get("low")), number(given.get("high")), number(given.get("n"))
    if low is None or high is None or low > high:
        low = high = None
    better = given.get("higher_is_better")
    return Score(
        clean(model, 80), clean(task, 80), clean(metric, 80), value, low, high,
        int(n) if n is not None else None, better if isinstance(better, bool) else None,
    )  # fmt: skip


def read_verdicts(scores: Mapping[str, Any] | None, most: int | None = None) -> list[str]:
    """The paired tests in words, and what about the scores may not be comparable; beyond `most`, how many."""
    given: Mapping[str, Any] = scores if isinstance(scores, Mapping) else {}
    rows, cautions = given.get("comparisons"), given.get("cautions")
    found = [
        f"{clean(row.get('model'), 80)} against {clean(row.get('reference'), 80)}, {clean(row.get('task'), 80)}, "
        f"{clean(row.get('metric'), 80)}: {clean(row.get('verdict'))}"
        for row in (rows if isinstance(rows, list) else ())
        if isinstance(row, Mapping)
    ]
    found += [f"Mind: {clean(one)}" for one in (cautions if isinstance(cautions, list) else ())]
    return found if most is None or len(found) <= most else [*found[:most], f"{len(found) - most} more"]


def is_rate(rows: list[Score]) -> bool:
    """Whether all values and intervals lie in [0, 1], and so read as percentages; J (`separation`) may be negative."""
    least = -1 if all(row.metric == "separation" for row in rows) else 0
    return all(least <= value <= 1 for row in rows for value in (row.value, row.low, row.high) if value is not None)


def shown(value: float, rate: bool) -> str:
    """A value as it is printed."""
    return f"{100 * value:.1f} %" if rate else figure(value, 4)


def interval(row: Score, rate: bool) -> str:
    """The 95 % interval as it is printed; empty where unknown."""
    if row.low is None or row.high is None:
        return ""
    if rate:
        return f"{100 * row.low:.1f} to {100 * row.high:.1f}"
    return f"{figure(row.low, 4)} to {figure(row.high, 4)}"
