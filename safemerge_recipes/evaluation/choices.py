"""What accuracy does not say of a task with few fixed answers: macro-F1, and by how much the right one is likelier.

Accuracy has a floor where a model gives one answer to everything; macro-F1, the mean over the answers of the harmonic
mean of precision and recall, falls to the floor of that answer alone. The margin is the log-likelihood of the right
answer minus that of the best wrong one, in nats: it moves before an answer does. Pure; knows no models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from safemerge_recipes.evaluation.scores import Metric

DRAWS = 500
"""Resamples behind the standard error of macro-F1."""
MOST = 10
"""Answers of a task that is taken for a classification."""


def class_metrics(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Metric]:
    """`macro_f1` and `margin` of a task that asks for one of the same few answers in every row; else nothing.

    Args:
        rows: lm-eval's samples by prompt id: `arguments`, `resps` and `target` of each.
    """
    table = [_row(row) for row in rows.values()]
    names = table[0][0] if table and table[0] else None
    if names is None or not 1 < len(names) <= MOST or any(one is None or one[0] != names for one in table):
        return {}
    likely = [one[1] for one in table if one is not None]
    right = [one[2] for one in table if one is not None]
    said = [max(range(len(names)), key=values.__getitem__) for values in likely]
    margins = {
        key: values[true] - max(value for i, value in enumerate(values) if i != true)
        for key, values, true in zip(rows, likely, right, strict=True)
    }
    mean = math.fsum(margins.values()) / len(margins)
    spread = math.fsum((value - mean) ** 2 for value in margins.values()) / max(1, len(margins) - 1)
    return {
        "macro_f1": Metric(macro_f1(said, right), _error(said, right), len(right), True),
        "margin": Metric(mean, math.sqrt(spread / len(margins)), len(margins), True, margins),
    }


def _row(row: Mapping[str, Any]) -> tuple[tuple[str, ...], list[float], int] | None:
    """(the answers, how likely each is, the place of the right one); None where the row asks for something else."""
    try:
        names = tuple(str(request[1]).strip() for request in row["arguments"])
        values = [float(answer[0][0]) for answer in row["resps"]]
    except (TypeError, ValueError, IndexError, KeyError):
        return None
    target = row.get("target")
    true = target if isinstance(target, int) else names.index(str(target)) if str(target) in names else -1
    fits = len(set(names)) == len(names) == len(values) and 0 <= true < len(names) and all(map(math.isfinite, values))
    return (names, values, true) if fits else None


def macro_f1(said: Sequence[int], right: Sequence[int]) -> float:
    """The mean of F1 over the answers that are right somewhere or were given somewhere."""
    found = []
    for one in {*said, *right}:
        hits = sum(a == b == one for a, b in zip(said, right, strict=True))
        found.append(2 * hits / (sum(a == one for a in said) + sum(b == one for b in right)))
    return math.fsum(found) / len(found)


def _error(said: Sequence[int], right: Sequence[int]) -> float | None:
    """The bootstrap's standard error of macro-F1."""
    import numpy as np

    if len(right) < 2:
        return None
    draw, n = np.random.default_rng(0), len(right)
    values = []
    for _ in range(DRAWS):
        places = draw.integers(n, size=n).tolist()
        values.append(macro_f1([said[i] for i in places], [right[i] for i in places]))
    return float(np.std(values, ddof=1))
