"""The whole story of a recipe: resolve → measure → decide → write → report, as plain function calls.

`prepare` goes as far as the plan and its graph, reading headers and gated tensors; `carry_out` writes the
output folder. Both print nothing; what happens is told as events.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes.engine.executor import Executor
from safemerge_recipes.engine.executors.threads import LOCAL
from safemerge_recipes.engine.folder import (
    PICTURES,
    PLAN_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    keep_only,
    part_of,
    publish,
    working_folder,
)
from safemerge_recipes.engine.journal import JOURNAL_FILE, Journal
from safemerge_recipes.engine.local_store import LocalStore
from safemerge_recipes.engine.manifest import make_manifest, versions, write_manifest
from safemerge_recipes.engine.resume import finished, reusable
from safemerge_recipes.errors import PlanError, ReadError, WriteError
from safemerge_recipes.events import Listener, PhaseStarted, ignore
from safemerge_recipes.planning.graph import ENGINE, Graph, build_graph, check_merges, task_memory
from safemerge_recipes.planning.memory import projected_peak
from safemerge_recipes.planning.outcome import empty
from safemerge_recipes.planning.plan import Measure, Outlook, Plan, check_gates, make_plan, survey
from safemerge_recipes.planning.plugins import Registry, read_registry
from safemerge_recipes.recipe.loading import LoadedRecipe, dump_recipe
from safemerge_recipes.recipe.model import Recipe, Role
from safemerge_recipes.report.licences import licence_note
from safemerge_recipes.sources.family import Family, open_family
from safemerge_recipes.sources.masks import mask_path
from safemerge_recipes.sources.provenance import origin, pipeline_tag, portable, sources_of
from safemerge_recipes.sources.side_files import copy_side_files, no_tokenizer, only_tokenizer, side_files
from safemerge_recipes.storage.digests import Digests, InputDigest, remember_digest
from safemerge_recipes.storage.files import write_file, write_json
from safemerge_recipes.storage.identity import FileIdentity, check_unchanged
from safemerge_recipes.storage.layout import INDEX_FILE
from safemerge_recipes.storage.workers import Resources, fit_workers

if TYPE_CHECKING:
    from safemerge_recipes.gate.measurer import Measurer


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe whose sources are found and fit together; only headers were read. Needs no torch."""

    loaded: LoadedRecipe
    family: Family
    identities: tuple[FileIdentity, ...]
    side_files: Mapping[str, Path]
    outlooks: tuple[Outlook, ...]
    registry: Registry

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.loaded.recipe


@dataclass(frozen=True, slots=True, repr=False)
class Prepared:
    """Everything that is decided before the first byte is written."""

    resolved: Resolved
    plan: Plan
    graph: Graph
    resources: Resources
    peak_memory: int
    timings: Mapping[str, float]

    @property
    def recipe(self) -> Recipe:
        """The recipe that was planned."""
        return self.plan.recipe

    @property
    def family(self) -> Family:
        """Its sources."""
        return self.resolved.family

    @property
    def identities(self) -> tuple[FileIdentity, ...]:
        """Those of every file of the sources."""
        return self.resolved.identities

    def plan_json(self) -> dict[str, Any]:
        """The content of safemerge_plan.json."""
        summary = {
            **self.plan.summary(),
            "bytes_read": self.graph.bytes_read,
            "bytes_written": self.graph.bytes_written,
            "peak_memory": self.peak_memory,
        }
        return {
            "recipe": json.loads(_recipe_json(self.recipe)),
            "summary": summary,
            "warnings": list(self.plan.warnings),
            "tensors": [tensor.as_json() for tensor in self.plan.tensors],
        }

    def __repr__(self) -> str:
        counts = self.plan.summary()
        found = f"{counts['merged']} of {counts['gated']} gated tensors merge, {counts['tensors']} in all"
        return f"<plan of {self.resolved.loaded.path.name}: {found}>"

    def _repr_html_(self) -> str:
        """How a notebook shows the plan: a table by module type, and ρ by block as a picture."""
        from safemerge_recipes.report.notebook import plan_html

        return plan_html(self.plan_json())


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run.

    Attributes:
        output: the folder.
        plan: what was carried out.
        files: sha256 of each weight file, by name.
        timings: seconds of each phase, and their `total`.
        bytes_written: bytes of the weight files, and of an adapter's config.
        resumed: tensors that were there from an earlier run.
        scores: the content of safemerge_scores.json where the output was scored.
    """

    output: Path
    plan: Prepared
    files: Mapping[str, str]
    timings: Mapping[str, float]
    bytes_written: int
    resumed: int
    scores: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """The run as plain data, as `run --json` prints it."""
        told = {
            "output": str(self.output),
            "summary": {**self.plan.plan_json()["summary"], "bytes_written": self.bytes_written},
            "bytes_written": self.bytes_written,
            "warnings": [note] if (note := licence_note(provenance_of(self.plan)["sources"])) else [],
            "files": dict(self.files),
            "timings": dict(self.timings),
            "resumed": self.resumed,
        }
        return told if self.scores is None else {**told, "scores": dict(self.scores)}


def _recipe_json(recipe: Recipe) -> str:
    return recipe.model_dump_json(by_alias=True, exclude_unset=True, exclude_none=True)


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


def resolve(loaded: LoadedRecipe, family: Family | None = None) -> Resolved:
    """Finds, fetches and opens the sources. Reads headers only.

    Args:
        loaded: the recipe.
        family: its sources, where another recipe with the same ones has opened them.

    Raises:
        SafemergeError: a source is missing, unsound, or does not fit the others or what the recipe does with it.
    """
    recipe = loaded.recipe
    family = family or open_family(recipe, loaded.directory)
    registry = read_registry()
    outlooks = survey(recipe, family, registry.metrics)
    check_gates(outlooks, registry.selectors)
    check_merges(outlooks, family, registry.methods)
    beside = side_files(family)
    lacking = no_tokenizer(beside)
    if lacking and lacking not in family.warnings:
        family = replace(family, warnings=(*family.warnings, lacking))
    return Resolved(loaded, family, family.identities(), beside, outlooks, registry)


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


def prepare(resolved: Resolved, resources: Resources, on_event: Listener, *, use_cache: bool = True) -> Prepared:
    """Measures what is gated, decides every tensor and builds the work.

    Raises:
        SafemergeError: the plan cannot be made or carried out; nothing has been written.
    """
    begun = time.perf_counter()
    measurer = measurer_of(resolved, resources, on_event, use_cache=use_cache)
    plan = decide(resolved, measurer)
    measured = time.perf_counter()
    graph = build(plan, resolved, resources.device)
    needs = ((task.slot.name, task_memory(task)) for task in graph.tasks)
    workers = fit_workers(needs, resources.workers, resources.memory)
    peak = projected_peak(graph, workers, measurer.peak if measurer else 0)
    timings = {"measure": measured - begun, "plan": time.perf_counter() - measured}
    return Prepared(resolved, plan, graph, replace(resources, workers=workers), peak, timings)


def measurer_of(
    resolved: Resolved, resources: Resources, on_event: Listener = ignore, *, use_cache: bool = True
) -> Measurer | None:
    """What measures the family's tensors; None where nothing is gated or there is no base and so no V."""
    family, gated = resolved.family, [outlook.name for outlook in resolved.outlooks if outlook.policy]
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
    return Measurer(family, resources, use_cache=use_cache, on_event=on_event)


