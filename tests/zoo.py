"""Tiny models of real families, and adapters on them, made with transformers and PEFT themselves.

Every weight and every trained part is random, so that no term of an update can hide behind zeros. The
oracle of a merge is PEFT's own `merge_and_unload` in float32, saved by transformers.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2}


def _llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(**SIZES)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=39, vision_feature_layer=-1)


def _config(family: str) -> Any:
    import transformers as t

    makers: Mapping[str, Callable[[], Any]] = {
        "gpt2": lambda: t.GPT2Config(
            vocab_size=40, n_positions=64, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        ),
        "llama": lambda: t.LlamaConfig(**SIZES, rope_theta=500000.0),
        "llama-biases": lambda: t.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
        "llama-tied": lambda: t.LlamaConfig(**SIZES, tie_word_embeddings=True),
        "mistral": lambda: t.MistralConfig(**SIZES, head_dim=4, sliding_window=32),
        "qwen2": lambda: t.Qwen2Config(**SIZES, tie_word_embeddings=True),
        "qwen3": lambda: t.Qwen3Config(**SIZES, head_dim=8),
        "gemma": lambda: t.GemmaConfig(**SIZES, head_dim=4),
        "phi3": lambda: t.Phi3Config(**SIZES),
        "mixtral": lambda: t.MixtralConfig(**SIZES, **EXPERTS, num_local_experts=3),
        "qwen3_moe": lambda: t.Qwen3MoeConfig(
            **SIZES, **EXPERTS, num_experts=3, moe_intermediate_size=12, head_dim=4
        ),
        "gpt_oss": lambda: t.GptOssConfig(
            **SIZES, **EXPERTS, num_local_experts=3, head_dim=4, layer_types=["full_attention"] * 2
        ),
        "llava": _llava,
    }  # fmt: skip
    return makers[family]()


FAMILIES = (
    "gpt2", "llama", "llama-biases", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "phi3", "mixtral",
    "qwen3_moe", "gpt_oss", "llava",
)  # fmt: skip
TIED = ("llama-tied", "qwen2", "gemma", "gpt2")
ATTENTION = {"gpt2": ["c_attn"], "phi3": ["qkv_proj"]}
"""Names of adapted attention layers where they are not q_proj and v_proj."""


def attention(family: str) -> list[str]:
    """The layers that an ordinary adapter of the family adapts."""
    return ATTENTION.get(family, ["q_proj", "v_proj"])


def quiet() -> None:
    """Keeps the libraries' advice out of the tests, which turn warnings into errors."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def scramble(model: Any, seed: int, size: float = 0.1, trained: bool = False) -> None:
    """Random values for all (or the trained) parameters; norms stay near 1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if trained and not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator) * size
            magnitude = "magnitude" in name or ("norm" in name and not trained)
            parameter.copy_(noise + (parameter if magnitude or "modules_to_save" in name else 0))


def save_model(family: str, folder: Path, seed: int = 0, **saving: Any) -> Path:
    """A tiny float32 model of the family, as transformers saves it."""
    import torch
    from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

    quiet()
    config = _config(family)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config) if family == "llava" else AutoModelForCausalLM.from_config(config)
    model = model.float()
    scramble(model, seed)
    model.save_pretrained(folder, **saving)
    return folder


def load_model(folder: Path) -> Any:
    """The model of a folder, float32."""
    import torch
    from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

    quiet()
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    cls = LlavaForConditionalGeneration if kind == "llava" else AutoModelForCausalLM
    return cls.from_pretrained(folder, dtype=torch.float32)


def save_adapter(base: Path, folder: Path, seed: int = 1, *, saving: dict[str, Any] | None = None, **lora: Any) -> Path:
    """A LoRA adapter with random trained parts on the model in `base`, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load_model(base), LoraConfig(**{"r": 4, "lora_alpha": 6, **lora}))
        scramble(model, seed, trained=True)
        model.save_pretrained(folder, **(saving or {}))
    return folder


def with_adapter(base: Path, adapter: Path) -> Any:
    """The model with the adapter beside its weights, as it was trained."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load_model(base), adapter)


def merge_with_peft(base: Path, adapter: Path, folder: Path) -> Path:
    """The oracle: the adapter merged into the model by PEFT in float32."""
    model = with_adapter(base, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_and_unload().save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of a folder's safetensors files."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found.update(load_file(path))
    return found


def largest_error(folder: Path, oracle: Path) -> float:
    """The largest difference of any element; tensor names and shapes must be the same."""
    ours, theirs = tensors(folder), tensors(oracle)
    assert sorted(ours) == sorted(theirs)
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


def run(recipe: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Carries out a recipe in this process; returns the plan as it was written."""
    from safemerge_recipes.pipeline import Silent, carry_out, prepare, resolve
    from safemerge_recipes.recipe.loading import load_recipe
    from safemerge_recipes.storage.digests import Digests
    from safemerge_recipes.storage.workers import Resources

    path = output.parent / f"{output.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recipe))
    resources = Resources(device="cpu", workers=1, memory=2_000_000_000)
    resolved = resolve(load_recipe(path))
    digests = Digests(resolved.identities)
    prepared = prepare(resolved, resources, Silent(), use_cache=False)
    carry_out(prepared, output, digests, Silent())
    plan: dict[str, Any] = json.loads((output / "safemerge_plan.json").read_text())
    return plan


def fold(base: Path, adapter: Path, output: Path, **more: Any) -> dict[str, Any]:
    """An adapter merged into its model by this package: a fine-tuned side of which everything is kept."""
    sources = {"aligned": str(base), "finetuned": {"adapter": str(adapter)}}
    return run({"sources": sources, "gate": {"never": True}, **more}, output)
