"""Plans and runs: a recipe to decisions, and decisions to the merged model."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safemerge_recipes.api.given import loaded_of, resources_of, target_of
from safemerge_recipes.api.opening import opened
from safemerge_recipes.errors import PlanError, SafemergeError
from safemerge_recipes.events import Listener, Note, ignore

if TYPE_CHECKING:
    from safemerge_recipes.api.given import RecipeLike
    from safemerge_recipes.engine.output import Result
    from safemerge_recipes.evaluation.suite import Suite
    from safemerge_recipes.planning.prepared import Prepared, Resolved
    from safemerge_recipes.recipe.loading import LoadedRecipe


def plan(
    recipe: RecipeLike,
    *,
    device: str = "auto",
    workers: int | None = None,
    max_memory: str | int = "2GB",
    on_event: Listener = ignore,
) -> Prepared:
    """Measures what is gated and decides every tensor. Reads headers and the gated tensors, writes nothing.

    Args:
        recipe: a loaded recipe, or its file.
        device: where gate and merge are computed: `auto`, `cpu`, `cuda` or `cuda:N`.
        workers: threads; by default one a core.
        max_memory: own memory, in bytes or as a text such as `2GB`; at least 64MB.
        on_event: is told what goes on.

    Of models on the hub the headers are fetched first, their weights only where the gate must read them to decide.

    Returns:
        The plan. `.plan.tensors` holds a line for every tensor of the output, `.plan_json()` the content of
        safemerge_plan.json; in a notebook it shows itself.

    Raises:
        RecipeError: the recipe is wrong.
        SourceError: a source is missing, broken, or does not fit the others.
        PlanError: the plan cannot be made or carried out with these means.
    """
    resources = resources_of(device, workers, max_memory)
    from safemerge_recipes.pipeline.preparing import prepare

    loaded = loaded_of(recipe)
    train_missing(loaded, False, on_event)
    return prepare(opened(loaded, on_event, planned=True), resources, on_event)


def run(
    recipe: RecipeLike | Prepared,
    output: str | Path | None = None,
    *,
    force: bool = False,
    allow_empty: bool = False,
    evaluate: bool = True,
    device: str = "auto",
    workers: int | None = None,
    max_memory: str | int = "2GB",
    train: bool = False,
    executor: str = "local",
    ray_address: str | None = None,
    on_event: Listener = ignore,
) -> Result:
    """Writes the merged model, and scores it if its recipe says so. A run cut short is resumed by the same call.

    Args:
        recipe: a plan, which is carried out with its own device and memory, or a recipe, which is planned first.
        output: the folder, or a URL such as `s3://bucket/folder`; by default the recipe's `output.path`.
        force: replace a finished output.
        allow_empty: write the fine-tuned model where the gate merges nothing.
        evaluate: score the output if the recipe has `evaluate`.
        device: as in `plan`, like `workers` and `max_memory`.
        workers: threads.
        max_memory: own memory.
        train: train the adapter of a source that says `train: FILE` where it is not in the cache.
        executor: `local`, `ray` or a plugin's: what carries the plan out.
        ray_address: the Ray cluster, such as `auto` or `ray://host:10001`; None: one of its own on this machine.
        on_event: is told what goes on.

    Raises:
        RecipeError: the recipe is wrong, or says no output.
        SourceError: a source is missing, broken, does not fit the others, or changed.
        PlanError: the output is in the way, or memory or disk do not suffice.
        WriteError: stopped while writing; the same call goes on from there.
        CheckError: the output is written, but scoring it failed.
    """
    from safemerge_recipes.engine.executor import digests_of
    from safemerge_recipes.engine.executors import find
    from safemerge_recipes.engine.shared_output import check_target
    from safemerge_recipes.pipeline.opening import fetch
    from safemerge_recipes.pipeline.preparing import prepare
    from safemerge_recipes.pipeline.writing import carry_out
    from safemerge_recipes.planning.prepared import Prepared

    planned = recipe if isinstance(recipe, Prepared) else None
    engine = find(executor, ray_address)
    resources = planned.resources if planned else resources_of(device, workers, max_memory)
    loaded = planned.resolved.loaded if planned else loaded_of(recipe)  # type: ignore[arg-type]  # the other kind
    target = target_of(loaded, output)
    if planned is None:
        train_missing(loaded, train, on_event)
    suite = None
    if evaluate and loaded.recipe.evaluate is not None:  # what can be wrong with it is known before it costs
        from safemerge_recipes.evaluation.scoring import suite_of

        if isinstance(target, str):
            raise PlanError(f"{target}: scoring reads a folder; say --no-evaluate, and score a copy of the output")
        suite = suite_of(loaded)
    check_target(target, force)
    if planned is not None and planned.family.away:  # planned from headers on the hub
        planned = prepare(fetch(planned.resolved, None, on_event), resources, on_event, executor=engine)
    resolved = planned.resolved if planned else opened(loaded, on_event)
    if suite is not None:
        _warn_of_template(resolved, on_event)
    with closing(engine), closing(digests_of(engine, resolved.identities, resources)) as digests:  # begins at once
        prepared = planned or prepare(resolved, resources, on_event, executor=engine)
        result = carry_out(prepared, target, digests, on_event, force=force, allow_empty=allow_empty, executor=engine)
    return result if suite is None else _scored(result, loaded, suite, on_event, told=bool(output))


def train_missing(loaded: LoadedRecipe, train: bool, on_event: Listener) -> None:
    """Says of every adapter that is still to be trained what that takes; trains it if that is asked for."""
    if not any(source.train for source in loaded.recipe.sources.roles().values()):
        return
    from safemerge_recipes.sources.trained import to_train
    from safemerge_recipes.training.plan import plan_training as plan_it
    from safemerge_recipes.training.run import train_adapter as train_it

    for role, file in to_train(loaded).items():
        found = plan_it(file)
        if found.folder is None:
            steps = ", ".join(f"{size} rows in {steps} steps" for size, steps in found.steps().items())
            state = "trained now" if train else "still to be trained"
            on_event(
                Note(
                    f"sources.{role}: {file.path.name}: the adapter is {state}: {steps}, "
                    f"about {found.memory / 1e9:.1f} GB, very roughly {max(1, round(found.minutes))} min"
                )
            )
            if train:
                train_it(file, plan=found, on_event=on_event)


def _warn_of_template(resolved: Resolved, on_event: Listener) -> None:
    from safemerge_recipes.evaluation.chat import check_template

    asked = resolved.recipe.evaluate
    warning = check_template(resolved.side_files, asked.chat_template) if asked else None
    if warning:
        on_event(Note(f"Warning: {warning}", warning=True))


def _scored(result: Result, loaded: LoadedRecipe, suite: Suite, on_event: Listener, told: bool) -> Result:
    """The run with its scores. What goes wrong says that the output stays, and how to go on."""
    from safemerge_recipes.evaluation.scoring import score_output

    assert isinstance(result.output, Path)  # `run` has refused to score anything else
    try:
        scores = score_output(result.plan, result.output, loaded, on_event, suite=suite)
    except SafemergeError as error:
        again = f"safemerge evaluate {loaded.path}" + (f" --output {result.output}" if told else "")
        raise type(error)(f"{error}\n{result.output} is merged and sound; `{again}` goes on from there") from None
    return replace(result, scores=scores)
