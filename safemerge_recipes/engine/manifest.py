"""The manifest: what went into an output and what came out, by sha256; written last, so its presence says done.

Beside the files it names every tensor with its result key and the digest of its bytes, which lets a later
run reuse what stays the same and lets `verify` say which tensor a damaged byte belongs to.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safemerge_recipes._version import __version__
from safemerge_recipes.engine.folder import DOCUMENTS, LOCK_FILE, MANIFEST_FILE, PARTS, SIGNATURE_FILE
from safemerge_recipes.engine.journal import JOURNAL_FILE, Entries
from safemerge_recipes.errors import CheckError, SourceError
from safemerge_recipes.storage.digests import InputDigest
from safemerge_recipes.storage.files import MAX_BYTES, content_of, reading, remove_left, write_file
from safemerge_recipes.storage.identity import FileIdentity
from safemerge_recipes.storage.safetensors import check_values
from safemerge_recipes.weights import compiled

FORMAT = 2
_BLANK = "0" * 64
_OPENING = re.compile(rb'\{\n "format": (\d{1,9}),\n "digest": "([0-9a-f]{64})",\n')
"""How a manifest begins. Its digest is the sha256 of the whole file with zeros in the digest's place."""
LEFT_OUT = "left_out"
"""Key of a manifest: the files that an output had and that were left out when it was published."""
MAX_VALUES = 4_000_000
"""Most values a manifest, plan or scores may hold."""
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file's size in bytes and its sha256.

    Attributes:
        next: What it may be as well, while it is being replaced; see `replace_files`.
        new: It may be missing, while it is being added.
    """

    size: int
    sha256: str
    next: Stamp | None = None
    new: bool = False


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest as read back. `inputs` maps (role, file name) to its stamp, `outputs` a relative path."""

    engine: int
    inputs: Mapping[tuple[str, str], Stamp]
    outputs: Mapping[str, Stamp]
    tensors: Entries


def sha256_of(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with reading(path) as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def output_files(folder: Path) -> dict[str, Path]:
    """Every file of an output by its relative path, but the lock, the journal, the manifest and its signature."""
    left_out = (LOCK_FILE, JOURNAL_FILE, MANIFEST_FILE, SIGNATURE_FILE)
    found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_symlink() or not p.is_dir()}
    return {n: path for n, path in found.items() if n not in left_out and not n.startswith(f"{PARTS}/")}


def make_manifest(
    *,
    engine: int,
    workers: int,
    identities: Iterable[FileIdentity],
    labels: Mapping[str, tuple[Sequence[str], str]],
    inputs: Mapping[str, InputDigest],
    folder: Path,
    sealed: Mapping[str, str],
    timings: Mapping[str, float],
    tensors: Entries,
    away: Mapping[str, int],
) -> dict[str, Any]:
    """The manifest of the finished files in `folder`.

    Args:
        engine: version of the arithmetic.
        workers: number of threads that took part.
        identities: the input files.
        labels: input path -> (its roles, the source's name).
        inputs: input path -> its digest, and whether this run or an earlier one read the file for it.
        folder: where the output lies.
        sealed: output file -> sha256, where it is already known.
        timings: seconds by phase.
        tensors: tensor -> (result key, digest of its bytes).
        away: bytes of the sealed files that do not lie in the folder, but where it is going.
    """
    sizes = {name: path.stat().st_size for name, path in output_files(folder).items()} | dict(away)
    return {
        "engine": engine,
        "versions": versions(),
        "machine": {"system": platform.system(), "machine": platform.machine(), "workers": workers},
        "inputs": [
            {
                "roles": list(labels[one.path][0]),
                "source": labels[one.path][1],
                "file": Path(one.path).name,
                "size": one.size,
                "sha256": inputs[one.path].sha256,
                "hashed": inputs[one.path].when,
            }
            for one in identities
        ],
        "outputs": [
            {"file": name, "size": size, "sha256": sealed.get(name) or sha256_of(folder / name)}
            for name, size in sorted(sizes.items())
        ],
        "timings": {name: round(seconds, 3) for name, seconds in timings.items()},
        "tensors": {name: list(entry) for name, entry in tensors.items()},
    }


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an output. Raises CheckError when it is missing or not sound."""
    path = folder / MANIFEST_FILE
    value = manifest_record(folder)
    try:
        outputs = {_relative(entry["file"]): _stamp(entry) for entry in _list(value["outputs"])}
        inputs = {
            (_text(role), _text(entry["file"])): _stamp(entry)
            for entry in _list(value["inputs"])
            for role in _list(entry["roles"])
        }
        tensors: Entries = {}
        for name, entry in value["tensors"].items():
            key, digest = _list(entry)
            tensors[name] = _text(key), _text(digest)
        engine = value["engine"]
        if type(engine) is not int:
            raise ValueError(f"engine {str(engine)[:40]}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckError(
            f"{path}: not a manifest of this program ({type(error).__name__}: {str(error)[:200]}); "
            "expected it as it was written, run the recipe again"
        ) from None
    return Manifest(engine, inputs, outputs, tensors)


def replace_files(folder: Path, contents: Mapping[str, bytes | str]) -> None:
    """Replaces or adds small files of a finished output, so that its manifest is right at every moment.

    The manifest first allows old and new, then the files are replaced one by one, then it allows the new alone. A
    run that is cut short in between leaves a sound output; the next one finishes it.

    Raises:
        CheckError: something that is no file lies where one goes; nothing is changed.
    """
    value = manifest_record(folder)
    for name in contents:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise CheckError(f"{folder / name}: is a folder; expected a file of this output or nothing, move it")
    remove_left(folder, DOCUMENTS)
    data = {name: text.encode() if isinstance(text, str) else text for name, text in contents.items()}
    fresh = {name: {"size": len(one), "sha256": hashlib.sha256(one).hexdigest()} for name, one in data.items()}
    found = {entry["file"]: entry for entry in value["outputs"]}
    between, final = dict(found), dict(found)
    for name, stamp in fresh.items():
        there = folder / name
        old = (
            {"size": there.stat().st_size, "sha256": sha256_of(there)}
            if there.is_file() and not there.is_symlink()
            else None
        )
        final[name] = {"file": name, **stamp}
        between[name] = {"file": name, **stamp, "new": True} if old is None else {"file": name, **old, "next": stamp}
    for outputs in (between, final):
        entries = [outputs[name] for name in sorted(outputs)]
        write_manifest(folder, value | {"outputs": entries, "rendered": __version__})
        if outputs is between:
            for name, one in data.items():
                write_file(folder / name, one)


def write_manifest(folder: Path, value: Mapping[str, Any]) -> None:
    """Writes an output's manifest with a digest of itself, so that no byte of it can change unseen."""
    write_file(folder / MANIFEST_FILE, sealed(value, FORMAT))


