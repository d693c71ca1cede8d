"""What models wrote, beside their scores: one line of JSON an answer, for judges and for reading.

A line has the model, task, prompt id, answer and its outcomes; the prompt itself is not repeated, since benchmarks
differ in what may be passed on. `requests_of` finds it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import CheckError, SourceError
from safemerge_recipes.evaluation import benchmarks
from safemerge_recipes.evaluation.scores import Scores
from safemerge_recipes.evaluation.tasks import PUBLISHED_TASKS, benchmark_of
from safemerge_recipes.evaluation.tasks.prompts import prompts
from safemerge_recipes.storage.files import MAX_BYTES, text_of


def lines(scores: Mapping[str, Scores]) -> str:
    """The answers of all models as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in _rows(scores))


def _rows(scores: Mapping[str, Scores]) -> Iterator[dict[str, Any]]:
    for model, one in scores.items():
        for task, found in one.tasks.items():
            for prompt, answer in found.answers.items():
                outcomes = {name: m.outcomes[prompt] for name, m in found.metrics.items() if prompt in m.outcomes}
                yield {"model": model, "task": task, "id": prompt, "answer": answer, "outcomes": outcomes}


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The lines of an answers file.

    Raises:
        CheckError: It is missing or not such a file.
    """
    try:
        # Answers may hold line breaks of other alphabets, which JSON leaves as they are.
        rows = [json.loads(line) for line in text_of(path, MAX_BYTES).split("\n") if line]
        for row in rows:
            if not all(isinstance(row[key], str) for key in ("model", "task", "id", "answer")):
                raise ValueError(f"a line of {sorted(row)}")
    except FileNotFoundError:
        raise CheckError(f"{path}: missing; expected the answers that an evaluation keeps, run it first") from None
    except (OSError, SourceError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckError(f"{path}: not a file of answers ({type(error).__name__}: {error})") from None
    return rows


def requests_of(tasks: Sequence[str]) -> dict[str, dict[str, str]]:
    """task -> prompt id -> request, of those tasks whose answers may be refused.

    Raises:
        CheckError: A published benchmark is not on this machine any more.
    """
    found: dict[str, dict[str, str]] = {}
    for task in tasks:
        split = "tuning" if task.endswith("_tuning") else "test"
        kind = {"safemerge_refusal": "harmful", "safemerge_overrefusal": "harmless"}.get(task.removesuffix("_tuning"))
        if kind is not None:
            found[task] = {one.id: one.prompt for one in prompts(kind, split)}  # type: ignore[arg-type]  # literals
        elif task in PUBLISHED_TASKS and task != "safemerge_pubmedqa":
            found[task] = {row.id: row.prompt for row in benchmarks.load(benchmark_of(task)).rows}
    return found
