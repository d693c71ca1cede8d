"""MXFP4 of gpt-oss: codes of four bits, a power of two for every 32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemerge_recipes.errors import SourceError
from safemerge_recipes.sources.quantised.names import Found
from safemerge_recipes.weights.quantised import Quantised

MX_BLOCK = 32
"""Elements that share a scale of MXFP4."""


def read(found: Found, _: Mapping[str, Any]) -> tuple[str, Quantised | None]:
    """Blocks `(…, rows, groups, 16)` hold the transpose of a weight `(…, groups·32, rows)`.

    Raises:
        SourceError: codes and scales do not fit.
    """
    blocks, scales = found.parts.get("_blocks"), found.parts.get("_scales")
    if blocks is None or scales is None or {blocks.dtype, scales.dtype} != {"U8"} or len(blocks.shape) < 3:
        return found.kind, None
    if blocks.shape[-1] != MX_BLOCK // 2 or blocks.shape[:-1] != scales.shape:
        raise SourceError(
            f"{blocks.path}: MXFP4 blocks {blocks.shape} with scales {scales.shape}; expected (…, rows, groups, 16) "
            "and (…, rows, groups)"
        )
    *stack, rows, count, _half = blocks.shape
    return found.kind, Quantised(blocks, scales, "e2m1", (*stack, rows, count * MX_BLOCK), (1, MX_BLOCK), turned=True)
