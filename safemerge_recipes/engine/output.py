"""Writes an output into its working folder: the weights by an executor, or an adapter, then what lies beside them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safemerge_recipes.engine.documents import provenance_of, write_documents
from safemerge_recipes.engine.executor import Executor
from safemerge_recipes.engine.folder import keep_only, part_of
from safemerge_recipes.engine.journal import JOURNAL_FILE, Journal
from safemerge_recipes.engine.local_store import LocalStore
from safemerge_recipes.engine.requantised import note_lines, requantised_errors
from safemerge_recipes.engine.resume import finished
from safemerge_recipes.errors import PlanError
from safemerge_recipes.events import Listener, PhaseStarted
from safemerge_recipes.planning.graph import ENGINE
from safemerge_recipes.planning.prepared import Prepared
from safemerge_recipes.report.licences import licence_note
from safemerge_recipes.sources.mirror import origin_url
from safemerge_recipes.storage.digests import Digests
from safemerge_recipes.storage.files import write_file
from safemerge_recipes.storage.identity import check_unchanged
from safemerge_recipes.storage.layout import INDEX_FILE


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run.

    Attributes:
        output: the folder, or the URL.
        plan: what was carried out.
        files: sha256 of each weight file, by name.
        timings: seconds of each phase, and their `total`.
        bytes_written: bytes of the weight files, and of an adapter's config.
        resumed: tensors that were there from an earlier run.
        scores: the content of safemerge_scores.json where the output was scored.
    """

    output: Path | str
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


@dataclass(frozen=True, slots=True)
class PartWritten:
    """What one of several workers has done.

    Attributes:
        output: the folder or URL.
        number: which worker, from 1.
        count: how many there are.
        written: weight files that are there, whoever wrote them.
        files: weight files of the whole output.
    """

    output: Path | str
    number: int
    count: int
    written: int
    files: int

    def as_json(self) -> dict[str, Any]:
        """The same as plain data, as `run --part --json` prints it."""
        part = f"{self.number}/{self.count}"
        return {"output": str(self.output), "part": part, "written": self.written, "files": self.files}


def write_output(
    prepared: Prepared,
    part: Path,
    output: Path | str,
    digests: Digests,
    on_event: Listener,
    force: bool,
    executor: Executor,
) -> Result:
    """Writes everything that belongs to an output into its working folder `part`; goes on where a run was cut short.

    Raises:
        SourceError: an input changed, or holds values that are not finite.
        WriteError: stopped while writing.
    """
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
    note_lines(plan, requantised_errors(prepared, part))
    timings = write_documents(prepared, part, output, plan, inputs, sealed.files, tensors, timings)
    return Result(output, prepared, sealed.files, timings, graph.bytes_written, len(done))


def _write_adapter(prepared: Prepared, part: Path, output: Path | str, digests: Digests, on_event: Listener) -> Result:
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
    note_lines(plan, notes)
    plan["summary"]["bytes_written"] = sum((part / name).stat().st_size for name in files)
    inputs = digests.result()
    timings = {"write": written - started, "hash": time.perf_counter() - written}
    timings = write_documents(prepared, part, output, plan, inputs, files, {}, timings)
    return Result(output, prepared, files, timings, plan["summary"]["bytes_written"], 0)


def _header(prepared: Prepared) -> dict[str, Any]:
    """What a journal says of the inputs: what holds on every machine, and what this one sees besides."""
    inputs = {one.path: one.key for one in prepared.identities}
    here = {one.path: one.here for one in prepared.identities}
    return {"format": 1, "engine": ENGINE, "inputs": inputs, "here": here}


def check_apart(prepared: Prepared, output: Path | str) -> None:
    """Refuses an output that is a source, or lies in one, or holds one."""
    for role, model in prepared.family.models.items():
        if isinstance(output, str):
            url = f"{origin_url(model.folder.path)}/"
            if url.startswith(f"{output}/") or f"{output}/".startswith(url):
                raise PlanError(f"{output}: overlaps sources.{role}, {url}; choose another --output")
            continue
        for place in (output, part_of(output)):
            real, source = Path(os.path.realpath(place)), Path(os.path.realpath(model.folder.path))
            if real.is_relative_to(source) or source.is_relative_to(real):
                raise PlanError(f"{output}: overlaps sources.{role}, {source}; choose another --output")
