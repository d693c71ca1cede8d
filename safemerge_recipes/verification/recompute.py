"""An output's tensors against what its recipe and sources make them now: the deep check."""

from __future__ import annotations

import random
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from safemerge_recipes.engine.folder import PLAN_FILE, RECIPE_FILE
from safemerge_recipes.engine.manifest import Manifest, manifest_record, read_record, versions
from safemerge_recipes.engine.produce import digest_of, produce
from safemerge_recipes.engine.requantised import ERROR, requantised_errors
from safemerge_recipes.errors import CheckError
from safemerge_recipes.events import BytesDone, Listener, PhaseStarted
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.pipeline.opening import open_sources
from safemerge_recipes.pipeline.preparing import prepare
from safemerge_recipes.planning.graph import ENGINE, Task
from safemerge_recipes.planning.memory import room_of
from safemerge_recipes.planning.prepared import Prepared
from safemerge_recipes.sources.checkpoint import read_object
from safemerge_recipes.sources.peft.config import CONFIG_FILE
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.workers import Resources, run_parallel
from safemerge_recipes.verification.problems import refuse, same
from safemerge_recipes.verification.provenance import input_problems, made_otherwise


def recompute(
    folder: Path, manifest: Manifest, resources: Resources, on_event: Listener, sample: int | None, seed: int
) -> list[str]:
    """Computes tensors again; returns their names. Raises CheckError when one comes out otherwise."""
    from safemerge_recipes.recipe.loading import load_recipe

    if manifest.engine != ENGINE:
        raise CheckError(
            f"{folder}: written by arithmetic {manifest.engine}, this is {ENGINE}, which may round otherwise; "
            "check it with the version of safemerge-recipes named in its manifest"
        )
    sources = open_sources(load_recipe(folder / RECIPE_FILE), on_event, locked=False)
    prepared = prepare(sources, resources, on_event, use_cache=False)
    refuse(folder, list(input_problems(prepared, manifest)))
    refuse(folder, list(made_otherwise(prepared, folder, manifest)))
    if prepared.recipe.output.format == "adapter":
        return _recompute_adapter(folder, prepared, manifest, on_event)
    tasks = list(prepared.graph.tasks)
    if sample is not None and sample < len(tasks):
        tasks = random.Random(seed).sample(tasks, sample)
    on_event(PhaseStarted("again", sum(task.slot.nbytes for task in tasks)))
    problems: list[str] = []
    stop = threading.Event()
    with Reader() as reader:

        def work(task: Task, arena: Arena) -> None:
            tools = Tools(reader, arena, room_of(task, prepared.resources.share))
            pieces = produce(task, tools, stop, allow_overflow=prepared.graph.allow_overflow)
            digest = digest_of(pieces)
            on_event(BytesDone(task.slot.nbytes))
            if digest != manifest.tensors[task.slot.name][1]:
                file = prepared.graph.layout.files[task.slot.shard]
                problems.append(f"{file}: {task.slot.name}: computed again from the sources, it has other bytes")

        light = not any(task.needs_torch for task in tasks)
        run_parallel(tasks, work, prepared.resources.workers, prepared.resources.device, stop, light=light)
    if problems:
        written = manifest_record(folder).get("versions")
        if written != versions():
            problems.append(f"(written with {written}; computed again with {versions()})")
    refuse(folder, problems)
    refuse(folder, list(_errors(prepared, folder)))
    return [task.slot.name for task in tasks]


def _errors(prepared: Prepared, folder: Path) -> Iterator[str]:
    """Lines whose figure of what quantising again lost is not what the written codes show."""
    lines = {line["name"]: line.get(ERROR) for line in read_record(folder / PLAN_FILE)["tensors"]}
    now = requantised_errors(prepared, folder)
    for name, said in lines.items():
        found = now.get(name, {}).get(ERROR)
        if not same(found, said):
            yield f"{PLAN_FILE}: {name}: says {ERROR} {said}; the written codes make it {found}"


def _recompute_adapter(folder: Path, prepared: Prepared, manifest: Manifest, on_event: Listener) -> list[str]:
    """The same for an adapter, which is computed whole, into a folder that is then removed."""
    from safemerge_recipes.engine.adapter.write import write_adapter

    on_event(PhaseStarted("again", prepared.graph.bytes_written))
    with tempfile.TemporaryDirectory() as place:
        files, _ = write_adapter(
            prepared.plan, prepared.family, prepared.graph, Path(place), prepared.resources.memory, on_event
        )
        # Where the base model lies is seen from elsewhere now.
        configs = [
            read_object(root / CONFIG_FILE) | {"base_model_name_or_path": None} for root in (folder, Path(place))
        ]
    alike = {CONFIG_FILE} if configs[0] == configs[1] else set()
    wrong = [name for name in files if name not in alike and manifest.outputs[name].sha256 != files[name]]
    refuse(folder, [f"{name}: computed again from the sources, it has other bytes" for name in wrong])
    return [tensor.name for tensor in prepared.plan.tensors if tensor.action == "merge"]
