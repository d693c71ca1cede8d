"""The command line: reads options, calls the phases and prints. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safemerge_recipes._version import __version__
from safemerge_recipes.cli.program import run_program
from safemerge_recipes.errors import PlanError, RecipeError, SafemergeError
from safemerge_recipes.weights import compiled as native

if TYPE_CHECKING:
    from safemerge_recipes.pipeline import Prepared, Resolved
    from safemerge_recipes.recipe.loading import LoadedRecipe

app = typer.Typer(
    name="safemerge",
    help="Restore the safety of fine-tuned language models with declarative, gated merge recipes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable on standard output.")]
OutputOption = Annotated[Path | None, typer.Option("--output", metavar="DIR", help="Instead of output.path.")]
DeviceOption = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where gate and merge are computed.")]
WorkersOption = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads; default: one a core.")]
MemoryOption = Annotated[str, typer.Option("--max-memory", metavar="SIZE", help="Own memory, such as 256MB or 2GB.")]
ExecutorOption = Annotated[str, typer.Option(metavar="local|ray", help="Which engine carries out the graph.")]


def _load(recipe: Path, overrides: list[str] | None) -> LoadedRecipe:
    from safemerge_recipes.planning.plugins import read_registry
    from safemerge_recipes.recipe.loading import load_recipe

    registry = read_registry()
    return load_recipe(recipe, overrides or (), metrics=registry.names("metrics"), methods=registry.names("methods"))


def _bytes(text: str) -> int:
    from safemerge_recipes.recipe.model import parse_size

    try:
        size = parse_size(text)
    except ValueError as error:
        raise RecipeError(f"--max-memory {text}: {error}") from None
    if not isinstance(size, int) or size < 64_000_000:
        raise RecipeError(f"--max-memory {text}: too little; expected at least 64MB")
    return size


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare(resolved: Resolved, device: str, workers: int | None, memory: int) -> tuple[Prepared, Any]:
    from safemerge_recipes.cli.progress import Bar
    from safemerge_recipes.pipeline import choose_device, prepare
    from safemerge_recipes.storage.workers import Resources

    bar = Bar()
    try:
        return prepare(resolved, Resources(workers or _cores(), memory, choose_device(device)), bar), bar
    finally:
        bar.pause()


def _console(json_: bool) -> Any:
    """Where people read: standard output, or standard error where that one is for a program."""
    from rich.console import Console

    return Console(stderr=json_, highlight=False)


def _target(loaded: LoadedRecipe, output: Path | None) -> Path:
    if output is not None:
        return Path.cwd() / output
    if loaded.recipe.output.path is not None:
        return loaded.resolve(loaded.recipe.output.path)
    raise RecipeError(f"{loaded.path}: output.path: missing; expected it there, or --output DIR")


@app.command()
def run(
    recipe: RecipeArgument,
    output: OutputOption = None,
    set_: SetOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure and decide, print the plan, write nothing.")
    ] = False,
    json_: JsonOption = False,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    max_memory: MemoryOption = "2GB",
    executor: ExecutorOption = "local",
    force: Annotated[bool, typer.Option("--force", help="Replace a finished output.")] = False,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Write the fine-tuned model where the gate merges nothing.")
    ] = False,
    no_evaluate: Annotated[
        bool, typer.Option("--no-evaluate", help="Merge only, even if the recipe evaluates.")
    ] = False,
) -> None:
    """Do it all: resolve, measure, decide, write, evaluate, report. A run cut short is resumed by the same command."""
    from safemerge_recipes.report import terminal as report

    if executor != "local":
        raise RecipeError(f"--executor {executor}: not available; expected local")
    memory = _bytes(max_memory)
    loaded = _load(recipe, set_)
    console = _console(json_)
    from safemerge_recipes.pipeline import carry_out, resolve

    if dry_run:
        prepared, _ = _prepare(resolve(loaded), device, workers, memory)
        if json_:
            sys.stdout.write(json.dumps(prepared.plan_json(), ensure_ascii=False, allow_nan=False) + "\n")
        else:
            report.print_plan(prepared.plan_json(), console)
        return
    target = _target(loaded, output)
    suite = None
    if loaded.recipe.evaluate is not None and not no_evaluate:  # what can be wrong with it is known before it costs
        from safemerge_recipes.evaluation.scoring import suite_of

        suite = suite_of(loaded)
    from safemerge_recipes.engine.folder import check_output
    from safemerge_recipes.storage.digests import Digests

    check_output(target, force)
    resolved = resolve(loaded)
    if suite is not None:
        from safemerge_recipes.evaluation.chat import check_template

        assert loaded.recipe.evaluate is not None  # it asks for the suite
        if warning := check_template(resolved.side_files, loaded.recipe.evaluate.chat_template):
            console.print(f"Warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    digests = Digests(resolved.identities)
    try:
        prepared, bar = _prepare(resolved, device, workers, memory)
        try:
            result = carry_out(prepared, target, digests, bar, force=force, allow_empty=allow_empty)
        finally:
            bar.pause()
    finally:
        digests.cancelled.set()
    plan = prepared.plan_json()
    if suite is not None:
        from safemerge_recipes.cli.progress import scoring_bar
        from safemerge_recipes.evaluation.scoring import score_output

        try:
            with scoring_bar() as bar:
                result["scores"] = score_output(prepared, target, loaded, console, suite=suite, listen=bar)
        except SafemergeError as error:
            again = f"safemerge evaluate {recipe}" + (f" --output {target}" if output else "")
            raise type(error)(f"{error}\n{target} is merged and sound; `{again}` goes on from there") from None
    if json_:
        sys.stdout.write(json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n")
    report.print_result(plan, result, console)


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    json_: JsonOption = False,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    max_memory: MemoryOption = "2GB",
) -> None:
    """Measure and decide, print the plan, write nothing (the same as run --dry-run)."""
    run(recipe, None, set_, True, json_, device, workers, max_memory, "local", False, False, True)


@app.command()
def validate(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Check a recipe's text: every problem at once, with its line. Opens no source."""
    loaded = _load(recipe, set_)
    rules = len(loaded.recipe.rules)
    print(f"{recipe}: a sound recipe ({len(loaded.recipe.sources.roles())} sources, {rules} rules)")


