"""Experiments: many plans of one family, and what a gate must beat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes.api.given import Overrides, load_recipe, loaded_of, resources_of, texts_of
from safemerge_recipes.api.merging import plan
from safemerge_recipes.errors import PlanError, RecipeError, SafemergeError
from safemerge_recipes.events import Listener, ignore

if TYPE_CHECKING:
    from safemerge_recipes.api.given import RecipeLike
    from safemerge_recipes.evaluation.experiments.workbench import Bench


def sweep(
    recipe: RecipeLike,
    grid: Mapping[str, Sequence[Any]] | Sequence[str],
    output: str | Path = "safemerge-sweep",
    *,
    overrides: Overrides = (),
    tasks: Sequence[str] = (),
    tuning_tasks: Sequence[str] = (),
    limit: int | None = None,
    seeds: int = 10,
    allowed_loss: float = 0.02,
    device: str = "auto",
    on_event: Listener = ignore,
) -> dict[str, Any]:
    """Tries keys of a recipe without writing models; chooses on the tuning split, reports on the test split.

    Args:
        recipe: a loaded recipe, or its file.
        grid: values by dotted key, such as `{"gate.tau": [0.2, 0.3]}`, or `KEY=V1,V2` texts.
        output: the folder for results; finished scores in it are used again.
        overrides: what holds at every point, as in `load_recipe`.
        tasks: what is reported on; by default the recipe's `evaluate.tasks`.
        tuning_tasks: what is chosen on; by default the tuning splits of the tasks.
        limit: only the first so many prompts of each task.
        seeds: random controls of each kind for the chosen point; 0: no controls.
        allowed_loss: utility that the choice may lose against the fine-tuned model, from 0 to 1.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        on_event: is told what goes on.

    Returns:
        The content of safemerge_sweep.json.

    Raises:
        SafemergeError: a point is no sound recipe, or scoring failed; what was scored is kept.
    """
    from safemerge_recipes.evaluation.experiments.sweep import sweep as run_sweep

    axes = _axes(grid)
    if not axes:
        raise RecipeError("sweep: found nothing to vary; expected --tau, --alpha or --grid KEY=V1,V2")
    bench = _bench(recipe, overrides, tasks, limit, Path(output), device, on_event, tuning_tasks)
    return run_sweep(bench, axes, Path(output), seeds=seeds, allowed_loss=allowed_loss)


def compare_recipes(
    recipes: Sequence[RecipeLike],
    output: str | Path = "safemerge-recipes",
    *,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    seeds: int = 10,
    device: str = "auto",
    on_event: Listener = ignore,
) -> dict[str, Any]:
    """Scores several recipes of one family and their controls on the same prompts, without writing models.

    Args:
        recipes: the recipes, or their files; the first says what is scored, and how.
        output: the folder for results; finished scores in it are used again.
        tasks: what is scored; by default the first recipe's `evaluate.tasks`.
        limit: only the first so many prompts of each task.
        seeds: random controls of each kind for every recipe; 0: no controls.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        on_event: is told what goes on.

    Returns:
        The content of safemerge_recipes.json.

    Raises:
        SafemergeError: the recipes are not of one family, or scoring failed; what was scored is kept.
    """
    from safemerge_recipes.evaluation.experiments.recipes import compare, one_family

    if len(recipes) < 2:
        raise RecipeError("sweep --recipes: found one recipe; expected at least two to compare")
    joined, family = one_family([loaded_of(one) for one in recipes])
    asked = joined.recipe.evaluate
    if limit and asked is not None:
        evaluate = asked.model_copy(update={"limit": limit})
        joined = replace(joined, recipe=joined.recipe.model_copy(update={"evaluate": evaluate}))
    bench = _bench(joined, (), tasks, None, Path(output), device, on_event, None)
    return compare(bench, family, Path(output), seeds=seeds)


def probe(
    recipe: RecipeLike,
    by: str = "type",
    output: str | Path = "safemerge-probe",
    *,
    overrides: Overrides = (),
    tasks: Sequence[str] = (),
    limit: int | None = None,
    only: int | None = None,
    equal_norm: bool = False,
    device: str = "auto",
    on_event: Listener = ignore,
) -> dict[str, Any]:
    """Merges one tensor, module type or block at a time; returns the content of safemerge_probe.json.

    `by` is `tensor`, `type` or `block`; `only` probes so many groups, spread evenly over the
    model; with `equal_norm` V is added with the same Frobenius norm to each; the rest is as in `sweep`.
    """
    from safemerge_recipes.evaluation.experiments.probe import probe as run_probe

    if by not in ("tensor", "type", "block"):
        raise RecipeError(f"--by {by}: expected tensor, type or block")
    bench = _bench(recipe, overrides, tasks, limit, Path(output), device, on_event)
    given: Any = by  # checked above
    return run_probe(bench, given, Path(output), only=only, equal_norm=equal_norm)


def write_controls(
    recipe: RecipeLike,
    output: str | Path | None = None,
    *,
    seeds: int = 3,
    device: str = "auto",
    workers: int | None = None,
    max_memory: str | int = "2GB",
    on_event: Listener = ignore,
) -> list[Path]:
    """Writes a recipe's controls as recipes, by default into RECIPE-controls beside it; returns their paths."""
    from safemerge_recipes.evaluation.experiments import controls

    loaded = loaded_of(recipe)
    prepared = plan(loaded, device=device, workers=workers, max_memory=max_memory, on_event=on_event)
    folder = Path.cwd() / output if output else loaded.directory / f"{loaded.path.stem}-controls"
    return controls.write_controls(loaded, prepared.plan, folder, seeds)


def results_of(kind: str, folder: str | Path) -> tuple[Path, ...]:
    """The files for people that an experiment leaves in its folder: its picture first."""
    from safemerge_recipes.evaluation.experiments import probe, recipes, sweep

    names = {
        "sweep": (sweep.PICTURE_FILE, sweep.CHOSEN_FILE),
        "recipes": (recipes.PICTURE_FILE, recipes.RESULT_FILE),
        "probe": (probe.PICTURE_FILE,),
    }[kind]
    return tuple(Path(folder) / name for name in names)


def _axes(grid: Mapping[str, Sequence[Any]] | Sequence[str]) -> list[str]:
    if not isinstance(grid, Mapping):
        return list(grid)
    return [f"{key}={','.join(json.dumps(value) for value in values)}" for key, values in grid.items()]


def _bench(
    recipe: RecipeLike,
    overrides: Overrides,
    tasks: Sequence[str],
    limit: int | None,
    folder: Path,
    device: str,
    on_event: Listener,
    tuning_tasks: Sequence[str] | None = (),
) -> Bench:
    from safemerge_recipes.evaluation.experiments.results import STORE_FILE
    from safemerge_recipes.evaluation.experiments.workbench import Bench
    from safemerge_recipes.planning.load import vary

    given = [*texts_of(overrides), *([f"evaluate.limit={limit}"] if limit else [])]
    varied = load_recipe(recipe, given) if isinstance(recipe, str | Path) else recipe
    loaded = vary(varied, given) if given and varied is recipe else varied
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"--output {folder}: {error.strerror}; expected a folder that can be made") from None
    try:
        return Bench(loaded, folder / STORE_FILE, resources_of(device, None, "2GB"), on_event, tasks, tuning_tasks)
    except SafemergeError:
        if new:  # nothing is written where nothing can begin
            with suppress(OSError):
                folder.rmdir()
        raise
