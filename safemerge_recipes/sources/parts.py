"""Parts of a model, told by a tensor's path: text, vision, audio, draft head, projector, encoder or decoder.

Where names differ between two saved forms of a model, tensors are matched by what stays alike, and never across
parts: a text tower and a vision tower have modules of the same names and often of the same shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from safemerge_recipes.sources.model_config import setting
from safemerge_recipes.tensor_names import block_index, block_of

_ANYWHERE = (
    ("vision", frozenset(("vision", "visual", "vit", "image", "images", "img", "siglip", "clip", "pixel"))),
    ("audio", frozenset(("audio", "speech", "sound", "acoustic", "token2wav", "code2wav"))),
    ("draft", frozenset(("mtp", "nextn", "draft", "eagle", "eagle3", "medusa"))),
    ("projector", frozenset(("projector", "connector", "resampler", "merger", "aligner", "perceiver"))),
)
_BEFORE_BLOCKS = (("encoder", frozenset(("encoder",))), ("decoder", frozenset(("decoder",))))

_NEUTRAL = frozenset((
    "", "model", "models", "language", "lang", "text", "base", "transformer", "transformers", "backbone", "trunk",
    "body", "net", "network", "llm", "lm", "causal", "gpt", "neox", "rwkv", "policy", "actor", "student",
    "generator", "pretrained", "wrapped", "inner", "core", "hf", "peft", "layers", "layer", "h", "blocks", "block",
))  # fmt: skip
"""Words above the blocks that name no part: what libraries and trainers call the language model as a whole."""

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
"""What torch.compile, FSDP, activation checkpointing and DeepSpeed put into names, wherever they wrap a module."""


def _words(path: str) -> frozenset[str]:
    return frozenset(word for component in path.lower().split(".") for word in component.split("_"))


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to: `text` where its path says nothing else.

    A word above the blocks that is not known names a part of its own: better a match too few than one elsewhere.
    """
    path = name.rpartition(".")[0] or name
    words = _words(path)
    for part, marks in _ANYWHERE:
        if words & marks:
            return part
    above = _words((block_of(name) or path).rpartition(".")[0])  # a decoder's block may hold an `encoder_attn`
    found = next((part for part, marks in _BEFORE_BLOCKS if above & marks), None)
    return found or " ".join(sorted(above - _NEUTRAL)) or "text"


def unwrapped(name: str) -> str:
    """A tensor's name without what training wrappers added: `_orig_mod.` and the like anywhere, `module.` in front."""
    name = _WRAPPERS.sub("", name)
    while name.startswith("module."):  # DistributedDataParallel and DataParallel wrap the whole
        name = name.removeprefix("module.")
    return name


def is_draft(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor serves multi-token prediction alone, which transformers does not load.

    Such tensors lie under a part of their own, or in blocks behind the last one that config.json counts
    (DeepSeek-V3, GLM-4.5).
    """
    part = part_of(name)
    if part == "draft":
        return True
    count, number = setting(config, "num_hidden_layers"), block_index(name)
    return part == "text" and isinstance(count, int) and number is not None and number >= count
