"""Quantised weights, told by the tensors alone: which tensors one consists of, and what they are worth.

A config may say so or not, and may say so of weights that are plain. A quantised weight is two or more tensors (codes,
scales), which mean something only together. Where their format is known they become one operand under the weight's
own name; where it is not, they stay what they are, are copied together, and are never merged one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from safemerge_recipes.errors import SourceError
from safemerge_recipes.sources.quantised import bitsandbytes, compressed, gptq, mxfp4, scaled
from safemerge_recipes.sources.quantised.group import Group
from safemerge_recipes.sources.quantised.names import FP8, NAMED, Found, found_weights
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.quantised import POWERS, Quantised


def quantised(tensors: Mapping[str, TensorRef]) -> dict[str, str]:
    """Tensor -> kind, of every tensor that is a part of a quantised weight."""
    return {f"{found.root}{end}": found.kind for found in found_weights(tensors) for end in found.parts}


def groups(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> dict[str, Group]:
    """Name of a weight -> its quantised form, in the order of the names of `tensors`.

    Raises:
        SourceError: codes without their scales, or scales that do not fit their codes.
    """
    found = [_group(weight, config) for weight in found_weights(tensors)]
    _check_alone(tensors, {name for group in found for name in group.names}, config)
    place = {name: number for number, name in enumerate(tensors)}
    found.sort(key=lambda group: min(place[name] for name in group.names))
    return {group.name: group for group in found}


def _check_alone(tensors: Mapping[str, TensorRef], grouped: set[str], config: Mapping[str, Any]) -> None:
    """Refuses codes whose scale is missing, where others have theirs or the config says that there are some."""
    told = any(tensors[name].dtype in FP8 for name in grouped) or "quantization_config" in config
    for name, ref in tensors.items():
        lost = ref.dtype in FP8 and told
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


READERS: Mapping[str, Callable[[Found, Mapping[str, Any]], tuple[str, Quantised | None]]] = {
    "MXFP4": mxfp4.read,
    "packed integers": compressed.read,
    "bitsandbytes 8-bit": bitsandbytes.read_eight_bits,
    "bitsandbytes 4-bit": bitsandbytes.read_four_bits,
    "GPTQ or AWQ": gptq.read,
}
"""Kind of a scheme -> what tells its format more closely, and what it is worth, where that is known here."""


def _group(found: Found, config: Mapping[str, Any]) -> Group:
    """The tensors of one weight with what they are worth."""
    plain = found.parts.keys() & {"", "_scale_inv", "_scale", "_blocks"}
    name = found.root if plain else f"{found.root}.weight"
    if found.kind in NAMED:
        return Group(name, found.kind, found.root, found.parts, None)
    kind, operand = READERS.get(found.kind, scaled.read)(found, config)
    powers = found.kind not in READERS and operand is not None and _powers(operand, config)
    return Group(name, kind, found.root, found.parts, operand, powers)


def _powers(operand: Quantised, config: Mapping[str, Any]) -> bool:
    """Whether scales are powers of two, by their dtype or because the config says so."""
    said = config.get("quantization_config")
    return operand.scales.dtype in POWERS or (isinstance(said, dict) and said.get("scale_fmt") == "ue8m0")
