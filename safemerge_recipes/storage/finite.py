"""NaN and infinities: counts them in raw bytes at the speed of a maximum, and refuses them. Needs numpy, not torch."""

from __future__ import annotations

from collections.abc import Iterable

from safemerge_recipes.errors import SourceError
from safemerge_recipes.storage.dtypes import DTYPES, itemsize
from safemerge_recipes.storage.safetensors import TensorRef


def non_finite(data: memoryview, dtype: str) -> int:
    """The number of NaN and infinite elements; 0 for dtypes that are not floats of `FLOAT_DTYPES`.

    Args:
        data: whole elements, little-endian.
        dtype: their safetensors dtype.
    """
    positive = DTYPES[dtype].infinity
    if positive is None or not len(data):
        return 0
    import numpy as np

    # A float is NaN or infinite exactly if all bits of its exponent are set, so among positive numbers such values
    # are the largest integers from +infinity on, and among negative ones those from -infinity on.
    width = itemsize(dtype)
    negative = positive + (1 << 8 * width - 1)
    unsigned = np.frombuffer(data, dtype=f"<u{width}")
    signed = unsigned.view(f"<i{width}")
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
        bad: how many values of a piece are NaN or infinite after rounding.
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
