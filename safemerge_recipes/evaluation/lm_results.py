"""What lm-eval gives for a task as scores of ours: metrics with their outcomes by prompt, and the answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from safemerge_recipes.evaluation.choices import class_metrics
from safemerge_recipes.evaluation.scores import Metric, TaskScores


def task_scores(task: str, raw: Mapping[str, Any]) -> TaskScores:
    """Turn lm-eval's results of one task into ours."""
    samples = raw["samples"][task]
    better = raw.get("higher_is_better", {}).get(task, {})
    metrics = {}
    for key, value in raw["results"][task].items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr"):
            continue
        rows = [row for row in samples if row.get("filter", "none") == chosen]
        outcomes = {prompt_id(row): float(row[metric]) for row in rows if _is_number(row.get(metric))}
        metrics[metric if chosen == "none" else key] = Metric(
            value=_finite(value),
            stderr=_finite(raw["results"][task].get(f"{metric}_stderr,{chosen}")),
            n=len(rows),
            higher_is_better=better.get(metric),
            outcomes=outcomes if len(outcomes) == len(rows) else {},
        )
    first = {prompt_id(row): row for row in samples if row.get("filter", "none") == "none"}
    metrics |= class_metrics(first)
    answers = {}
    for row in samples:
        text = row["resps"][0][0]
        # Multiple choice has likelihoods instead of an answer.
        if isinstance(text, str):
            answers[prompt_id(row)] = text
    return TaskScores(str(raw["versions"].get(task)), metrics, answers)


def prompt_id(row: Mapping[str, Any]) -> str:
    """Return the row's own id where the task has one, else lm-eval's hash of the row."""
    own = row["doc"].get("id") if isinstance(row["doc"], dict) else None
    return str(own if own is not None else row["doc_hash"])


def _is_number(value: Any) -> bool:
    return _finite(value) is not None


def _finite(value: Any) -> float | None:
    """Return numbers, also numpy's, as floats; NaN, infinities and words as None."""
    if value is None or isinstance(value, str | tuple | list | dict):
        return None
    number = float(value)
    return number if math.isfinite(number) else None
