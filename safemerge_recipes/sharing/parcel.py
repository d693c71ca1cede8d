"""What of a finished output is published: its files, made fit for others to read and to run.

The output itself is not touched. Where its recipe names folders of this machine, the published one names what the user
says they are on the hub, after comparing their bytes with what was merged, or the folder's last name. Everything that
goes out as text is searched for paths of this machine and for tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safemerge_recipes.engine.documents import documents, provenance_in, scores_in
from safemerge_recipes.engine.folder import (
    ANSWERS_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    SIGNATURE_FILE,
)
from safemerge_recipes.engine.manifest import (
    FORMAT,
    LEFT_OUT,
    manifest_record,
    read_record,
    sealed,
    sha256_of,
    versions,
)
from safemerge_recipes.errors import PlanError, RecipeError, SourceError
from safemerge_recipes.recipe.source import source_holders, split_revision
from safemerge_recipes.recipe.yaml_text import read_yaml, write_yaml
from safemerge_recipes.sharing.leaks import check_leaks, is_here
from safemerge_recipes.sources.checkpoint import read_object
from safemerge_recipes.sources.hub import is_id, open_repository
from safemerge_recipes.sources.peft.config import CONFIG_FILE
from safemerge_recipes.sources.provenance import portable
from safemerge_recipes.storage.files import MAX_BYTES, content_of, json_text, text_of, write_file

_NAMES = ("_name_or_path", "name_or_path")
_CONFIGS = ("config.json", CONFIG_FILE)
_PLACES = ("model", "adapter", "location")


@dataclass(frozen=True, slots=True)
class Parcel:
    """What is sent.

    Attributes:
        files: name in the repository -> the file, or content that takes its place.
        changed: names of files whose content is another than the output's.
        sources: what is told of the sources, by role.
        notes: what the user should know before it is sent.
        digests: file of the output -> its sha256, as the manifest has it.
    """

    files: Mapping[str, Path | bytes]
    changed: tuple[str, ...]
    sources: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]
    digests: Mapping[str, str]

    def size(self, name: str) -> int:
        """Bytes of a file."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    def sha256(self, name: str) -> str:
        """The sha256 of a file."""
        content = self.files[name]
        if isinstance(content, bytes):
            return hashlib.sha256(content).hexdigest()
        return self.digests.get(name) or sha256_of(content)


def make_parcel(folder: Path, stand_ins: Mapping[str, str], *, answers: bool = False) -> Parcel:
    """What of a sound output is sent. Writes nothing.

    Args:
        folder: the output, already verified.
        stand_ins: for roles that the recipe names by a folder, what they are on the hub: `org/name[@revision]`.
        answers: send the answers to harmful requests, too.

    Raises:
        CheckError: the folder is no finished output.
        RecipeError: a stand-in is for a role that is not there, or has no id.
        SourceError: a stand-in has other weights than were merged, or the hub does not give it.
        PlanError: a file holds a path of this machine or a token, or an adapter lies on a model without an id.
    """
    record, provenance = manifest_record(folder), provenance_in(folder)
    stored = text_of(folder / RECIPE_FILE, MAX_BYTES)
    sources = _on_the_hub(folder, record, stored, stand_ins)
    provenance |= {"sources": sources, "recipe": portable(stored, sources)}
    listed = [entry["file"] for entry in record["outputs"]]
    files = {name: folder / name for name in listed if (folder / name).is_file()}
    notes = []
    if ANSWERS_FILE in files:
        notes.append(f"{ANSWERS_FILE} is {'sent' if answers else 'left out'}: it holds answers to harmful requests")
        files = {name: path for name, path in files.items() if answers or name != ANSWERS_FILE}
    contents = dict(_rewritten(folder, files, provenance, stored, fresh=bool(stand_ins)))
    changed = {name: new for name, new in contents.items() if new != content_of(folder / name, MAX_BYTES)}
    parcel: dict[str, Path | bytes] = {**files, **changed, MANIFEST_FILE: folder / MANIFEST_FILE}
    if changed or len(files) < len(listed) or stand_ins:
        parcel[MANIFEST_FILE] = changed[MANIFEST_FILE] = _manifest(record, sources, changed, set(files))
    if (folder / SIGNATURE_FILE).is_file() and changed:
        notes.append(f"{SIGNATURE_FILE} is left out, as it signs other files: say --private-key to sign these")
    elif (folder / SIGNATURE_FILE).is_file():
        parcel[SIGNATURE_FILE] = folder / SIGNATURE_FILE
    notes += _unnamed(provenance["recipe"])
    digests = {entry["file"]: entry["sha256"] for entry in record["outputs"]}
    found = Parcel(dict(sorted(parcel.items())), tuple(changed), sources, tuple(notes), digests)
    check_leaks(folder, found.files)
    return found


