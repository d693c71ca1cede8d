"""An output's plan, manifest and side files against what its recipe and sources make them now."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safemerge_recipes.engine.documents import beside_of, provenance_of
from safemerge_recipes.engine.folder import DOCUMENTS, MANIFEST_FILE, PLAN_FILE
from safemerge_recipes.engine.manifest import Manifest, manifest_record, read_record, sha256_of
from safemerge_recipes.engine.requantised import ERROR
from safemerge_recipes.planning.prepared import Prepared
from safemerge_recipes.sources.peft.config import CONFIG_FILE
from safemerge_recipes.sources.peft.keys import WEIGHTS_FILE
from safemerge_recipes.sources.side_files import copy_side_files
from safemerge_recipes.storage.digests import file_digest
from safemerge_recipes.storage.identity import FileIdentity
from safemerge_recipes.storage.layout import INDEX_FILE
from safemerge_recipes.verification.problems import same


def input_problems(prepared: Prepared, manifest: Manifest) -> Iterator[str]:
    """Sources that are not those of the run."""
    digests = {one.path: sha256_of_source(one) for one in prepared.identities}
    owners = {f"sources.{role}": (role, model.files) for role, model in prepared.family.models.items()}
    for place, (role, paths) in {**owners, "merge.mask": ("mask", prepared.family.mask_files)}.items():
        for path in paths:
            written = manifest.inputs.get((role, Path(path).name))
            if written is None or written.sha256 != digests[path]:
                expected = f"sha256 {written.sha256}" if written else "no such input"
                yield f"{place}: {path} has sha256 {digests[path]}; the manifest says {expected}"


def sha256_of_source(identity: FileIdentity) -> str:
    """A source's sha256 from its bytes alone: what was remembered of it proves nothing here."""
    found = file_digest(identity, use_cache=False)
    assert found is not None  # nothing stops it
    return found.sha256


def made_otherwise(prepared: Prepared, folder: Path, manifest: Manifest) -> Iterator[str]:
    """What the recipe and its sources make otherwise than it stands in the output, before a tensor is computed."""
    yield from _decisions(prepared, folder)
    yield from _beside(prepared, folder, manifest)
    yield from _told(prepared, folder)


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
    for key in stored.keys() - now.keys():
        yield f"{PLAN_FILE}: {str(key)[:100]!r}: no run writes such a key"
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
