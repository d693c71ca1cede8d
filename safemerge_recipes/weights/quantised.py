"""A quantised weight as an exact operand: stored codes, each worth a number, times the scale of the block it lies in.

FP8 and int8 codes are a byte each; those of MXFP4 and packed int4 half a byte, the lower half first, and those of
bitsandbytes the upper half first. Only frozen descriptions and the tables of what codes are worth; `dequantise` makes
the numbers. Knows no names of tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.algebra import Naming, Operand, Stored, Weight

if TYPE_CHECKING:
    import numpy as np

Code = Literal["e4m3", "e5m2", "int8", "offset8", "e2m1", "offset4", "nf4", "fp4"]
"""Numbers of a byte or half a byte: FP8, two's complement, excess 128; FP4, excess 8, NF4 and FP4 of bitsandbytes."""
HALF = ("e2m1", "offset4", "nf4", "fp4")
"""Codes of half a byte."""
UPPER_FIRST = ("nf4", "fp4")
"""Those of which the first lies in the upper half."""

SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")  # NVFP4's, in FP8, come with a number over them: `Overall`
"""Dtypes in which scales are stored."""
POWERS = ("F8_E8M0", "U8")
"""Those of which the value is 2^(byte − 127)."""


@dataclass(frozen=True, slots=True)
class ScaleCodes:
    """Scales that are codes themselves: table[code] · absmax of the block of scales + offset, each rounded to float32.

    Attributes:
        table: what a code is worth, float32 `(256,)`.
        absmax: float32 `(⌈scales / block⌉,)`.
        block: scales that share one of these.
        offset: added to all.
    """

    table: TensorRef
    absmax: TensorRef
    block: int
    offset: float


@dataclass(frozen=True, slots=True)
class Overall:
    """A number over all scales of a matrix, which are FP8 (NVFP4): scale · number or scale / number, in float32.

    Attributes:
        number: float32, of one element.
        divides: whether scales are divided by it.
    """

    number: TensorRef
    divides: bool