# Sources


def _on_the_hub(
    folder: Path, record: Mapping[str, Any], stored: str, stand_ins: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """What is told of the sources, with stand-ins as if they had been read from the hub."""
    sources = {role: dict(source) for role, source in record["sources"].items()}
    given = {role: holder[role] for holder, role in source_holders(read_yaml(stored).value["sources"])}
    for role, where in stand_ins.items():
        name, revision = split_revision(where, None)
        if role not in sources or not is_id(name):
            raise RecipeError(
                f"--source {role}={where}: expected ROLE=org/name[@revision], with a role of {', '.join(sources)}"
            )
        label = f"--source {role}: {where}"
        repository = open_repository(name, revision, label, first=_CONFIGS)
        merged = {entry["file"]: entry["sha256"] for entry in record["inputs"] if role in entry["roles"]}
        listed = {file: one.sha256 for file, one in (repository.files or {}).items()}
        source = given[role]
        here = source if isinstance(source, str) else next(source[key] for key in _PLACES if source.get(key))
        for file, digest in merged.items():
            if listed.get(file) != digest and not (file in _CONFIGS and repository.has(file)):
                state = "has another" if file in listed else "has no"
                raise SourceError(f"{label}: {state} {file} than was merged; expected sha256 {digest}")
        for file in _CONFIGS:
            if (folder / here / file).is_file() and _meaning(folder / here / file) != _meaning(repository.path / file):
                raise SourceError(f"{label}: has another {file} than was merged; expected the same settings")
        sources[role] |= {"label": name, "revision": repository.commit}
    return sources


def _meaning(config: Path) -> Any:
    """What a config says, but for where its model came from."""
    said = read_object(config) if config.is_file() else {}
    return {key: value for key, value in said.items() if key not in (*_NAMES, "base_model_name_or_path", "revision")}


def _unnamed(recipe: str) -> Iterator[str]:
    """What others cannot read of a portable recipe."""
    for holder, role in source_holders(read_yaml(recipe).value["sources"]):
        source = holder[role]
        named = source if isinstance(source, str) else next(iter(source.values()))
        if str(named).startswith("./"):
            yield (
                f"sources.{role} is a folder of this machine, so others cannot run the recipe: publish it, then say "
                f"--source {role}=org/name"
            )


# Contents


def _rewritten(
    folder: Path, files: Mapping[str, Path], provenance: dict[str, Any], stored: str, fresh: bool
) -> Iterator[tuple[str, bytes]]:
    """Files that may need other content to be published."""
    plan = read_record(folder / PLAN_FILE)
    here = fresh or "./" in stored or (plan["recipe"].get("output") or {}).get("path")
    if here or not all(source.get("revision") for source in provenance["sources"].values()):
        yield RECIPE_FILE, provenance["recipe"].encode()
        plan["recipe"] = read_yaml(portable(write_yaml(plan["recipe"]), provenance["sources"])).value
        yield PLAN_FILE, json_text(plan).encode()
        written = documents(plan, scores_in(folder), provenance, folder)  # from what lies beside them, as always
        yield from ((name, text.encode()) for name, text in written.items())
    if CONFIG_FILE in files:
        yield CONFIG_FILE, _adapter_config(folder, provenance["sources"])
    for name in files:
        if name.endswith("config.json") and name != CONFIG_FILE:
            yield name, _without_names(folder / name)


def _adapter_config(folder: Path, sources: Mapping[str, Mapping[str, Any]]) -> bytes:
    """adapter_config.json on a model that others can find."""
    content = content_of(folder / CONFIG_FILE, MAX_BYTES)
    config = json.loads(content)
    named = str(config.get("base_model_name_or_path") or "")
    if config.get("revision") and is_id(named):
        return content
    below = next((s for s in (sources.get("aligned"), sources.get("base")) if s and s.get("kind") == "model"), {})
    if not below.get("revision"):
        raise PlanError(
            f"{folder / CONFIG_FILE}: the adapter lies on a folder of this machine, {Path(named).name}, where nobody "
            "finds it; say --source aligned=org/name, what that model is on the hub"
        )
    config |= {"base_model_name_or_path": below["label"], "revision": below["revision"]}
    return (json.dumps(config, indent=2) + "\n").encode()


def _without_names(path: Path) -> bytes:
    """A config without the path that its model was loaded from, if that is one of this machine."""
    content = content_of(path, MAX_BYTES)
    for key in _NAMES:
        pattern = rb'("' + key.encode() + rb'"\s*:\s*)"((?:[^"\\]|\\.)*)"'
        content = re.sub(pattern, lambda m: m[0] if not is_here(m[2]) else m[1] + b'""', content)
    return content


def _manifest(
    record: Mapping[str, Any], sources: Mapping[str, Any], contents: Mapping[str, bytes], kept: set[str]
) -> bytes:
    """The manifest of what is sent."""
    outputs = [entry for entry in record["outputs"] if entry["file"] in kept]
    for entry in outputs:
        if (content := contents.get(entry["file"])) is not None:
            entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for entry in record["inputs"]:
        labels = [sources[role]["label"] for role in entry["roles"] if role in sources]
        entry["source"] = labels[0] if labels else entry["source"]
    more: dict[str, Any] = {"rendered": versions()["safemerge-recipes"]} if REPORT_FILE in contents else {}
    if out := sorted({entry["file"] for entry in record["outputs"]} - kept):
        more[LEFT_OUT] = out
    return sealed({**record, "outputs": outputs, "sources": sources, **more}, FORMAT).encode()


def signed(parcel: Parcel, folder: Path, private_key: Path) -> Parcel:
    """The same with a signature over what is sent.

    Raises:
        PlanError: model-signing is not installed, or no folder can be made beside the output.
        CheckError: the key cannot be used.
    """
    from safemerge_recipes.signing import sign

    try:
        with _beside(folder, set(parcel.files)) as place:
            for name, held in parcel.files.items():
                path = place / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(held, bytes):
                    write_file(path, held, durable=False)
                else:
                    os.link(held, path)
            signature = content_of(sign(place, private_key), MAX_BYTES)
    except OSError as error:
        raise PlanError(f"{folder}: cannot be signed: {error.strerror}; expected to write beside it") from None
    notes = tuple(note for note in parcel.notes if not note.startswith(SIGNATURE_FILE))
    return replace(parcel, files={**parcel.files, SIGNATURE_FILE: signature}, notes=notes)


@contextmanager
def _beside(folder: Path, names: set[str]) -> Iterator[Path]:
    """A folder beside an output for links to its files; what a killed run left of it is removed.

    Raises:
        PlanError: something else lies there.
    """
    place = folder.absolute().with_name(f".{folder.name[:50]}.safemerge-signing")
    if place.is_symlink() or place.exists():
        found = {path.relative_to(place).as_posix() for path in place.rglob("*") if not path.is_dir()}
        if place.is_symlink() or not place.is_dir() or not all(_ours(name, names) for name in found):
            raise PlanError(f"{place}: is in the way and holds what safemerge did not put there; move it away")
        shutil.rmtree(place)
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _ours(name: str, names: set[str]) -> bool:
    return name in names or name == SIGNATURE_FILE or Path(name).suffix == ".tmp"
