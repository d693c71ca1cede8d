"""`run`, `plan`, `validate`, `schema` and `plugins`: a recipe from its text to the merged model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from safemerge_recipes import api
from safemerge_recipes.cli.options import (
    AddressOption,
    DeviceOption,
    EmptyOption,
    ExecutorOption,
    ForceOption,
    JsonOption,
    MemoryOption,
    OutputOption,
    RecipeArgument,
    SetOption,
    SourceOption,
    VersionOption,
    WorkersOption,
)
from safemerge_recipes.cli.streams import console, watched, write_json, write_line
from safemerge_recipes.errors import RecipeError


def run(
    recipe: RecipeArgument,
    output: OutputOption = None,
    set_: SetOption = None,
    source: SourceOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure and decide, print the plan, write nothing.")
    ] = False,
    json_: JsonOption = False,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    max_memory: MemoryOption = "2GB",
    executor: ExecutorOption = "local",
    ray_address: AddressOption = None,
    force: ForceOption = False,
    allow_empty: EmptyOption = False,
    part: Annotated[
        str | None, typer.Option("--part", metavar="i/N", help="Do one of N shares; `safemerge finalize` ends it.")
    ] = None,
    no_evaluate: Annotated[
        bool, typer.Option("--no-evaluate", help="Merge only, even if the recipe evaluates.")
    ] = False,
    train: Annotated[
        bool, typer.Option("--train", help="Train the adapter of a `train:` source that is not in the cache.")
    ] = False,
    update_lock: Annotated[
        bool, typer.Option("--update-lock", help="Lock what the recipe reads now, instead of refusing what changed.")
    ] = False,
    version: VersionOption = False,
) -> None:
    """Do it all: resolve, measure, decide, write, evaluate, report. A run cut short is resumed by the same command."""
    if dry_run:
        return plan(recipe, set_, source, json_, device, workers, max_memory)
    if part is not None:
        taken = {"--force": force, "--train": train, "--update-lock": update_lock, "--executor": executor != "local"}
        return _run_part(
            recipe, part, output, set_, source, json_, device, workers, max_memory, allow_empty,
            [name for name, given in taken.items() if given],
        )  # fmt: skip
    from safemerge_recipes.report.terminal import print_result

    with watched(json_) as listener:
        if update_lock:
            api.lock(api.load_recipe(recipe, set_ or (), sources=source or ()), listener)
        result = api.run(
            api.load_recipe(recipe, set_ or (), sources=source or ()), output,
            force=force, allow_empty=allow_empty, evaluate=not no_evaluate, train=train,
            device=device, workers=workers, max_memory=max_memory,
            executor=executor, ray_address=ray_address, on_event=listener,
        )  # fmt: skip
    if json_:
        write_json(result.as_json())
    print_result(result.plan.plan_json(), result.as_json(), console(json_))
    return None


def _run_part(
    recipe: str, part: str, output: str | None, set_: list[str] | None, source: list[str] | None, json_: bool,
    device: str, workers: int | None, max_memory: str, allow_empty: bool, beside: list[str],
) -> None:  # fmt: skip
    if beside:
        raise RecipeError(f"{beside[0]}: expected without --part; `safemerge finalize` may take it")
    with watched(json_) as listener:
        done = api.run_part(
            api.load_recipe(recipe, set_ or (), sources=source or ()), part, output, allow_empty=allow_empty,
            device=device, workers=workers, max_memory=max_memory, on_event=listener,
        )  # fmt: skip
    if json_:
        return write_json(done.as_json())
    state = "`safemerge finalize` ends it" if done.written == done.files else "others write the rest"
    return write_line(f"part {part}: {done.written} of {done.files} weight files are in {done.output}; {state}")


def finalize(
    recipe: RecipeArgument,
    output: OutputOption = None,
    set_: SetOption = None,
    source: SourceOption = None,
    json_: JsonOption = False,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    max_memory: MemoryOption = "2GB",
    force: ForceOption = False,
    allow_empty: EmptyOption = False,
) -> None:
    """Make the output of what `run --part` has written: check it, write index, report and manifest."""
    from safemerge_recipes.report.terminal import print_result

    with watched(json_) as listener:
        result = api.finalize(
            api.load_recipe(recipe, set_ or (), sources=source or ()), output, force=force, allow_empty=allow_empty,
            device=device, workers=workers, max_memory=max_memory, on_event=listener,
        )  # fmt: skip
    if json_:
        write_json(result.as_json())
    print_result(result.plan.plan_json(), result.as_json(), console(json_))


def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    source: SourceOption = None,
    json_: JsonOption = False,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    max_memory: MemoryOption = "2GB",
) -> None:
    """Measure and decide, print the plan, write nothing (the same as run --dry-run)."""
    from safemerge_recipes.report.terminal import print_plan

    with watched(json_) as listener:
        loaded = api.load_recipe(recipe, set_ or (), sources=source or ())
        found = api.plan(loaded, device=device, workers=workers, max_memory=max_memory, on_event=listener)
    if json_:
        write_json(found.plan_json())
    else:
        print_plan(found.plan_json(), console(json_))


def validate(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Recipes, as for run; several are checked one by one.")
    ],
    set_: SetOption = None,
    source: SourceOption = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the recipe as it stands alone: extended, filled in, in full.")
    ] = False,
) -> None:
    """Check a recipe's text: every problem at once, with its line. Opens no source."""
    wrong = []
    for number, recipe in enumerate(recipes):
        try:
            loaded = api.load_recipe(recipe, set_ or (), sources=source or ())
        except RecipeError as error:
            wrong.append(str(error))
            continue
        if show:
            write_line(("---\n" if number else "") + api.show(loaded).rstrip("\n"))
            continue
        rules = len(loaded.recipe.rules)
        write_line(f"{loaded.path}: a sound recipe ({len(loaded.recipe.sources.roles())} sources, {rules} rules)")
    if wrong:
        raise RecipeError("\n".join(wrong))


def lock(recipe: RecipeArgument, set_: SetOption = None, source: SourceOption = None) -> None:
    """Write RECIPE.lock.yaml: commit, size and sha256 of all that a recipe reads. A run refuses anything else then."""
    with watched(False) as listener:
        path = api.lock(api.load_recipe(recipe, set_ or (), sources=source or ()), listener)
    write_line(str(path))


def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    write_line(json.dumps(api.schema(), indent=2))


def plugins(json_: JsonOption = False) -> None:
    """List the metrics, selectors and merge methods that recipes may name, and where each comes from."""
    entries = api.registered()
    if json_:
        return write_json([one for one in entries if one["target"]])
    width = max(len(one["name"]) for one in entries if one["target"])
    for kind in dict.fromkeys(one["kind"] for one in entries):
        write_line(f"{kind}:")
        for one in entries:
            if one["kind"] == kind:
                write_line(f"  {one['name']:<{width}}  {one['origin']}  {one['target']}".rstrip())
    return None
