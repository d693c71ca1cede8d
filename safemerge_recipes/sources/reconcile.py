"""One inventory for models that were saved a little differently: tied heads, buffers, vocabularies.

The output follows the aligned model. Where another model differs from it in nothing but these, its weights
are brought into the output's form here, each time with a note; whatever else differs is refused by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import SourceError
from safemerge_recipes.recipe.model import Role
from safemerge_recipes.sources.checkpoint import Checkpoint
from safemerge_recipes.sources.experts import as_saved
from safemerge_recipes.sources.matching import renamed, unwrap
from safemerge_recipes.sources.model_config import REMOVED, dtype_edits, setting
from safemerge_recipes.sources.parts import is_draft
from safemerge_recipes.sources.quantised.group import Group
from safemerge_recipes.sources.quantised.names import dequantise
from safemerge_recipes.sources.vocabulary import (
    SHOWN,
    difference,
    embedding_of,
    is_head,
    match_rows,
    read_tokens,
    rows_of,
    same_tokenizer,
)
from safemerge_recipes.storage.dtypes import FLOAT_DTYPES
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.tensor_names import block_of
from safemerge_recipes.weights.algebra import Weight

_BUFFERS = ("inv_freq", "masked_bias", "position_ids", "cos_cached", "sin_cached")


@dataclass(frozen=True, slots=True)
class Side:
    """One role before it is fitted in: its weights, what lies underneath, and where its tokenizer is.

    `forms` are the quantised weights of what lies underneath, by the weight's name.
    """

    label: str
    weights: Mapping[str, Weight]
    checkpoint: Checkpoint
    tokenizer: Path
    forms: Mapping[str, Group] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reconciled:
    """The roles over one inventory; `config_edits` are the values that the output's config.json must have.

    `owner` is the role whose vocabulary, and so whose config and tokenizer, the output has. `absent` names the
    tensors for multi-token prediction that not every role has, with the first that lacks it.
    """

    inventory: Mapping[str, TensorRef]
    weights: Mapping[Role, Mapping[str, Weight]]
    owner: Role
    config_edits: Mapping[str, Any]
    notes: tuple[str, ...]
    absent: Mapping[str, Role]


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a stored tensor is no parameter: rotary frequencies, causal masks and the like."""
    return name.rpartition(".")[2] in _BUFFERS or (name.endswith(".attn.bias") and len(shape) == 4)


def _under_names(
    role: Role, own: dict[str, Weight], aligned: Mapping[str, Weight], config: Mapping[str, Any], notes: list[str]
) -> dict[str, Weight]:
    """A role's weights in the form and under the names of the aligned model's, as far as that is unmistakable."""
    if own.keys() == aligned.keys():
        return own
    own = unwrap(own)
    groups = as_saved(own, aligned)
    if groups:
        notes.append(f"sources.{role}: the experts of {groups} blocks were brought into the aligned model's form")
    headless = not any(is_head(name) for name in aligned if name not in own)
    spare = {
        name
        for name, weight in own.items()
        if is_buffer(name, weight.shape) or is_draft(name, config) or (headless and is_head(name))
    }
    found, pairs = renamed(own, aligned, spare)
    if pairs:
        notes.append(
            f"sources.{role}: {len(pairs)} tensors were found under other names, such as {pairs[0][1]} as {pairs[0][0]}"
        )
    return found


_HEADS = {
    "score": "a classification head",
    "classifier": "a classification head",
    "qa_outputs": "a question-answering head",
    "v_head": "a value head",
    "value_head": "a value head",
    "regression_head": "a reward model's head",
    "reward_head": "a reward model's head",
    "rm_head": "a reward model's head",
    "class_head": "a classification head",
    "classification_head": "a classification head",
}


