"""bitsandbytes' formats: LLM.int8, and NF4 and FP4, which may be quantised twice."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

from safemerge_recipes.sources.quantised.names import Found
from safemerge_recipes.sources.quantised.small import bytes_of, floats_of
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.quantised import TABLES, Quantised, ScaleCodes


def read_eight_bits(found: Found, _: Mapping[str, Any]) -> tuple[str, Quantised | None]:
    """LLM.int8: code · SCB / 127, SCB the largest magnitude of each row."""
    codes, scales = found.parts.get(".weight"), found.parts[".SCB"]
    if codes is None or codes.dtype != "I8" or len(codes.shape) != 2 or scales.shape != codes.shape[:1]:
        return found.kind, None
    if scales.dtype not in ("F32", "F16", "BF16"):
        return found.kind, None
    return found.kind, Quantised(codes, scales, "int8", codes.shape, (1, codes.shape[1]), 127.0)


def read_four_bits(found: Found, _: Mapping[str, Any]) -> tuple[str, Quantised | None]:
    """NF4 and FP4: table[code] · absmax of each `blocksize` of a row; absmax may be codes itself."""
    return found.kind, _four_bits(found.parts)


def _four_bits(parts: Mapping[str, TensorRef]) -> Quantised | None:
    """What NF4 or FP4 codes are worth, by their stored state; None for a state that is not known here."""
    state = next((ref for end, ref in parts.items() if end.startswith(".weight.quant_state.")), None)
    codes, scales, table = (parts.get(f".weight{end}") for end in ("", ".absmax", ".quant_map"))
    if state is None or codes is None or scales is None or table is None or codes.dtype != "U8":
        return None
    try:
        said = json.loads(bytes_of(state))
        code, each, (rows, columns) = said["quant_type"], int(said["blocksize"]), map(int, said["shape"])
        if code not in TABLES or floats_of(table) != struct.unpack("<16f", struct.pack("<16f", *TABLES[code])):
            return None
        if min(rows, columns, each) < 1 or columns % 2 or 2 * codes.nbytes != rows * columns:
            return None
        if columns % each or scales.numel != rows * columns // each:
            return None  # blocks that begin in one row and end in another
        form = (rows, columns), (1, each)
        if scales.dtype == "F32":
            return Quantised(codes, scales, code, *form)
        own = _scale_codes(parts, said, scales)
        return Quantised(codes, scales, code, *form, scale_codes=own) if own else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _scale_codes(parts: Mapping[str, TensorRef], said: Mapping[str, Any], scales: TensorRef) -> ScaleCodes | None:
    """How bitsandbytes' doubly quantised scales are read."""
    table, most = parts.get(".weight.nested_quant_map"), parts.get(".weight.nested_absmax")
    each, offset = int(said["nested_blocksize"]), float(said["nested_offset"])
    if table is None or most is None or {table.dtype, most.dtype} != {"F32"} or scales.dtype != "U8" or each < 1:
        return None
    fits = table.numel == 256 and most.numel == -(-scales.numel // each) and math.isfinite(offset)
    return ScaleCodes(table, most, each, offset) if fits else None
