"""adapter_model.safetensors: which stored tensor is which part of which module. Reads headers only.

A file's keys are the adapted modules' paths in memory, with PEFT's own suffixes. Each is taken apart here;
one that cannot be is an error, since PEFT itself would leave it out without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safemerge_recipes.errors import SourceError
from safemerge_recipes.sources.checkpoint import named_files, read_object
from safemerge_recipes.sources.mirror import is_there, weight_path
from safemerge_recipes.sources.parts import unwrapped
from safemerge_recipes.sources.peft.config import AdapterConfig
from safemerge_recipes.sources.vocabulary import is_head
from safemerge_recipes.storage.dtypes import FLOAT_DTYPES
from safemerge_recipes.storage.files import inside
from safemerge_recipes.storage.identity import FileIdentity
from safemerge_recipes.storage.safetensors import TensorRef, open_header
from safemerge_recipes.tensor_names import block_of

WEIGHTS_FILE = "adapter_model.safetensors"
INDEX = f"{WEIGHTS_FILE}.index.json"
"""Names the files of an adapter that was saved in pieces."""
KEY_PREFIX = "base_model.model."

_PARTS = (
    (r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight", "{side}"),
    (r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])", "embedding_{side}"),
    (r"(?P<module>.+)\.lora_B\.bias", "lora_bias"),
    (r"(?P<module>.+)\.lora_magnitude_vector(?:\.weight)?", "magnitude"),
    (r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta", "tokens"),
    (r"(?P<module>.+?)(?:\.token_adapter)?\.base_layer\.(?P<side>weight|bias)", "base_{side}"),
)


_FOREIGN = (
    (r"\.lora_(?:down|up)\.weight$|\.alpha$", " (the form of kohya and other image trainers: convert it to PEFT's)"),
    (r"\.lora_[ab]$", " (the form of MLX, whose factors are turned: merge it with `mlx_lm.fuse`, and use the model)"),
    (r"\.(?:lora_[ab]|lora_magnitude)\.weight$", " (torchtune's form: save again with its PEFT format)"),
    (r"\.(?:hada|lokr|oft|vera)_", " (another kind of adapter than LoRA: merge it with PEFT, and use the model)"),
)
"""Keys of adapters that others than PEFT saved: what becomes part of the message."""

_NAMED = (
    (r"(.+\.(?:lora_[AB]|lora_magnitude_vector))\.([^.]+)\.(weight|bias)", r"\1.\3"),
    (r"(.+\.(?:lora_embedding_[AB]|token_adapter\.trainable_tokens_delta))\.([^.]+)", r"\1"),
    (r"(.+)\.modules_to_save\.([^.]+)\.(.+)", r"\1.\3"),
)
"""Keys that still hold the adapter's name, as the state dict of a live PEFT model has them: what becomes of them."""


def plain_key(key: str) -> tuple[str, str | None]:
    """(name as PEFT saves it without its prefix, the adapter's own name where the key holds one).

    What torch.compile, FSDP, DeepSpeed and DistributedDataParallel put around modules is taken off; the prefix
    `base_model.model.` may be missing.
    """
    name = unwrapped(unwrapped(key).removeprefix(KEY_PREFIX))
    for pattern, form in _NAMED:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(form), match[2]
    return name, None


@dataclass(frozen=True, slots=True)
class Keys:
    """Everything an adapter file holds: `modules` maps module -> part -> tensor, `whole` tensor name -> tensor.

    Parts: A, B, embedding_A, embedding_B, lora_bias, magnitude, tokens, base_weight, base_bias. The layers of
    a module whose parameters are adapted one by one keep PEFT's `.base_layer` in their name. `unlisted` names those
    of `whole` that no field of the config announces: PEFT saves a resized embedding and head of its own accord.
    """

    path: Path | str
    identities: tuple[FileIdentity, ...] = ()
    modules: dict[str, dict[str, TensorRef]] = field(default_factory=dict)
    whole: dict[str, TensorRef] = field(default_factory=dict)
    unlisted: list[str] = field(default_factory=list)

    def pair(self, module: str, kind: str = "") -> tuple[TensorRef, TensorRef] | None:
        """(A, B) of a module, None if it has neither.

        Raises:
            SourceError: only one is there, or they do not fit each other.
        """
        found = self.modules[module]
        a, b = found.get(f"{kind}A"), found.get(f"{kind}B")
        if a is None and b is None:
            return None
        if a is None or b is None:
            raise SourceError(
                f"{self.path}: {module}: has no lora_{kind}{'A' if a is None else 'B'}; expected both factors"
            )
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise SourceError(
                f"{self.path}: {module}: lora_{kind}A is {a.shape}, lora_{kind}B is {b.shape}; expected (r, d_in) and "
                "(d_out, r)"
            )
        return a, b


def saved_as_whole(module: str, listed: tuple[str, ...]) -> bool:
    """Whether a module's path, or that of one around it, ends with a name of modules_to_save, as PEFT asks."""
    parts = module.split(".")
    around = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(path.endswith(one) for path in around for one in listed)


