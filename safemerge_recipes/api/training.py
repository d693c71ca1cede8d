"""The safety adapter: its rows, what training it takes, and the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safemerge_recipes.api.given import memory_of
from safemerge_recipes.errors import RecipeError
from safemerge_recipes.events import Listener, ignore

if TYPE_CHECKING:
    from safemerge_recipes.recipe.training import LoadedTraining
    from safemerge_recipes.training.plan import TrainingPlan
    from safemerge_recipes.training.prepare import PreparedRows
    from safemerge_recipes.training.run import TrainedAdapter


def prepare_safety_data(
    output: Path,
    sources: Sequence[Path] = (),
    refuse: Sequence[Path] = (),
    *,
    holdout: float = 0.0,
    keep_out: Sequence[Path] = (),
    drop_overlap: bool = False,
    own_answers: Path | None = None,
    answered_by: LoadedTraining | str | Path | None = None,
    on_event: Listener = ignore,
) -> tuple[PreparedRows, list[Path]]:
    """Rows for a safety adapter, checked, cleaned and written; returns them and the files that hold them.

    Args:
        output: the training file; rows that are held out go beside it.
        sources: files of rows; the shipped set where none is named.
        refuse: files of harmful requests that get a refusal.
        holdout: part of the rows that is held out.
        keep_out: files with further evaluation prompts to stay away from.
        drop_overlap: leave out rows near an evaluation prompt instead of refusing the set.
        own_answers: rows of your task, whose prompts the model answers by itself: there the adapter changes nothing.
        answered_by: the training file that names that model.
        on_event: is told how many prompts are answered.

    Raises:
        RecipeError: a file cannot be read, harmful rows are answered, or rows are near evaluation prompts.
        SafemergeError: the model cannot answer.
    """
    from safemerge_recipes.recipe.training import load_training
    from safemerge_recipes.training.prepare import check_target, write_prepared
    from safemerge_recipes.training.prepare import prepare_safety_data as prepare

    if (own_answers is None) != (answered_by is None):
        raise RecipeError(
            "--own-answers and --answered-by go together: the task's rows, and the training file whose "
            "model answers them"
        )
    check_target(output, [*sources, *refuse, *keep_out, *([own_answers] if own_answers else [])])
    found = prepare(sources, refuse, holdout=holdout, keep_out=keep_out, drop_overlap=drop_overlap)
    if own_answers is not None and answered_by is not None:
        from safemerge_recipes.training.own import own_rows

        loaded = load_training(answered_by) if isinstance(answered_by, str | Path) else answered_by
        own = own_rows(own_answers, loaded, on_event)
        found = prepare(sources, refuse, holdout=holdout, keep_out=keep_out, drop_overlap=drop_overlap, own=own)
    return found, write_prepared(found, output)


def plan_training(file: LoadedTraining | str | Path, *, max_memory: str | int | None = None) -> TrainingPlan:
    """What a training file comes to: rows, steps, memory and the key. Trains nothing.

    Args:
        file: the training file, or one that is loaded.
        max_memory: own memory that may not be exceeded.

    Raises:
        RecipeError: the file or its rows are wrong.
        SourceError: the model or the data are missing.
        PlanError: it takes more memory.
    """
    from safemerge_recipes.recipe.training import load_training
    from safemerge_recipes.training.plan import plan_training as plan_it

    loaded = load_training(file) if isinstance(file, str | Path) else file
    return plan_it(loaded, None if max_memory is None else memory_of(max_memory))


def train_adapter(
    file: TrainingPlan | LoadedTraining | str | Path,
    *,
    output: str | Path | None = None,
    on_event: Listener = ignore,
) -> TrainedAdapter:
    """The adapter of a training file, from the cache or trained now. Cut short, the same call goes on.

    Args:
        file: the training file, or its plan.
        output: a folder that gets a copy.
        on_event: is told of steps, and a line at a time what goes on.

    Raises:
        SafemergeError: it cannot be trained.
    """
    from safemerge_recipes.training.plan import TrainingPlan
    from safemerge_recipes.training.run import check_target, copy_adapter
    from safemerge_recipes.training.run import train_adapter as train

    planned = file if isinstance(file, TrainingPlan) else plan_training(file)
    if output is not None:
        check_target(Path(output))
    found = train(planned.loaded, on_event=on_event, plan=planned)
    if output is not None:
        copy_adapter(found.path, Path(output), found.record)
    return found
