"""compressed-tensors' packed integers of 4 or 8 bits; its packed FP4 is `fp4`'s."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from safemerge_recipes.errors import SourceError
from safemerge_recipes.sources.quantised import fp4
from safemerge_recipes.sources.quantised.names import Found
from safemerge_recipes.sources.quantised.small import bytes_of
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.quantised import Packing, Quantised


def read(found: Found, _: Mapping[str, Any]) -> tuple[str, Quantised | None]:
    """Several integers in an int32 from the lowest bits; zeros may be missing.

    Raises:
        SourceError: scales or shape are missing.
    """
    kind, root, parts = found.kind, found.root, found.parts
    codes, scales, shape = (parts.get(f".weight_{end}") for end in ("packed", "scale", "shape"))
    if codes is not None and codes.dtype == "U8":
        return fp4.read(found)
    if codes is None or codes.dtype != "I32":
        return kind, None
    if scales is None or shape is None:
        raise SourceError(
            f"{codes.path}: {root} holds packed integers without .weight_{'scale' if scales is None else 'shape'}; "
            "expected .weight_packed, .weight_scale and .weight_shape, is a shard missing?"
        )
    if ".weight_g_idx" in parts:
        return f"{kind} with an order of their own", None
    if len(codes.shape) != 2 or len(scales.shape) != 2 or scales.dtype not in ("F32", "F16", "BF16"):
        return kind, None
    rows, columns = _stored_shape(shape)
    bits = next((b for b in (4, 8) if codes.shape == (rows, -(-columns * b // 32))), None)
    groups_of = scales.shape[1]
    if bits is None or scales.shape[0] != rows or not groups_of or columns % groups_of:
        return kind, None
    block, zeros = (1, columns // groups_of), parts.get(".weight_zero_point")
    operand = Quantised(codes, scales, "offset4" if bits == 4 else "offset8", (rows, columns), block)
    named = f"int{bits} packed, a scale for every {block[1]} of a row"
    if zeros is None:
        return named, operand
    if zeros.dtype != "I32" or zeros.shape != (-(-rows * bits // 32), groups_of):
        return f"{kind} with zero points", None
    return f"{named}, with zero points", replace(operand, packing=Packing("rows", zeros))


def _stored_shape(ref: TensorRef) -> tuple[int, int]:
    """The two numbers of a `weight_shape` tensor."""
    form = {"I64": "<2q", "I32": "<2i"}.get(ref.dtype)
    if form is None or ref.numel != 2:
        return 0, 0
    rows, columns = struct.unpack(form, bytes_of(ref))
    return (rows, columns) if 0 < rows <= 1 << 40 and 0 < columns <= 1 << 40 else (0, 0)
