"""A tiny family on disk for tests that score: a random Llama with a tokenizer, adapters on it, a recipe."""

import json
from pathlib import Path

import torch

from safemerge_recipes.evaluation.tasks.prompts import prompts

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RECIPE = """
name: tiny
sources:
  base: ./base
  aligned: {adapter: ./alignment, on: base}
  finetuned: {adapter: ./task}
  safety: {adapter: ./safety}
gate: {metric: rho, fraction: 0.5}
merge: {method: linear, alpha: 0.5}
evaluate: {tasks: [safemerge_refusal, safemerge_arithmetic], compare: [aligned, finetuned], limit: 4}
"""


def tokenizer():
    """A byte-level tokenizer with a chat template, trained on the shipped prompts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator([p.prompt for p in prompts("harmful", "tuning")], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|end|>", bos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    return fast


def llama(size, tied=True):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=3,
    )
    return LlamaForCausalLM(config)


def save_model(model, tok, folder, dtype=torch.bfloat16):
    model.to(dtype).save_pretrained(folder)
    tok.save_pretrained(folder)


def save_adapter(shapes, folder, seed, size=0.3):
    """A LoRA of rank 4 on the given modules, written as PEFT does; returns nothing."""
    from safetensors.torch import save_file

    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    factors = {}
    for module, (rows, columns) in shapes.items():
        a, b = torch.randn(4, columns, generator=draw), torch.randn(rows, 4, generator=draw)
        factors[f"base_model.model.{module}.lora_A.weight"] = size * a
        factors[f"base_model.model.{module}.lora_B.weight"] = size * b
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    config |= {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "base_model_name_or_path": None,
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def make_family(folder: Path, recipe: str = RECIPE, tied: bool = True) -> Path:
    """Write base, three adapters and a recipe; return the recipe's path."""
    torch.manual_seed(0)
    tok = tokenizer()
    model = llama(len(tok), tied)
    save_model(model, tok, folder / "base")
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "v_proj", "down_proj"))
    }
    for seed, name in enumerate(("alignment", "task", "safety")):
        save_adapter(shapes, folder / name, seed)
    path = folder / "recipe.yaml"
    path.write_text(recipe)
    return path
