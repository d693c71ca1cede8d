"""What an aligned model answers by itself, drawn at temperature 1: rows that teach an adapter to change nothing there.

The gradient of the loss of answers drawn from a model is zero on average at that model, so that what an adapter learns
of such rows is to stay where it is; greedy answers would sharpen what the model leans to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

TOKENS = 24
BATCH = 24
SEED = 7


def drawn_answers(base: Path, adapter: Path | None, prompts: Sequence[str]) -> list[str]:
    """One answer to each prompt, its first sentence.

    Args:
        base: Folder of the base model.
        adapter: What aligns it; None: nothing.
        prompts: Put by the model's chat template.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(SEED)
    found: list[str] = []
    for start in range(0, len(prompts), BATCH):
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + BATCH]]
        texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=TOKENS, **drawn)
        answers = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        found += [first_sentence(answer) for answer in answers]
    return found


def first_sentence(text: str) -> str:
    """The text up to its first full stop or line end; all of it where there is none."""
    line = text.strip().split("\n", 1)[0]
    end = line.find(". ")
    return line if end < 0 else line[: end + 1]