@app.command()
def controls(
    recipe: RecipeArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Default: RECIPE-controls beside it.", show_default=False),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="How many random controls of each kind.")] = 3,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    max_memory: MemoryOption = "2GB",
) -> None:
    """Write a recipe's controls: as many tensors at random (also by module type), the others, all, none."""
    from safemerge_recipes.evaluation.experiments.controls import write_controls
    from safemerge_recipes.pipeline import resolve

    memory = _bytes(max_memory)
    loaded = _load(recipe, set_)
    prepared, _ = _prepare(resolve(loaded), device, workers, memory)
    folder = Path.cwd() / output if output else loaded.directory / f"{loaded.path.stem}-controls"
    for path in write_controls(loaded, prepared.plan, folder, seeds):
        print(path)


@app.command()
def plugins(json_: JsonOption = False) -> None:
    """List the metrics, selectors and merge methods that recipes may name, and where each comes from."""
    from safemerge_recipes.planning.plugins import KINDS, read_registry

    registry = read_registry()
    entries = [entry for kind in KINDS for entry in registry.entries[kind].values()]
    for entry in entries:
        entry.load()
    if json_:
        rows = [{"kind": e.kind, "name": e.name, "origin": e.origin, "target": e.target} for e in entries]
        sys.stdout.write(json.dumps(rows) + "\n")
        return
    width = max(len(entry.name) for entry in entries)
    for kind in KINDS:
        print(f"{kind}:")
        for entry in registry.entries[kind].values():
            print(f"  {entry.name:<{width}}  {entry.origin}  {entry.target}")
    if origin := registry.origin("methods", "mergekit:"):
        print(f"  {'mergekit:<any of its methods>':<{width}}  {origin}")


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from safemerge_recipes.recipe.model import json_schema

    print(json.dumps(json_schema(), indent=2))


TasksOption = Annotated[
    list[str] | None, typer.Option("--tasks", "-t", metavar="TASK", help="Tasks; repeatable, or joined by commas.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only so many prompts of each task.")]
