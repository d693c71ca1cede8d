"""The whole story of a recipe: resolve → measure → decide → write → report, as plain function calls.

`prepare` goes as far as the plan and its graph, reading headers and gated tensors; `carry_out` writes the
output folder. Both print nothing; what happens is told as events.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safemerge_recipes.engine.executor import Executor
from safemerge_recipes.engine.executors.parts import Parts
from safemerge_recipes.engine.executors.threads import LOCAL
from safemerge_recipes.engine.folder import part_of, publish, working_folder
from safemerge_recipes.engine.output import PartWritten, Result, check_apart, write_output
from safemerge_recipes.engine.receipts import Receipts, forget_receipt, joined, without
from safemerge_recipes.engine.resume import reusable
from safemerge_recipes.engine.shared_output import SharedOutput, shared_output
from safemerge_recipes.errors import PlanError, ReadError, SourceError, WriteError
from safemerge_recipes.events import BytesDone, Listener, PhaseStarted, ignore
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
from safemerge_recipes.sources.side_files import check_tokens, half_a_tokenizer, no_tokenizer, side_files
from safemerge_recipes.sources.trained import settled
from safemerge_recipes.storage.digests import Digests, InputDigest, remember_digest
from safemerge_recipes.storage.identity import FileIdentity, check_unchanged
from safemerge_recipes.storage.remote import is_url
from safemerge_recipes.storage.workers import Resources, fit_workers, worst

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
    recipe, opened = loaded.recipe, family is not None
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
    half = half_a_tokenizer(beside) if recipe.output.format == "full" else None
    if half:
        raise SourceError(f"{beside[half.partition(':')[0]].parent}: {half}; add what is missing, or remove that file")
    beyond = None if opened else check_tokens(family, beside, recipe.output.format == "full")
    if beyond:
        family = replace(family, warnings=(*family.warnings, beyond))
    return Resolved(loaded, family, beside, outlooks, registry)


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
    return build_graph(plan, resolved.family, known.methods, known.brings, device)


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
    largest = worst((task.slot.name, task_memory(task)) for task in graph.tasks)
    workers = fit_workers([largest], resources.workers, resources.memory)
    peak = projected_peak(largest[1], workers, measurer.peak if measurer else 0)
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
    output: Path | str,
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
        output: the folder to write, or the URL.
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
    started = time.perf_counter()
    _check_output(prepared, output, allow_empty)
    if is_url(output):
        with _goes_on(output):
            result = _write_to_url(prepared, output, digests, on_event, force, executor)
        return replace(result, timings={**result.timings, "total": time.perf_counter() - started})
    output = Path(os.path.abspath(output))
    part = part_of(output)
    with _goes_on(part), working_folder(output, force, lambda folder: reusable(folder, prepared.graph)):
        result = write_output(prepared, part, output, digests, on_event, force, executor)
        publish(part, output, force)
    for file, digest in result.files.items():
        remember_digest(FileIdentity.of(output / file), digest)  # it may well be another merge's input
    return replace(result, timings={**result.timings, "total": time.perf_counter() - started})


def _check_output(prepared: Prepared, output: Path | str, allow_empty: bool) -> None:
    nothing = empty(prepared.plan)
    if nothing and not allow_empty:
        raise PlanError(f"{nothing}; --allow-empty writes the fine-tuned model all the same")
    check_apart(prepared, output)


@contextlib.contextmanager
def _goes_on(place: Path | str) -> Iterator[None]:
    """Whatever stops the writing leaves what is done; the message says so. Raises WriteError."""
    goes_on = f"{place} keeps what is done, the same command goes on from there"
    try:
        yield
    except KeyboardInterrupt:
        raise WriteError(f"stopped; {goes_on}") from None
    except ReadError as error:
        raise WriteError(f"{error}; {goes_on}") from None
    except OSError as error:
        raise WriteError(
            f"{place}: {error.strerror}; mend it and run the same command, which goes on from there"
        ) from None


def _write_to_url(
    prepared: Prepared, output: str, digests: Digests, on_event: Listener, force: bool, executor: Executor
) -> Result:
    """Writes the files that have no receipt yet, then what lies beside them."""
    with shared_output(output, force, alone=True) as out:
        if prepared.recipe.output.format == "adapter":
            with tempfile.TemporaryDirectory(prefix="safemerge-") as folder:
                result = write_output(prepared, Path(folder), output, digests, on_event, force, executor)
                out.publish(Path(folder), force)
            return result
        graph = prepared.graph
        out.agree(graph, anew=True)
        there = out.receipts(graph)
        left = without(graph, there)
        for shard, _ in left.by_file():
            forget_receipt(out.place, graph.layout.files[shard])
        on_event(PhaseStarted("write", graph.bytes_written))
        begun = time.perf_counter()
        for shard in there:
            on_event(BytesDone(graph.layout.sizes[shard]))
        by = Parts(1, 1, out.place) if executor is LOCAL else executor
        by.run(left, out.store(graph.layout), prepared.resources, {}, Receipts(out.place, graph), on_event)
        written = time.perf_counter()
        inputs = digests.result()
        timings = {"write": written - begun, "hash": time.perf_counter() - written}
        return _finished(prepared, out, inputs, timings, force, sum(len(one.tensors) for one in there.values()))


def _finished(
    prepared: Prepared,
    out: SharedOutput,
    inputs: Mapping[str, InputDigest],
    timings: Mapping[str, float],
    force: bool,
    resumed: int = 0,
) -> Result:
    """Everything but the weights, when all of these are there. Raises PlanError when they are not."""
    graph = prepared.graph
    receipts = out.receipts(graph)
    missing = [graph.layout.files[shard] for shard, _ in graph.by_file() if shard not in receipts]
    if missing:
        raise PlanError(
            f"{out.output}: {len(missing)} of {len(graph.layout.files)} weight files are not written yet, such as "
            f"{missing[0]}; start those parts (again), `safemerge run --part i/N`, then finalize"
        )
    files = joined(receipts, graph).files
    timings = out.finish(prepared, inputs, timings, force)
    return Result(out.output, prepared, files, timings, graph.bytes_written, resumed)


def write_part(
    prepared: Prepared, out: SharedOutput, worker: Parts, digests: Digests, on_event: Listener, *, allow_empty: bool
) -> PartWritten:
    """Writes the share of one of several workers; `finalize` does the rest when all are done.

    Args:
        prepared: what `prepare` made with this worker as its executor.
        out: the output, taken.
        worker: which share.
        digests: hashes this share of the inputs.
        on_event: is told what goes on.
        allow_empty: as in `carry_out`.

    Raises:
        PlanError: nothing is merged, the output is an adapter, or other workers do other work.
        SourceError: an input changed, or holds values that are not finite.
        WriteError: stopped while writing; the same part may run again.
    """
    _check_output(prepared, out.output, allow_empty)
    if prepared.recipe.output.format == "adapter":
        raise PlanError("--part: an adapter is small and written by one process; expected `format: full`")
    with _goes_on(out.place.name):
        graph = prepared.graph
        out.agree(graph)
        on_event(PhaseStarted("write", sum(graph.layout.sizes[n] for n in worker.share(graph))))
        sealed = worker.run(
            graph, out.store(graph.layout), prepared.resources, {}, Receipts(out.place, graph), on_event
        )
        found = digests.result()
        check_unchanged(prepared.identities)
        own = {one: found[one.path] for one in prepared.identities if one.path in found}
        out.tell_inputs(worker.number, worker.count, own)
    return PartWritten(out.output, worker.number, worker.count, len(sealed.files), len(graph.layout.files))


def finalize(prepared: Prepared, out: SharedOutput, digests: Digests, *, force: bool, allow_empty: bool) -> Result:
    """Makes an output of what part workers have written: checks it, writes index, documents and manifest.

    Raises:
        PlanError: files are missing, or nothing is merged.
        SourceError: an input changed.
        WriteError: writing failed; the same call goes on.
    """
    started = time.perf_counter()
    _check_output(prepared, out.output, allow_empty)
    with _goes_on(out.place.name):
        result = _finished(prepared, out, digests.result(), {}, force)
    return replace(result, timings={**result.timings, "total": time.perf_counter() - started})