@dataclass(frozen=True, slots=True)
class Packing:
    """Codes in int32s from the lowest bits on, worth (code − zero) · scale; of one matrix `(d_out, d_in)`, no stack.

    Attributes:
        order: `rows`: codes of d_in go into an int32, as in compressed-tensors, `(d_out, d_in / n)`, zeros
            `(d_out / n, groups)`; `gptq`: codes of d_in, `(d_in / n, d_out)`; `awq`: codes of d_out, shuffled,
            `(d_in, d_out / n)`; zeros of the last two `(groups, d_out / n)`.
        zeros: None: half of what codes go up to.
        less: what zeros are stored too small by.
        groups: of GPTQ, the group of each column, where they are not in order.
    """

    order: Literal["rows", "gptq", "awq"]
    zeros: TensorRef | None = None
    less: int = 0
    groups: TensorRef | None = None

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Zeros and groups."""
        return tuple(ref for ref in (self.zeros, self.groups) if ref is not None)


@dataclass(frozen=True, slots=True)
class Quantised(Operand):
    """value(code) · scale / `divisor`, rounded once to float32.

    Attributes:
        codes: one matrix `(rows, columns)` or a stack of them, rows one behind the other.
        scales: `(…, ⌈rows / block[0]⌉, ⌈columns / block[1]⌉)`.
        code: what a code is worth.
        stored_shape: `(…, rows, columns)`, as the codes lie.
        block: rows and columns that share a scale.
        divisor: what the scale is too large by.
        turned: whether the weight is the transpose of each stored matrix.
        scale_codes: what `scales` are worth where they are codes; of one matrix, not of a stack.
        packing: how the codes lie where that is not row by row, or have zeros of their own.
        overall: the number over the scales of one matrix, which are FP8 then.
    """

    codes: TensorRef
    scales: TensorRef
    code: Code
    stored_shape: tuple[int, ...]
    block: tuple[int, int]
    divisor: float = 1.0
    turned: bool = False
    scale_codes: ScaleCodes | None = None
    packing: Packing | None = None
    overall: Overall | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        *stack, rows, columns = self.stored_shape
        return (*stack, columns, rows) if self.turned else self.stored_shape

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Codes, scales, and what these are worth."""
        own = self.scale_codes
        packed = self.packing.refs if self.packing else ()
        over = (self.overall.number,) if self.overall else ()
        return (self.codes, self.scales, *((own.table, own.absmax) if own else ()), *packed, *over)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 if self.code in HALF else 8

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row."""
        return self.codes.nbytes // math.prod(self.stored_shape[:-1])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of scales of one matrix."""
        *_, rows, columns = self.stored_shape
        return -(-rows // self.block[0]), -(-columns // self.block[1])

    def member(self, number: int) -> Quantised:
        """One matrix of a stack."""
        count = self.stored_shape[0]

        def piece(ref: TensorRef) -> TensorRef:
            each = ref.nbytes // count
            return replace(ref, offset=ref.offset + number * each, nbytes=each, shape=ref.shape[1:])

        return replace(self, codes=piece(self.codes), scales=piece(self.scales), stored_shape=self.stored_shape[1:])

    def entry(self, number: int) -> Weight:
        """One matrix of a stack."""
        return Weight.of(self.member(number))

    def transpose(self) -> Quantised:
        """The transpose, which is read in the other direction."""
        return replace(self, turned=not self.turned)

    def describe(self, name: Naming) -> str:
        """Codes, scales and how they go together."""
        how = f"{self.code}{self.stored_shape}/{self.block}/{self.divisor!r}T{self.turned}"
        if (own := self.scale_codes) is not None:
            how += f",{name(own.table)},{name(own.absmax)}/{own.block}+{own.offset!r}"
        if (over := self.overall) is not None:
            how += f",{'/' if over.divides else '*'}{name(over.number)}"
        if (packed := self.packing) is not None:
            how += f",{packed.order}{packed.less}:{','.join(map(name, packed.refs))}"
        return f"Quantised({name(self.codes)},{name(self.scales)}:{how})"

    def memory(self, block: int) -> int:
        """A block's codes and values, one matrix's scales in float32; where it is turned or packed, its codes."""
        *_, rows, columns = self.stored_shape
        if self.packing is not None:
            return self.codes.nbytes + 32 * block + 16 * math.prod(self.grid) + 8 * columns
        held = 4 * block + rows * (self.row_bytes + 4 * 2 * self.block[1]) if self.turned else 0
        return 5 * block + held + 8 * math.prod(self.grid)


Read = (Stored, Quantised)
"""The operands whose pieces are read from files one for one, without looking at the rest of the tensor."""


_FLOATS = {"e4m3": (3, 7), "e5m2": (2, 15), "e2m1": (1, 1)}
"""Bits of the mantissa, and the exponent's bias."""
TABLES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(
        sign * value
        for sign in (1.0, -1.0)
        for value in (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
    ),
}  # fmt: skip
"""NF4: quantiles of a normal distribution (QLoRA, arXiv 2305.14314); FP4: as bitsandbytes has it."""


def _count(code: Code) -> int:
    return 1 << (4 if code in HALF else 8)


def _worth(code: Code, number: int) -> float:
    """The value of a code."""
    if code in TABLES:
        return TABLES[code][number]
    if code == "int8":
        return float(number - 256 if number > 127 else number)
    if code in ("offset8", "offset4"):
        return float(number - _count(code) // 2)
    mantissas, bias = _FLOATS[code]
    size, sign = number % (_count(code) // 2), -1.0 if number >= _count(code) // 2 else 1.0
    if code == "e4m3" and size == 0x7F:
        return math.nan
    if code == "e5m2" and size >= 0x7C:
        return sign * math.inf if size == 0x7C else math.nan
    exponent, mantissa = size >> mantissas, size & (1 << mantissas) - 1
    return sign * (mantissa + (1 << mantissas if exponent else 0)) * 2.0 ** (max(exponent, 1) - bias - mantissas)


@lru_cache
def values(code: Code) -> np.ndarray:
    """What each code is worth, float32."""
    import numpy as np

    return np.array([_worth(code, number) for number in range(_count(code))], "f4")


@lru_cache
def rounding(code: Code) -> np.ndarray:
    """Expected square of what rounding to each code took or gave, float32; NaN where a code is no number.

    Of what is even in the cell of a code, from halfway to the one below to halfway to the one above: step² / 12 where
    both are a step away.
    """
    import numpy as np

    worth = [_worth(code, number) for number in range(_count(code))]
    ordered = sorted({value for value in worth if math.isfinite(value)})

    def square(value: float) -> float:
        if not math.isfinite(value):
            return math.nan
        at = ordered.index(value)
        below, above = ((ordered[at + way] - value if 0 <= at + way < len(ordered) else 0.0) for way in (-1, 1))
        below, above = (-below or above) / 2, (above or -below) / 2  # the outermost as if there were more beyond
        return (below**3 + above**3) / 3 / (below + above)

    return np.array([square(value) for value in worth], "f4")