FolderOption = Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the results go.")]


def _tasks(given: list[str] | None) -> list[str]:
    return [task for text in given or () for task in text.split(",") if task]


def _print_scores(content: dict[str, Any], json_: bool) -> None:
    from safemerge_recipes.evaluation.scoring import print_table, print_verdicts

    if json_:
        sys.stdout.write(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
    console = _console(json_)
    print_table(content, console)
    print_verdicts(content, console)


@app.command()
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
    from safemerge_recipes.cli.progress import scoring_bar
    from safemerge_recipes.evaluation.compare import evaluate_folder, is_recipe

    console = _console(json_)
    if not is_recipe(target):
        with scoring_bar() as bar:
            content = evaluate_folder(target, _tasks(tasks), console, limit=limit, device=device, listen=bar)
        _print_scores(content, json_)
        return
    from safemerge_recipes.evaluation.scoring import print_table, score_output, suite_of
    from safemerge_recipes.pipeline import resolve

    overrides = [*(set_ or ()), *([f"evaluate.limit={limit}"] if limit else [])]
    overrides += [f"evaluate.tasks={json.dumps(_tasks(tasks))}"] if tasks else []
    loaded = _load(target, overrides)
    if loaded.recipe.evaluate is None:
        raise RecipeError(f"{target}: evaluate: missing; expected it there with tasks, or --tasks")
    folder, suite = _target(loaded, output), suite_of(loaded)
    prepared, _ = _prepare(resolve(loaded), device, None, _bytes("2GB"))
    with scoring_bar() as bar:
        content = score_output(prepared, folder, loaded, console, suite=suite, listen=bar)
    if json_:
        sys.stdout.write(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
    print_table(content, console)


@app.command()
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
    from safemerge_recipes.cli.progress import scoring_bar
    from safemerge_recipes.evaluation.compare import score_models
    from safemerge_recipes.evaluation.scoring import document

    with scoring_bar() as bar:
        scores = score_models(models, _tasks(tasks), _console(json_), limit=limit, device=device, listen=bar)
    references = reference or [next(iter(scores))]
    for name in references:
        if name not in scores:
            raise RecipeError(f"--reference {name}: no model goes by it; expected one of {', '.join(scores)}")
    _print_scores(document(scores, references), json_)


def _bench(
    recipe: Path,
    set_: list[str] | None,
    tasks: list[str] | None,
    limit: int | None,
    folder: Path,
    device: str,
    tuning_tasks: list[str] | None = None,
) -> Any:
    from safemerge_recipes.cli.progress import Bar
    from safemerge_recipes.evaluation.experiments.sweep import STORE_FILE
    from safemerge_recipes.evaluation.experiments.workbench import Bench
    from safemerge_recipes.pipeline import choose_device
    from safemerge_recipes.storage.workers import Resources

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"--output {folder}: {error.strerror}; expected a folder that can be made") from None
    overrides = [*(set_ or ()), *([f"evaluate.limit={limit}"] if limit else [])]
    resources = Resources(_cores(), _bytes("2GB"), choose_device(device))
    bar = Bar()
    try:
        store = folder / STORE_FILE
        return Bench(recipe, overrides, store, resources, bar, _console(True), _tasks(tasks), _tasks(tuning_tasks))
    finally:
        bar.pause()


@app.command()
def sweep(
    recipe: RecipeArgument,
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
    """Try keys of a recipe without writing models; choose on the tuning split, report on the test split."""
    from safemerge_recipes.cli.progress import scoring_bar
    from safemerge_recipes.evaluation.experiments.sweep import CHOSEN_FILE, PICTURE_FILE, print_sweep
    from safemerge_recipes.evaluation.experiments.sweep import sweep as run_sweep

    axes = [f"{key}={values}" for key, values in (("gate.tau", tau), ("merge.alpha", alpha)) if values]
    axes += grid or []
    if not axes:
        raise RecipeError("sweep: found nothing to vary; expected --tau, --alpha or --grid KEY=V1,V2")
    bench = _bench(recipe, set_, tasks, limit, output, device, tuning_tasks)
    with scoring_bar() as bar:
        content = run_sweep(bench, axes, output, _console(True), seeds=seeds, allowed_loss=allowed_loss, listen=bar)
    if json_:
        sys.stdout.write(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
    console = _console(json_)
    print_sweep(content, console)
    console.print(f"\nPicture: {output / PICTURE_FILE}\nRecipe of the choice: {output / CHOSEN_FILE}", markup=False)


@app.command()
def probe(
    recipe: RecipeArgument,
    by: Annotated[str, typer.Option(metavar="tensor|type|block", help="What is merged at a time.")] = "type",
    set_: SetOption = None,
    tasks: TasksOption = None,
    limit: LimitOption = None,
    only: Annotated[int | None, typer.Option(min=2, help="Only so many, spread evenly over the model.")] = None,
    output: FolderOption = Path("safemerge-probe"),
    json_: JsonOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Merge one tensor, module type or block at a time; does safety change where ρ says it should?"""
    from safemerge_recipes.cli.progress import scoring_bar
    from safemerge_recipes.evaluation.experiments.probe import PICTURE_FILE, print_probe
    from safemerge_recipes.evaluation.experiments.probe import probe as run_probe

    if by not in ("tensor", "type", "block"):
        raise RecipeError(f"--by {by}: expected tensor, type or block")
    bench = _bench(recipe, set_, tasks, limit, output, device)
    with scoring_bar() as bar:
        content = run_probe(bench, by, output, only=only, listen=bar)  # type: ignore[arg-type]  # checked above
    if json_:
        sys.stdout.write(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
    console = _console(json_)
    print_probe(content, console)
    console.print(f"\nPicture: {output / PICTURE_FILE}", markup=False)


@app.command("report")
def report_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished output.", show_default=False)],
    include: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Results of a sweep or probe to show; repeatable.")
    ] = None,
) -> None:
    """Write the report and the card of a finished output anew, with its scores if it has any."""
    from safemerge_recipes.engine.folder import REPORT_FILE
    from safemerge_recipes.evaluation.compare import render_again

    render_again(folder, include or ())
    print(f"{folder / REPORT_FILE}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The output to check.", show_default=False)],
    deep: Annotated[bool, typer.Option("--deep", help="Compute every tensor again from the sources.")] = False,
    sample: Annotated[
        int | None, typer.Option("--sample", metavar="N", min=1, help="Compute only N tensors again; implies --deep.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Which N.")] = 0,
    json_: JsonOption = False,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    max_memory: MemoryOption = "2GB",
) -> None:
    """Check an output against its manifest and plan: hashes, index, headers, and with --deep the arithmetic."""
    from safemerge_recipes.cli.progress import Bar
    from safemerge_recipes.pipeline import choose_device
    from safemerge_recipes.storage.workers import Resources
    from safemerge_recipes.verification import verify as check

    deep = deep or sample is not None
    resources = Resources(workers or _cores(), _bytes(max_memory), choose_device(device) if deep else "cpu")
    bar = Bar()
    try:
        result = check(folder, resources, bar, deep=deep, sample=sample, seed=seed)
    finally:
        bar.pause()
    if json_:
        sys.stdout.write(json.dumps(result) + "\n")
    again = f", {result['recomputed']} tensors computed again" if deep else ""
    sys.stderr.write(f"{folder}: sound ({result['files']} files, {result['tensors']} tensors{again})\n")
    for heading, key in (("checked", "checked"), ("not checked", "unchecked")):
        sys.stderr.write("".join(f"  {heading}: {line}\n" for line in result[key]))


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        kernels = "compiled kernels" if native.LIBRARY is not None else "kernels not compiled: slower, see the README"
        print(f"{__version__} ({kernels})")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """The program `safemerge`."""
    run_program(app, "safemerge", arguments)


run_app = typer.Typer(name="safemerge-run", pretty_exceptions_enable=False, add_completion=False)
run_app.command()(run)


def run_main(arguments: list[str] | None = None) -> None:
    """The program `safemerge-run`: `safemerge run` under the name of its promise."""
    run_program(run_app, "safemerge-run", arguments)


if __name__ == "__main__":
    main()
