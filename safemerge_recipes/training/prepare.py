"""A set of rows that is fit to train on: refusals among helpful answers, without copies, apart from evaluation.

Near copies are dropped, rows near an evaluation prompt are refused or dropped by name, and the hash of its request
assigns each row to the training file or to the held-out one, so that the same row is on the same side in every set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import RecipeError, SourceError
from safemerge_recipes.evaluation.refusal import classify
from safemerge_recipes.sources.trained import SHIPPED
from safemerge_recipes.storage.files import MAX_BYTES, text_of
from safemerge_recipes.training.plan import evaluation_prompts, read_prompts, refuse_overlap
from safemerge_recipes.training.rows import Row, read_rows, without_copies, write_rows


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """What came out: rows to train on, rows held out, and what was left out with the reason."""

    training: tuple[Row, ...]
    held_out: tuple[Row, ...]
    copies: tuple[Row, ...]
    overlapping: tuple[Row, ...]
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Counts, as `--json` prints them."""
        return {
            "training": _kinds(self.training),
            "held_out": _kinds(self.held_out),
            "near_copies_dropped": len(self.copies),
            "near_evaluation_dropped": [f"{row.where}: {row.prompt}" for row in self.overlapping],
            "warnings": list(self.warnings),
        }


def _kinds(rows: Sequence[Row]) -> dict[str, int]:
    return {kind: n for kind in ("harmful", "harmless", "task") if (n := sum(row.kind == kind for row in rows))}


def prepare_safety_data(
    sources: Sequence[Path] = (),
    refuse: Sequence[Path] = (),
    *,
    holdout: float = 0.0,
    keep_out: Sequence[Path] = (),
    drop_overlap: bool = False,
    own: Sequence[Row] = (),
) -> PreparedRows:
    """Rows from files, checked and cleaned; the shipped set where none is named.

    Args:
        sources: Files of rows, in any form that `train-adapter` reads.
        refuse: Files of harmful requests without answers, JSONL with `prompt` or plain lines; each gets one of the
            shipped set's refusals, by the hash of the request.
        holdout: Part of the rows that goes into the held-out file.
        keep_out: Files with further evaluation prompts.
        drop_overlap: Leave out rows that are close to an evaluation prompt, instead of refusing the set.
        own: Rows of a task that the model answers by itself (`training.own`).

    Raises:
        RecipeError: a file cannot be read, a harmful row's answer is no refusal (more than 2 %), or rows are close to
            evaluation prompts; says which.
    """
    given = list(sources) or ([] if refuse else [SHIPPED])
    rows = [_labelled(row) for row in read_rows(given)] + [row for path in refuse for row in _refused(path)]
    rows += own
    if not rows:
        raise RecipeError("found no rows; expected some in the files")
    near = evaluation_prompts()
    for path in keep_out:
        for prompt in _prompts(path):
            near.add(prompt)
    overlapping = [row for row in rows if row.kind != "task" and near.find(row.prompt) is not None]
    if overlapping and not drop_overlap:
        refuse_overlap(rows, near, "prepare-safety-data")
    gone = {row.key for row in overlapping}
    kept, copies = without_copies([row for row in rows if row.key not in gone])
    harmful = [row for row in kept if row.kind == "harmful"]
    complied = [row for row in harmful if classify(row.answer) != "refuses"]
    if len(complied) > 0.02 * len(harmful):
        where = ", ".join(row.where for row in complied[:10])
        raise RecipeError(
            f"{len(complied)} of {len(harmful)} harmful rows have an answer that is no refusal ({where}); expected at "
            "most 2 %. Look at them: this may be a poisoned set"
        )
    warnings = []
    if not any(row.kind == "harmless" for row in kept):
        warnings.append("no harmless rows: an adapter trained on refusals alone learns to refuse everything")
    if not harmful:
        warnings.append("no harmful rows: nothing here teaches a refusal")
    training = tuple(row for row in kept if _place(row) >= holdout)
    held_out = tuple(row for row in kept if _place(row) < holdout)
    return PreparedRows(training, held_out, tuple(copies), tuple(overlapping), tuple(warnings))


def _labelled(row: Row) -> Row:
    if row.kind is not None:
        return row
    return replace(row, kind="harmful" if classify(row.answer) == "refuses" else "harmless")


def _place(row: Row) -> float:
    """A number in [0, 1) fixed by the words of the request."""
    words = " ".join(row.prompt.lower().split())
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:6], "big") / 2**48


def _prompts(path: Path) -> list[str]:
    if not path.is_file():
        raise RecipeError(f"{path}: there is no such file; expected prompts, JSONL or a line each")
    if path.suffix in (".json", ".jsonl"):
        return read_prompts(path)
    try:
        text = text_of(path, MAX_BYTES, "any")
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: {error}; expected text, a prompt a line") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _refused(path: Path) -> list[Row]:
    answers = [row.answer for row in read_rows([SHIPPED]) if row.kind == "harmful" and len(row.answer) < 60]
    found = []
    for number, prompt in enumerate(_prompts(path), 1):
        digest = hashlib.sha256(prompt.encode()).digest()
        answer = answers[int.from_bytes(digest[:4], "big") % len(answers)]
        found.append(Row(prompt, answer, f"{path.name}:{number}", "harmful"))
    return found


def held_out_path(path: Path) -> Path:
    """Where the rows go that are held out, beside the training file."""
    return path.with_name(f"{path.stem}.held-out{path.suffix}")


def check_target(path: Path, read: Sequence[Path]) -> None:
    """Refuses a training file that would replace what is read for it, or something that holds no rows.

    Raises:
        RecipeError: it would.
    """
    for target in (path, held_out_path(path)):
        if not target.exists() and not target.is_symlink():
            continue
        if any(one.exists() and one.samefile(target) for one in read if target.exists()):
            raise RecipeError(f"--output {path}: {target} is read, too; expected another file")
        try:
            read_rows([target])
        except (RecipeError, SourceError):
            raise RecipeError(f"--output {path}: {target} holds no rows and is not replaced; move it") from None


def write_prepared(prepared: PreparedRows, path: Path) -> list[Path]:
    """Writes the training file, and `NAME.held-out.jsonl` beside it where rows are held out."""
    write_rows(path, prepared.training)
    if not prepared.held_out:
        return [path]
    beside = held_out_path(path)
    write_rows(beside, prepared.held_out)
    return [path, beside]
