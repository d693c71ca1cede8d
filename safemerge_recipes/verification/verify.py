"""Checks a finished output: its files against the manifest, its headers, index and plan against each other.

With a deep check, tensors are computed again from the sources through the stored recipe and compared by
digest; report and card are rendered again. Writes nothing and keeps no more in memory than a run does.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safemerge_recipes.engine.documents import beside_of, provenance_of, rendered, scores_in
from safemerge_recipes.engine.folder import DOCUMENTS, MANIFEST_FILE, PLAN_FILE, RECIPE_FILE
from safemerge_recipes.engine.manifest import (
    Manifest,
    manifest_record,
    output_files,
    read_manifest,
    read_record,
    sha256_of,
    versions,
)
from safemerge_recipes.engine.produce import digest_of, produce
from safemerge_recipes.engine.requantised import ERROR, requantised_errors
from safemerge_recipes.errors import CheckError, SourceError
from safemerge_recipes.events import BytesDone, Listener, PhaseStarted
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.pipeline import open_sources, prepare
from safemerge_recipes.planning.graph import ENGINE, Task
from safemerge_recipes.planning.memory import room_of
from safemerge_recipes.planning.prepared import Prepared
from safemerge_recipes.sources.architecture import Loaded, disagreements, loads
from safemerge_recipes.sources.checkpoint import open_checkpoint, read_object
from safemerge_recipes.sources.peft.apply import is_adapter, open_adapter
from safemerge_recipes.sources.peft.config import CONFIG_FILE
from safemerge_recipes.sources.peft.keys import WEIGHTS_FILE
from safemerge_recipes.sources.side_files import copy_side_files
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.digests import file_digest
from safemerge_recipes.storage.files import inside, reading
from safemerge_recipes.storage.identity import FileIdentity
from safemerge_recipes.storage.layout import INDEX_FILE
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import TensorRef, read_header
from safemerge_recipes.storage.workers import Resources, run_parallel

CHUNK = 1 << 20
"""Bytes hashed at once."""
SHOWN = 20
"""Problems listed in one message."""


def verify(
    folder: Path,
    resources: Resources,
    on_event: Listener,
    *,
    deep: bool = False,
    sample: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Checks an output and returns what was checked: numbers of files, bytes and tensors.

    Args:
        folder: the output.
        resources: what a deep check may use.
        on_event: is told what goes on.
        deep: compute tensors again from the sources.
        sample: only so many of them, drawn with `seed`.
        seed: which sample.

    Raises:
        CheckError: something is not as it was written; the message names the file and, if it can, the tensor.
        SourceError: a source that the deep check needs is missing or does not fit.
    """
    manifest = read_manifest(folder)
    on_event(PhaseStarted("verify", sum(stamp.size for stamp in manifest.outputs.values())))
    problems = [*_files(folder, manifest, on_event), *_inventory(folder, manifest)]
    refuse(folder, problems)
    found = _loaded(folder) if deep else Loaded(unchecked=("whether transformers loads it as what it is: --deep",))
    refuse(folder, list(found.problems))
    result: dict[str, Any] = {
        "checked": [
            "every file of the manifest, and the manifest itself: size and sha256",
            "headers, index, config and plan against each other",
            *found.checked,
        ],
        "unchecked": [
            "who wrote the manifest: a stranger can make an output whose parts agree",
            *([] if deep else ["whether the sources give these bytes: --deep"]),
            *found.unchecked,
        ],
        "files": len(manifest.outputs),
        "bytes": sum(stamp.size for stamp in manifest.outputs.values()),
        "tensors": len(manifest.tensors),
        "recomputed": 0,
    }
    if deep:
        names = _recompute(folder, manifest, resources, on_event, sample, seed)
        result["recomputed"] = len(names)
        result["checked"] += [
            "sources: sha256 of every weight file, read anew",
            "plan: made again and compared line by line",
            f"tensors: {len(names)} computed again from the sources",
            "config, tokenizer and other side files against the sources'",
        ]
        rendering = _rendered(folder, manifest)
        result["unchecked" if rendering else "checked"].append(rendering or "report and card: rendered again")
        if sample is not None:
            result["unchecked"].append("tensors outside the sample")
    return result


def _loaded(folder: Path) -> Loaded:
    """What transformers makes of the output; of an adapter nothing, as its base model lies elsewhere."""
    return (
        Loaded(unchecked=("whether it loads with its base model",))
        if is_adapter(folder)
        else loads(open_checkpoint(folder))
    )


