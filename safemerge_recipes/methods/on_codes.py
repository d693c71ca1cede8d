"""A task's bytes as FP8 codes, or their scales: values come in float32 pieces, as another task would write them.

A block's scale is its largest magnitude over 448, the largest number of FP8 (e4m3), so that codes that are read and
written again are the same; where scales are powers of two (ue8m0), the next one above. All scales are known before the
first code, so codes take two passes over the sources.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from safemerge_recipes.methods.work import Requantise
from safemerge_recipes.weights import compiled
from safemerge_recipes.weights.quantised import POWERS, Quantised

if TYPE_CHECKING:
    import numpy as np

LARGEST = 448.0
"""The largest number of FP8 (e4m3)."""

Values = Callable[[], Iterator[memoryview]]
"""A fresh pass over the float32 values, in pieces."""


def requantised(work: Requantise, values: Values) -> Iterator[memoryview]:
    """The bytes of the codes, or of the scales, piece by piece."""
    import numpy as np

    scales = _scales(work.form, values)
    scales = _power_above(scales) if work.powers else scales
    stored = _as_stored(scales, work.form.scales.dtype)
    if work.part == "scales":
        yield memoryview(np.ascontiguousarray(stored).view(np.uint8).reshape(-1))  # type: ignore[arg-type]  # buffer
        return
    scales = _as_float(stored, work.form.scales.dtype).reshape(scales.shape)
    for row, rows in _rows(work.form, values):
        yield memoryview(_codes(work.form, rows, row, scales).reshape(-1))  # type: ignore[arg-type]  # a buffer


def _rows(form: Quantised, values: Values) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of the values as one tall matrix; a piece never goes beyond a matrix of the stack."""
    import numpy as np

    height, width = form.stored_shape[-2:]
    row, left = 0, np.empty(0, np.float32)
    for piece in values():
        found = np.frombuffer(piece, np.float32)
        if len(left):
            found = np.concatenate([left, found])
        whole = len(found) // width * width
        left = found[whole:].copy()
        rows = found[:whole].reshape(-1, width)
        while len(rows):
            count = min(len(rows), height - row % height)
            yield row, rows[:count]
            rows, row = rows[count:], row + count


def _scales(form: Quantised, values: Values) -> np.ndarray:
    """Scales in float32, `(matrices, rows, columns)` of blocks; 1 for blocks of zeros."""
    import numpy as np

    height, width = form.stored_shape[-2:]
    found = np.zeros((math.prod(form.stored_shape[:-2]), *form.grid), np.float32)
    starts = np.arange(0, width, form.block[1])
    for row, rows in _rows(form, values):
        most = np.maximum.reduceat(np.abs(rows), starts, axis=1)
        at = (row % height + np.arange(len(rows))) // form.block[0]
        firsts = np.flatnonzero(np.diff(at, prepend=-1))
        into = found[row // height]
        into[at[firsts]] = np.maximum(into[at[firsts]], np.maximum.reduceat(most, firsts, axis=0))
    return np.where(found > 0, found / np.float32(LARGEST), np.float32(1)).astype(np.float32)


def _power_above(scales: np.ndarray) -> np.ndarray:
    """The least powers of two that are no smaller."""
    import numpy as np

    mantissas, exponents = np.frexp(scales)
    return np.ldexp(np.float32(1), np.maximum(exponents - (mantissas == 0.5), -126)).astype(np.float32)


def _as_stored(scales: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 scales in the dtype that they are stored in."""
    import numpy as np

    if dtype in POWERS:  # the exponent alone
        return (np.ascontiguousarray(scales).view(np.uint32) >> 23).astype(np.uint8)
    if dtype != "BF16":
        return scales.astype({"F32": "<f4", "F16": "<f2"}[dtype])
    bits = np.ascontiguousarray(scales).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def _as_float(stored: np.ndarray, dtype: str) -> np.ndarray:
    import numpy as np

    if dtype in POWERS:
        return (stored.astype(np.uint32) << 23).view(np.float32)
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def _codes(form: Quantised, rows: np.ndarray, row: int, scales: np.ndarray) -> np.ndarray:
    """Codes `(rows, columns)`: value / scale, to the nearest."""
    import numpy as np

    matrix, first = divmod(row, form.stored_shape[-2])
    own = np.ascontiguousarray(scales[matrix])
    if compiled.LIBRARY is not None:
        values, out = np.ascontiguousarray(rows), np.empty(rows.shape, np.uint8)
        coded = compiled.Coded(None, own.ctypes.data, None, 0, own.shape[1], *form.block, compiled.E4M3)
        compiled.LIBRARY.sm_to_e4m3(
            ctypes.byref(coded), first, len(rows), rows.shape[1], values.ctypes.data, out.ctypes.data
        )
        return out
    import torch

    at = np.arange(first, first + len(rows)) // form.block[0], np.arange(rows.shape[1]) // form.block[1]
    numbers = torch.from_numpy(rows / own[at[0]][:, at[1]]).clamp_(-LARGEST, LARGEST)
    return numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
