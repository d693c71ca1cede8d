"""The dtypes of the safetensors format: the one table from which headers, readers and checks take what they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dtype:
    """One dtype.

    Attributes:
        bits: of one element.
        torch: what torch calls it; None where torch lacks its arithmetic, so that it is only copied.
        infinity: the bits of +infinity, for the floats that may take part in a merge.
    """

    bits: int
    torch: str | None = None
    infinity: int | None = None


DTYPES: Mapping[str, Dtype] = {
    "F64": Dtype(64, "float64", 0x7FF0000000000000),
    "F32": Dtype(32, "float32", 0x7F800000),
    "F16": Dtype(16, "float16", 0x7C00),
    "BF16": Dtype(16, "bfloat16", 0x7F80),
    "C64": Dtype(64),
    "I64": Dtype(64, "int64"),
    "I32": Dtype(32, "int32"),
    "I16": Dtype(16, "int16"),
    "I8": Dtype(8, "int8"),
    "U64": Dtype(64),
    "U32": Dtype(32),
    "U16": Dtype(16),
    "U8": Dtype(8, "uint8"),
    "BOOL": Dtype(8, "bool"),
    "F8_E4M3": Dtype(8),
    "F8_E5M2": Dtype(8),
    "F8_E4M3FNUZ": Dtype(8),
    "F8_E5M2FNUZ": Dtype(8),
    "F8_E8M0": Dtype(8),
    "F4": Dtype(4),
}
"""Every dtype that the format knows, by its name there."""

FLOAT_DTYPES = tuple(name for name, dtype in DTYPES.items() if dtype.infinity is not None)
"""Those that may take part in a merge; all others can only be copied."""

BY_TORCH_NAME: Mapping[str, str] = {dtype.torch: name for name, dtype in DTYPES.items() if dtype.torch is not None}
"""torch's name -> the format's."""


def itemsize(name: str) -> int:
    """Bytes of one element. Undefined for dtypes of less than a byte."""
    return DTYPES[name].bits // 8
