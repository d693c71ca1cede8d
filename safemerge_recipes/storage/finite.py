"""NaN and infinities: counts them in raw bytes at the speed of a maximum, and refuses them. Needs numpy, not torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from safemerge_recipes.errors import SourceError
from safemerge_recipes.storage.safetensors import TensorRef

# dtype -> (unsigned integer of its width, bits of +infinity, bits of -infinity). A float is NaN or infinite
# exactly if all bits of its exponent are set, so among positive numbers such values are the largest integers
# from +infinity on, and among negative ones those from -infinity on.
_BITS: Mapping[str, tuple[str, int, int]] = {
    "F64": ("u8", 0x7FF0000000000000, 0xFFF0000000000000),
    "F32": ("u4", 0x7F800000, 0xFF800000),
    "F16": ("u2", 0x7C00, 0xFC00),
    "BF16": ("u2", 0x7F80, 0xFF80),
}


def non_finite(data: memoryview, dtype: str) -> int:
    """The number of NaN and infinite elements; 0 for dtypes that are not floats of `FLOAT_DTYPES`.

    Args:
        data: whole elements, little-endian.
        dtype: their safetensors dtype.
    """
    if dtype not in _BITS or not len(data):
        return 0
    import numpy as np

    kind, positive, negative = _BITS[dtype]
    unsigned = np.frombuffer(data, dtype=f"<{kind}")
    signed = unsigned.view(f"<{kind.replace('u', 'i')}")
    if unsigned.max() < negative and signed.max() < positive:
        return 0
    return int((unsigned >= negative).sum() + (signed >= positive).sum())


def refuse_non_finite(
    name: str, dtype: str, refs: Iterable[TensorRef], bad: int, overflows: int, allow_overflow: bool
) -> None:
    """Says what is wrong with merged values of which `bad` are not finite.

    Args:
        name: of the tensor.
        dtype: its safetensors dtype in the output.
        refs: what it was merged from.
        bad: how many values of a block are NaN or infinite after rounding.
        overflows: how many of them were finite before.
        allow_overflow: whether values that do not fit may become infinite, if all others are finite.

    Raises:
        SourceError: unless that is allowed.
    """
    if bad == overflows:
        if allow_overflow:
            return
        raise SourceError(
            f"{name}: {bad} merged values do not fit {dtype}; choose another output.dtype, "
            "or say output.allow_overflow: true"
        )
    paths = ", ".join(dict.fromkeys(ref.path for ref in refs))
    raise SourceError(f"{name}: {bad} merged values are NaN or infinite; expected finite weights in {paths}")
