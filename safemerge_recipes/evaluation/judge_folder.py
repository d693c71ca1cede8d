"""A judge's verdicts on the answers that lie in a finished output, put into its scores, report, card and manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safemerge_recipes.engine.documents import provenance_in
from safemerge_recipes.engine.folder import ANSWERS_FILE, SCORES_FILE
from safemerge_recipes.engine.manifest import read_record
from safemerge_recipes.evaluation import answers
from safemerge_recipes.evaluation.compare import read_scores
from safemerge_recipes.evaluation.judge import Judge
from safemerge_recipes.evaluation.judging import judged
from safemerge_recipes.evaluation.scores import Scores
from safemerge_recipes.evaluation.scoring import MERGED, REFERENCES, attach, document


def with_answers(folder: Path) -> dict[str, Scores]:
    """The scores of a folder with the answers that lie beside them.

    Raises:
        CheckError: Either is missing.
    """
    scores = read_scores(folder / SCORES_FILE)
    said: dict[tuple[str, str], dict[str, str]] = {}
    for row in answers.read_answers(folder / ANSWERS_FILE):
        said.setdefault((row["model"], row["task"]), {})[row["id"]] = row["answer"]
    return {
        model: replace(
            one, tasks={name: replace(task, answers=said.get((model, name), {})) for name, task in one.tasks.items()}
        )
        for model, one in scores.items()
    }


def judge_folder(
    folder: Path, judge: Judge, tell: Callable[[str, int, int], None] = lambda task, done, total: None
) -> dict[str, Any]:
    """Judges the stored answers of a finished output; puts the verdicts into scores, report, card and manifest.

    Args:
        folder: The output.
        judge: Who judges.
        tell: See `judged`.

    Returns:
        The content of `safemerge_scores.json`.

    Raises:
        CheckError: There are no answers, or the judge does not answer. What it said is kept.
    """
    provenance_in(folder)  # before anything is asked
    before = read_record(folder / SCORES_FILE) if (folder / SCORES_FILE).exists() else {}
    found = judged(with_answers(folder), judge, tell)
    references = dict.fromkeys(row["reference"] for row in before.get("comparisons", ())) or REFERENCES
    content = document(found, tuple(references), MERGED if MERGED in found else None)
    attach(folder, content, answers.lines(found))
    return content
