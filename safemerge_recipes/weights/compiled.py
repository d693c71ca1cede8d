"""The compiled merge kernels (native/merge.c): their structures, and the library where it was built.

Calls release the interpreter's lock. Without the library, or with one that is older than this file, `LIBRARY` is
None and torch does the work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_uint32, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

VERSION = 6
"""What `sm_version` must say; changes with every structure, signature and result."""
STRIP = 1024
"""Elements merged at a time where no weight has a product."""
ROWS, PANEL = 3, 1 << 15
"""Where one has: so many rows, as often as they fit into so many elements, and once more."""
TILE = 32
"""Columns of a tile of a right factor."""
DTYPES = {"F32": 0, "F16": 1, "BF16": 2}
"""safetensors dtype -> its number there."""
SUM, BLEND, TIES, DARE_LINEAR, DARE_TIES = range(5)
E4M3, INT8, E2M1, TABLE8, TABLE4 = range(5)
KEEP_ALL, KEEP_NONE, KEEP_LARGEST = range(3)


class Term(Structure):
    """coefficient · data: a stored tensor's piece."""

    _fields_ = (("data", c_void_p), ("coefficient", c_float), ("dtype", c_int32))


class Sum(Structure):
    """The terms' sum, and left `(rows, rank)` @ right `(rank, columns)`, float32, where rank > 0; right as `tiled`."""

    _fields_ = (
        ("terms", POINTER(Term)), ("count", c_int64),
        ("left", c_void_p), ("right", c_void_p), ("rank", c_int64), ("columns", c_int64),
    )  # fmt: skip


class Trim(Structure):
    """What trimming keeps: `threshold` and how many of those at it, all of them if negative."""

    _fields_ = (("ties", c_int64), ("threshold", c_float), ("kind", c_int32))


class Draw(Structure):
    """DARE's choice: the key's halves, and how many of 65536 draws keep an element."""

    _fields_ = (("first", c_uint32), ("second", c_uint32), ("limit", c_uint32))


class Consensus(Structure):
    """TIES' election; `total` is the sum of two weights, where it takes the short way for a pair."""

    _fields_ = (("total", c_float), ("scale", c_float), ("normalize", c_int32), ("pair", c_int32))


class Merge(Structure):
    """One tensor's merge: origin + method(sides), stored as `dtype`; arrays have an entry a side, draws one a pair."""

    _fields_ = (
        ("sides", POINTER(Sum)), ("count", c_int64), ("origin", Sum), ("method", c_int32), ("dtype", c_int32),
        ("shares", POINTER(c_float)), ("trims", POINTER(Trim)), ("draws", POINTER(Draw)), ("scales", POINTER(c_float)),
        ("consensus", Consensus),
    )  # fmt: skip


class Coded(Structure):
    """Rows of codes and the scales of their blocks, `(…, scale_columns)` float32; `table` where a code needs one."""

    _fields_ = (
        ("codes", c_void_p), ("scales", c_void_p), ("table", c_void_p), ("row_bytes", c_int64),
        ("scale_columns", c_int64), ("block_rows", c_int64), ("block_columns", c_int64), ("kind", c_int32),
    )  # fmt: skip


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    merge, pointer = POINTER(Merge), c_void_p
    for name, arguments in {
        "sm_merge": (merge, c_int64, c_int64, pointer, pointer, POINTER(c_int64)),
        "sm_evaluate": (POINTER(Sum), c_int64, pointer),
        "sm_dots": (merge, c_int64, POINTER(c_double), pointer),
        "sm_sizes": (merge, c_int64, c_int64, POINTER(c_double), pointer),
        "sm_look": (merge, c_int32, c_int64, c_int64, pointer, pointer),
        "sm_dequantise": (POINTER(Coded), c_int64, c_int64, c_int64, c_int64, pointer),
        "sm_to_e4m3": (POINTER(Coded), c_int64, c_int64, c_int64, pointer, pointer),
        "sm_count": (merge, c_int32, c_int64, c_float, c_float, POINTER(c_int64), pointer, pointer),
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int64 if name == "sm_look" else None
    return library


def terms(stored: Sequence[tuple[float, str, int]]) -> ctypes.Array[Term]:
    """Terms from (coefficient, safetensors dtype, address of the piece)."""
    found = (Term * len(stored))()
    for term, (coefficient, dtype, address) in zip(found, stored, strict=True):
        term.coefficient, term.dtype, term.data = coefficient, DTYPES[dtype], address
    return found


def strip(columns: int | None) -> int:
    """Elements merged at a time, as `sm_strip` has it, where a weight has a product of so many columns, or none has."""
    return STRIP if columns is None else (1 + PANEL // (ROWS * columns)) * ROWS * columns


def strips(sides: int) -> int:
    """Strips of scratch memory that a merge of so many sides takes: theirs, the origin's, two of an election."""
    return max(sides, 1) + 3


def tiled(right: np.ndarray) -> np.ndarray:
    """A right factor `(rank, columns)` as float32 tiles `(tiles, rank, TILE)`, the last one padded with zeros."""
    import numpy as np

    rank, columns = right.shape
    padded = np.zeros((rank, -(-columns // TILE) * TILE), np.float32)
    with np.errstate(over="ignore"):  # what does not fit float32 is refused where it is merged
        padded[:, :columns] = right
    return np.ascontiguousarray(padded.reshape(rank, -1, TILE).swapaxes(0, 1))


def load(name: str) -> ctypes.CDLL | None:
    """A library of this package by name, or None where it was not built or belongs to another version."""
    try:
        library = ctypes.CDLL(str(Path(__file__).with_name(f"{name}.so")))
        fits = (library.sm_version(), library.sm_size()) == (VERSION, ctypes.sizeof(Merge) + ctypes.sizeof(Coded))
    except (OSError, AttributeError):
        return None
    return _declared(library) if fits else None


def _best() -> ctypes.CDLL | None:
    """The one that serves this machine best, if any does better than torch."""
    plain = load("_merge")
    if plain is None:
        return None
    return (plain, load("_merge_v3"), None)[plain.sm_best()]


LIBRARY = _best()
