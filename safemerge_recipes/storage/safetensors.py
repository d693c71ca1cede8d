"""Safetensors headers: where each tensor's bytes lie. Reads no tensor data and needs no torch.

The format (github.com/huggingface/safetensors): an unsigned 64-bit little-endian length N, N bytes of
JSON, then the data. Offsets in the JSON count from the start of the data; `TensorRef.offset` counts from
the start of the file. Everything a stranger's file may get wrong is checked here, before any byte is used.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import SourceError
from safemerge_recipes.storage.dtypes import DTYPES
from safemerge_recipes.storage.files import reading
from safemerge_recipes.storage.identity import FileIdentity
from safemerge_recipes.storage.remote import is_url

MAX_HEADER_BYTES = 16_000_000
"""Largest header accepted, in bytes: about 100 000 tensors a file, ten times what is found in the wild."""

_OTHER = (
    (b"version ", "it is a pointer of Git LFS, not the file; run `git lfs pull` in its folder"),
    (b"<!doctyp", "it is a web page, not the file that was asked for"),
    (b"<html", "it is a web page, not the file that was asked for"),
    (b"pk\x03\x04", "it is an archive or a pickle of torch.save, which is never loaded"),
    (b"gguf", "it is a GGUF file, for llama.cpp; use the model that it was made from"),
)
"""What else begins files of that name, in lower case, and what to tell."""

MAX_FILE_BYTES = 400_000_000_000
"""Largest weight file accepted, in bytes; those in the wild stay below 150 GB, and what is read is hashed."""
MAX_NAME = 500
"""Longest tensor name accepted, in characters; those in the wild stay below 200."""
MAX_DIMENSION = 2**40
"""Largest dimension of a tensor accepted, be the tensor empty or not."""
MAX_VALUES = 1_500_000
"""Most arrays, objects and keys a header or JSON file may hold: what its parsed form costs is bounded by them."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """The place of one stored tensor: `nbytes` bytes at `offset` (from the start of the file) of `path`."""

    path: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    def __hash__(self) -> int:
        """Of where it lies, which tells nearly all apart: planning asks often."""
        return hash((self.path, self.offset))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """First dimension of the tensor seen as a matrix `(rows, columns)`: all dimensions but the last."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Last dimension, or 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    def part(self, first: int, count: int | None = None) -> TensorRef:
        """Entries [first, first + count) of the first dimension; the single entry, one dimension less, if None."""
        each = self.nbytes // self.shape[0]
        shape = self.shape[1:] if count is None else (count, *self.shape[1:])
        return replace(self, offset=self.offset + first * each, nbytes=each * (count or 1), shape=shape)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:200]!r} stands there twice")
    return found


def check_values(text: bytes, limit: int | None = None) -> None:
    """Raises ValueError for JSON whose parsed form would be many times larger than its text."""
    limit = MAX_VALUES if limit is None else limit
    if sum(map(text.count, (b"[", b"{", b":"))) > limit:
        raise ValueError(f"it holds more than {limit} values")


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _ref(path: str, start: int, name: str, entry: object) -> TensorRef:
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise ValueError(f"{name[:80]!r} is no name; expected up to {MAX_NAME} printable characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} must hold exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(_natural(n) and n <= MAX_DIMENSION for n in shape):
        raise ValueError(f"{name!r} has an impossible shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise ValueError(f"{name!r} has impossible offsets")
    nbytes = offsets[1] - offsets[0]
    if nbytes * 8 != math.prod(shape) * DTYPES[dtype].bits:
        raise ValueError(f"{name!r} of shape {shape} and dtype {dtype} does not take {nbytes} bytes")
    return TensorRef(path, start + offsets[0], nbytes, dtype, tuple(shape))


def _check_coverage(refs: Mapping[str, TensorRef], start: int, size: int) -> None:
    end, last = start, "the header"
    for name, ref in sorted(refs.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if ref.offset != end:
            what = "overlap" if ref.offset < end else "leave a gap"
            raise ValueError(f"{last} and {name!r} {what} at byte {ref.offset}")
        end, last = ref.offset + ref.nbytes, repr(name)
    if end != size:
        state = "truncated" if size < end else "followed by bytes that belong to no tensor"
        raise ValueError(f"the file has {size} bytes where its header needs {end}: it is {state}")


def _check_size(found: os.stat_result) -> None:
    """Refuses a file that would be read for hours: one too large, or one that is a hole but for a few bytes."""
    stored = getattr(found, "st_blocks", 0) * 512  # 0: a file system that does not say
    if found.st_size > MAX_FILE_BYTES:
        raise ValueError(f"it has {found.st_size} bytes, the limit is {MAX_FILE_BYTES}")
    if found.st_size > 1_000_000_000 and 0 < stored < found.st_size // 1000:
        raise ValueError(f"it has {found.st_size} bytes, of which only {stored} are on the disk: the rest is a hole")


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of one safetensors file says, and the file that said it.

    Attributes:
        tensors: every tensor by name, in the order of the bytes.
        metadata: the texts that the header also holds.
        identity: by which the file is known again.
    """

    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str]
    identity: FileIdentity


def read_header(path: Path | str, whole: int | None = None) -> Mapping[str, TensorRef]:
    """Every tensor of one safetensors file, by name, in the order of the bytes.

    Raises:
        SourceError: as `open_header`.
    """
    return open_header(path, whole).tensors


def open_header(path: Path | str, whole: int | None = None) -> Header:
    """The header of one safetensors file; the file is opened once.

    Args:
        path: the file.
        whole: its bytes, where only its beginning lies at `path`.

    Raises:
        SourceError: the file is missing, is not safetensors, or its header and size disagree.
    """
    path = str(path)
    try:
        with reading(path) as file:
            if not is_url(path):
                _check_size(os.fstat(file.fileno()))
            prefix = file.read(8)
            size = file.seek(0, 2) if whole is None else whole
            if len(prefix) < 8:
                raise ValueError(f"it has only {len(prefix)} bytes")
            (length,) = struct.unpack("<Q", prefix)
            if other := next((told for start, told in _OTHER if prefix.lower().startswith(start)), None):
                raise ValueError(other)
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(
                    f"its header claims {length} bytes; the file has {size}, the limit is {MAX_HEADER_BYTES}"
                )
            file.seek(8)
            text = file.read(length)
            identity = FileIdentity.of_object(path) if is_url(path) else FileIdentity.of_open(path, file.fileno())
        check_values(text)
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        metadata = header.pop("__metadata__", None)
        texts = metadata if isinstance(metadata, dict) else {}
        refs = {name: _ref(path, 8 + length, name, entry) for name, entry in header.items()}
        _check_coverage(refs, 8 + length, size)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}; check the path and its permissions") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise SourceError(
            f"{path}: not a sound safetensors file: {str(error)[:900]}; "
            "expected an intact file, download or save it again"
        ) from None
    ordered = dict(sorted(refs.items(), key=lambda item: item[1].offset))
    return Header(ordered, {key: value for key, value in texts.items() if isinstance(value, str)}, identity)


def header_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The opening bytes of a safetensors file, length prefix included, padded to a multiple of 8.

    Args:
        tensors: name -> (dtype, shape, begin, end); begin and end in bytes from the start of the data.
        metadata: texts by name that the header also holds.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    for name, (dtype, shape, begin, end) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
