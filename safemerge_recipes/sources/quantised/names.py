"""The names by which quantised weights are told: how those of one weight's tensors end, and what a format is called.

Formats that are named here and not read elsewhere have the way out beside them. Used by `find`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from safemerge_recipes.storage.dtypes import FLOAT_DTYPES
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.quantised import Code

FP8: Mapping[str, Code] = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
_ACTIVATIONS = (".input_scale", ".activation_scale", ".output_scale")


@dataclass(frozen=True, slots=True)
class Scheme:
    """A format: how the names of one weight's tensors end."""

    mark: str
    """The end that no plain weight has."""
    beside: tuple[str, ...]
    kind: str


SCHEMES = (
    Scheme(".weight_scale_inv", (".weight", *_ACTIVATIONS), "FP8 with a scale for each block"),
    Scheme("_scale_inv", ("",), "FP8 with a scale for each block"),
    Scheme(
        ".weight_packed",
        (".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".weight_global_scale",
         ".input_global_scale", *_ACTIVATIONS),
        "packed integers",
    ),
    Scheme(".q_weight", tuple(f".q_{end}" for end in ("scale", "scale_max", "groups", "group_map", "perm", "invperm")),
            "EXL2"),
    Scheme(".trellis", (".suh", ".svh", ".su", ".sv", ".mcg", ".mul1"), "EXL3"),
    Scheme(".W_q", (".scale", ".zero", ".nbits", ".axis", ".group_size", ".shape", ".channel_wise", ".packing",
                     ".compute_dtype", ".view_as_float", ".unpack_view_dtype", ".quant_scale", ".quant_zero",
                     ".offload_meta", ".encoded_state_dict", ".stores_quant_config"), "HQQ"),
    Scheme(".weight._data", (".weight._scale", ".weight._shift", ".weight._zeropoint", ".input_scale",
                              ".output_scale"), "Quanto"),
    Scheme(".codebooks", (".codes", ".scales"), "AQLM"),
    Scheme(".weight_qdata", (".weight_scale", ".weight_zero_point"), "torchao"),
    Scheme("._weight_qdata", ("._weight_scale", "._weight_zero_point"), "torchao"),
    Scheme(".weight_scales", (".weight",), "EETQ int8"),
    Scheme(".qweight", (".qzeros", ".scales", ".g_idx"), "GPTQ or AWQ"),
    Scheme("_blocks", ("_scales",), "MXFP4"),
    Scheme(
        ".weight.absmax",
        (".weight", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map"),
        "bitsandbytes 4-bit",
    ),
    Scheme(".biases", (".weight", ".scales"), "MLX"),
    Scheme(".SCB", (".weight", ".weight_format"), "bitsandbytes 8-bit"),
    Scheme(".weight_scale", (".weight", ".weight_scale_2", ".weight_zero_point", *_ACTIVATIONS), "scaled codes"),
    Scheme("_scale", ("",), "scaled codes"),
)  # fmt: skip


NAMED = {
    "EXL2": " (ExLlama has no way back)",
    "EXL3": " (ExLlama has no way back)",
    "HQQ": ", or let its `HQQLinear.dequantize()` give the weights back",
    "Quanto": ", or let `weight.dequantize()` of optimum-quanto give the weights back",
    "AQLM": " (AQLM has no exact way back)",
    "torchao": ", or let `weight.dequantize()` of torchao give the weights back",
    "EETQ int8": " (EETQ has no way back)",
    "MLX": ", or write it as floats with `mlx_lm.convert --dequantize`",
    "BitNet": " (of BitNet models: the master weights in bf16)",
    "GPTQ": ", or let GPTQModel give the weights back",
    "AWQ": ", or let AutoAWQ or GPTQModel give the weights back",
}
"""Formats that are named and not read: what else than the model before quantisation there is to be had."""


@dataclass(frozen=True, slots=True)
class Found:
    """The tensors of one quantised weight by their names alone: the kind, what the names begin with, the rest."""

    kind: str
    root: str
    parts: Mapping[str, TensorRef]


def found_weights(tensors: Mapping[str, TensorRef]) -> Iterator[Found]:
    """Every quantised weight."""
    taken: set[str] = set()
    for scheme in SCHEMES:
        for name in tensors:
            root = name.removesuffix(scheme.mark)
            if root in (name, "") or name in taken:
                continue
            parts = {end: tensors[f"{root}{end}"] for end in scheme.beside if f"{root}{end}" in tensors}
            if scheme.kind == "MLX" and parts.get(".weight", tensors[name]).dtype != "U32":
                continue
            if scheme.kind == "EETQ int8" and parts.get(".weight", tensors[name]).dtype != "I8":
                continue
            if "" in scheme.beside and parts.get("", tensors[name]).dtype not in FP8:
                continue  # a tensor of its own that is called a scale
            if scheme.kind == "scaled codes" and parts.get(".weight", tensors[name]).dtype in FLOAT_DTYPES:
                continue  # a plain weight, with something of that name beside it
            parts[scheme.mark] = tensors[name]
            if "4-bit" in scheme.kind:
                parts |= {
                    other.removeprefix(root): tensors[other]
                    for other in tensors
                    if other.startswith(f"{root}.weight.quant_state.")
                }
            taken.update(f"{root}{end}" for end in parts)
            yield Found(scheme.kind, root, parts)


def dequantise(label: str, kind: str = "") -> str:
    """What to try with a model whose quantised weights would have to be merged, and cannot be read here."""
    way = next((way for name, way in NAMED.items() if kind.startswith(name)), None)
    if way is not None:  # transformers has no way back from these
        return f"use the model before quantisation instead of {label}{way}"
    return (
        "use the model before quantisation, or save a dequantised copy (transformers: from_pretrained with the "
        f"quantization config's dequantize=True, or model.dequantize(), then save_pretrained) of {label}, and quantise "
        "the merged one"
    )