def _cure(side: Side, missing: Sequence[str], extra: Sequence[str]) -> str:
    """What may be the cause of other names than the aligned model's, and what to try."""
    closed = next((form for form in side.forms.values() if form.operand is None), None)
    if closed is not None:
        first = next(iter(closed.names))
        return f"its weights are quantised ({closed.kind}, first {first}): {dequantise('it', closed.kind)}"
    whole = {name: weight.shape for name, weight in side.weights.items()}
    lora = next((name for name in extra if ".lora_" in name or ".base_layer." in name), None)
    if lora is not None:
        return f"{lora} belongs to an adapter that was never merged into it; expected merge_and_unload before saving"
    if any(re.match(r"(?:model\.)?layers\.\d+\.attention\.w[qkvo]\.", name) for name in extra):
        return "its names are those of the original release; expected transformers' form, convert it with its script"
    several = re.compile(r"\.(?:qkv_proj|W_pack|c_attn|gate_up_proj)\.weight$")
    fused = next((name for name in extra if several.search(name)), None)
    if fused is not None and len(whole[fused]) == 2:
        return f"{fused} holds several matrices in one; expected one tensor each, as the aligned model has them"
    for name in extra:
        kind = next((_HEADS[part] for part in name.split(".") if part in _HEADS), "")
        if kind:
            return f"{name} is {kind}; expected a language model, take the checkpoint that the head was trained on"
    if missing and not extra and all(is_head(name) for name in missing):
        return "it was saved without its output head (AutoModel); expected a language model (AutoModelForCausalLM)"
    return "expected models of one architecture, saved alike"


def _shape_cure(weight: Weight) -> str:
    """What may be the cause of another shape."""
    if 0 in weight.shape:
        return (
            "it is empty: DeepSpeed ZeRO-3 keeps parameters in pieces, and this file was saved without gathering them; "
            "save again with stage3_gather_16bit_weights_on_model_save, or use zero_to_fp32.py"
        )
    stored = weight.stored
    if stored is not None and stored.dtype not in FLOAT_DTYPES:
        return f"it is stored as {stored.dtype}, so quantised in a way that is not known; {dequantise('it')}"
    return "expected models of one architecture and vocabulary"


def _fit_names(sides: Mapping[Role, Side], notes: list[str], absent: dict[str, Role]) -> dict[Role, dict[str, Weight]]:
    """All roles over the aligned model's names, plus a head where some role has one of its own.

    `absent` gets the tensors for multi-token prediction that a role lacks, with that role.
    """
    weights = {role: dict(side.weights) for role, side in sides.items()}
    aligned = weights["aligned"]
    for role, own in weights.items():
        if role != "aligned":
            weights[role] = _under_names(role, own, aligned, sides[role].checkpoint.config, notes)
    heads = dict.fromkeys(
        name for own in weights.values() for name in own if is_head(name) and name.endswith(".weight")
    )
    for role, own in weights.items():
        embedding = embedding_of(own, sides[role].checkpoint.config)
        for head in heads:
            if head not in own and embedding is not None and sides[role].checkpoint.tied:
                own[head] = own[embedding]
    for role, own in weights.items():
        missing = [name for name in aligned if name not in own]
        extra = [name for name in own if name not in aligned]
        for name in [name for name in missing if is_buffer(name, aligned[name].shape)]:
            own[name] = aligned[name]
            missing.remove(name)
        for name in [name for name in extra if is_buffer(name, own[name].shape)]:
            del own[name]
            extra.remove(name)
            notes.append(f"sources.{role}: {name} is a buffer that the aligned model does not store; left out")
        drafts = [name for name in missing if is_draft(name, sides["aligned"].checkpoint.config)]
        for name in drafts:
            own[name] = aligned[name]
            missing.remove(name)
            absent.setdefault(name, role)
        if drafts:
            notes.append(
                f"sources.{role}: has none of the aligned model's {len(drafts)} tensors for multi-token prediction, "
                f"such as {drafts[0]}; the output has the aligned model's"
            )
        own_drafts = [name for name in extra if is_draft(name, sides[role].checkpoint.config)]
        for name in own_drafts:
            del own[name]
            extra.remove(name)
        if own_drafts:
            notes.append(
                f"sources.{role}: its {len(own_drafts)} tensors for multi-token prediction, such as {own_drafts[0]}, "
                "are left out, as the aligned model has none"
            )
        if missing or extra:
            lines = [f"lacks {len(missing)} tensors of the aligned model, first {missing[0]!r}"] if missing else []
            lines += [f"has {len(extra)} tensors that the aligned model lacks, first {extra[0]!r}"] if extra else []
            raise SourceError(
                f"sources.{role}: {sides[role].label}: {' and '.join(lines)}; {_cure(sides[role], missing, extra)}"
            )
    return weights


