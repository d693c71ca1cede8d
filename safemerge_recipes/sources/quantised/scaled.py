"""FP8 and int8: byte codes with one scale, one a row, or one a block, as compressed-tensors and others store them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from safemerge_recipes.errors import SourceError
from safemerge_recipes.sources.quantised import fp4
from safemerge_recipes.sources.quantised.names import FP8, Found
from safemerge_recipes.storage.dtypes import FLOAT_DTYPES
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.quantised import SCALES, Code, Quantised

BLOCK = 128
"""Rows and columns that share a scale in FP8 checkpoints that do not say otherwise."""


def read(found: Found, config: Mapping[str, Any]) -> tuple[str, Quantised | None]:
    """Codes of a byte with one scale, one a row, or one a block.

    Raises:
        SourceError: scales do not fit their codes.
    """
    kind, root, parts = found.kind, found.root, found.parts
    codes = parts.get(".weight", parts.get(""))
    scales = next(ref for end, ref in parts.items() if re.fullmatch(r"(\.weight)?_scale(_inv)?", end))
    if codes is not None and codes.dtype == "U8" and scales.numel == 1:
        return "BitNet", None
    if codes is not None and codes.dtype == "U8" and ".weight" in parts:
        return fp4.read(found)
    if ".weight_scale_2" in parts or (codes is not None and codes.dtype == "U8"):
        return "NVFP4", None
    if ".weight_zero_point" in parts:
        return "int8 with zero points", None
    if codes is None or codes.dtype in FLOAT_DTYPES:
        return kind, None  # scales of something that is not here, or is plain
    code: Code | None = FP8.get(codes.dtype) or ("int8" if codes.dtype == "I8" else None)
    if code is None or scales.dtype not in SCALES or len(codes.shape) < 2:
        return kind, None
    block = _block(root, codes, scales, config)
    named = kind if kind.startswith("FP8") else f"{'FP8' if code != 'int8' else 'int8'} with {_shared(codes, block)}"
    return named, Quantised(codes, scales, code, codes.shape, block)


def _shared(codes: TensorRef, block: tuple[int, int]) -> str:
    if block == codes.shape[-2:]:
        return "one scale"
    return "a scale for each row" if block == (1, codes.shape[-1]) else "a scale for each block"


def _block(root: str, codes: TensorRef, scales: TensorRef, config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    rows, columns = codes.shape[-2:]
    grid = scales.shape[-2:] if len(scales.shape) == len(codes.shape) else ()
    if not grid and scales.numel in (1, rows) and len(codes.shape) == 2:
        return (rows, columns) if scales.numel == 1 else (1, columns)
    if grid and scales.shape[:-2] == codes.shape[:-2]:
        said = config.get("quantization_config")
        own = said.get("weight_block_size") if isinstance(said, dict) else None
        sizes = own if isinstance(own, list) and len(own) == 2 and all(type(n) is int and n > 0 for n in own) else None
        for block in (tuple(sizes) if sizes else (BLOCK, BLOCK), (BLOCK, BLOCK)):
            if grid == tuple(-(-n // each) for n, each in zip((rows, columns), block, strict=True)):
                return int(block[0]), int(block[1])
        if all(n and not size % n for n, size in zip(grid, (rows, columns), strict=True)):
            return rows // grid[0], columns // grid[1]
    raise SourceError(
        f"{scales.path}: {root}: its scales are {scales.shape}, its codes {codes.shape}; expected one scale, one a "
        f"row, or one for each block of {BLOCK} × {BLOCK} (or as quantization_config.weight_block_size says)"
    )
