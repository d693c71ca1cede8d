"""Sums of stored and quantised tensors, and LoRA factors, as numpy arrays: what most gates read, without torch.

The same arithmetic as `evaluator.Evaluator`, for the weights that need no other: float32 (float64 where a float64
tensor takes part), a piece of rows at a time, compiled where that is possible. Loading torch takes longer than gating a
model of a billion parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.dtypes import FLOAT_DTYPES, itemsize
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights import compiled
from safemerge_recipes.weights.algebra import LowRank, Weight
from safemerge_recipes.weights.dequantise import Pieces
from safemerge_recipes.weights.quantised import Quantised, Read

DOT = 1 << 15
"""Elements of one dot product: short enough that its rounding does not add up."""


def numpy_suffices(weight: Weight) -> bool:
    """Whether the weight is a sum of stored or quantised tensors, or of LoRA products, and nothing else."""
    kinds = {type(operand) for _, operand in weight}
    plain = (ref for _, operand in weight if not isinstance(operand, Quantised) for ref in operand.refs)
    return (kinds == {LowRank} or (bool(kinds) and kinds <= set(Read))) and all(r.dtype in FLOAT_DTYPES for r in plain)


class NumpyRows:
    """A sum of stored or quantised tensors as pieces of rows `(rows, columns)`; a piece is valid until the next one."""

    def __init__(self, weight: Weight, reader: Reader, arena: Arena, piece: int) -> None:
        self.columns = weight.shape[-1]
        self.rows = math.prod(weight.shape) // self.columns
        wide = any(ref.dtype == "F64" for ref in weight.refs)
        self.dtype = np.dtype(np.float64 if wide else np.float32)
        self._step = min(self.rows, max(1, piece // self.columns))
        size = self._step * self.columns
        self._sum = arena.array("sum", size, self.dtype)
        self._terms = [
            (float(coefficient), Pieces(operand, reader, arena, f"raw {number}", size))
            for number, (coefficient, operand) in enumerate(weight)
            if isinstance(operand, Read)
        ]
        self._term = arena.array("term", size, self.dtype)
        self._native = None
        if compiled.LIBRARY is not None and all(pieces.dtype in compiled.DTYPES for _, pieces in self._terms):
            self._native = compiled.terms([(c, pieces.dtype, pieces.raw.ctypes.data) for c, pieces in self._terms])

    def lift(self, x: np.ndarray) -> np.ndarray:
        """The array as it goes into products with the pieces."""
        return x.astype(self.dtype)

    def __iter__(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, piece `(len(rows), columns)`)."""
        for first in range(0, self.rows, self._step):
            rows = slice(first, min(first + self._step, self.rows))
            count = (rows.stop - first) * self.columns
            for _, pieces in self._terms:
                pieces.read(first * self.columns, first * self.columns + count)
            total = self._sum[:count]
            if self._native is not None and compiled.LIBRARY is not None:
                compiled.LIBRARY.sm_evaluate(compiled.Sum(self._native, len(self._native)), count, total.ctypes.data)
            else:
                self._add_up(total)
            yield rows, total.reshape(-1, self.columns)

    def _add_up(self, total: np.ndarray) -> None:
        for number, (coefficient, pieces) in enumerate(self._terms):
            into = self._term[: len(total)] if number else total
            widen(pieces.raw[: len(total) * itemsize(pieces.dtype)], pieces.dtype, into)
            if coefficient != 1:
                into *= coefficient
            if number:
                total += into


def widen(raw: np.ndarray, dtype: str, into: np.ndarray) -> None:
    """Stored bytes as numbers; exact, but where float64 is asked to be float32."""
    if dtype == "BF16" and into.dtype == np.float32:
        bits = into.view(np.uint32)  # bfloat16 is the upper half of a float32
        bits[...] = raw.view(np.uint16)
        np.left_shift(bits, 16, out=bits)
    elif dtype == "BF16":
        into[...] = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        into[...] = raw.view(f"<f{itemsize(dtype)}")


def load(reader: Reader, ref: TensorRef) -> np.ndarray:
    """A whole stored tensor in float64. For LoRA factors only."""
    raw, found = np.empty(ref.nbytes, np.uint8), np.empty(ref.numel, np.float64)
    reader.read_bytes(ref.path, ref.offset, raw.data)
    widen(raw, ref.dtype, found)
    return found.reshape(ref.shape)


def numpy_factors(weight: Weight, reader: Reader) -> tuple[np.ndarray, np.ndarray]:
    """(B, A) in float64 whose product is the sum of LoRA products, coefficients and scales folded into A."""
    left, right = [], []
    for coefficient, operand in weight:
        assert isinstance(operand, LowRank)  # callers have asked numpy_suffices
        first, step = operand.columns
        b, a = load(reader, operand.b)[:, first::step], load(reader, operand.a)
        a = a * (float(coefficient) * operand.scale)
        left.append(a.T if operand.transposed else b)
        right.append(b.T if operand.transposed else a)
    return np.concatenate(left, axis=1), np.concatenate(right, axis=0)


def dot(x: np.ndarray, y: np.ndarray) -> float:
    """⟨x, y⟩ of contiguous arrays: short dot products in their dtype, summed in float64."""
    x, y = x.reshape(-1), y.reshape(-1)
    return math.fsum(float(np.dot(x[i : i + DOT], y[i : i + DOT])) for i in range(0, len(x), DOT))


def one_blas_thread() -> AbstractContextManager[Any]:
    """Numpy's products on the calling thread alone, as the workers are parallel already."""
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[Any] = threadpool_limits(1, user_api="blas")
    return limits


def add_product(total: Any, x: Any, y: Any, arena: Arena) -> None:
    """total += x·y, numpy arrays or torch tensors."""
    if isinstance(total, np.ndarray):
        product = arena.array("product", total.size, total.dtype).reshape(total.shape)
        total += np.matmul(x, y, out=product)
    else:
        total.addmm_(x, y)


def wide(x: Any) -> np.ndarray:
    """A numpy array or torch tensor as a float64 array."""
    return x.astype(np.float64) if isinstance(x, np.ndarray) else x.double().cpu().numpy()
