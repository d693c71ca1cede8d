"""The whole story of a recipe: resolve → measure → decide → write → report, as plain function calls.

`prepare` goes as far as the plan and its graph, reading headers and gated tensors; `carry_out` writes the
output folder. Both print nothing; what happens is told as events.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safemerge_recipes.engine.executor import Executor
from safemerge_recipes.engine.executors.threads import LOCAL
from safemerge_recipes.engine.folder import part_of, publish, working_folder
from safemerge_recipes.engine.output import Result, check_apart, write_output
from safemerge_recipes.engine.resume import reusable
from safemerge_recipes.errors import PlanError, ReadError, WriteError
from safemerge_recipes.events import Listener, PhaseStarted, ignore
from safemerge_recipes.planning.decisions import Measure, check_gates, make_plan, survey
from safemerge_recipes.planning.graph import Graph, build_graph, check_merges, task_memory
from safemerge_recipes.planning.memory import projected_peak
from safemerge_recipes.planning.outcome import empty
from safemerge_recipes.planning.plan import Plan
from safemerge_recipes.planning.plugins import read_registry
from safemerge_recipes.planning.prepared import Prepared, Resolved
from safemerge_recipes.recipe.loading import LoadedRecipe
from safemerge_recipes.recipe.model import Role
from safemerge_recipes.sources.family import Family, open_family
from safemerge_recipes.sources.locate import Folder, complete
from safemerge_recipes.sources.side_files import no_tokenizer, side_files
from safemerge_recipes.sources.trained import settled
from safemerge_recipes.storage.digests import Digests, remember_digest
from safemerge_recipes.storage.identity import FileIdentity
from safemerge_recipes.storage.workers import Resources, fit_workers

if TYPE_CHECKING:
    from safemerge_recipes.gate.measurer import Measurer


def choose_device(device: str) -> str:
    """`auto` becomes cuda where there is one. Raises PlanError for a device that is not there."""
    if device == "cpu" or (device == "auto" and not Path("/dev/nvidiactl").exists()):
        return "cpu"  # without asking torch, which takes a second to load
    import torch

    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if not device.startswith("cuda"):
        raise PlanError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(device.partition(":")[2] or 0) if device.partition(":")[2].isdigit() or device == "cuda" else -1
    if not 0 <= number < count:
        raise PlanError(f"--device {device}: {count} CUDA devices are visible; try --device cpu")
    return f"cuda:{number}"


def resolve(
    loaded: LoadedRecipe,
    family: Family | None = None,
    *,
    headers: bool = False,
    folders: Mapping[Role, Folder] | None = None,
) -> Resolved:
    """Finds, fetches and opens the sources. Reads headers only.

    Args:
        loaded: the recipe.
        family: its sources, where another recipe with the same ones has opened them.
        headers: of models on the hub fetch the headers alone; `fetch` gets the rest.
        folders: where the sources lie, if that is known.

    Raises:
        SafemergeError: a source is missing, unsound, or does not fit the others or what the recipe does with it.
    """
    loaded, notes = settled(loaded)
    recipe = loaded.recipe
    family = family or open_family(recipe, loaded.directory, headers=headers, folders=folders)
    family = replace(family, warnings=tuple(dict.fromkeys((*family.warnings, *notes))))
    registry = read_registry()
    outlooks = survey(recipe, family, registry.metrics)
    check_gates(outlooks, registry.selectors)
    check_merges(outlooks, family, registry.methods)
    beside = side_files(family)
    lacking = no_tokenizer(beside)
    if lacking and lacking not in family.warnings:
        family = replace(family, warnings=(*family.warnings, lacking))
    return Resolved(loaded, family, family.identities(), beside, outlooks, registry)


def fetch(resolved: Resolved, files: Collection[str] | None, on_event: Listener) -> Resolved:
    """The same with weight files fetched that are still on the hub, at the commits that were resolved.

    Args:
        resolved: as `resolve` found it.
        files: which, by the paths of their headers; None: all.
        on_event: is told of bytes.

    Raises:
        SourceError: the hub does not give one.
    """
    away = resolved.family.away
    wanted = [away[path][1] for path in away if files is None or path in files]
    if not wanted:
        return resolved
    folders = {}
    for role, model in resolved.family.models.items():
        own = [name for name, one in model.folder.away.items() if files is None or str(one.header) in files]
        folders[role] = complete(model.folder, own, on_event)
    return resolve(resolved.loaded, folders=folders)


def open_sources(loaded: LoadedRecipe, on_event: Listener) -> Resolved:
    """Opens the sources: headers of all of them first, then whatever is still on the hub. Raises as `resolve` does."""
    return fetch(resolve(loaded, headers=True), None, on_event)


def measured_away(resolved: Resolved) -> tuple[str, ...]:
    """The files on the hub, by the paths of their headers, that a gate must read before it can decide."""
    family = resolved.family
    away = family.away
    if not away or "base" not in family.models:
        return ()
    found = (
        path
        for outlook in resolved.outlooks
        if outlook.policy is not None and outlook.policy.gate.needs_metric
        for path in _measured_files(family, outlook.name)
        if path in away
    )
    return tuple(dict.fromkeys(found))


def _measured_files(family: Family, name: str) -> tuple[str, ...]:
    """The files that measuring a tensor reads: those of V and Δf."""
    v = family.v(name)
    return tuple(ref.path for weight in (v, family.delta("finetuned", name)) if weight for ref in weight.refs)


def decide(resolved: Resolved, measure: Measure | None) -> Plan:
    """The plan: every tensor decided, measured as far as its gate needs.

    Raises:
        SafemergeError: the plan cannot be made.
    """
    known = resolved.registry
    return make_plan(resolved.recipe, resolved.family, resolved.outlooks, measure, known.metrics, known.selectors)


def build(plan: Plan, resolved: Resolved, device: str) -> Graph:
    """The work of a plan of a family, for a device. Reads nothing.

    Raises:
        SafemergeError: a tensor cannot be computed from what is stored.
    """
    known = resolved.registry
    return build_graph(plan, resolved.family, resolved.identities, known.methods, known.brings, device)


def as_source(prepared: Prepared, role: Role) -> Graph:
    """The work that writes a source's own model, in the output's dtypes. Reads nothing.

    Raises:
        PlanError: the recipe does not have it.
    """
    if role not in prepared.family.models:
        raise PlanError(f"sources.{role}: missing; expected it in the recipe")
    tensors = (replace(t, action="keep", gated=False, take=role, policy=None) for t in prepared.plan.tensors)
    return build(Plan(prepared.recipe, tuple(tensors), ()), prepared.resolved, prepared.resources.device)


def prepare(
    resolved: Resolved,
    resources: Resources,
    on_event: Listener,
    *,
    use_cache: bool = True,
    executor: Executor = LOCAL,
) -> Prepared:
    """Measures what is gated, decides every tensor and builds the work.

    Raises:
        SafemergeError: the plan cannot be made or carried out; nothing has been written.
    """
    begun = time.perf_counter()
    measurer = measurer_of(resolved, resources, on_event, use_cache=use_cache, executor=executor)
    plan = decide(resolved, _of_what_is_here(resolved, measurer))
    measured = time.perf_counter()
    graph = build(plan, resolved, resources.device)
    needs = ((task.slot.name, task_memory(task)) for task in graph.tasks)
    workers = fit_workers(needs, resources.workers, resources.memory)
    peak = projected_peak(graph, workers, measurer.peak if measurer else 0)
    timings = {"measure": measured - begun, "plan": time.perf_counter() - measured}
    return Prepared(resolved, plan, graph, replace(resources, workers=workers), peak, timings)


def _of_what_is_here(resolved: Resolved, measure: Measure | None) -> Measure | None:
    """Measures only what needs no file that is still on the hub; such a gate decides without being measured."""
    away = resolved.family.away
    if measure is None or not away:
        return measure
    return lambda names, *how: measure(
        [name for name in names if away.keys().isdisjoint(_measured_files(resolved.family, name))], *how
    )


def measurer_of(
    resolved: Resolved,
    resources: Resources,
    on_event: Listener = ignore,
    *,
    use_cache: bool = True,
    executor: Executor = LOCAL,
) -> Measurer | None:
    """What measures the family's tensors; None where nothing is gated or there is no base and so no V."""
    family, away = resolved.family, resolved.family.away
    gated = [outlook.name for outlook in resolved.outlooks if outlook.policy]
    gated = [name for name in gated if not away or away.keys().isdisjoint(_measured_files(family, name))]
    if "base" not in family.models or not gated:
        return None
    from safemerge_recipes.gate.measurer import Measurer

    refs = (
        ref
        for name in gated
        for ref in dict.fromkeys(
            (*(family.v(name) or family.delta("base", name)).refs, *family.delta("finetuned", name).refs)
        )
    )
    on_event(PhaseStarted("measure", sum(ref.nbytes for ref in refs)))
    return Measurer(family, resources, use_cache=use_cache, on_event=on_event, by=executor.measure)


