"""The output's files: which tensor lies where. Only arithmetic on names, shapes and sizes; writes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from safemerge_recipes.storage.dtypes import DTYPES
from safemerge_recipes.storage.safetensors import header_bytes

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one output tensor: `nbytes` bytes at `offset` from the start of file `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All files of the output: names, opening bytes, sizes in bytes, and every tensor's slot in order."""

    files: tuple[str, ...]
    headers: tuple[bytes, ...]
    sizes: tuple[int, ...]
    slots: Mapping[str, Slot]

    def alone(self, shard: int) -> Layout:
        """One file of it, as a layout of its own."""
        slots = {name: replace(slot, shard=0) for name, slot in self.slots.items() if slot.shard == shard}
        return Layout((self.files[shard],), (self.headers[shard],), (self.sizes[shard],), slots)

    def index(self) -> dict[str, Any] | None:
        """The content of the index file, or None where one file holds everything."""
        if self.files == (SINGLE_FILE,):
            return None
        total = sum(slot.nbytes for slot in self.slots.values())
        weight_map = {name: self.files[slot.shard] for name, slot in sorted(self.slots.items())}
        return {"metadata": {"total_size": total}, "weight_map": weight_map}

    def index_bytes(self) -> bytes | None:
        """The index file as it is written."""
        index = self.index()
        return None if index is None else (json.dumps(index, indent=2) + "\n").encode()


def nbytes_of(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor."""
    bits = DTYPES[dtype].bits
    for size in shape:
        bits *= size
    return bits // 8


def _groups(tensors: Mapping[str, tuple[str, tuple[int, ...], str]], limit: int) -> list[tuple[str | None, list[str]]]:
    """(file name or None, tensor names): the aligned model's own files where they fit, else filled in order."""
    by_file: dict[str, list[str]] = {}
    for name, (_, _, file) in tensors.items():
        by_file.setdefault(os.path.basename(file), []).append(name)
    size = {name: nbytes_of(dtype, shape) for name, (dtype, shape, _) in tensors.items()}
    if all(sum(size[name] for name in names) <= limit for names in by_file.values()):
        return list(by_file.items())
    groups: list[tuple[str | None, list[str]]] = []
    room = 0
    for name in tensors:
        if not groups or size[name] > room:
            groups.append((None, []))
            room = limit
        groups[-1][1].append(name)
        room -= size[name]
    return groups


def lay_out(tensors: Mapping[str, tuple[str, tuple[int, ...], str]], limit: int) -> Layout:
    """The layout of an output.

    Args:
        tensors: name -> (dtype, shape, aligned file), in checkpoint order.
        limit: largest shard in bytes; a single tensor may exceed it.
    """
    groups = _groups(tensors, limit)
    files, headers, sizes, slots = [], [], [], {}
    for number, (file, names) in enumerate(groups):
        if len(groups) == 1:
            file = SINGLE_FILE
        elif file is None:
            file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        at, entries = 0, {}
        for name in names:
            dtype, shape, _ = tensors[name]
            nbytes = nbytes_of(dtype, shape)
            entries[name] = (dtype, shape, at, at + nbytes)
            at += nbytes
        header = header_bytes(entries)
        for name, (dtype, shape, begin, end) in entries.items():
            slots[name] = Slot(name, dtype, shape, number, len(header) + begin, end - begin)
        files.append(file)
        headers.append(header)
        sizes.append(len(header) + at)
    ordered = {name: slots[name] for name in tensors}
    return Layout(tuple(files), tuple(headers), tuple(sizes), ordered)