def unfinished(manifest: Manifest) -> bool:
    """Whether files of an output are being replaced, or a command that replaced them was cut short."""
    return any(stamp.next is not None or stamp.new for stamp in manifest.outputs.values())


def _rendered(folder: Path, manifest: Manifest) -> str:
    """Compares report and card with what is rendered anew; says why not, where it cannot.

    Raises:
        CheckError: one is not what plan, scores, recipe and manifest make it.
    """
    own, version = manifest_record(folder), versions()["safemerge-recipes"]
    written = str(own.get("rendered") or own.get("versions", {}).get("safemerge-recipes"))
    if written != version:
        return f"report and card: rendered by version {written[:40]}, this is {version}"
    if unfinished(manifest):
        return "report and card: a command that replaces them was cut short, `safemerge report` ends it"
    now = rendered(folder, scores_in(folder))
    stamps = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in now.items()}
    refuse(
        folder,
        [
            f"{name}: is not what plan, scores, recipe and manifest make it when rendered again"
            for name, sha256 in stamps.items()
            if name not in manifest.outputs or manifest.outputs[name].sha256 != sha256
        ],
    )
    return ""


def refuse(folder: Path, problems: list[str]) -> None:
    """Raises CheckError with what is wrong with an output, if anything is."""
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        listed = "\n  ".join([*problems[:SHOWN], *more])
        raise CheckError(
            f"{folder}: not as it was written; get it again, or run its recipe again with --force\n  {listed}"
        )


# Files

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
"""Endings of files that run code when they are loaded, or may."""


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    return inside(path.parent, path.name)


def _files(folder: Path, manifest: Manifest, on_event: Listener) -> Iterator[str]:
    """What is wrong with the files' presence, sizes and hashes."""
    for name in manifest.outputs:
        if name.startswith(".") or "/." in name or name.endswith(PICKLES):
            yield f"{name}: no run writes such a file, whatever the manifest says"
    for name in output_files(folder):
        if name not in manifest.outputs and not name.startswith(".") and name.isprintable():
            yield f"{name}: is not in the manifest"
        elif not name.isprintable():
            yield f"{name!r}: is not in the manifest"
    for name, stamp in manifest.outputs.items():
        try:
            path = _file(folder, name)
            if not path.is_file():
                if not stamp.new:
                    yield f"{name}: is missing"
                continue
            if path.stat().st_size not in (stamp.size, stamp.next and stamp.next.size):
                yield f"{name}: has {path.stat().st_size} bytes; expected {stamp.size}"
                continue
            refs = read_header(path) if name.endswith(".safetensors") else {}
        except SourceError as error:
            yield f"{name}: {error}"
            continue
        except OSError as error:
            yield f"{name}: {error.strerror}"
            continue
        yield from _bytes(path, name, refs, manifest, on_event)


def _bytes(
    path: Path, name: str, refs: Mapping[str, TensorRef], manifest: Manifest, on_event: Listener
) -> Iterator[str]:
    """What is wrong with a file's bytes, told by tensor; reads the file once."""
    import xxhash

    whole = hashlib.sha256()
    regions: list[tuple[str | None, int]] = [(None, path.stat().st_size)]  # which was seen to be right
    if refs:
        start = min(ref.offset for ref in refs.values())
        regions = [(None, start), *((tensor, ref.nbytes) for tensor, ref in refs.items())]
    damaged: list[str] = []
    with reading(path) as file:
        for tensor, left in regions:
            own = xxhash.xxh3_128()
            while left:
                piece = file.read(min(CHUNK, left))
                if not piece:
                    yield f"{name}: became shorter while it was read"
                    return
                whole.update(piece)
                own.update(piece)
                left -= len(piece)
                on_event(BytesDone(len(piece)))
            if tensor in manifest.tensors and own.hexdigest() != manifest.tensors[tensor][1]:
                damaged.append(tensor)
    yield from (f"{name}: {tensor}: its bytes changed" for tensor in damaged)
    stamp = manifest.outputs[name]
    if whole.hexdigest() not in (stamp.sha256, stamp.next and stamp.next.sha256) and not damaged:
        known = any(tensor in manifest.tensors for tensor in refs)
        yield f"{name}: {'its header' if known else 'it'} changed (sha256 {whole.hexdigest()})"


# Inventory