def sealed(value: Mapping[str, Any], form: int) -> str:
    """JSON that begins with its format and a digest of itself; see `seal_of`."""
    rest = {key: part for key, part in value.items() if key not in ("format", "digest")}
    content = {"format": form, "digest": _BLANK, **rest}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.replace(_BLANK, hashlib.sha256(text.encode()).hexdigest(), 1)


def seal_of(content: bytes) -> tuple[int, bool] | None:
    """(format, whether the digest of itself is right) of what `sealed` wrote; None for anything else."""
    opening = _OPENING.match(content)
    if opening is None:
        return None
    blank = content[: opening.start(2)] + _BLANK.encode() + content[opening.end(2) :]
    return int(opening[1]), hashlib.sha256(blank).hexdigest().encode() == opening[2]


def manifest_record(folder: Path) -> dict[str, Any]:
    """The JSON object of an output's manifest.

    Raises:
        CheckError: it is missing, of another format, or not as it was written: its digest of itself tells.
    """
    path = folder / MANIFEST_FILE
    content = _content(path)
    seal = seal_of(content)
    if seal is None or seal[0] != FORMAT:
        found = f"format {seal[0]}" if seal else "another beginning"
        raise CheckError(
            f"{path}: not a manifest of this program (found {found}, expected format {FORMAT}); "
            "run the recipe again, with --force if an earlier version wrote it"
        )
    if not seal[1]:
        raise CheckError(f"{path}: changed since it was written (its digest of itself differs); get the output again")
    return object_of(path, content)


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object of a plan or scores. Raises CheckError when it is missing or not sound."""
    return object_of(path, _content(path))


def _content(path: Path) -> bytes:
    try:
        return content_of(path, MAX_BYTES)
    except SourceError as error:
        raise CheckError(str(error)) from None
    except OSError as error:
        raise CheckError(f"{path}: {error.strerror}; expected the folder of a finished run") from None


def object_of(path: Path, content: bytes) -> dict[str, Any]:
    """The JSON object that a file holds. Raises CheckError when it holds none."""
    try:
        check_values(content, MAX_VALUES)
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckError(f"{path}: not JSON: {str(error)[:200]}; expected it as it was written") from None
    if not isinstance(value, dict):
        raise CheckError(f"{path}: holds a {type(value).__name__}; expected a JSON object")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:40]} is no list")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]} is no text")
    return value


def _relative(value: Any) -> str:
    path = PurePosixPath(_text(value))
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in value or not value.isprintable():
        raise ValueError(f"{value[:80]!r} is no file of this folder")
    return str(path)


def _stamp(entry: Any) -> Stamp:
    size, digest = entry["size"], entry["sha256"]
    if type(size) is not int or size < 0 or not re.fullmatch(r"[0-9a-f]{64}", _text(digest)):
        raise ValueError("a size or sha256 is impossible")
    following = entry.get("next")
    return Stamp(size, digest, None if following is None else _stamp(following), bool(entry.get("new", False)))


def versions() -> dict[str, str]:
    """Versions of everything that takes part in the arithmetic."""
    from importlib.metadata import version

    found = {"safemerge-recipes": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "safetensors", "xxhash", "huggingface_hub"):
        found[name] = version(name)
    found["native"] = str(compiled.VERSION) if compiled.LIBRARY is not None else "not built"
    return found
