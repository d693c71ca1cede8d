"""Integers of GPTQ, AWQ and compressed-tensors: several in an int32, with a zero for each group as well as a scale.

Their int32s do not lie row by row of the weight, so one matrix's are held in memory as they are stored, and the piece
that is asked for is unpacked. In numpy, with the same rounding as the kernels: (code − zero) is exact, the product with
the scale is rounded once. Called by `dequantise`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safemerge_recipes.errors import SourceError
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.quantised import Quantised

if TYPE_CHECKING:
    import numpy as np

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in an int32 AWQ puts the outputs 0 to 7."""


class Unpacker:
    """A matrix of packed integers, ready to give float32 pieces of its rows.

    Args:
        operand: the weight, with `packing`.
        scales: its scales as they are stored, float32.
        table: what a code is worth without its zero, float32; the expected squares of rounding where `noise`.
        reader: open files.
        codes: a buffer of as many bytes as the codes have.
        noise: rather give step² · scale² / 12 of each element.
    """

    def __init__(
        self, operand: Quantised, scales: np.ndarray, table: np.ndarray, reader: Reader, codes: np.ndarray, noise: bool
    ) -> None:
        import numpy as np

        assert operand.packing is not None  # callers have asked
        self.operand, self.packing, self.table = operand, operand.packing, table
        (rows, columns), (_, groups) = operand.stored_shape, operand.grid
        reader.read_bytes(operand.codes.path, operand.codes.offset, codes.data)
        self.words = codes.view("<u4").reshape(operand.codes.shape)
        by_row = self.packing.order == "rows"
        self.scales = scales.reshape(rows, groups) if by_row else scales.reshape(groups, rows).T
        if noise:
            self.scales = np.square(self.scales)
        self.zeros = None if noise or self.packing.zeros is None else self._zeros(self.packing.zeros, reader)
        self.groups = np.arange(columns) // operand.block[1]
        if self.packing.groups is not None:
            self.groups = reader.whole(self.packing.groups).view("<i4")
            if self.groups.min() < 0 or self.groups.max() >= groups:
                raise SourceError(
                    f"{self.packing.groups.path}: g_idx of a GPTQ weight names group {self.groups.max()} of {groups} "
                    f"(least {self.groups.min()}); expected 0 to {groups - 1}; was the file changed?"
                )

    def _zeros(self, ref: TensorRef, reader: Reader) -> np.ndarray:
        """What is taken from the codes' worth, float32 `(rows, groups)`."""
        import numpy as np

        words, half = reader.whole(ref).view("<u4").reshape(ref.shape), 1 << self.operand.bits - 1
        rows = self.operand.stored_shape[0]
        found = self._unpack(words.T if self.packing.order == "rows" else words)[:, :rows].T
        return ((found + self.packing.less) % (2 * half)).astype(np.float32) - np.float32(half)

    def _unpack(self, words: np.ndarray) -> np.ndarray:
        """int32s `(n, m)` -> integers `(n, m · 32 / bits)`, in the order in which they count."""
        import numpy as np

        bits = self.operand.bits
        places = np.array(_PLACES if self.packing.order == "awq" else range(32 // bits), np.uint32)
        found = words[..., None] >> (places * bits).astype(np.uint32) & np.uint32((1 << bits) - 1)
        return found.reshape(len(words), -1)

    def _codes(self, rows: slice, columns: slice) -> np.ndarray:
        """Codes `(rows, columns)` of the matrix."""
        per = 32 // self.operand.bits
        if self.packing.order == "rows":
            first = columns.start // per
            found = self._unpack(self.words[rows, first : -(-columns.stop // per)])
            return found[:, columns.start - first * per : columns.stop - first * per]
        if self.packing.order == "awq":
            first = rows.start // per
            found = self._unpack(self.words[columns, first : -(-rows.stop // per)])
            return found[:, rows.start - first * per : rows.stop - first * per].T
        first = columns.start // per
        words = self.words[first : -(-columns.stop // per), rows]
        found = self._unpack(words.T.copy())
        return found[:, columns.start - first * per : columns.stop - first * per]

    def fill(self, first: int, count: int, out: np.ndarray) -> None:
        """Rows [first, first + count) of the weight into `out`."""
        import numpy as np

        (rows, columns), some = self.operand.stored_shape, slice(first, first + count)
        part = (slice(0, rows), some) if self.operand.turned else (some, slice(0, columns))
        values = self.table[self._codes(*part)]
        groups = self.groups[part[1]]
        if self.zeros is not None:
            values -= self.zeros[part[0]][:, groups]
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused where it is merged
            values *= self.scales[part[0]][:, groups]
        out[...] = values.T if self.operand.turned else values
