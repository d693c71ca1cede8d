"""Tiny model families for tests: real folders of a few kilobytes, with everything the engine reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HIDDEN, WIDE, VOCABULARY, BLOCKS = 24, 40, 32, 2
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": WIDE,
    "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}  # fmt: skip
MATRICES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
GATED = tuple(f"model.layers.{i}.{module}.weight" for i in range(BLOCKS) for module in MATRICES)

Tensors = dict[str, torch.Tensor]


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the tiny Llama."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(BLOCKS):
        found |= {f"model.layers.{i}.{module}.weight": shape for module, shape in MATRICES.items()}
        found |= {
            f"model.layers.{i}.{norm}.weight": (HIDDEN,) for norm in ("input_layernorm", "post_attention_layernorm")
        }
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def write_model(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A model folder."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def write_adapter(
    folder: Path, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], alpha: int, **config: Any
) -> Path:
    """A PEFT LoRA folder; `factors` maps a module to (A, B)."""
    folder.mkdir(parents=True)
    rank = next(iter(factors.values()))[0].shape[0]
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in factors})
    written = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": rank, "lora_alpha": alpha,
        "target_modules": targets, "inference_mode": True, "bias": "none", "fan_in_fan_out": False, **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return folder


def random_factors(seed: int, rank: int, size: float = 0.1) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """LoRA factors (A, B) for every matrix of the tiny Llama, float32."""
    draw = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{i}.{module}": (
            torch.randn(rank, d_in, generator=draw) * size,
            torch.randn(d_out, rank, generator=draw) * size,
        )
        for i in range(BLOCKS)
        for module, (d_out, d_in) in MATRICES.items()
    }


def random_model(seed: int, near: Mapping[str, torch.Tensor] | None = None, size: float = 0.02) -> Tensors:
    """Random float32 tensors, or `near` with random updates of its matrices."""
    draw = torch.Generator().manual_seed(seed)
    if near is None:
        return {name: torch.randn(shape, generator=draw) * 0.1 for name, shape in shapes().items()}
    return {
        name: tensor + torch.randn(tensor.shape, generator=draw) * size if name in GATED else tensor.clone()
        for name, tensor in near.items()
    }


@dataclass(frozen=True)
class Family:
    """Folders of a family and its tensors: full models and adapters on the aligned one."""

    root: Path
    base: Tensors
    aligned: Tensors
    finetuned: Tensors
    safety: Tensors
    finetuned_factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    safety_factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    alpha: int = 8
    rank: int = 4

    @property
    def scale(self) -> float:
        """s of both adapters."""
        return self.alpha / self.rank

    def v(self, name: str) -> torch.Tensor:
        """V, float64."""
        return self.aligned[name].double() - self.base[name].double()

    def lora(self, which: str, name: str) -> torch.Tensor:
        """Δ of the `finetuned` or `safety` adapter, float64."""
        factors = self.finetuned_factors if which == "finetuned" else self.safety_factors
        a, b = factors[name.removesuffix(".weight")]
        return self.scale * b.double() @ a.double()


def make_family(root: Path, dtype: torch.dtype = torch.float32) -> Family:
    """Folders base, aligned, finetuned, safety, finetuned-adapter and safety-adapter under `root`."""
    base = {name: tensor.to(dtype) for name, tensor in random_model(1).items()}
    aligned = {name: tensor.to(dtype) for name, tensor in random_model(2, base, 0.05).items()}
    finetuned = {name: tensor.to(dtype) for name, tensor in random_model(3, aligned).items()}
    safety = {name: tensor.to(dtype) for name, tensor in random_model(4, aligned).items()}
    for name, tensors in (("base", base), ("aligned", aligned), ("finetuned", finetuned), ("safety", safety)):
        write_model(root / name, tensors)
    factors = random_factors(5, 4), random_factors(6, 4)
    write_adapter(root / "finetuned-adapter", factors[0], 8)
    write_adapter(root / "safety-adapter", factors[1], 8)
    return Family(root, base, aligned, finetuned, safety, *factors)


FULL = "{base: base, aligned: aligned, finetuned: finetuned, safety: safety}"
ADAPTERS = "{base: base, aligned: aligned, finetuned: {adapter: finetuned-adapter}, safety: {adapter: safety-adapter}}"


def recipe_text(sources: str, gate: str, merge: str, rest: str = "") -> str:
    """A recipe with flow mappings for its parts."""
    return f"sources: {sources}\ngate: {gate}\nmerge: {merge}\n{rest}"


def run_recipe(directory: Path, text: str, *, memory: int = 2_000_000_000, workers: int = 2) -> tuple[Any, Tensors]:
    """Runs a recipe of that folder; returns what was prepared and the tensors that were written."""
    prepared = prepare_recipe(directory, text, memory=memory, workers=workers)
    from safemerge_recipes.pipeline import Silent, carry_out
    from safemerge_recipes.storage.digests import Digests

    number = len(list(directory.glob("out*")))
    carry_out(prepared, directory / f"out{number}", Digests(prepared.identities), Silent())
    written: Tensors = {}
    for path in sorted((directory / f"out{number}").glob("*.safetensors")):
        written |= load_file(path)
    return prepared, written


def prepare_recipe(directory: Path, text: str, *, memory: int = 2_000_000_000, workers: int = 2) -> Any:
    """Everything up to the first byte written."""
    from safemerge_recipes.pipeline import Silent, prepare, resolve
    from safemerge_recipes.recipe.loading import parse_recipe
    from safemerge_recipes.storage.workers import Resources

    loaded = parse_recipe(text, directory / "recipe.yaml")
    return prepare(resolve(loaded), Resources(workers, memory), Silent(), use_cache=False)
