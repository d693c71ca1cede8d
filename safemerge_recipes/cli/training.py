"""`train-adapter` and `prepare-safety-data`: the safety adapter and what it is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safemerge_recipes.cli.options import JsonOption
from safemerge_recipes.cli.streams import console, watched, write_json


def train_adapter(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The training file, YAML.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Also copy the adapter here.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print rows, steps, memory and key; train nothing.")
    ] = False,
    json_: JsonOption = False,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", metavar="SIZE", help="Refuse what would take more, such as 16GB.")
    ] = None,
) -> None:
    """Train the adapter that a training file describes, or find it in the cache. Cut short, it goes on."""
    from safemerge_recipes import api
    from safemerge_recipes.report.terminal_training import print_training

    screen = console(json_)
    plan = api.plan_training(file, max_memory=max_memory)
    if dry_run and json_:
        return write_json(plan.as_json())
    print_training(plan.as_json(), screen)
    if dry_run:
        return None
    with watched(json_) as bar:
        found = api.train_adapter(plan, output=output, on_event=bar)
    for warning in found.warnings:
        screen.print(f"Warning: {warning}", style="bold yellow", markup=False, soft_wrap=True)
    if json_:
        write_json({"path": str(found.path), "key": found.key, "chosen": found.chosen, "scores": found.scores})
    else:
        screen.print(f"{found.path}", markup=False, soft_wrap=True)
    return None


def prepare_safety_data(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE...]", help="Files of rows; default: the set that ships.", show_default=False),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The training file.")] = Path(
        "safety.jsonl"
    ),
    refuse: Annotated[
        list[Path] | None,
        typer.Option("--refuse", metavar="FILE", help="Harmful requests that get a refusal; repeatable."),
    ] = None,
    holdout: Annotated[float, typer.Option(min=0, max=0.9, help="Part that goes into a file beside it.")] = 0.0,
    keep_out: Annotated[
        list[Path] | None,
        typer.Option("--keep-out", metavar="FILE", help="Further evaluation prompts to stay away from; repeatable."),
    ] = None,
    drop_overlap: Annotated[
        bool, typer.Option("--drop-overlap", help="Leave out rows near an evaluation prompt instead of refusing.")
    ] = False,
    own_answers: Annotated[
        Path | None,
        typer.Option(
            "--own-answers",
            metavar="FILE",
            help="Rows of your task; the model answers them itself, to teach the adapter to change nothing there.",
        ),
    ] = None,
    answered_by: Annotated[
        Path | None,
        typer.Option("--answered-by", metavar="FILE", help="The training file that names the model for --own-answers."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Mix refusals with helpful answers, drop near copies, and keep every evaluation prompt out."""
    from safemerge_recipes import api

    with watched(json_) as bar:
        found, paths = api.prepare_safety_data(
            output, sources or (), refuse or (), holdout=holdout, keep_out=keep_out or (), drop_overlap=drop_overlap,
            own_answers=own_answers, answered_by=answered_by, on_event=bar,
        )  # fmt: skip
    if json_:
        return write_json({"files": [str(path) for path in paths], **found.as_json()})
    screen = console(False)
    for path, rows in zip(paths, (found.training, found.held_out), strict=False):
        kinds = [str(row.kind) for row in rows]
        mixture = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
        screen.print(f"{path}: {len(rows)} rows ({mixture})", markup=False, soft_wrap=True)
    screen.print(f"{len(found.copies)} near copies left out", markup=False)
    for row in found.overlapping:
        screen.print(f"left out, near an evaluation prompt: {row.where}: {row.prompt}", markup=False, soft_wrap=True)
    for warning in found.warnings:
        screen.print(f"Warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    return None
