"""GPTQ and AWQ: integers of 4 or 8 bits in words, under names that both use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemerge_recipes.errors import SourceError
from safemerge_recipes.sources.model_config import setting
from safemerge_recipes.sources.quantised.names import Found
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.quantised import Code, Packing, Quantised


def read(found: Found, config: Mapping[str, Any]) -> tuple[str, Quantised | None]:
    """As AutoGPTQ and AutoAWQ (GEMM) store them, and what is told apart by the shape of the zeros.

    Raises:
        SourceError: scales or zeros are missing.
    """
    own = "AWQ" if _is_awq(found.parts) else "GPTQ"
    operand = _words(own, found.root, found.parts, config)
    return own if operand else f"{own} of a kind that is not read", operand


def _is_awq(parts: Mapping[str, TensorRef]) -> bool:
    """AWQ packs along the outputs, so that codes and zeros are equally wide."""
    zeros = parts.get(".qzeros")
    return zeros is not None and ".g_idx" not in parts and zeros.shape[-1:] == parts[".qweight"].shape[-1:]


def _words(own: str, root: str, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Quantised | None:
    """What the words are worth; None for other variants."""
    codes, scales, zeros, order = (parts.get(f".{end}") for end in ("qweight", "scales", "qzeros", "g_idx"))
    assert codes is not None  # it marks the scheme
    if scales is None or (zeros is None and own == "GPTQ"):
        raise SourceError(
            f"{codes.path}: {root} holds {own} codes without .{'scales' if scales is None else 'qzeros'}; expected "
            ".qweight, .qzeros and .scales, is a shard missing?"
        )
    if len(codes.shape) != 2 or len(scales.shape) != 2 or scales.dtype not in ("F32", "F16", "BF16"):
        return None
    if {ref.dtype for ref in (codes, zeros, order) if ref is not None} != {"I32"}:
        return None
    groups, rows = scales.shape
    bits = next((b for b in (4, 8) if zeros is not None and zeros.shape == (groups, rows * b // 32)), 0)
    bits = 4 if own == "AWQ" else bits
    columns = codes.shape[0] * (1 if own == "AWQ" else 32 // bits if bits else 0)
    if not bits or not groups or columns % groups or rows * bits % 32:
        return None
    if codes.shape != ((columns, rows * bits // 32) if own == "AWQ" else (columns * bits // 32, rows)):
        return None
    if zeros is not None and zeros.shape != (groups, rows * bits // 32):
        return None
    said = setting(config, "quantization_config")
    said = said if isinstance(said, dict) else {}
    if own == "GPTQ":
        if "round" in str(said.get("quant_method")) and "gptq" not in str(said.get("packing_format")):
            return None  # AutoRound has a form of its own, with the same names, whose zeros are stored otherwise
        less = 0 if "gptq_v2" in (said.get("checkpoint_format"), said.get("format")) else 1
        packing = Packing("gptq", zeros, less, order if order is not None and order.shape == (columns,) else None)
    else:
        packing = Packing("awq", zeros)
    code: Code = "offset4" if bits == 4 else "offset8"
    return Quantised(codes, scales, code, (rows, columns), (1, columns // groups), packing=packing)
