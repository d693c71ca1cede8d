"""Quantised weights, told by the tensors alone: which tensors they are, and how they were made.

A config may say so or not, and may say so of weights that are plain. A quantised weight is two or more tensors (codes
and scales), which mean something only together: they are copied together, byte for byte, and never merged one by one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from safemerge_recipes.storage.dtypes import FLOAT_DTYPES
from safemerge_recipes.storage.safetensors import TensorRef

_KINDS = (
    # (how a tensor's name ends that no plain weight has, how those beside it end, kind)
    (r"\.weight_scale_inv", (".weight",), "FP8 with a scale for each block"),
    (r"\.weight_packed", (".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx"), "packed integers"),
    (r"\.qweight", (".qzeros", ".scales", ".g_idx"), "GPTQ or AWQ"),
    (r"_blocks", ("_scales",), "MXFP4"),
    (r"\.weight\.absmax", (".weight", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map"),
     "bitsandbytes 4-bit"),
    (r"\.SCB", (".weight", ".weight_format"), "bitsandbytes 8-bit"),
    (r"\.weight_scale", (".weight", ".weight_scale_2", ".input_scale"), "scaled codes"),
)  # fmt: skip


def quantised(tensors: Mapping[str, TensorRef]) -> dict[str, str]:
    """Tensor -> kind, of every tensor that is a part of a quantised weight."""
    found: dict[str, str] = {}
    for mark, beside, kind in _KINDS:
        for name in tensors:
            match = re.fullmatch(rf"(.+){mark}", name)
            if match is None or name in found:
                continue
            parts = [f"{match[1]}{end}" for end in beside if f"{match[1]}{end}" in tensors]
            if kind == "scaled codes" and tensors.get(f"{match[1]}.weight", tensors[name]).dtype in FLOAT_DTYPES:
                continue  # a plain weight, with something of that name beside it
            found.update(dict.fromkeys((name, *parts), kind))
            quant_state = (other for other in tensors if other.startswith(f"{match[1]}.weight.quant_state."))
            found.update(dict.fromkeys(quant_state if "4-bit" in kind else (), kind))
    return found


def dequantise(label: str) -> str:
    """What to try with a model whose quantised weights would have to be merged."""
    return (
        "use the model before quantisation, or save a dequantised copy (transformers: from_pretrained with the "
        f"quantization config's dequantize=True, then save_pretrained) of {label}, and quantise the merged one"
    )