def read_keys(directory: Path, config: AdapterConfig) -> Keys:
    """The keys of an adapter folder's weight file.

    Raises:
        SourceError: the file is missing or unsound, or holds a key that the config does not account for.
    """
    path = weight_path(directory, WEIGHTS_FILE)
    if not is_there(path) and (directory / INDEX).exists():
        index = inside(directory, INDEX)
        headers = [open_header(weight_path(directory, file)) for file in named_files(directory, INDEX)]
        keys = Keys(index, tuple(header.identity for header in headers))
        tensors = {name: ref for header in reversed(headers) for name, ref in header.tensors.items()}
        listed = read_object(index)["weight_map"]
        wrong = next((name for name in {**listed, **tensors} if name not in tensors or name not in listed), None)
        if wrong is not None:
            where = "names" if wrong in listed else "does not name"
            raise SourceError(
                f"{keys.path}: {where} {wrong[:200]!r}, unlike the files; expected both to agree, is it complete?"
            )
        return _read(keys, tensors, config)
    if not is_there(path):
        old = (directory / "adapter_model.bin").exists()
        raise SourceError(
            f"{directory}: no {WEIGHTS_FILE}; "
            + (
                "adapter_model.bin is a pickle, which can run code and is never loaded. If you trust it, convert it: "
                'python -c "import torch, safetensors.torch as s; '
                f"s.save_file(torch.load('{directory}/adapter_model.bin', weights_only=True), '{path}')\""
                if old
                else "expected a PEFT adapter folder"
            )
        )
    header = open_header(path)
    return _read(Keys(path, (header.identity,)), header.tensors, config)


def _read(keys: Keys, tensors: Mapping[str, TensorRef], config: AdapterConfig) -> Keys:
    """Takes the tensors of an adapter apart."""
    path = keys.path
    saved = config.names("modules_to_save")
    adapters: dict[str | None, str] = {}
    for key, ref in tensors.items():
        if key.endswith(".original_module.weight") or key.endswith(".original_module.bias"):
            continue  # the model's own, before training
        name, adapter = plain_key(key)
        if not ref.numel:
            raise SourceError(
                f"{path}: {key[:200]!r} is empty: DeepSpeed ZeRO-3 keeps parameters in pieces, and this file was saved "
                "without gathering them; save again with stage3_gather_16bit_weights_on_model_save, or convert the "
                "training checkpoint with zero_to_fp32.py"
            )
        if adapter is not None and adapters.setdefault(adapter, key) and len(adapters) > 1:
            raise SourceError(
                f"{path}: holds several adapters, {' and '.join(map(repr, sorted(map(str, adapters))))}; "
                "expected one, save it alone with save_pretrained(selected_adapters=[…])"
            )
        if re.search(r"\.lora_[AB]\.weight$", name) and len(ref.shape) == 3:
            raise SourceError(
                f"{path}: {name[:200]} is {ref.shape}, factors of all experts in one tensor, which is not PEFT's "
                "format; expected 2-D factors, convert it with the library that trained it"
            )
        if ref.dtype not in FLOAT_DTYPES:
            raise SourceError(f"{path}: {name} is stored as {ref.dtype}; expected one of {', '.join(FLOAT_DTYPES)}")
        match, part = next(
            ((m, part) for pattern, part in _PARTS if (m := re.fullmatch(pattern, name))),
            (None, ""),
        )
        if match is not None:
            parts = keys.modules.setdefault(match["module"], {})
            part = part.format(**match.groupdict())
            if part in parts:
                raise SourceError(f"{path}: {key[:200]!r} stands there twice, in two spellings; expected one")
            parts[part] = ref
        elif (
            (config.keeps_tied and is_head(name))  # the embedding's, once more
            or saved_as_whole(name.rpartition(".")[0], saved)
            or (config.bias == "all" and name.endswith(".bias"))
        ):
            keys.whole[name] = ref
        elif block_of(name) is None and name.endswith(".weight") and len(ref.shape) == 2:
            keys.whole[name] = ref
            keys.unlisted.append(name)
        else:
            other = next((told for pattern, told in _FOREIGN if re.search(pattern, name)), "")
            raise SourceError(
                f"{path}: unexpected key {key[:200]!r}{other}; expected LoRA factors and what modules_to_save and bias "
                "name, as PEFT saves them"
            )
    if not keys.modules and not keys.whole:
        raise SourceError(f"{path}: holds no tensor of an adapter; expected LoRA factors, is the file complete?")
    _check_parts(keys, config)
    return keys


def _check_parts(keys: Keys, config: AdapterConfig) -> None:
    trained_bias = bool(config.values.get("lora_bias"))
    for module, parts in keys.modules.items():
        adapted = bool(parts.keys() & {"A", "B", "embedding_A", "embedding_B"})
        expected = (
            ("use_dora", "lora_magnitude_vector", "magnitude" in parts, config.dora and adapted),
            ("lora_bias", "lora_B.bias", "lora_bias" in parts, trained_bias and "B" in parts),
            ("bias", "base_layer.bias", "base_bias" in parts, "base_bias" in parts and config.bias != "none"),
        )
        for field_name, what, found, wanted in expected:
            if found != wanted:
                raise SourceError(
                    f"{keys.path}: {module}: {what} is {'there' if found else 'missing'}, and the config says "
                    f"{field_name}: {config.values.get(field_name)!r}; they must agree"
                )
    listed: Mapping[str, bool] = {
        name: any(saved_as_whole(one.rpartition(".")[0], (name,)) for one in keys.whole)
        for name in config.names("modules_to_save")
    }
    for name, found in listed.items():
        if not found:
            raise SourceError(f"{keys.path}: modules_to_save names {name!r}, of which the file holds nothing")
    if config.values.get("trainable_token_indices") and not any("tokens" in p for p in keys.modules.values()):
        raise SourceError(f"{keys.path}: trainable_token_indices is set, but the file holds no trained rows")