def carry_out(
    prepared: Prepared,
    output: Path,
    digests: Digests,
    on_event: Listener,
    *,
    force: bool = False,
    allow_empty: bool = False,
    executor: Executor = LOCAL,
) -> Result:
    """Writes the output folder.

    Args:
        prepared: what `prepare` made.
        output: the folder to write.
        digests: hashes the inputs; begun as early as may be, since it takes long.
        on_event: is told what goes on.
        executor: does the work.
        force: replace a finished output; go on with an interrupted run although its inputs changed.
        allow_empty: write the fine-tuned model once more where nothing is merged.

    Raises:
        PlanError: nothing is merged; the output is in the way, locked, or the disk is too small.
        SourceError: an input changed, or holds values that are not finite.
        WriteError: stopped while writing, be it by a source that could not be read.
    """
    output = Path(os.path.abspath(output))
    part = part_of(output)
    started = time.perf_counter()
    nothing = empty(prepared.plan)
    if nothing and not allow_empty:
        raise PlanError(f"{nothing}; --allow-empty writes the fine-tuned model all the same")
    check_apart(prepared, output)
    try:
        with working_folder(output, force, lambda folder: reusable(folder, prepared.graph)):
            result = write_output(prepared, part, output, digests, on_event, force, executor)
            publish(part, output, force)
    except KeyboardInterrupt:
        raise WriteError(f"stopped; {part} keeps what is done, the same command goes on from there") from None
    except ReadError as error:
        raise WriteError(f"{error}; {part} keeps what is done, the same command goes on from there") from None
    except OSError as error:
        raise WriteError(
            f"{part}: {error.strerror}; mend it and run the same command, which goes on from there"
        ) from None
    for file, digest in result.files.items():
        remember_digest(FileIdentity.of(output / file), digest)  # it may well be another merge's input
    return replace(result, timings={**result.timings, "total": time.perf_counter() - started})
