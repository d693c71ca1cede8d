"""Small tensors that say how others are to be read."""

from __future__ import annotations

import struct

from safemerge_recipes.errors import SourceError
from safemerge_recipes.storage.files import reading
from safemerge_recipes.storage.safetensors import TensorRef

SMALL = 4096
"""Bytes of a tensor that says how others are read, at most."""


def floats_of(ref: TensorRef) -> tuple[float, ...]:
    """A small tensor of float32."""
    return struct.unpack(f"<{ref.numel}f", bytes_of(ref)) if ref.dtype == "F32" else ()


def bytes_of(ref: TensorRef) -> bytes:
    """A small tensor that says how others are to be read; nothing of a large one. Raises SourceError."""
    if ref.nbytes > SMALL:
        return b""
    try:
        with reading(ref.path) as file:
            file.seek(ref.offset)
            found: bytes = file.read(ref.nbytes)
    except OSError:
        found = b""
    if len(found) != ref.nbytes:
        raise SourceError(f"{ref.path}: byte {ref.offset} cannot be read; was the file changed?")
    return found