def _stored_recipe(prepared: Prepared, output: Path) -> str:
    """The recipe as it lies in the output: local paths seen from there, hub ids pinned to their commit."""
    values = json.loads(_recipe_json(prepared.recipe))
    for role, model in prepared.family.models.items():
        source = values["sources"][role]
        if isinstance(source, str):
            source = values["sources"][role] = {"location": source}
        key = next(key for key in ("model", "adapter", "location") if key in source)
        if model.folder.revision is not None:
            source["revision"] = model.folder.revision
        else:
            root = model.folder.path
            for _ in Path(source.get("subfolder") or "").parts:
                root = root.parent
            source[key] = os.path.relpath(root, output)
            if not source[key].startswith("."):
                source[key] = f"./{source[key]}"
    for part in (values, *values.get("rules", ())):
        mask = (part.get("merge") or {}).get("mask")
        if mask:
            mask["path"] = os.path.relpath(mask_path(prepared.resolved.loaded.directory, mask["path"]), output)
    values.get("output", {}).pop("path", None)
    return dump_recipe(Recipe.model_validate_json(json.dumps(values)))


def _header(prepared: Prepared) -> dict[str, Any]:
    return {"format": 1, "engine": ENGINE, "inputs": {one.path: one.key for one in prepared.identities}}


def _check_apart(prepared: Prepared, output: Path) -> None:
    """Refuses an output that is a source, or lies in one, or holds one."""
    for role, model in prepared.family.models.items():
        for place in (output, part_of(output)):
            real, source = Path(os.path.realpath(place)), Path(os.path.realpath(model.folder.path))
            if real.is_relative_to(source) or source.is_relative_to(real):
                raise PlanError(f"{output}: overlaps sources.{role}, {source}; choose another --output")


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
    _check_apart(prepared, output)
    try:
        with working_folder(output, force, lambda folder: reusable(folder, prepared.graph)):
            result = _write(prepared, part, output, digests, on_event, force, executor)
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