def _warned(folder: Path) -> list[str]:
    """What the plan warned of, and so is as it was meant; a deep check makes the plan again."""
    try:
        said = read_record(folder / PLAN_FILE).get("warnings")
    except CheckError:
        return []
    return [line for line in said if isinstance(line, str)] if isinstance(said, list) else []


def _inventory(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What does not fit between headers, index, config, plan and manifest."""
    try:
        if is_adapter(folder):  # its inventory is its own: the plan lists the full model's tensors
            open_adapter(folder)
            return
        checkpoint = open_checkpoint(folder)
    except SourceError as error:
        yield str(error)
        return
    told = _warned(folder)
    yield from (line for line in disagreements(checkpoint) if not any(warning.startswith(line) for warning in told))
    listed = {name for name in manifest.outputs if name.endswith(".safetensors")}
    used = {Path(file).name for file in checkpoint.files}
    if listed != used:
        yield f"{INDEX_FILE}: uses {len(used)} weight files; the manifest has {len(listed)}"
    try:
        lines = read_record(folder / PLAN_FILE)["tensors"]
        plan = {line["name"]: (line["dtype"], tuple(line["shape"])) for line in lines}
        if len(plan) != len(lines):
            raise ValueError("a tensor stands there twice")
    except CheckError as error:
        yield str(error)
        return
    except (KeyError, TypeError, ValueError) as error:
        yield f"{PLAN_FILE}: not a plan ({type(error).__name__}: {str(error)[:200]})"
        return
    found = {name: (ref.dtype, ref.shape) for name, ref in checkpoint.tensors.items()}
    for name in {**plan, **found, **manifest.tensors}:
        where = Path(checkpoint.tensors[name].path).name if name in found else PLAN_FILE
        shown = name if isinstance(name, str) and name.isprintable() else repr(name)
        if name not in plan:
            yield f"{where}: {shown}: the plan has no such tensor"
        elif name not in found:
            yield f"{where}: {shown}: no weight file holds it"
        elif found[name] != plan[name]:
            yield f"{where}: {shown}: is {found[name]}; the plan says {plan[name]}"
        elif name not in manifest.tensors:
            yield f"{MANIFEST_FILE}: {shown}: the manifest has no such tensor"


# The deep check


def _recompute(
    folder: Path, manifest: Manifest, resources: Resources, on_event: Listener, sample: int | None, seed: int
) -> list[str]:
    """Computes tensors again; returns their names. Raises CheckError when one comes out otherwise."""
    from safemerge_recipes.recipe.loading import load_recipe

    if manifest.engine != ENGINE:
        raise CheckError(
            f"{folder}: written by arithmetic {manifest.engine}, this is {ENGINE}, which may round otherwise; "
            "check it with the version of safemerge-recipes named in its manifest"
        )
    sources = open_sources(load_recipe(folder / RECIPE_FILE), on_event)
    prepared = prepare(sources, resources, on_event, use_cache=False)
    refuse(folder, list(_inputs(prepared, manifest)))
    refuse(folder, [*_decisions(prepared, folder), *_beside(prepared, folder, manifest), *_told(prepared, folder)])
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
    same = {CONFIG_FILE} if configs[0] == configs[1] else set()
    wrong = [name for name in files if name not in same and manifest.outputs[name].sha256 != files[name]]
    refuse(folder, [f"{name}: computed again from the sources, it has other bytes" for name in wrong])
    return [tensor.name for tensor in prepared.plan.tensors if tensor.action == "merge"]


def sha256_of_source(identity: FileIdentity) -> str:
    """A source's sha256 from its bytes alone: what was remembered of it proves nothing here."""
    found = file_digest(identity, use_cache=False)
    assert found is not None  # nothing stops it
    return found.sha256


def _inputs(prepared: Prepared, manifest: Manifest) -> Iterator[str]:
    """Sources that are not those of the run."""
    digests = {one.path: sha256_of_source(one) for one in prepared.identities}
    owners = {f"sources.{role}": (role, model.files) for role, model in prepared.family.models.items()}
    for place, (role, paths) in {**owners, "merge.mask": ("mask", prepared.family.mask_files)}.items():
        for path in paths:
            written = manifest.inputs.get((role, Path(path).name))
            if written is None or written.sha256 != digests[path]:
                expected = f"sha256 {written.sha256}" if written else "no such input"
                yield f"{place}: {path} has sha256 {digests[path]}; the manifest says {expected}"


_ROUNDING = 1e-5
"""Relative difference of measured numbers that other processors' order of additions explains."""


def same(now: Any, then: Any) -> bool:
    """Whether a value of a plan is what it was, numbers up to rounding."""
    if isinstance(now, float) and isinstance(then, int | float) and not isinstance(then, bool):
        return math.isclose(now, then, rel_tol=_ROUNDING, abs_tol=1e-12)
    if isinstance(now, dict) and isinstance(then, dict):
        return now.keys() == then.keys() and all(same(now[key], then[key]) for key in now)
    if isinstance(now, list) and isinstance(then, list):
        return len(now) == len(then) and all(map(same, now, then))
    return bool(now == then) and isinstance(then, type(now))


def _decisions(prepared: Prepared, folder: Path) -> Iterator[str]:
    """Where the stored plan is not the one that the stored recipe and the sources make now, line by line."""
    stored = read_record(folder / PLAN_FILE)
    then = {line["name"]: line for line in stored["tensors"]}
    adapter = prepared.recipe.output.format == "adapter"
    for tensor in prepared.plan.tensors:
        line, found = json.loads(json.dumps(tensor.as_json())), then.get(tensor.name, {})
        extra = found.keys() - line.keys() - {ERROR} if not adapter else set()  # an adapter's tell what truncation lost
        wrong = sorted({key for key in line if not same(line[key], found.get(key))} | extra)
        if wrong:
            yield (
                f"{PLAN_FILE}: {tensor.name}: says {wrong[0]} {str(found.get(wrong[0]))[:100]!r}; "
                f"the recipe and its sources make it {str(line.get(wrong[0]))[:100]!r}"
            )
    now = json.loads(json.dumps(prepared.plan_json()))
    if adapter:  # it tells what was written, which is known only then
        now["summary"]["bytes_written"] = sum((folder / name).stat().st_size for name in (WEIGHTS_FILE, CONFIG_FILE))
    for key in ("tensors", "gated", "merged", "kept", "bytes_read", "bytes_written"):
        if not same(now["summary"][key], stored.get("summary", {}).get(key)):
            yield f"{PLAN_FILE}: summary.{key} is {stored.get('summary', {}).get(key)}; expected {now['summary'][key]}"
    if [line["name"] for line in stored["tensors"]] != [tensor.name for tensor in prepared.plan.tensors]:
        yield f"{PLAN_FILE}: its tensors are not those of the output in their order"


def _told(prepared: Prepared, folder: Path) -> Iterator[str]:
    """What the manifest, and so report and card, tell of the sources and is not so."""
    stored, now = manifest_record(folder), provenance_of(prepared)
    then = stored.get("sources")
    then = then if isinstance(then, dict) else {}
    for role in dict.fromkeys((*now["sources"], *then)):
        one, other = now["sources"].get(role, {}), then.get(role)
        other = other if isinstance(other, dict) else {}
        # Whether a base named by an adapter is a hub id depends on the folder that a command is given in.
        for key in sorted((one.keys() | other.keys()) - {"base_model"}):
            if not same(one.get(key), other.get(key)):
                yield (
                    f"{MANIFEST_FILE}: sources.{role}.{key} is {str(other.get(key))[:100]!r}; "
                    f"the source makes it {str(one.get(key))[:100]!r}"
                )
    if stored.get("pipeline_tag") != now["pipeline_tag"]:
        found = str(stored.get("pipeline_tag"))[:100]
        yield f"{MANIFEST_FILE}: pipeline_tag is {found!r}; expected {now['pipeline_tag']!r}"


def _beside(prepared: Prepared, folder: Path, manifest: Manifest) -> Iterator[str]:
    """Config, tokenizer and other side files that are not those of the sources, and files that no run writes."""
    beside = beside_of(prepared)
    with tempfile.TemporaryDirectory() as place:
        copy_side_files(beside, Path(place), prepared.side_edits)
        for name in beside:
            found = manifest.outputs.get(name)
            if found is None or found.sha256 != sha256_of(Path(place) / name):
                yield f"{name}: is not what the sources' file makes it"
    weights = {name for name in manifest.outputs if name.endswith(".safetensors")}
    known = {*beside, *weights, *DOCUMENTS, INDEX_FILE, CONFIG_FILE}
    for name in manifest.outputs:
        if name not in known:
            yield f"{name}: no run of this recipe writes such a file"
