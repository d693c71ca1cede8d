"""A run by workers that share nothing but files: a share of it, and the end that makes an output of all shares."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from safemerge_recipes.api.given import loaded_of, resources_of, target_of
from safemerge_recipes.api.merging import train_missing
from safemerge_recipes.api.opening import opened
from safemerge_recipes.errors import RecipeError
from safemerge_recipes.events import Listener, ignore

if TYPE_CHECKING:
    from safemerge_recipes.api.given import RecipeLike
    from safemerge_recipes.engine.output import PartWritten, Result


def run_part(
    recipe: RecipeLike,
    part: str,
    output: str | Path | None = None,
    *,
    allow_empty: bool = False,
    device: str = "auto",
    workers: int | None = None,
    max_memory: str | int = "2GB",
    on_event: Listener = ignore,
) -> PartWritten:
    """Does one of N shares of a run, together with N − 1 other processes, on any machines that see the same files.

    Each may be killed, started again, or started twice. `finalize` makes the output when all are done.

    Args:
        recipe: a loaded recipe, or its file.
        part: `i/N`, with i from 1 to N.
        output: as in `run`.
        allow_empty: as in `run`.
        device: as in `plan`, like `workers` and `max_memory`.
        workers: threads.
        max_memory: own memory.
        on_event: is told what goes on.

    Raises:
        SafemergeError: as `run`; PlanError also where other workers of this output do other work.
    """
    from safemerge_recipes.engine.executors.parts import Parts
    from safemerge_recipes.engine.shared_output import check_target, shared_output
    from safemerge_recipes.pipeline.preparing import prepare
    from safemerge_recipes.pipeline.writing import write_part
    from safemerge_recipes.storage.digests import Digests, threads_for

    number, count = _share(part)
    resources, loaded = resources_of(device, workers, max_memory), loaded_of(recipe)
    target = target_of(loaded, output)
    train_missing(loaded, False, on_event)
    check_target(target, False)
    resolved = opened(loaded, on_event)
    threads = threads_for(resources.workers, resources.memory)
    own = resolved.identities[number - 1 :: count]
    with closing(Digests(own, threads=threads)) as digests, shared_output(target, False) as out:
        worker = Parts(number, count, out.place)
        prepared = prepare(resolved, resources, on_event, use_cache=False, executor=worker)
        return write_part(prepared, out, worker, digests, on_event, allow_empty=allow_empty)


def finalize(
    recipe: RecipeLike,
    output: str | Path | None = None,
    *,
    force: bool = False,
    allow_empty: bool = False,
    device: str = "auto",
    workers: int | None = None,
    max_memory: str | int = "2GB",
    on_event: Listener = ignore,
) -> Result:
    """Makes the output of what the workers of `run_part` have written: checks it, writes index and manifest.

    Args:
        recipe: the same recipe.
        output: the same output.
        force: replace a finished output of that name.
        allow_empty: as in `run`.
        device: as in `run_part`, like `workers` and `max_memory`.
        workers: threads.
        max_memory: own memory.
        on_event: is told what goes on.

    Raises:
        SafemergeError: as `run`; PlanError also where weight files are missing, or workers are still writing.
    """
    from safemerge_recipes.engine.executors.parts import Parts
    from safemerge_recipes.engine.shared_output import check_target, shared_output
    from safemerge_recipes.pipeline.preparing import prepare
    from safemerge_recipes.pipeline.writing import finalize as finish
    from safemerge_recipes.storage.digests import Digests, threads_for

    resources, loaded = resources_of(device, workers, max_memory), loaded_of(recipe)
    target = target_of(loaded, output)
    check_target(target, force)
    resolved = opened(loaded, on_event)
    threads = threads_for(resources.workers, resources.memory)
    with (
        shared_output(target, force, alone=True) as out,
        closing(Digests(resolved.identities, out.inputs(resolved.identities), threads)) as digests,
    ):
        prepared = prepare(resolved, resources, on_event, use_cache=False, executor=Parts(1, 1, out.place))
        return finish(prepared, out, digests, force=force, allow_empty=allow_empty)


def _share(part: str) -> tuple[int, int]:
    """(i, N) of `i/N`. Raises RecipeError."""
    number, slash, count = part.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) <= 100_000):
        raise RecipeError(f"--part {part[:40]}: expected i/N with i from 1 to N, such as 3/8")
    return int(number), int(count)
