"""Quantised weights, told by the tensors alone: which tensors one consists of, and what they are worth.

A config may say so or not, and may say so of weights that are plain. A quantised weight is two or more tensors (codes,
scales), which mean something only together. Where their format is known they become one operand under the weight's
own name; where it is not, they stay what they are, are copied together, and are never merged one by one.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from safemerge_recipes.errors import SourceError
from safemerge_recipes.sources.model_config import setting
from safemerge_recipes.sources.quantised_names import FP8, NAMED, found_weights
from safemerge_recipes.storage.dtypes import FLOAT_DTYPES
from safemerge_recipes.storage.files import reading
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.quantised import POWERS, SCALES, TABLES, Code, Packing, Quantised, ScaleCodes

BLOCK = 128
"""Rows and columns that share a scale in FP8 checkpoints that do not say otherwise."""
MX_BLOCK = 32
"""Elements that share a scale of MXFP4."""

_SMALL = 4096
"""Bytes of a tensor that says how others are read, at most."""


@dataclass(frozen=True, slots=True)
class Group:
    """A quantised weight as it is stored.

    Attributes:
        name: of the weight: what a plain checkpoint would call it.
        kind: how it was quantised, in words.
        root: what the names of its tensors begin with.
        parts: the rest of a name -> tensor: codes, scales, and what belongs to them.
        operand: what it is worth; None where that is not known here.
        powers: whether its scales are powers of two (ue8m0), by their dtype or by config.json's `scale_fmt`.
    """

    name: str
    kind: str
    root: str
    parts: Mapping[str, TensorRef]
    operand: Quantised | None
    powers: bool = False

    @property
    def names(self) -> dict[str, TensorRef]:
        """Its tensors by name."""
        return {f"{self.root}{end}": ref for end, ref in self.parts.items()}

    @property
    def codes(self) -> str:
        """The name of its codes. Undefined without an operand."""
        assert self.operand is not None
        return next(name for name, ref in self.names.items() if ref is self.operand.codes)

    @property
    def scales(self) -> str:
        """The name of its scales. Undefined without an operand."""
        assert self.operand is not None
        return next(name for name, ref in self.names.items() if ref is self.operand.scales)

    @property
    def requantisable(self) -> bool:
        """Whether other values can be written in its format: FP8 (e4m3), with scales of any dtype."""
        return self.operand is not None and self.operand.code == "e4m3" and self.operand.divisor == 1

    def like(self, other: Group) -> bool:
        """Whether the other's tensors may take the place of these."""
        mine, theirs = self.operand, other.operand
        if mine is None or theirs is None or mine.code != theirs.code or mine.divisor != theirs.divisor:
            return False
        if self.powers and not other.powers:
            return False  # loaders that expect powers of two may take the exponent alone
        if (mine.stored_shape, mine.block, mine.turned) != (theirs.stored_shape, theirs.block, theirs.turned):
            return False
        orders = [one.packing and (one.packing.order, one.packing.less) for one in (mine, theirs)]
        if orders[0] != orders[1]:
            return False
        parts = [{end: (ref.dtype, ref.shape) for end, ref in one.parts.items()} for one in (self, other)]
        return parts[0] == parts[1]


def quantised(tensors: Mapping[str, TensorRef]) -> dict[str, str]:
    """Tensor -> kind, of every tensor that is a part of a quantised weight."""
    return {f"{root}{end}": kind for kind, root, parts in found_weights(tensors) for end in parts}


