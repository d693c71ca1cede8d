"""The safety adapter: its rows, what training it takes, and the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safemerge_recipes.api.given import memory_of
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
) -> tuple[PreparedRows, list[Path]]:
    """Rows for a safety adapter, checked, cleaned and written; returns them and the files that hold them.

    Args:
        output: the training file; rows that are held out go beside it.
        sources: files of rows; the shipped set where none is named.
        refuse: files of harmful requests that get a refusal.
        holdout: part of the rows that is held out.
        keep_out: files with further evaluation prompts to stay away from.
        drop_overlap: leave out rows near an evaluation prompt instead of refusing the set.

    Raises:
        RecipeError: a file cannot be read, harmful rows are answered, or rows are near evaluation prompts.
    """
    from safemerge_recipes.training.prepare import check_target, write_prepared
    from safemerge_recipes.training.prepare import prepare_safety_data as prepare

    check_target(output, [*sources, *refuse, *keep_out])
    found = prepare(sources, refuse, holdout=holdout, keep_out=keep_out, drop_overlap=drop_overlap)
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