def _is_vocabulary(name: str, weights: Mapping[Role, Mapping[str, Weight]], sizes: Mapping[Role, int]) -> bool:
    """Whether a tensor has one row a token in every role."""
    shapes = {role: own[name].shape for role, own in weights.items()}
    return (
        block_of(name) is None
        and all(shape and shape[0] == sizes[role] for role, shape in shapes.items())
        and len({shape[1:] for shape in shapes.values()}) == 1
        and (len(shapes["aligned"]) == 2 or is_head(name))
    )


def _choose_owner(
    wanted: str | None,
    sizes: Mapping[Role, int],
    sides: Mapping[Role, Side],
    tokens: Mapping[Role, dict[str, int] | None],
) -> Role:
    before, after = tokens["aligned"], tokens["finetuned"]
    changed = difference(before, after) if before is not None and after is not None else []
    if wanted == "strict" and (len(set(sizes.values())) > 1 or changed or before != after):
        found = ", ".join(f"{role} {size}" for role, size in sizes.items())
        shown = "; ".join(changed[:SHOWN]) or "some only append"
        raise SourceError(f"vocabulary: strict, but vocabularies differ: rows: {found}; tokens: {shown}")
    if wanted in ("aligned", "finetuned"):
        return wanted
    cut = sizes["finetuned"] < sizes["aligned"] and (after is None or max(after.values()) >= sizes["finetuned"])
    if changed or cut:
        shown = "; ".join(changed[:SHOWN]) or f"{sizes['aligned']} rows before, {sizes['finetuned']} after"
        raise SourceError(
            f"sources.finetuned: {sides['finetuned'].label}: its vocabulary does more than append to the aligned "
            f"model's: {len(changed)} tokens differ: {shown}; say `vocabulary: finetuned` or `vocabulary: aligned`"
        )
    return "finetuned"


def _fit_vocabulary(
    wanted: str | None, sides: Mapping[Role, Side], weights: dict[Role, dict[str, Weight]], notes: list[str]
) -> tuple[Role, int | None]:
    """Gives every role the rows of one vocabulary; returns whose it is and its size, None if unknown."""
    base = embedding_of(weights["aligned"], sides["aligned"].checkpoint.config)
    if base is None:
        return "finetuned", None
    sizes = {role: own[base].shape[0] for role, own in weights.items()}
    alike = len(set(sizes.values())) == 1
    aligned = sides["aligned"].tokenizer
    if alike and all(same_tokenizer(side.tokenizer, aligned) for side in sides.values()):
        return "finetuned", sizes["finetuned"]
    tokens = {role: read_tokens(side.tokenizer) for role, side in sides.items()}
    for role, side in sides.items():
        known = tokens[role] is not None and tokens["aligned"] is not None
        grown = side.checkpoint is sides["aligned"].checkpoint  # by an adapter, which appends
        if wanted is None and sizes[role] != sizes["aligned"] and not known and not grown:
            raise SourceError(
                f"sources.{role}: {side.label}: has a vocab_size of {sizes[role]}, the aligned model of "
                f"{sizes['aligned']}, and no tokenizer.json tells which row is which token; add the tokenizers, or say "
                "`vocabulary: finetuned` or `vocabulary: aligned` to match rows by position"
            )
    owner = _choose_owner(wanted, sizes, sides, tokens)
    fitting = [name for name in weights["aligned"] if _is_vocabulary(name, weights, sizes)]
    originals = {name: weights[owner][name] for name in fitting}
    for role, own in weights.items():
        rows = rows_of(tokens[role], sizes[role], tokens[owner], sizes[owner])
        if role == owner or rows == list(range(sizes[role])):
            continue
        lacking = sum(row is None for row in rows)
        notes.append(
            f"sources.{role}: its {sizes[role]} rows were matched with the {owner} side's {sizes[owner]} by "
            f"{'token' if tokens[role] and tokens[owner] else 'position'}; {lacking} it has not are taken from there"
        )
        for name in fitting:
            own[name] = match_rows(own[name], originals[name], rows)
    return owner, sizes[owner]