def groups(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> dict[str, Group]:
    """Name of a weight -> its quantised form, in the order of the names of `tensors`.

    Raises:
        SourceError: codes without their scales, or scales that do not fit their codes.
    """
    found = [_group(kind, root, parts, config) for kind, root, parts in found_weights(tensors)]
    _check_alone(tensors, {name for group in found for name in group.names}, config)
    place = {name: number for number, name in enumerate(tensors)}
    found.sort(key=lambda group: min(place[name] for name in group.names))
    return {group.name: group for group in found}


def _check_alone(tensors: Mapping[str, TensorRef], grouped: set[str], config: Mapping[str, Any]) -> None:
    """Refuses codes whose scale is missing, where others have theirs or the config says that there are some."""
    scaled = any(tensors[name].dtype in FP8 for name in grouped) or "quantization_config" in config
    for name, ref in tensors.items():
        lost = ref.dtype in FP8 and scaled
        lost = lost or (name.endswith(("_packed", ".qweight")) and ref.dtype == "I32")
        if lost and name not in grouped and len(ref.shape) > 1:
            raise SourceError(
                f"{ref.path}: {name} is stored as {ref.dtype} and has no scale beside it (such as "
                f"{name.removesuffix('.weight')}.weight_scale_inv), so nobody knows what it is worth; expected both, "
                "is a shard missing?"
            )
        codes = name.removesuffix("_scale_inv")
        if codes != name and codes not in tensors:
            raise SourceError(
                f"{ref.path}: {name} is the scale of {codes}, which is not there; expected both, is a shard missing?"
            )
        orphan = (
            name.endswith("_blocks") and ref.dtype == "U8" and f"{name.removesuffix('blocks')}scales" not in tensors
        )
        if orphan:
            raise SourceError(
                f"{ref.path}: {name} holds MXFP4 codes without {name.removesuffix('blocks')}scales; expected both, "
                "is a shard missing?"
            )


def _group(kind: str, root: str, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Group:
    if kind == "MXFP4":
        operand = _mxfp4(parts.get("_blocks"), parts.get("_scales"))
        return Group(root, kind, root, parts, operand)
    if kind == "packed integers":
        return Group(f"{root}.weight", *_packed(root, parts))
    name = root if "" in parts or "_scale_inv" in parts or "_scale" in parts else f"{root}.weight"
    if kind == "bitsandbytes 8-bit":
        return Group(name, kind, root, parts, _rows_of_bytes(parts.get(".weight"), parts[".SCB"]))
    if kind == "bitsandbytes 4-bit":
        return Group(name, kind, root, parts, _four_bits(parts))
    if kind in NAMED:
        return Group(name, kind, root, parts, None)
    if kind == "GPTQ or AWQ":
        own = "AWQ" if _is_awq(parts) else "GPTQ"
        operand = _words(own, root, parts, config)
        return Group(name, own if operand else f"{own} of a kind that is not read", root, parts, operand)
    found = Group(name, *_scaled(kind, root, parts, config))
    said = config.get("quantization_config")
    stored = found.operand.scales.dtype if found.operand else ""
    powers = stored in POWERS or (isinstance(said, dict) and said.get("scale_fmt") == "ue8m0")
    return replace(found, powers=powers) if found.operand else found


def _scaled(
    kind: str, root: str, parts: Mapping[str, TensorRef], config: Mapping[str, Any]
) -> tuple[str, str, Mapping[str, TensorRef], Quantised | None]:
    """(kind, root, parts, operand) of byte codes with one scale, one a row, or one a block."""
    codes = parts.get(".weight", parts.get(""))
    scales = next(ref for end, ref in parts.items() if re.fullmatch(r"(\.weight)?_scale(_inv)?", end))
    if codes is not None and codes.dtype == "U8" and scales.numel == 1:
        return "BitNet", root, parts, None
    if ".weight_scale_2" in parts or (codes is not None and codes.dtype == "U8"):
        return "NVFP4", root, parts, None
    if ".weight_zero_point" in parts:
        return "int8 with zero points", root, parts, None
    if codes is None or codes.dtype in FLOAT_DTYPES:
        return kind, root, parts, None  # scales of something that is not here, or is plain
    code: Code | None = FP8.get(codes.dtype) or ("int8" if codes.dtype == "I8" else None)
    if code is None or scales.dtype not in SCALES or len(codes.shape) < 2:
        return kind, root, parts, None
    block = _block(root, codes, scales, config)
    named = kind if kind.startswith("FP8") else f"{'FP8' if code != 'int8' else 'int8'} with {_shared(codes, block)}"
    return named, root, parts, Quantised(codes, scales, code, codes.shape, block)


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


def _rows_of_bytes(codes: TensorRef | None, scales: TensorRef) -> Quantised | None:
    """bitsandbytes' LLM.int8: code · SCB / 127, SCB the largest magnitude of each row."""
    if codes is None or codes.dtype != "I8" or len(codes.shape) != 2 or scales.shape != codes.shape[:1]:
        return None
    if scales.dtype not in ("F32", "F16", "BF16"):
        return None
    return Quantised(codes, scales, "int8", codes.shape, (1, codes.shape[1]), 127.0)


def _four_bits(parts: Mapping[str, TensorRef]) -> Quantised | None:
    """bitsandbytes' NF4 and FP4: table[code] · absmax of each `blocksize` of a row; absmax may be codes itself."""
    state = next((ref for end, ref in parts.items() if end.startswith(".weight.quant_state.")), None)
    codes, scales, table = (parts.get(f".weight{end}") for end in ("", ".absmax", ".quant_map"))
    if state is None or codes is None or scales is None or table is None or codes.dtype != "U8":
        return None
    try:
        said = json.loads(_bytes_of(state))
        code, each, (rows, columns) = said["quant_type"], int(said["blocksize"]), map(int, said["shape"])
        if code not in TABLES or _floats(table) != struct.unpack("<16f", struct.pack("<16f", *TABLES[code])):
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


def _mxfp4(blocks: TensorRef | None, scales: TensorRef | None) -> Quantised | None:
    """gpt-oss: blocks `(…, rows, groups, 16)` hold the transpose of a weight `(…, groups·32, rows)`."""
    if blocks is None or scales is None or {blocks.dtype, scales.dtype} != {"U8"} or len(blocks.shape) < 3:
        return None
    if blocks.shape[-1] != MX_BLOCK // 2 or blocks.shape[:-1] != scales.shape:
        raise SourceError(
            f"{blocks.path}: MXFP4 blocks {blocks.shape} with scales {scales.shape}; expected (…, rows, groups, 16) "
            "and (…, rows, groups)"
        )
    *stack, rows, count, _ = blocks.shape
    return Quantised(blocks, scales, "e2m1", (*stack, rows, count * MX_BLOCK), (1, MX_BLOCK), turned=True)


def _is_awq(parts: Mapping[str, TensorRef]) -> bool:
    """AWQ packs along the outputs, so that codes and zeros are equally wide."""
    zeros = parts.get(".qzeros")
    return zeros is not None and ".g_idx" not in parts and zeros.shape[-1:] == parts[".qweight"].shape[-1:]


def _words(own: str, root: str, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Quantised | None:
    """GPTQ's and AWQ's integers of 4 or 8 bits, as AutoGPTQ and AutoAWQ (GEMM) store them; None for other variants."""
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


def _packed(root: str, parts: Mapping[str, TensorRef]) -> tuple[str, str, Mapping[str, TensorRef], Quantised | None]:
    """compressed-tensors' integers of 4 or 8 bits, several in an int32 from the lowest bits; zeros may be missing."""
    codes, scales, shape = (parts.get(f".weight_{end}") for end in ("packed", "scale", "shape"))
    kind = "packed integers"
    if codes is None or codes.dtype != "I32":
        return ("NVFP4" if codes is not None and codes.dtype == "U8" else kind), root, parts, None
    if scales is None or shape is None:
        raise SourceError(
            f"{codes.path}: {root} holds packed integers without .weight_{'scale' if scales is None else 'shape'}; "
            "expected .weight_packed, .weight_scale and .weight_shape, is a shard missing?"
        )
    if ".weight_g_idx" in parts:
        return f"{kind} with an order of their own", root, parts, None
    if len(codes.shape) != 2 or len(scales.shape) != 2 or scales.dtype not in ("F32", "F16", "BF16"):
        return kind, root, parts, None
    rows, columns = _stored_shape(shape)
    bits = next((b for b in (4, 8) if codes.shape == (rows, -(-columns * b // 32))), None)
    groups_of = scales.shape[1]
    if bits is None or scales.shape[0] != rows or not groups_of or columns % groups_of:
        return kind, root, parts, None
    block, zeros = (1, columns // groups_of), parts.get(".weight_zero_point")
    operand = Quantised(codes, scales, "offset4" if bits == 4 else "offset8", (rows, columns), block)
    named = f"int{bits} packed, a scale for every {block[1]} of a row"
    if zeros is None:
        return named, root, parts, operand
    if zeros.dtype != "I32" or zeros.shape != (-(-rows * bits // 32), groups_of):
        return f"{kind} with zero points", root, parts, None
    return f"{named}, with zero points", root, parts, replace(operand, packing=Packing("rows", zeros))


def _stored_shape(ref: TensorRef) -> tuple[int, int]:
    """The two numbers of a `weight_shape` tensor."""
    form = {"I64": "<2q", "I32": "<2i"}.get(ref.dtype)
    if form is None or ref.numel != 2:
        return 0, 0
    rows, columns = struct.unpack(form, _bytes_of(ref))
    return (rows, columns) if 0 < rows <= 1 << 40 and 0 < columns <= 1 << 40 else (0, 0)


def _floats(ref: TensorRef) -> tuple[float, ...]:
    """A small tensor of float32."""
    return struct.unpack(f"<{ref.numel}f", _bytes_of(ref)) if ref.dtype == "F32" else ()


def _bytes_of(ref: TensorRef) -> bytes:
    """A small tensor that says how others are to be read; nothing of a large one. Raises SourceError."""
    if ref.nbytes > _SMALL:
        return b""
    try:
        with reading(ref.path) as file:
            file.seek(ref.offset)
            found: bytes = file.read(ref.nbytes)
    except OSError:
        found = b""
    if len(found) != ref.nbytes:
        raise SourceError(f"{ref.path}: byte {ref.offset} cannot be read; was the file changed?")
    return found
