"""Scores of a finished output against the answers beside them: the part of `verify --deep` that needs no model.

Every rate is the mean of its outcomes, every outcome follows from the stored answer where this program scores the task
itself, and what report and card show is computed again from the outcomes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safemerge_recipes.engine.documents import scores_in
from safemerge_recipes.engine.folder import ANSWERS_FILE, SCORES_FILE
from safemerge_recipes.engine.manifest import LEFT_OUT, manifest_record, read_manifest
from safemerge_recipes.errors import CheckError
from safemerge_recipes.evaluation.answers import read_answers
from safemerge_recipes.evaluation.compare import read_scores
from safemerge_recipes.evaluation.refusal import MATCHER_VERSION
from safemerge_recipes.evaluation.scores import Scores, TaskScores
from safemerge_recipes.evaluation.scoring import MERGED, REFERENCES, document
from safemerge_recipes.evaluation.tasks import arithmetic
from safemerge_recipes.evaluation.tasks.hooks import score_arithmetic, score_refusal
from safemerge_recipes.verification.documents import unfinished
from safemerge_recipes.verification.problems import refuse, same

SHOWN = ("models", "headline", "comparisons", "cautions")
"""Parts of a scores file that follow from its details."""


def check_scores(folder: Path) -> tuple[list[str], list[str]]:
    """(what was checked, what not) of an output's scores; two empty lists where it has none.

    Raises:
        CheckError: a score is not what its outcomes and answers make it.
    """
    record = scores_in(folder)
    if record is None:
        return [], []
    if unfinished(read_manifest(folder)):
        return [], ["scores against answers: a command that replaces them was cut short, `safemerge report` ends it"]
    scores, judged, silent = read_scores(folder / SCORES_FILE), list[str](), list[str]()
    left_out = ANSWERS_FILE in (manifest_record(folder).get(LEFT_OUT) or ())
    answers: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in read_answers(folder / ANSWERS_FILE):
        answers.setdefault((row["model"], row["task"]), {})[row["id"]] = row
    problems = [*_shown(record, scores)]
    for model, one in scores.items():
        for task, found in one.tasks.items():
            rows = answers.pop((model, task), {})
            problems += _rates(model, task, found)
            problems += [] if left_out else _outcomes(model, task, found, rows)
            scored = {name: _again(task, found, one, row) for name, row in rows.items()}
            again = {name: values for name, values in scored.items() if values is not None}
            problems += _against(model, task, found, again)
            (judged if again else silent).append(task)
    problems += [f"{ANSWERS_FILE}: {model}, {task}: no scores go with these answers" for model, task in answers]
    refuse(folder, problems)
    checked = [f"{SCORES_FILE}: rates, tests and words against the outcome of every prompt"]
    if judged:
        checked.append(f"outcomes of {', '.join(dict.fromkeys(judged))} against the stored answers")
    unchecked = ["scores: whether the models give these answers; only evaluating again shows it"]
    if left_out:
        unchecked.append("outcomes against answers, which were left out when this was published")
    elif silent:
        unchecked.append(
            f"outcomes of {', '.join(dict.fromkeys(silent))}, which this version does not score from answers"
        )
    if any("unsafe" in found.metrics for one in scores.values() for found in one.tasks.values()):
        unchecked.append("a judge's verdicts; `safemerge judge` asks again")
    return checked, unchecked


def _shown(record: Mapping[str, Any], scores: Mapping[str, Scores]) -> Iterator[str]:
    try:
        now = json.loads(json.dumps(document(scores, REFERENCES, MERGED if MERGED in scores else None)))
    except (CheckError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        yield f"{SCORES_FILE}: details that give no scores ({type(error).__name__}: {str(error)[:200]})"
        return
    for key in SHOWN:
        if not same(now[key], record.get(key)):
            yield f"{SCORES_FILE}: {key} is not what its details make it"


def _rates(model: str, task: str, found: TaskScores) -> Iterator[str]:
    for name, metric in found.metrics.items():
        outcomes = list(metric.outcomes.values())
        if outcomes and not (
            metric.n == len(outcomes)
            and metric.value is not None
            and math.isclose(metric.value, math.fsum(outcomes) / len(outcomes), rel_tol=1e-9, abs_tol=1e-9)
        ):
            yield f"{SCORES_FILE}: {model}, {task}: {name} is {metric.value}, which is not the mean of its outcomes"


def _outcomes(model: str, task: str, found: TaskScores, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Where an answer's outcomes are not those of the scores, or an answer is missing."""
    for prompt, row in rows.items():
        expected = {name: m.outcomes[prompt] for name, m in found.metrics.items() if prompt in m.outcomes}
        if row.get("outcomes") != expected:
            yield f"{ANSWERS_FILE}: {model}, {task}, {prompt}: its outcomes are not those of the scores"
    asked = {prompt for metric in found.metrics.values() for prompt in metric.outcomes}
    if rows and (lacking := sorted(asked - rows.keys())):
        yield f"{ANSWERS_FILE}: {model}, {task}: {lacking[0]}: its answer is missing"
    if not rows and "refusal" in found.metrics:
        yield f"{ANSWERS_FILE}: {model}, {task}: its answers are missing"


def _again(task: str, found: TaskScores, one: Scores, row: Mapping[str, Any]) -> dict[str, float] | None:
    """The outcomes that an answer has; None where this version scores the task in another way, or lm-eval does."""
    if "refusal" in found.metrics and "compliance" in found.metrics:
        return score_refusal({}, [row["answer"]]) if one.settings.get("refusal_matcher") == MATCHER_VERSION else None
    kind, _, seed = str(row["id"]).partition("/")
    if task.removesuffix("_tuning") == "safemerge_arithmetic" and kind == "arithmetic" and seed.isdecimal():
        return score_arithmetic({"answer": arithmetic.make(int(seed)).answer}, [row["answer"]])
    return None


def _against(model: str, task: str, found: TaskScores, again: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    for prompt, values in again.items():
        for name, value in values.items():
            if name in found.metrics and found.metrics[name].outcomes.get(prompt) != value:
                yield f"{SCORES_FILE}: {model}, {task}, {prompt}: {name} is not what its answer makes it"