def _edits(owner: Side, untied: bool, size: int | None, coded: bool) -> dict[str, Any]:
    config = owner.checkpoint.config
    edits: dict[str, Any] = {}
    if untied:
        text = config.get("text_config")
        flags = [part.get("tie_word_embeddings") for part in (config, text) if isinstance(part, dict)]
        own_head = any(is_head(name) for name in owner.checkpoint.tensors)
        if True in flags or (False not in flags and not own_head):
            edits["tie_word_embeddings"] = False
    declared = setting(config, "vocab_size")
    if "quantization_config" in config and not coded:
        edits["quantization_config"] = REMOVED
    if size is not None and declared is not None and declared != size:
        edits["vocab_size"] = size
    return edits


def reconcile(sides: Mapping[Role, Side], vocabulary: str | None, dtype: str | None) -> Reconciled:
    """Brings all roles into one inventory.

    Args:
        sides: the roles as they were opened.
        vocabulary: the recipe's word on whose vocabulary the output has.
        dtype: the recipe's word on the dtype of float weights, as safetensors names it; None: the aligned model's.

    Raises:
        SourceError: models differ in what cannot be brought together, or vocabularies in more than additions.
    """
    notes: list[str] = []
    absent: dict[str, Role] = {}
    weights = _fit_names(sides, notes, absent)
    owner, size = _fit_vocabulary(vocabulary, sides, weights, notes)
    stored = sides["aligned"].checkpoint.tensors
    last = list(stored.values())[-1].path
    inventory = {}
    forms = sides["aligned"].forms
    for name, weight in weights["aligned"].items():
        form = forms[name].operand if name in forms else None
        ref = form.codes if form is not None else stored.get(name)
        if ref is None:  # a head of its own, which the aligned model ties
            ref = replace(weight.refs[0], path=last)
        inventory[name] = ref if ref.shape == weight.shape else replace(ref, shape=weight.shape)
    for role, own in weights.items():
        for name, ref in inventory.items():
            if own[name].shape != ref.shape:
                raise SourceError(
                    f"sources.{role}: {sides[role].label}: {name} is {own[name].shape}, the aligned model's is "
                    f"{ref.shape}; {_shape_cure(own[name])}"
                )
    untied = any(is_head(name) and name.endswith(".weight") for name in inventory)
    edits = _edits(sides[owner], untied, size, bool(sides["aligned"].forms))
    nbytes: Counter[str] = Counter()
    for ref in inventory.values():
        nbytes[dtype if dtype and ref.dtype in FLOAT_DTYPES else ref.dtype] += ref.numel
    edits |= dtype_edits(sides[owner].checkpoint.config, nbytes)
    notes += [
        f"config.json: {key} is left out, as no weight is quantised"
        if value is REMOVED
        else f"config.json: {key} is set to {value!r}, which the merged weights need"
        for key, value in edits.items()
    ]
    return Reconciled(inventory, weights, owner, edits, tuple(notes), absent)
