"""`evaluate`, `compare`, `judge` and `report`: what merged models are worth, and how it is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safemerge_recipes import api
from safemerge_recipes.cli.options import (
    DeviceOption,
    JsonOption,
    LimitOption,
    OutputOption,
    SetOption,
    TasksOption,
    tasks_of,
)
from safemerge_recipes.cli.streams import console, watched, write_json, write_line


def evaluate(
    target: Annotated[Path, typer.Argument(metavar="DIR|RECIPE", help="A model folder, or a finished recipe.")],
    output: OutputOption = None,
    set_: SetOption = None,
    tasks: TasksOption = None,
    limit: LimitOption = None,
    json_: JsonOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Score a model folder, or a recipe's finished output beside its sources; put the scores into its report."""
    from safemerge_recipes.report.terminal_scores import print_scores

    with watched(json_) as listener:
        model = api.load_recipe(target, set_ or ()) if api.is_recipe(target) else target
        content = api.evaluate(
            model, output=output, tasks=tasks_of(tasks), limit=limit, device=device, on_event=listener
        )
    if json_:
        write_json(content)
    print_scores(content, console(json_))


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Folders, MODEL+ADAPTER, recipes (sources and merge), scores files; NAME= before one names it.",
            show_default=False,
        ),
    ],
    tasks: TasksOption = None,
    reference: Annotated[
        list[str] | None, typer.Option(help="Compare with this model; repeatable. Default: the first.")
    ] = None,
    limit: LimitOption = None,
    json_: JsonOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Score models on the same prompts and say, with paired tests, where they differ."""
    from safemerge_recipes.report.terminal_scores import print_scores

    with watched(json_) as listener:
        content = api.compare(
            models, tasks=tasks_of(tasks), references=reference or (), limit=limit, device=device, on_event=listener
        )
    if json_:
        write_json(content)
    print_scores(content, console(json_))


def judge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished output with answers.", show_default=False)],
    kind: Annotated[
        str | None, typer.Option(metavar="llama-guard-3|chat|openai", help="Who judges; default: as its recipe says.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The judge's folder or hub id, or its name at the server.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="verdict, llama-guard-3, harmbench, strongreject, or a text file.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="The server, such as http://localhost:8000/v1.")] = None,
    json_: JsonOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Let another model judge the stored answers to harmful requests; put its verdicts into scores and report."""
    from safemerge_recipes.report.terminal_scores import print_scores

    with watched(json_) as listener:
        content = api.judge(folder, kind=kind, model=model, prompt=prompt, url=url, device=device, on_event=listener)
    if json_:
        write_json(content)
    print_scores(content, console(json_))


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished output.", show_default=False)],
    include: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Results of a sweep or probe to show; repeatable.")
    ] = None,
) -> None:
    """Write the report and the card of a finished output anew, with its scores if it has any."""
    write_line(str(api.render(folder, include or ())))
