"""How the output stores what is decided: plain, or quantised as the aligned model has it, and what its config says.

A quantised weight that nothing changes is copied with its scales. One that is computed is written plain, or quantised
again in the same format. Weights that loaders put together in memory (the experts of a block, q, k and v) are written
alike, as no loader takes half of them quantised.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from safemerge_recipes.errors import PlanError
from safemerge_recipes.recipe.output import Output
from safemerge_recipes.sources.family import Family
from safemerge_recipes.sources.model_config import REMOVED, Added, dtype_edits
from safemerge_recipes.sources.quantised.group import Group
from safemerge_recipes.sources.vocabulary import is_head
from safemerge_recipes.storage.dtypes import BY_TORCH_NAME

if TYPE_CHECKING:
    from safemerge_recipes.planning.plan import TensorPlan

PLAIN = "BF16"
"""Dtype of quantised weights that are written plain, unless the recipe says another."""

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"),
             ("q_a_proj", "kv_a_proj_with_mqa"))  # fmt: skip
_SKIPPED = ("modules_to_not_convert", "ignore", "ignored_layers", "llm_int8_skip_modules")
"""What formats call the list of modules that are not quantised."""
_SKIPPED_BY = {"compressed-tensors": "ignore", "modelopt": "ignore", "bitsandbytes": "llm_int8_skip_modules"}
"""What those call it that do not call it `modules_to_not_convert`."""
_HF_QUANT = "hf_quant_config.json"


def copied(tensor: TensorPlan, family: Family) -> Group | None:
    """The quantised tensors of a kept weight that the output takes as they are; None if it is computed."""
    form = family.form(tensor.weight)
    own = family.stored_as(tensor.take, tensor.weight) if tensor.action == "keep" else None
    return own if form is not None and own is not None and form.like(own) else None


def _loaded_as(name: str, form: Group | None) -> str:
    """What a weight is put together with in memory: equal texts, one tensor there; of GPTQ, all or none are codes."""
    if form is not None and form.kind == "GPTQ":
        return form.kind
    experts = re.fullmatch(r"(.+\.\w*experts)\.\d+\..+", name)
    if experts:
        return experts[1]
    module, _, end = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    return next((f"{parent}.{'+'.join(names)}.{end}" for names in _TOGETHER if last in names), name)


def as_stored(
    tensors: Sequence[TensorPlan], family: Family, output: Output
) -> tuple[tuple[TensorPlan, ...], tuple[str, ...]]:
    """(the lines of the output's own tensors, what is to be said of them).

    Raises:
        PlanError: a computed weight is to stay quantised in a format that is not written here.
    """
    plain: set[str] = set()
    if output.quantized == "dequantize":
        computed = (t for t in tensors if family.form(t.name) is not None and copied(t, family) is None)
        plain = {_loaded_as(tensor.name, family.form(tensor.name)) for tensor in computed}
    lines: list[TensorPlan] = []
    counts = {"copied": 0, "plain": 0, "fresh": 0}
    for tensor in tensors:
        form = family.form(tensor.name)
        if form is None:
            lines.append(tensor)
        elif _loaded_as(tensor.name, form) in plain:
            counts["plain"] += 1
            lines.append(replace(tensor, dtype=BY_TORCH_NAME.get(output.dtype or "", PLAIN)))
        else:
            own = copied(tensor, family)
            if own is None and not form.requantisable:
                raise PlanError(
                    f"output.quantized: keep: {tensor.name} is changed, and {form.kind} is not written here; say "
                    "`output.quantized: dequantize`, and quantise the output with the tool that made the model"
                )
            counts["copied" if own else "fresh"] += 1
            lines += _parts(tensor, form, "copied" if own else "fresh")
    told = {
        "copied": "quantised weights are copied with their scales",
        "plain": f"quantised weights are written as {output.dtype or 'bfloat16'} (output.quantized: dequantize)",
        "fresh": "quantised weights are quantised again, with fresh scales (output.quantized: keep)",
    }
    notes = [f"{count} {told[what]}" for what, count in counts.items() if count]
    change = side_edits(lines, family)["config.json"].get("quantization_config")
    if isinstance(change, dict) and counts["plain"]:
        notes.append("config.json: quantization_config names the weights that are written plain")
    elif change is REMOVED and counts["plain"]:
        notes.append("config.json: quantization_config is left out, as no weight is quantised any more")
    if not _said(family) and counts["copied"] + counts["fresh"]:
        notes.append(
            "config.json of no model says that weights are quantised (quantization_config); the output's does not "
            "either, and loaders may need it"
        )
    return tuple(lines), _rows_set(family) if output.format == "adapter" else tuple(notes)


def _rows_set(family: Family) -> tuple[str, ...]:
    """What is to be said of an adapter, which holds no quantised weight: that PEFT gives no model the rows it sets."""
    before = family.models["aligned"].checkpoint.tensors
    grown = {
        name: (before[name].shape[0], ref.shape[0])
        for name, ref in family.inventory.items()
        if name in before and family.form(name) is None and before[name].shape != ref.shape
    }
    return tuple(
        f"output.format: adapter: {name} has {after} rows, the aligned model's {size}; call "
        f"model.resize_token_embeddings({after}) on that before PEFT loads the adapter"
        for name, (size, after) in grown.items()
    )


def _parts(tensor: TensorPlan, form: Group, how: str) -> list[TensorPlan]:
    """The lines of a weight that is stored quantised: its codes with the decision, and what belongs to them."""
    lines = []
    for name, ref in form.names.items():
        line = replace(tensor, name=name, of=tensor.name, shape=ref.shape, dtype=ref.dtype)
        if name != form.codes:
            reason = f"belongs to {form.codes}, {how if name == form.scales else 'copied'}"
            line = replace(line, action="keep", reason=reason, gated=False, policy=None, value=None, moments=None)
        lines.append(line)
    return lines


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    text = config.get("text_config")
    places = [config, text if isinstance(text, dict) else {}]
    return next((found for place in places if isinstance(found := place.get("quantization_config"), dict)), None)


def _said(family: Family) -> Mapping[str, Any] | None:
    """The quantization_config of the model whose quantised tensors the output has."""
    configs = (family.models[role].checkpoint.config for role in ("aligned", family.owner))
    return next((found for config in configs if (found := _quantization(config)) is not None), None)


def stale_files(tensors: Sequence[TensorPlan], family: Family) -> frozenset[str]:
    """Files beside the weights that would be untrue: ModelOpt's own config, where nothing is quantised any more."""
    forms = family.models["aligned"].forms
    left = any(tensor.of for tensor in tensors) or any(form.operand is None for form in forms.values())
    return frozenset() if left else frozenset((_HF_QUANT,))


def side_edits(tensors: Sequence[TensorPlan], family: Family) -> dict[str, Mapping[str, Any]]:
    """File beside the weights -> what it must say otherwise than the source's: config.json, and ModelOpt's own.

    A weight that is written plain must be named as one that is not quantised; where none is left that is, the key goes.
    """
    edits: dict[str, Any] = dict(family.config_edits)
    forms = family.models["aligned"].forms
    if not forms:
        return {"config.json": edits}
    numbers: Counter[str] = Counter()
    for tensor in tensors:
        numbers[tensor.dtype] += math.prod(tensor.shape)
    edits |= dtype_edits(family.models[family.owner].checkpoint.config, numbers)
    lines = {tensor.weight for tensor in tensors if not tensor.of}
    plain = [name for name in forms if name in lines and family.form(name) is not None]
    left = len(plain) < len(forms)
    own = _said(family)
    modules = _modules(plain, forms, lines)
    if own is not None and not left:
        edits["quantization_config"] = REMOVED
    elif own is not None and (plain or _quantization(family.models[family.owner].checkpoint.config) != own):
        edits["quantization_config"] = _skipping(own, modules, tensors) if plain else own
    return {"config.json": edits, **({_HF_QUANT: {"exclude_modules": Added(tuple(modules))}} if plain else {})}


def _modules(plain: Sequence[str], forms: Mapping[str, Group], lines: set[str]) -> list[str]:
    """The modules of weights that are written plain, experts of a block as the one that they are in memory."""
    names = (name.removesuffix(".weight") for name in plain)
    found = (re.sub(r"(\.\w*experts)\.(?:\d+\..+|\w*proj)$", r"\1", name) for name in names)
    return list(dict.fromkeys(found))


def _skipping(own: Mapping[str, Any], modules: Sequence[str], tensors: Sequence[TensorPlan]) -> dict[str, Any]:
    """A quantization_config that names further modules as plain."""
    default = _SKIPPED_BY.get(str(own.get("quant_method")), "modules_to_not_convert")
    key = next((one for one in _SKIPPED if own.get(one) is not None), default)
    listed = own.get(key)
    before = [str(one) for one in listed] if isinstance(listed, list) else []
    if not before:  # without a list readers leave the head plain of their own accord, with one they do not
        before = [t.name.removesuffix(".weight") for t in tensors if is_head(t.name) and t.name.endswith(".weight")]
    return {**own, key: list(dict.fromkeys((*before, *modules)))}
