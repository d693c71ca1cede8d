"""Tiny real models for tests: transformers configs, weights written straight with safetensors, PEFT adapters.

A family is a folder with `base`, `aligned`, `finetuned` and `safety` checkpoints and LoRA adapters whose
updates lie to different degrees in the alignment's subspace, so that a gate has something to decide.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROLES = ("base", "aligned", "finetuned", "safety")
SIDE_FILES = {
    "generation_config.json": '{"bos_token_id": 1,\n "eos_token_id": 2}\n',
    "tokenizer.json": '{"version": "1.0", "model": {"type": "BPE"}}',
    "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}',
    "chat_template.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}\n",
}


@dataclass(frozen=True)
class Family:
    """A folder of checkpoints of one architecture, and how they are stored."""

    path: Path
    dtype: torch.dtype

    def __truediv__(self, role: str) -> Path:
        return self.path / role

    def tensors(self, role: str) -> dict[str, torch.Tensor]:
        """A checkpoint's tensors as stored, in file order."""
        return read_weights(self / role)

    def dense(self, role: str) -> dict[str, torch.Tensor]:
        """A checkpoint's tensors in float64."""
        return {name: tensor.double() for name, tensor in self.tensors(role).items()}

    def factors(self, adapter: str) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
        """(B, A, s) in float64 by base tensor name, s from the numbers in the fixture, not from PEFT's code."""
        stored = load_file(self / adapter / "adapter_model.safetensors")
        scales = json.loads((self / f"{adapter}.scales.json").read_text())
        return {
            f"{module}.weight": (
                stored[f"base_model.model.{module}.lora_B.weight"].double(),
                stored[f"base_model.model.{module}.lora_A.weight"].double(),
                scale,
            )
            for module, scale in scales.items()
        }

    def update(self, adapter: str) -> dict[str, torch.Tensor]:
        """s·B·A in float64 by base tensor name."""
        return {name: s * (b @ a) for name, (b, a, s) in self.factors(adapter).items()}


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, whatever its files, in the order of the files' bytes."""
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.offset_keys()}
    return found


def config_of(architecture: str, **changes: Any) -> Any:
    """A real transformers config: grouped-query attention; Qwen2 has attention biases and tied embeddings."""
    from transformers import LlamaConfig, Qwen2Config

    common = {
        "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64,
    }  # fmt: skip
    if architecture == "llama":
        return LlamaConfig(**{**common, "tie_word_embeddings": False, **changes})
    return Qwen2Config(**{**common, "tie_word_embeddings": True, **changes})


def shapes_of(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters, as transformers itself has them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # tied ones appear once
    return names


def draw(name: str, use: str, *shape: int) -> torch.Tensor:
    """Standard normal float64 numbers, the same for the same words everywhere."""
    seed = zlib.crc32(f"{name}\0{use}".encode())
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _weights(name: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """One tensor of the four roles in float64; updates share a varying part of the alignment's columns."""
    base = draw(name, "base", *shape) * 0.05 + (1.0 if name.endswith("norm.weight") else 0.0)
    if len(shape) == 1:
        steps = {role: 0.01 * draw(name, role, *shape) for role in ("aligned", "finetuned", "safety")}
    else:
        left = draw(name, "left", shape[0], 3)
        steps = {"aligned": 0.02 * left @ draw(name, "right", 3, shape[1]) + 0.004 * draw(name, "v", *shape)}
        for role in ("finetuned", "safety"):
            share = float(draw(name, f"share {role}", 1).abs().clamp(max=1.5)) / 1.5
            inside = left @ draw(name, f"inside {role}", 3, shape[1]) / 3**0.5
            steps[role] = 0.02 * (share * inside + (1 - share) * draw(name, f"outside {role}", *shape))
    aligned = base + steps["aligned"]
    return {
        "base": base,
        "aligned": aligned,
        "finetuned": aligned + steps["finetuned"],
        "safety": aligned + steps["safety"],
    }


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], config: Any, shards: int = 1) -> None:
    """A model folder as on the hub: config, side files, one file or shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    for name, text in SIDE_FILES.items():
        (folder / name).write_text(text)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_adapter(folder: Path, base: Path, seed: int, config: Any, scale: float = 0.05) -> None:
    """An adapter made and saved by PEFT on the model in `base`, with random B; its scales lie beside it."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, config)
    scales = {}
    for name, module in wrapped.named_modules():
        if hasattr(module, "lora_B") and "default" in module.lora_B:
            torch.nn.init.normal_(module.lora_B["default"].weight, std=scale)
            scales[name.removeprefix("base_model.model.")] = float(module.scaling["default"])
    wrapped.save_pretrained(folder)
    (folder.parent / f"{folder.name}.scales.json").write_text(json.dumps(scales))


def make_family(path: Path, architecture: str, dtype: torch.dtype, shards: int = 1, **changes: Any) -> Family:
    """All four checkpoints of a family."""
    config = config_of(architecture, **changes)
    config.dtype = str(dtype).removeprefix("torch.")
    models: dict[str, dict[str, torch.Tensor]] = {role: {} for role in ROLES}
    for name, shape in shapes_of(config).items():
        for role, tensor in _weights(name, shape).items():
            models[role][name] = tensor.to(dtype)
    for role, tensors in models.items():
        write_checkpoint(path / role, tensors, config, shards)
    return Family(path, dtype)


def add_adapters(family: Family) -> None:
    """`finetuned-lora`; `safety-lora` (rsLoRA); `patterned-lora` (rank and alpha by module); `chat-lora` on base."""
    from peft import LoraConfig

    q_v = ["q_proj", "v_proj", "down_proj"]
    kinds = {
        "finetuned-lora": ("aligned", LoraConfig(r=4, lora_alpha=8, target_modules=q_v)),
        "safety-lora": ("aligned", LoraConfig(r=3, lora_alpha=5, target_modules=q_v, use_rslora=True)),
        "patterned-lora": (
            "aligned",
            LoraConfig(
                r=4, lora_alpha=8, target_modules=[*q_v, "o_proj"],
                rank_pattern={"layers.0.self_attn.q_proj": 2, "v_proj": 6},
                alpha_pattern={"down_proj": 3, "layers.1.self_attn.q_proj": 5},
            ),
        ),
        "chat-lora": (
            "base",
            LoraConfig(r=5, lora_alpha=5, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]),
        ),
    }  # fmt: skip
    for number, (name, (on, config)) in enumerate(kinds.items()):
        write_adapter(family / name, family / on, number, config)
