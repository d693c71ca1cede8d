"""An output's files against its manifest: which are there, their sizes, and every byte of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from safemerge_recipes.engine.manifest import Manifest, output_files
from safemerge_recipes.errors import SourceError
from safemerge_recipes.events import BytesDone, Listener
from safemerge_recipes.storage.files import inside, reading
from safemerge_recipes.storage.safetensors import TensorRef, read_header

CHUNK = 1 << 20
"""Bytes hashed at once."""


PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
"""Endings of files that run code when they are loaded, or may."""


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    return inside(path.parent, path.name)


def file_problems(folder: Path, manifest: Manifest, on_event: Listener) -> Iterator[str]:
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
