"""From a plan and its work to a finished output: by one process, into a folder or a URL, or by several, a part each."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from safemerge_recipes.engine.executor import Executor
from safemerge_recipes.engine.executors.parts import Parts
from safemerge_recipes.engine.executors.threads import LOCAL
from safemerge_recipes.engine.folder import part_of, publish, working_folder
from safemerge_recipes.engine.output import PartWritten, Result, check_apart, write_output
from safemerge_recipes.engine.receipts import Receipts, forget_receipt, joined, without
from safemerge_recipes.engine.resume import reusable
from safemerge_recipes.engine.shared_output import SharedOutput, shared_output
from safemerge_recipes.errors import PlanError, ReadError, WriteError
from safemerge_recipes.events import BytesDone, Listener, PhaseStarted
from safemerge_recipes.planning.outcome import empty
from safemerge_recipes.planning.prepared import Prepared
from safemerge_recipes.storage.digests import Digests, InputDigest, remember_digest
from safemerge_recipes.storage.identity import FileIdentity, check_unchanged
from safemerge_recipes.storage.remote import is_url


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
