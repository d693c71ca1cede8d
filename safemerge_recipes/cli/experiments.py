"""`sweep`, `probe` and `controls`: many plans of one family, and what a gate must beat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from safemerge_recipes import api
from safemerge_recipes.cli.options import (
    DeviceOption,
    FolderOption,
    JsonOption,
    LimitOption,
    MemoryOption,
    RecipeArgument,
    SetOption,
    TasksOption,
    WorkersOption,
    tasks_of,
)
from safemerge_recipes.cli.streams import console, watched, write_json, write_line


def sweep(
    recipe: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECIPE...",
            help="The recipe: a YAML file, the folder of an output, or - for standard input.",
            show_default=False,
            allow_dash=True,
        ),
    ],
    recipes: Annotated[
        bool, typer.Option("--recipes", help="Compare several recipes of one family, each with its controls.")
    ] = False,
    tau: Annotated[str | None, typer.Option(metavar="V1,V2", help="The same as --grid gate.tau=V1,V2.")] = None,
    alpha: Annotated[str | None, typer.Option(metavar="V1,V2", help="The same as --grid merge.alpha=V1,V2.")] = None,
    grid: Annotated[
        list[str] | None, typer.Option("--grid", "--set-grid", metavar="KEY=V1,V2", help="An axis; repeatable.")
    ] = None,
    set_: SetOption = None,
    tasks: TasksOption = None,
    tuning_tasks: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="Tasks to choose on; default: the tuning splits.")
    ] = None,
    limit: LimitOption = None,
    seeds: Annotated[int, typer.Option(min=0, help="Random controls of each kind; 0: no controls.")] = 10,
    allowed_loss: Annotated[float, typer.Option(min=0, max=1, help="Utility the choice may lose.")] = 0.02,
    output: FolderOption = Path("safemerge-sweep"),
    json_: JsonOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Try keys of a recipe without writing models; choose on the tuning split, report on the test split.

    With --recipes compare the recipes that are named instead.
    """
    if recipes:
        if tau or alpha or grid or tuning_tasks:
            raise typer.BadParameter("--recipes compares recipes as they are; expected no grid and no tuning tasks")
        loaded = [api.load_recipe(one, set_ or ()) for one in recipe]
        return _compare(loaded, output, tasks, limit, seeds, json_, device)
    if len(recipe) > 1:
        raise typer.BadParameter(f"found {len(recipe)} recipes; expected one, or --recipes to compare them")
    axes = [f"{key}={values}" for key, values in (("gate.tau", tau), ("merge.alpha", alpha)) if values]
    with watched(True) as listener:
        content = api.sweep(
            recipe[0], [*axes, *(grid or ())], output, overrides=set_ or (), tasks=tasks_of(tasks),
            tuning_tasks=tasks_of(tuning_tasks), limit=limit, seeds=seeds, allowed_loss=allowed_loss,
            device=device, on_event=listener,
        )  # fmt: skip
    from safemerge_recipes.report.terminal_scores import print_sweep

    if json_:
        write_json(content)
    page = console(json_)
    print_sweep(content, page)
    picture, chosen = api.results_of("sweep", output)
    page.print(f"\nPicture: {picture}\nRecipe of the choice: {chosen}", markup=False)


def _compare(
    recipes: list[Any], output: Path, tasks: list[str] | None, limit: int | None, seeds: int, json_: bool, device: str
) -> None:
    from safemerge_recipes.report.terminal_scores import print_recipes

    with watched(True) as listener:
        content = api.compare_recipes(
            recipes, output, tasks=tasks_of(tasks), limit=limit, seeds=seeds, device=device, on_event=listener
        )
    if json_:
        write_json(content)
    page = console(json_)
    print_recipes(content, page)
    page.print(f"\nPicture: {api.results_of('recipes', output)[0]}", markup=False)


def probe(
    recipe: RecipeArgument,
    by: Annotated[str, typer.Option(metavar="tensor|type|block", help="What is merged at a time.")] = "type",
    set_: SetOption = None,
    tasks: TasksOption = None,
    limit: LimitOption = None,
    only: Annotated[int | None, typer.Option(min=2, help="Only so many, spread evenly over the model.")] = None,
    equal_norm: Annotated[
        bool, typer.Option("--equal-norm", help="Add V with the same Frobenius norm to each (add_safety_vector).")
    ] = False,
    output: FolderOption = Path("safemerge-probe"),
    json_: JsonOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Merge one tensor, module type or block at a time; does safety change where ρ says it should?"""
    with watched(True) as listener:
        content = api.probe(
            recipe, by, output, overrides=set_ or (), tasks=tasks_of(tasks), limit=limit, only=only,
            equal_norm=equal_norm, device=device, on_event=listener,
        )  # fmt: skip
    from safemerge_recipes.report.terminal_scores import print_probe

    if json_:
        write_json(content)
    page = console(json_)
    print_probe(content, page)
    page.print(f"\nPicture: {api.results_of('probe', output)[0]}", markup=False)


def controls(
    recipe: RecipeArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Default: RECIPE-controls beside it.", show_default=False),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="How many random controls of each kind.")] = 3,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    max_memory: MemoryOption = "2GB",
) -> None:
    """Write a recipe's controls: as many tensors at random (also by module type), the others, all, none."""
    with watched(True) as listener:
        paths = api.write_controls(
            api.load_recipe(recipe, set_ or ()), output, seeds=seeds,
            device=device, workers=workers, max_memory=max_memory, on_event=listener,
        )  # fmt: skip
    for path in paths:
        write_line(str(path))