def _write(
    prepared: Prepared, part: Path, output: Path, digests: Digests, on_event: Listener, force: bool, executor: Executor
) -> Result:
    if prepared.recipe.output.format == "adapter":
        return _write_adapter(prepared, part, output, digests, on_event)
    graph, header = prepared.graph, _header(prepared)
    check_unchanged(prepared.identities)
    store = LocalStore(part, graph.layout)
    done = finished(part, store, graph, header, force)
    keys = {task.slot.name: task.key for task in graph.tasks}
    journal = Journal(part / JOURNAL_FILE, header, {name: (keys[name], digest) for name, digest in done.items()})
    try:
        keep_only(part, {name for file in graph.layout.files for name in (file, f"{file}.part")})
        on_event(PhaseStarted("write", graph.bytes_written))
        started = time.perf_counter()
        sealed = executor.run(graph, store, prepared.resources, done, journal, on_event)
        written = time.perf_counter()
        index = graph.layout.index_bytes()
        if index is not None:
            write_file(part / INDEX_FILE, index)
        inputs = digests.result()
    finally:
        journal.close()
    timings = {"write": written - started, "hash": time.perf_counter() - written}
    tensors: dict[str, tuple[str, str | None]] = {name: (keys[name], digest) for name, digest in sealed.tensors.items()}
    plan = prepared.plan_json()
    timings = _document(prepared, part, output, plan, beside_of(prepared), inputs, sealed.files, tensors, timings)
    return Result(output, prepared, sealed.files, timings, graph.bytes_written, len(done))


def beside_of(prepared: Prepared) -> Mapping[str, Path]:
    """Relative name -> source of the files that lie beside the weights; of an adapter, the tokenizer alone."""
    files = prepared.resolved.side_files
    return only_tokenizer(files) if prepared.recipe.output.format == "adapter" else files


def _write_adapter(prepared: Prepared, part: Path, output: Path, digests: Digests, on_event: Listener) -> Result:
    """An adapter is small: it is computed in memory and always written anew."""
    from safemerge_recipes.engine.adapter.write import write_adapter

    check_unchanged(prepared.identities)
    Journal(part / JOURNAL_FILE, _header(prepared), {}).close()
    keep_only(part, set())
    on_event(PhaseStarted("write", prepared.graph.bytes_written))
    started = time.perf_counter()
    family = prepared.family
    files, notes = write_adapter(prepared.plan, family, prepared.graph, part, prepared.resources.memory, on_event)
    written = time.perf_counter()
    plan = prepared.plan_json()
    for line in plan["tensors"]:
        line.update(notes.get(line["name"], {}))
    plan["summary"]["bytes_written"] = sum((part / name).stat().st_size for name in files)
    inputs = digests.result()
    timings = {"write": written - started, "hash": time.perf_counter() - written}
    timings = _document(prepared, part, output, plan, beside_of(prepared), inputs, files, {}, timings)
    return Result(output, prepared, files, timings, plan["summary"]["bytes_written"], 0)


def _document(
    prepared: Prepared,
    part: Path,
    output: Path,
    plan: dict[str, Any],
    beside: Mapping[str, Path],
    inputs: Mapping[str, InputDigest],
    files: Mapping[str, str],
    tensors: dict[str, tuple[str, str | None]],
    timings: Mapping[str, float],
) -> dict[str, float]:
    """Writes everything that lies beside the weights, the manifest last; returns the timings of all phases."""
    write_json(part / PLAN_FILE, plan)
    write_file(part / RECIPE_FILE, _stored_recipe(prepared, output))
    check_unchanged(prepared.identities)
    copy_side_files(beside, part, prepared.family.config_edits)
    timings = {**prepared.timings, **timings}
    provenance = provenance_of(prepared)
    for name, text in documents(plan, None, provenance, part).items():
        write_file(part / name, text)
    labels: dict[str, tuple[list[str], str]] = {}
    for role, model in prepared.family.models.items():
        for file in model.files:
            labels.setdefault(file, ([], origin(model.folder)[0]))[0].append(role)
    for file in prepared.family.mask_files:
        labels.setdefault(file, ([], Path(file).name))[0].append("mask")
    manifest = make_manifest(
        engine=ENGINE, workers=prepared.resources.workers, identities=prepared.identities, labels=labels,
        inputs=inputs, folder=part, sealed=files, timings=timings, tensors=tensors,
    )  # fmt: skip
    write_manifest(part, manifest | {key: provenance[key] for key in ("sources", "pipeline_tag")})
    return timings


def provenance_of(prepared: Prepared) -> dict[str, Any]:
    """What report and card say of the sources and versions. Holds no local path."""
    family = prepared.family
    sources = sources_of(family, prepared.resolved.loaded.directory)
    return {
        "sources": sources,
        "pipeline_tag": pipeline_tag(family.models["aligned"].checkpoint.config),
        "versions": versions(),
        "recipe": portable(dump_recipe(prepared.recipe), sources),
    }


def documents(
    plan: dict[str, Any], scores: dict[str, Any] | None, provenance: dict[str, Any], folder: Path
) -> dict[str, str]:
    """Report and model card by file name, with the pictures of a sweep or a probe that lie in the folder."""
    from safemerge_recipes.report.card import render_card
    from safemerge_recipes.report.page import render_report

    drawn = ((title, folder / name) for title, name in PICTURES.items())
    pictures = {title: path.read_text(encoding="utf-8") for title, path in drawn if path.exists()}
    return {
        REPORT_FILE: render_report(plan, scores=scores, provenance=provenance, pictures=pictures),
        "README.md": render_card(plan, scores=scores, provenance=provenance),
    }
