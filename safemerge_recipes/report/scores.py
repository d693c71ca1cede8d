"""Scores of an evaluation, flattened for display: one row a model, task and metric. Knows no lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safemerge_recipes.text import clean, figure, fixed, number, percent, points, signed

MAX_SENTENCES = 6
"""Pairs of models whose separation is told."""
UNITS = ("auroc", "margin")
"""Metrics that are no rates, whatever their values."""
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


@dataclass(frozen=True, slots=True)
class Test:
    """One paired test of a model against a reference. Figures that a file does not hold are None."""

    model: str
    reference: str
    task: str
    metric: str
    n: int | None
    value: float | None
    reference_value: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    better: bool | None
    detected: bool | None
    equivalent: bool
    verdict: str

    @property
    def rate(self) -> bool:
        """Whether the values are rates, so that their difference is told in points."""
        if self.metric in UNITS:
            return False
        return all(x is None or abs(x) <= 1 for x in (self.value, self.reference_value, self.difference))

    @property
    def secondary(self) -> bool:
        """Whether it tests a metric that only completes another."""
        return is_secondary(self.metric)

    @property
    def beside(self) -> bool:
        """Whether it says nothing that a headline needs: it completes another metric, or is J by another measure."""
        return self.secondary or self.metric == "auroc"

    @property
    def change(self) -> str:
        """The difference as it is printed."""
        return points(self.difference) if self.rate else signed(self.difference)

    @property
    def between(self) -> str:
        """Its 95 % interval as it is printed; empty where unknown."""
        if self.low is None or self.high is None:
            return ""
        ends = (points(x) if self.rate else signed(x) for x in (self.low, self.high))
        return " to ".join(ends)

    @property
    def chance(self) -> str:
        """The corrected p as it is printed."""
        return "< 0.001" if self.p is not None and self.p < 0.001 else fixed(self.p)

    @property
    def finding(self) -> str:
        """What was found, in a word or two; the whole verdict where the file holds no figures."""
        if self.detected is None or self.difference is None:
            return self.verdict
        if self.equivalent:
            return "equivalent"
        if not self.detected:
            return "no difference detected"
        word = "higher" if self.difference > 0 else "lower"
        return word if self.better is None else f"{word}: {'better' if self.better else 'worse'}"

    @property
    def words(self) -> str:
        """The test in one sentence."""
        return f"{self.model} against {self.reference}, {self.task}, {self.metric}: {self.verdict}"


def read_tests(scores: Mapping[str, Any] | None) -> list[Test]:
    """The paired tests of a scores file, in its order."""
    rows = scores.get("comparisons") if isinstance(scores, Mapping) else None
    return [_test(row) for row in (rows if isinstance(rows, list) else ()) if isinstance(row, Mapping)]


def _test(row: Mapping[str, Any]) -> Test:
    difference, higher, n = number(row.get("difference")), row.get("higher_is_better"), number(row.get("n"))
    detected = row.get("detected")
    p = number(row.get("p_holm"))
    return Test(
        clean(row.get("model"), 80), clean(row.get("reference"), 80),
        clean(row.get("task"), 80), clean(row.get("metric"), 80),
        int(n) if n is not None else None,
        number(row.get("value")), number(row.get("reference_value")), difference,
        number(row.get("low")), number(row.get("high")), p,
        (difference > 0) == higher if isinstance(higher, bool) and difference else None,
        detected if isinstance(detected, bool) else None, row.get("equivalent") is True, clean(row.get("verdict")),
    )  # fmt: skip


def read_cautions(scores: Mapping[str, Any] | None) -> list[str]:
    """What about the scores may not be comparable."""
    found = scores.get("cautions") if isinstance(scores, Mapping) else None
    return [clean(one) for one in (found if isinstance(found, list) else ())]


def is_secondary(metric: str) -> bool:
    """Whether a metric only completes another, as compliance and degenerate answers do refusals."""
    return metric.partition(",")[0] in ("compliance", "degenerate")


def task_title(task: str) -> str:
    """A task as people call it: ours without their prefix."""
    ours = task.removeprefix("safemerge_").removesuffix("_tuning")
    return {"overrefusal": "over-refusal"}.get(ours, ours.replace("_", " ") if ours != task else task)


def headline(scores: Mapping[str, Any] | None) -> str:
    """The verdict in one line: what the paired tests found of the merged model against the fine-tuned one.

    Empty without scores. A difference that was not detected is called that, not equality.
    """
    tests = [t for t in read_tests(scores) if (t.model, t.reference) == ("merged", "finetuned")]
    main = [t for t in tests if not t.beside and t.detected is not None and t.difference is not None]
    if not main:
        rows = (row for rows in read_scores(scores).values() for row in rows)
        told = [f"{task_title(r.task)} {shown(r.value, 0 <= r.value <= 1)}" for r in rows
                if r.model == "merged" and not is_secondary(r.metric)]  # fmt: skip
        return _sentence([*told[:4], "not tested against the fine-tuned model"]) if told else ""
    several = len({t.task for t in main}) < len(main)
    changed, same, unchanged = [], [], []
    for test in main:
        title, metric = task_title(test.task), clean(test.metric.partition(",")[0], 40)
        if metric == "separation":
            title = "separation of harmful from harmless"
        elif several and metric != title and sum(t.task == test.task for t in main) > 1:
            title += f" {metric}"
        if test.equivalent:
            unchanged.append(title)
        elif test.detected:
            worse = " (worse)" if test.better is False else ""
            changed.append(f"{title} {test.change}{' points' if test.rate else ''}{worse}")
        else:
            same.append(title)
    if unchanged:
        changed.append(f"{' and '.join(dict.fromkeys(unchanged))} unchanged within five points")
    if same:
        changed.append(f"no change detected in {' or '.join(dict.fromkeys(same))}")
    return _sentence(changed)


def separations(scores: Mapping[str, Any] | None) -> list[str]:
    """What a scores file says of how well each model tells harmful from harmless, a sentence a pair of models."""
    found = scores.get("headline") if isinstance(scores, Mapping) else None
    told = [clean(one) for one in (found if isinstance(found, list) else ())]
    return [text[:1].upper() + text[1:] for text in told if text][:MAX_SENTENCES]


def _sentence(parts: list[str]) -> str:
    text = ", ".join(parts)
    return text[:1].upper() + text[1:]


def is_rate(rows: list[Score]) -> bool:
    """Whether all values and intervals lie in [0, 1], and so read as percentages; J (`separation`) may be negative.

    AUROC is read as a number between 0 and 1, a margin as one of nats.
    """
    if any(row.metric in UNITS for row in rows):
        return False
    least = -1 if all(row.metric == "separation" for row in rows) else 0
    return all(least <= value <= 1 for row in rows for value in (row.value, row.low, row.high) if value is not None)


def shown(value: float, rate: bool) -> str:
    """A value as it is printed."""
    return percent(value) if rate else figure(value, 4)


def interval(row: Score, rate: bool) -> str:
    """The 95 % interval as it is printed; empty where unknown."""
    if row.low is None or row.high is None:
        return ""
    if rate:
        return f"{fixed(100 * row.low, 1)} to {fixed(100 * row.high, 1)}"
    return f"{figure(row.low, 4)} to {figure(row.high, 4)}"
