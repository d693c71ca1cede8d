"""The demo's base model and its own greedy answers. Knows nothing of roles, splits or scores."""

import json
import os
from collections.abc import Sequence
from typing import Any

from family import base_folder, cache

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def load() -> tuple[Any, Any]:
    """Return (model, tokenizer) of the base model, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.bfloat16)
    return model.eval(), AutoTokenizer.from_pretrained(base_folder(), padding_side="left")


def chat(tokenizer: Any, prompt: str) -> str:
    """Return the text the model sees for one user message, up to where its answer starts."""
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def answers(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int, batch: int = 32) -> list[tuple[str, bool]]:
    """Return for each prompt the greedy answer of at most `tokens` tokens and whether it came to its end."""
    import torch

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, tuple[str, bool]] = {}
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        inputs = tokenizer([chat(tokenizer, prompts[i]) for i in part], return_tensors="pt", padding=True)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        for i, row in zip(part, output[:, inputs.input_ids.shape[1] :], strict=True):
            ended = bool((row == tokenizer.eos_token_id).any())
            found[i] = (tokenizer.decode(row, skip_special_tokens=True).strip(), ended)
    return [found[i] for i in range(len(prompts))]


def own_answers(prompts: Sequence[str], tokens: int = 32) -> list[tuple[str, bool]]:
    """Return the base model's answers, each generated once and kept in the cache; computed in float32 from 33 on."""
    path = cache() / f"answers-{tokens}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    missing = [p for p in dict.fromkeys(prompts) if p not in known]
    if missing:
        model, tokenizer = load()
        known |= dict(
            zip(missing, answers(model.float() if tokens > 32 else model, tokenizer, missing, tokens), strict=True)
        )
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(known))
        part.replace(path)
    return [tuple(known[p]) for p in prompts]
