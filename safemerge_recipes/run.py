"""The whole story of a recipe: resolve → measure → decide → write → report, as plain function calls.

`prepare` goes as far as the plan and its graph, reading headers and gated tensors; `carry_out` writes the
output folder. Both print nothing; what happens is told to a `Progress`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from safemerge_recipes.checkpoint import INDEX_FILE, FileIdentity
from safemerge_recipes.errors import PlanError, SourceError, WriteError
from safemerge_recipes.execute import Resources, execute, region_digest
from safemerge_recipes.folder import (
    MANIFEST_FILE,
    PLAN_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    check_output,
    copy_side_files,
    locked,
    part_of,
    publish,
    side_files,
    tokenizer_files,
    write_file,
    write_json,
)  # fmt: skip
from safemerge_recipes.graph import ENGINE, Copy, Graph, build_graph, task_memory
from safemerge_recipes.journal import JOURNAL_FILE, Journal, read_journal
from safemerge_recipes.loading import LoadedRecipe, dump_recipe, read_names
from safemerge_recipes.memory import fit_workers, projected_peak
from safemerge_recipes.plan import Plan, make_plan, survey
from safemerge_recipes.provenance import Digests, check_unchanged, versions
from safemerge_recipes.recipe import Recipe
from safemerge_recipes.roles import Family, open_family


class Progress(Protocol):
    """Is told what goes on: a phase with its total bytes, then the bytes as they are done."""

    def phase(self, name: str, nbytes: int) -> None:
        """A new phase begins."""

    def tick(self, nbytes: int) -> None:
        """Bytes are done. Called from several threads."""


class Silent:
    """No progress."""

    def phase(self, name: str, nbytes: int) -> None:
        """Does nothing."""

    def tick(self, nbytes: int) -> None:
        """Does nothing."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe whose sources are found and fit together; only headers were read. Needs no torch."""

    recipe: Recipe
    directory: Path
    family: Family
    identities: tuple[FileIdentity, ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that is decided before the first byte is written."""

    recipe: Recipe
    directory: Path
    family: Family
    identities: tuple[FileIdentity, ...]
    plan: Plan
    graph: Graph
    resources: Resources
    peak_memory: int
    timings: Mapping[str, float]

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


def _recipe_json(recipe: Recipe) -> str:
    return recipe.model_dump_json(by_alias=True, exclude_unset=True, exclude_none=True)


def _settled(loaded: LoadedRecipe) -> Recipe:
    """The recipe with every file of names read in, so that it says everything itself."""

    def settle(gate: Any) -> Any:
        if gate is None:
            return None
        if gate.names_file is not None:
            names = read_names(loaded.resolve(gate.names_file))
            gate = gate.model_copy(update={"names_file": None, "names": names})
        if getattr(gate, "complement", None) is not None:
            gate = gate.model_copy(update={"complement": settle(gate.complement)})
        return gate

    recipe = loaded.recipe
    rules = tuple(rule.model_copy(update={"gate": settle(rule.gate)}) for rule in recipe.rules)
    return recipe.model_copy(update={"gate": settle(recipe.gate), "rules": rules})


def choose_device(device: str) -> str:
    """`auto` becomes cuda where there is one. Raises PlanError for a device that is not there."""
    if device == "cpu":
        return device
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


def resolve(loaded: LoadedRecipe) -> Resolved:
    """Finds, fetches and opens the sources. Reads headers only.

    Raises:
        SafemergeError: a source is missing, unsound, or does not fit the others.
    """
    recipe = _settled(loaded)
    family = open_family(recipe, loaded.directory)
    return Resolved(recipe, loaded.directory, family, family.identities())


def prepare(resolved: Resolved, resources: Resources, progress: Progress, *, use_cache: bool = True) -> Prepared:
    """Measures what is gated, decides every tensor and builds the work.

    Raises:
        SafemergeError: the plan cannot be made or carried out; nothing has been written.
    """
    recipe, family = resolved.recipe, resolved.family
    opened = time.perf_counter()
    outlooks = survey(recipe, family)
    measurer = None
    if "base" in family.models and any(outlook.policy for outlook in outlooks):
        from safemerge_recipes.measuring import Measurer

        gated = [outlook.name for outlook in outlooks if outlook.policy]
        nbytes = sum(
            ref.nbytes
            for name in gated
            for ref in dict.fromkeys(
                (*(family.v(name) or family.delta("base", name)).refs, *family.delta("finetuned", name).refs)
            )
        )
        progress.phase("measure", nbytes)
        measurer = Measurer(family, resources, use_cache=use_cache, tick=progress.tick)
    plan = make_plan(recipe, family, outlooks, measurer)
    measured = time.perf_counter()
    graph = build_graph(plan, family, resolved.identities)
    needs = ((task.slot.name, task_memory(task)) for task in graph.tasks)
    workers = fit_workers(needs, resources.workers, resources.memory)
    peak = projected_peak(graph, workers, resources.memory, measurer.peak if measurer else 0)
    timings = {"measure": measured - opened, "plan": time.perf_counter() - measured}
    return Prepared(
        recipe, resolved.directory, family, resolved.identities, plan, graph,
        replace(resources, workers=workers), peak, timings,
    )  # fmt: skip


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
    values.get("output", {}).pop("path", None)
    return dump_recipe(Recipe.model_validate_json(json.dumps(values)))


def _header(prepared: Prepared) -> dict[str, Any]:
    return {"format": 1, "engine": ENGINE, "inputs": {one.path: one.key for one in prepared.identities}}


def _resume(part: Path, prepared: Prepared, progress: Progress) -> dict[str, str | None] | None:
    """Tensors an interrupted run finished, checked against their bytes; None if there was no such run.

    Raises:
        SourceError: the inputs are not those of the interrupted run.
    """
    header, entries = read_journal(part / JOURNAL_FILE)
    if header is None:
        return None
    wanted = _header(prepared)
    before, now = header.get("inputs", {}), wanted["inputs"]
    for path in now:
        if isinstance(before, dict) and path in before and before[path] != now[path]:
            raise SourceError(
                f"{path}: changed since the run into {part} was interrupted; expected the same inputs. "
                "Restore it, or say --force to start over"
            )
    if header.get("engine") != ENGINE:
        return None
    tasks = {task.slot.name: task for task in prepared.graph.tasks}
    done: dict[str, str | None] = {}
    descriptors: dict[str, int] = {}
    layout = prepared.graph.layout
    try:
        for name, (key, digest) in entries.items():
            task = tasks.get(name)
            if task is None or task.key != key:
                continue
            file = _sealed_or_part(part, layout.files[task.slot.shard], layout, task.slot.shard, descriptors)
            if file is None:
                continue
            if digest is None and isinstance(task.work, Copy):
                source = os.open(task.work.source.path, os.O_RDONLY)
                try:
                    digest = region_digest(source, task.work.source.offset, task.slot.nbytes)
                finally:
                    os.close(source)
            if digest is not None and region_digest(file, task.slot.offset, task.slot.nbytes) == digest:
                done[name] = digest
    except (OSError, WriteError):
        return done
    finally:
        for file in descriptors.values():
            os.close(file)
    return done


def _sealed_or_part(part: Path, name: str, layout: Any, shard: int, descriptors: dict[str, int]) -> int | None:
    """A descriptor of a weight file of an earlier run, sealed or not, if it has this layout's opening bytes."""
    if name in descriptors:
        return descriptors[name]
    sealed, open_ = part / name, part / f"{name}.part"
    if sealed.exists() and not open_.exists():
        os.rename(sealed, open_)
    if not open_.exists() or open_.stat().st_size != layout.sizes[shard]:
        return None
    header = layout.headers[shard]
    with open(open_, "rb") as file:
        if file.read(len(header)) != header:
            return None
    descriptors[name] = os.open(open_, os.O_RDONLY)
    return descriptors[name]


def _reuse(output: Path, part: Path, prepared: Prepared) -> dict[str, str | None]:
    """Turns a finished output that is being replaced into the working folder, keeping what stays the same.

    Only where the files are laid out alike; tensors whose result key is unchanged are not written again.
    """
    try:
        manifest = json.loads((output / MANIFEST_FILE).read_bytes())
        keys = manifest["tensors"]
        files = {entry["file"]: entry["size"] for entry in manifest["outputs"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    layout = prepared.graph.layout
    if manifest.get("engine") != ENGINE:
        return {}
    for name, header, size in zip(layout.files, layout.headers, layout.sizes, strict=True):
        path = output / name
        if files.get(name) != size or not path.exists() or path.stat().st_size != size:
            return {}
        with open(path, "rb") as file:
            if file.read(len(header)) != header:
                return {}
    os.rename(output, part)
    for path in list(part.iterdir()):
        if path.name in layout.files:
            os.rename(path, part / f"{path.name}.part")
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return {task.slot.name: None for task in prepared.graph.tasks if keys.get(task.slot.name) == task.key}


def carry_out(
    prepared: Prepared, output: Path, digests: Digests, progress: Progress, *, force: bool = False
) -> dict[str, Any]:
    """Writes the output folder and returns the run's result.

    Args:
        prepared: what `prepare` made.
        output: the folder to write.
        digests: hashes the inputs; begun as early as may be, since it takes long.
        progress: is told what goes on.
        force: replace a finished output; start an interrupted run over if its inputs changed.

    Raises:
        PlanError: the output is in the way, locked, or the disk is too small.
        SourceError: an input changed, failed or holds values that are not finite.
        WriteError: stopped while writing.
    """
    check_output(output, force)
    part = part_of(output)
    started = time.perf_counter()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        done: dict[str, str | None] = {}
        if force and not part.exists() and output.exists():
            done = _reuse(output, part, prepared)
        created = not part.exists()
        part.mkdir(exist_ok=True)
    except OSError as error:
        raise PlanError(f"{output}: cannot be made: {error.strerror}; choose another --output") from None
    try:
        with locked(part):
            result = _write(prepared, part, output, done, digests, progress, force)
            publish(part, output)
    except KeyboardInterrupt:
        raise WriteError(f"stopped; {part} keeps what is done, the same command goes on from there") from None
    except (SourceError, PlanError):
        if created:
            shutil.rmtree(part, ignore_errors=True)
        raise
    except OSError as error:
        raise WriteError(
            f"{part}: {error.strerror}; mend it and run the same command, which goes on from there"
        ) from None
    finally:
        digests.cancelled.set()
    result["timings"]["total"] = time.perf_counter() - started
    return result


def _write(
    prepared: Prepared,
    part: Path,
    output: Path,
    done: dict[str, str | None],
    digests: Digests,
    progress: Progress,
    force: bool,
) -> dict[str, Any]:
    graph, recipe = prepared.graph, prepared.recipe
    if recipe.output.format == "adapter":
        return _write_adapter(prepared, part, output, digests, progress)
    if not done:
        try:
            resumed = _resume(part, prepared, progress)
        except SourceError:
            if not force:
                raise
            resumed = None
        done = resumed or {}
    tasks = {task.slot.name: task for task in graph.tasks}
    journal = Journal(part / JOURNAL_FILE, _header(prepared), resume=False)
    for name in done:
        journal.done(name, tasks[name].key, done[name])
    for path in part.iterdir():  # whatever an earlier layout left behind
        stale = path.name.endswith(".part") and path.name.removesuffix(".part") not in graph.layout.files
        if stale or path.suffix == ".safetensors":
            path.unlink()
    progress.phase("write", graph.bytes_written)
    started = time.perf_counter()
    try:
        sealed = execute(
            graph, part, prepared.resources, done, journal,
            allow_overflow=recipe.output.allow_overflow, tick=progress.tick,
        )  # fmt: skip
    finally:
        journal.close()
    written = time.perf_counter()
    index = graph.layout.index_bytes()
    if index is not None:
        write_file(part / INDEX_FILE, index)
    plan = prepared.plan_json()
    write_json(part / PLAN_FILE, plan)
    write_file(part / RECIPE_FILE, _stored_recipe(prepared, output))
    inputs = digests.result()
    hashed = time.perf_counter()
    check_unchanged(prepared.identities)
    copy_side_files(side_files(prepared.family), part, prepared.family.config_edits)
    timings = {**prepared.timings, "write": written - started, "hash": hashed - written}
    render_documents(part, plan, None, provenance_of(prepared))
    (part / JOURNAL_FILE).unlink(missing_ok=True)
    write_json(part / MANIFEST_FILE, _manifest(prepared, part, sealed, inputs, timings))
    return {
        "output": str(output),
        "summary": plan["summary"],
        "resumed": len(done),
        "files": sealed,
        "timings": timings,
    }


def _write_adapter(
    prepared: Prepared, part: Path, output: Path, digests: Digests, progress: Progress
) -> dict[str, Any]:
    """An adapter is small: it is computed in memory and always written anew."""
    from safemerge_recipes.adapter_output import write_adapter

    progress.phase("write", prepared.graph.bytes_written)
    started = time.perf_counter()
    graph = prepared.graph
    sealed, notes = write_adapter(prepared.plan, prepared.family, graph, part, prepared.resources.memory, progress.tick)
    written = time.perf_counter()
    plan = prepared.plan_json()
    for line in plan["tensors"]:
        line.update(notes.get(line["name"], {}))
    write_json(part / PLAN_FILE, plan)
    write_file(part / RECIPE_FILE, _stored_recipe(prepared, output))
    inputs = digests.result()
    check_unchanged(prepared.identities)
    finetuned = prepared.family.models["finetuned"].folder
    if finetuned.kind == "adapter":
        copy_side_files(tokenizer_files(finetuned.path), part)
    render_documents(part, plan, None, provenance_of(prepared))
    timings = {**prepared.timings, "write": written - started, "hash": time.perf_counter() - written}
    write_json(part / MANIFEST_FILE, _manifest(prepared, part, sealed, inputs, timings))
    return {"output": str(output), "summary": plan["summary"], "resumed": 0, "files": sealed, "timings": timings}


def provenance_of(prepared: Prepared) -> dict[str, Any]:
    """What report and card say of the sources and versions. Holds no local path."""
    sources = {
        role: {
            "label": model.folder.label if model.folder.revision else Path(model.folder.label).name,
            "kind": model.folder.kind,
            "revision": model.folder.revision,
        }
        for role, model in prepared.family.models.items()
    }
    return {"sources": sources, "versions": versions(), "recipe": dump_recipe(prepared.recipe)}


def render_documents(
    folder: Path, plan: dict[str, Any], scores: dict[str, Any] | None, provenance: dict[str, Any]
) -> None:
    """Writes report and model card."""
    from safemerge_recipes.card import render_card
    from safemerge_recipes.html import render_report

    write_file(folder / REPORT_FILE, render_report(plan, scores=scores, provenance=provenance))
    write_file(folder / "README.md", render_card(plan, scores=scores, provenance=provenance))


def _manifest(
    prepared: Prepared, part: Path, sealed: dict[str, str], inputs: dict[str, str], timings: dict[str, float]
) -> dict[str, Any]:
    import hashlib

    outputs = []
    for path in sorted(p for p in part.rglob("*") if p.is_file()):
        name = path.relative_to(part).as_posix()
        if name.startswith("safemerge.lock"):
            continue
        digest = sealed.get(name) or hashlib.sha256(path.read_bytes()).hexdigest()
        outputs.append({"file": name, "size": path.stat().st_size, "sha256": digest})
    roles: dict[str, list[str]] = {}
    for role, model in prepared.family.models.items():
        for file in model.files:
            roles.setdefault(file, []).append(role)
    return {
        "format": 1,
        "engine": ENGINE,
        "versions": versions(),
        "machine": {
            "system": platform.system(),
            "machine": platform.machine(),
            "workers": prepared.resources.workers,
        },
        "inputs": [
            {
                "roles": roles[one.path],
                "source": prepared.family.models[roles[one.path][0]].folder.label,  # type: ignore[index]  # a role
                "file": Path(one.path).name,
                "size": one.size,
                "sha256": inputs[one.path],
            }
            for one in prepared.identities
        ],
        "outputs": outputs,
        "timings": {name: round(seconds, 3) for name, seconds in timings.items()},
        "tensors": {task.slot.name: task.key for task in prepared.graph.tasks},
    }
