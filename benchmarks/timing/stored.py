"""Writing checkpoints piece by piece: safetensors headers, shards, index, tokenizer. Knows no values."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safemerge_recipes.storage import safetensors

ITEM_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes go: file and absolute offset in bytes."""

    path: Path
    offset: int


def lay_out(
    folder: Path, tensors: dict[str, tuple[int, ...]], dtype: str, shard_bytes: int | None = None,
    stem: str = "model", others: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Place]:  # fmt: skip
    """Create the files of a checkpoint, headers and index written, data still holes; return every place.

    The files have their final size from the start, so a checkpoint that is never filled costs no disk. `others` has
    the tensors of another dtype.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtypes = {name: others.get(name, dtype) for name in tensors}
    sizes = {name: prod(shape) * ITEM_BYTES[dtypes[name]] for name, shape in tensors.items()}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors.items():
        nbytes = sizes[name]
        if shard_bytes is not None and shards[-1] and filled + nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes

    places: dict[str, Place] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        part = "" if single else f"-{number:05}-of-{len(shards):05}"
        path = folder / f"{stem}{part}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shard.items():
            start, end = end, end + sizes[name]
            header[name] = {"dtype": dtypes[name], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        for name in shard:
            places[name] = Place(path, 8 + len(text) + header[name]["data_offsets"][0])
        total += end
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {n: p.path.name for n, p in places.items()}}
        write_json(folder / f"{stem}.safetensors.index.json", index)
    return places


class Files:
    """Open descriptors of the files being filled; `write` may be called from several threads."""

    def __init__(self, places: dict[str, Place]) -> None:
        self.places = places
        paths = sorted({place.path for place in places.values()})
        self.descriptors = {path: os.open(path, os.O_WRONLY) for path in paths}

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor, `offset` bytes after its start."""
        place = self.places[name]
        position = place.offset + offset
        while data:
            written = os.pwrite(self.descriptors[place.path], data, position)
            data, position = data[written:], position + written

    def close(self) -> None:
        """Close every file."""
        for descriptor in self.descriptors.values():
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer without merges: 256 bytes after three special tokens."""
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *_byte_characters()])}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": token, **plain} for i, token in enumerate(special)]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary,
        "merges": [],
    }  # fmt: skip
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": bytes_, "post_processor": None, "decoder": bytes_, "model": model,
    })  # fmt: skip
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>",
        "eos_token": "</s>", "pad_token": "<unk>", "model_max_length": 2048,
    })  # fmt: skip


def _byte_characters() -> list[str]:
    # Byte-level BPE shows printable bytes as themselves and moves the others up from U+0100.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(moved)) for byte in range(256)]


def allow_holes() -> None:
    """Has this process read checkpoints that are nothing but headers and holes, which the program refuses."""
    safetensors._check_size = lambda found: None
