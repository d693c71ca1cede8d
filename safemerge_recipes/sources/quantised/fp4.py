"""NVFP4 of compressed-tensors and ModelOpt, and MXFP4 of compressed-tensors: FP4 codes with a scale for each group.

NVFP4's scales are FP8, and one number more belongs to the whole matrix: compressed-tensors divides by it
(`weight_global_scale`), ModelOpt multiplies (`weight_scale_2`). MXFP4's are powers of two.
"""

from __future__ import annotations

from safemerge_recipes.errors import SourceError
from safemerge_recipes.sources.quantised.names import Found
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.quantised import POWERS, Overall, Quantised


def read(found: Found) -> tuple[str, Quantised | None]:
    """Two codes a byte, the first in the lower half, `(rows, columns / 2)`; scales `(rows, groups)`.

    Raises:
        SourceError: the scales are missing, or the number of the whole matrix.
    """
    parts, packed = found.parts, ".weight_packed" in found.parts
    codes, scales = parts[".weight_packed" if packed else ".weight"], parts.get(".weight_scale")
    if scales is None:
        raise _incomplete(found, codes, ".weight_scale")
    powers = scales.dtype in POWERS
    kind = "MXFP4 packed" if powers and packed else "NVFP4"
    rows, columns = (codes.shape[0], 2 * codes.shape[1]) if len(codes.shape) == 2 else (0, 0)
    groups = scales.shape[1] if len(scales.shape) == 2 and scales.shape[0] == rows else 0
    if not groups or columns % groups or ".weight_zero_point" in parts:
        return kind, None
    form = (rows, columns), (1, columns // groups)
    end = ".weight_global_scale" if packed else ".weight_scale_2"
    number = parts.get(end)
    if powers:
        return kind, Quantised(codes, scales, "e2m1", *form) if packed and number is None else None
    if number is None and scales.dtype == "F8_E4M3":
        raise _incomplete(found, codes, end)
    if number is None or scales.dtype != "F8_E4M3" or number.dtype != "F32" or number.numel != 1:
        return kind, None
    return kind, Quantised(codes, scales, "e2m1", *form, overall=Overall(number, packed))


def _incomplete(found: Found, codes: TensorRef, end: str) -> SourceError:
    return SourceError(f"{codes.path}: {found.root} holds FP4 codes without {end}; expected both, is a shard missing?")
