"""The numbers of quantised weights, a piece at a time: read, and turned into float32 in one pass through the cache.

Compiled (`native/merge.c`) where it can be, else by tables in numpy; the bytes are the same, as a product is rounded
once. What is read piece by piece without anything else, `algebra.Stored` and `Quantised`, has one form here, `Pieces`,
so that the kernels and the gate need not know which of the two they have.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.cut import ranges
from safemerge_recipes.storage.dtypes import itemsize
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights import compiled
from safemerge_recipes.weights.algebra import Stored, Weight
from safemerge_recipes.weights.packed import Unpacker
from safemerge_recipes.weights.quantised import POWERS, UPPER_FIRST, Quantised, rounding, values

if TYPE_CHECKING:
    import numpy as np

FAST = {"e4m3": compiled.E4M3, "int8": compiled.INT8, "e2m1": compiled.E2M1}
"""Codes that the compiled kernel knows; all others go by table."""


def scales_of(operand: Quantised, reader: Reader) -> np.ndarray:
    """The scales of one matrix in float32, one behind the other."""
    import numpy as np

    ref, raw = operand.scales, reader.whole(operand.scales)
    if (own := operand.scale_codes) is not None:
        table, most = (reader.whole(one).view("<f4") for one in (own.table, own.absmax))
        found = table[raw] * most[np.arange(len(raw)) // own.block] + np.float32(own.offset)
    elif (over := operand.overall) is not None:
        found, number = values("e4m3")[raw], reader.whole(over.number).view("<f4")[0]
        with np.errstate(all="ignore"):  # what is not finite is refused where it is merged
            found = (found / number if over.divides else found * number).astype(np.float32)
    elif ref.dtype in POWERS:  # 255 is not a number
        found = np.ldexp(np.float32(1), raw.astype(np.int32) - 127).astype(np.float32)
        found[raw == 255] = np.nan
    elif ref.dtype == "BF16":
        found = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        found = raw.view(f"<f{itemsize(ref.dtype)}").astype(np.float32)
    return found if operand.divisor == 1 else (found / np.float32(operand.divisor)).astype(np.float32)


class Dequantiser:
    """Fills float32 pieces of whole rows with a quantised weight's values, or with the expected squares of its noise.

    Args:
        operand: the weight.
        reader: open files.
        arena: the worker's buffers; `slot` names this operand's.
        noise: rather give step² · scale² / 12 of each element.
    """

    def __init__(self, operand: Quantised, reader: Reader, arena: Arena, slot: str, noise: bool = False) -> None:
        self.operand, self.reader, self.arena, self.slot, self.noise = operand, reader, arena, slot, noise
        self.table = (rounding if noise else values)(operand.code)
        self._at = -1  # the matrix of the stack whose scales, and codes where it is turned, are at hand
        self._matrix = operand
        self._scales: np.ndarray | None = None
        self._codes: np.ndarray | None = None
        self._packed: Unpacker | None = None

    def _open(self, number: int) -> None:
        """Goes to a matrix of the stack."""
        import numpy as np

        if number == self._at:
            return
        stacked = len(self.operand.stored_shape) > 2
        flat = self.operand
        if stacked:
            *stack, rows, columns = flat.stored_shape
            flat = replace(flat, stored_shape=(math.prod(stack), rows, columns))
            flat = flat.member(number)
        self._matrix, self._at = flat, number
        scales = scales_of(flat, self.reader).reshape(flat.grid)
        self._scales = np.ascontiguousarray(np.square(scales) if self.noise else scales)
        if flat.turned:
            self._codes = self.arena.array(f"{self.slot}:matrix", flat.codes.nbytes, np.uint8)
            self.reader.read_bytes(flat.codes.path, flat.codes.offset, self._codes.data)
            if flat.code in UPPER_FIRST:
                self._codes[...] = self._codes << 4 | self._codes >> 4

    def fill(self, start: int, stop: int, out: np.ndarray) -> None:
        """Elements [start, stop) of the flattened weight, whole rows, into `out`."""
        *_, rows, columns = self.operand.shape
        first, last = start // columns, stop // columns
        if self.operand.packing is not None:
            self._unpacker().fill(first, last - first, out[: stop - start].reshape(-1, columns))
            return
        while first < last:
            number, row = divmod(first, rows)
            count = min(rows - row, last - first)
            self._open(number)
            at = first * columns - start
            part = out[at : at + count * columns].reshape(count, columns)
            if self.operand.turned:
                self._turned(row, count, part)
            else:
                self._rows(row, count, part)
            first += count

    def _unpacker(self) -> Unpacker:
        """The packed matrix, read at first use."""
        import numpy as np

        if self._packed is None:
            codes = self.arena.array(f"{self.slot}:matrix", self.operand.codes.nbytes, np.uint8)
            scales = scales_of(self.operand, self.reader)
            self._packed = Unpacker(self.operand, scales, self.table, self.reader, codes, self.noise)
        return self._packed

    def _rows(self, row: int, count: int, out: np.ndarray) -> None:
        import numpy as np

        width, ref = self.operand.row_bytes, self._matrix.codes
        codes = self.arena.array(f"{self.slot}:codes", count * width, np.uint8)
        self.reader.read_bytes(ref.path, ref.offset + row * width, codes.data)
        if self.operand.code in UPPER_FIRST:
            codes[...] = codes << 4 | codes >> 4
        self._decode(codes, row, count, 0, out.shape[1], out)

    def _turned(self, first: int, count: int, out: np.ndarray) -> None:
        """Columns [first, first + count) of the stored matrix, as rows."""
        import numpy as np

        assert self._codes is not None  # `_open` has read them
        rows, each = self._matrix.stored_shape[0], self._matrix.block[1]
        begin = first // each * each
        end = min(-(-(first + count) // each) * each, self._matrix.stored_shape[1])
        found = self.arena.array(f"{self.slot}:turned", rows * (end - begin), np.float32).reshape(rows, -1)
        self._decode(self._codes, 0, rows, begin, end - begin, found)
        out[...] = found[:, first - begin : first - begin + count].T

    def _decode(self, codes: np.ndarray, row: int, rows: int, column: int, columns: int, out: np.ndarray) -> None:
        """`codes` begin with row `row` of the matrix; `out` is `(rows, columns)`, from column `column` on."""
        matrix, scales = self._matrix, self._scales
        assert scales is not None
        if compiled.LIBRARY is not None:
            kind = compiled.TABLE4 if matrix.bits == 4 else compiled.TABLE8
            coded = compiled.Coded(
                codes.ctypes.data, scales.ctypes.data, self.table.ctypes.data, matrix.row_bytes, scales.shape[1],
                *matrix.block, kind if self.noise else FAST.get(matrix.code, kind),
            )  # fmt: skip
            compiled.LIBRARY.sm_dequantise(ctypes.byref(coded), row, rows, column, columns, out.ctypes.data)
        else:
            self._by_table(codes, row, rows, column, columns, out)

    def _by_table(self, codes: np.ndarray, row: int, rows: int, column: int, columns: int, out: np.ndarray) -> None:
        import numpy as np

        matrix, scales = self._matrix, self._scales
        assert scales is not None
        numbers = codes.reshape(rows, -1)
        if matrix.bits == 4:
            numbers = np.stack([numbers & 15, numbers >> 4], -1).reshape(rows, -1)
        np.take(self.table, numbers[:, column : column + columns], out=out)
        at = np.arange(row, row + rows) // matrix.block[0], np.arange(column, column + columns) // matrix.block[1]
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused where it is merged
            out *= scales[at[0]][:, at[1]]


class Pieces:
    """One operand's pieces as bytes of a dtype that the kernels read, in a buffer that each piece overwrites.

    Attributes:
        dtype: safetensors dtype of the elements in `raw`.
        raw: the bytes.
    """

    def __init__(self, operand: Stored | Quantised, reader: Reader, arena: Arena, slot: str, most: int) -> None:
        import numpy as np

        self.reader = reader
        self.ref: TensorRef | None = operand.ref if isinstance(operand, Stored) else None
        self.codes = None if isinstance(operand, Stored) else Dequantiser(operand, reader, arena, slot)
        self.dtype = "F32" if self.ref is None else self.ref.dtype
        self.raw = arena.array(slot, most * itemsize(self.dtype), np.uint8)

    def read(self, start: int, stop: int) -> None:
        """Elements [start, stop) of the flattened tensor."""
        import numpy as np

        width = itemsize(self.dtype)
        raw = self.raw[: (stop - start) * width]
        if self.codes is not None:
            self.codes.fill(start, stop, raw.view(np.float32))
        elif self.ref is not None:
            self.reader.read_bytes(self.ref.path, self.ref.offset + start * width, raw.data)


def noise_square(weight: Weight, reader: Reader, arena: Arena) -> float:
    """Expected ‖noise‖² that rounding to codes put into a weight: Σ c² · step² / 12, float64; 0 without codes.

    Errors of different operands count as unrelated, and each as even within its step.
    """
    import numpy as np

    total = 0.0
    for coefficient, operand in weight:
        if not isinstance(operand, Quantised):
            continue
        codes = Dequantiser(operand, reader, arena, "noise", noise=True)
        for start, stop in ranges(operand.shape, whole_rows=True):
            found = arena.array("noise", stop - start, np.float32)
            codes.fill(start, stop, found)
            total += float(coefficient) ** 2 * float(found.sum(dtype=np.float64))
    return total
