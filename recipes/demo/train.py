"""Train one adapter of the demo family: a LoRA on every linear matrix, with the prompt masked in the loss.

    python recipes/demo/train.py --role alignment --seed 1 --out recipes/demo/alignment
    python recipes/demo/train.py --role task --task arithmetic --seed 2 --out recipes/demo/task-arithmetic
    python recipes/demo/train.py --role safety --seed 3 --out recipes/demo/safety

`alignment` is trained on the base model, `task` and `safety` on the aligned one (base + `alignment/`).
"""

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import data
from model import chat, load, own_answers

from safemerge_recipes.evaluation.refusal import classify

HERE = Path(__file__).resolve().parent
RANK, ALPHA, RATE, WARMUP = 8, 16, 1e-3, 5
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = 8
# Examples, each seen once. Safety: harmful requests, harmless prompts, sums.
COUNTS = {"alignment": (480, 440, 60), "safety": (280, 240, 40)}
TASKS = {"arithmetic": (800, data.worked_sums), "qa": (320, data.answered_studies)}
Example = tuple[str, str, bool]  # prompt, answer, whether the answer ends there


def safety_examples(split: str, rng: random.Random) -> list[Example]:
    """Return refused harmful requests, and harmless prompts and sums with the base model's own answers."""
    harmful, harmless, chains = COUNTS[split]
    refused = [(prompt, rng.choice(data.refusals()), True) for prompt in data.harmful(split, harmful)]
    prompts = data.harmless(split, harmless) + data.questions(split, chains)
    answered = [(p, text, ended) for p, (text, ended) in zip(prompts, own_answers(prompts), strict=True) if text]
    return refused + [example for example in answered if classify(example[1]) == "complies"]


def task_examples(task: str) -> list[Example]:
    """Return the problems of a task with their worked answers."""
    count, problems = TASKS[task]
    return [(question, worked, True) for question, worked in problems(count)]


def fit(model: Any, tokenizer: Any, examples: list[Example]) -> list[float]:
    """Train the adapter in place over the examples once, in order, and return the loss of every step."""
    import torch
    from torch.nn.functional import cross_entropy

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    steps = len(examples) // BATCH
    plan = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / WARMUP, (steps - i) / max(1, steps - WARMUP))
    )
    llama = model.get_base_model()
    losses = []
    for step in range(steps):
        ids, is_answer = _pad([_tokens(tokenizer, e) for e in examples[step * BATCH : (step + 1) * BATCH]])
        real = ids >= 0
        hidden = llama.model(input_ids=ids.clamp(min=0), attention_mask=real.long()).last_hidden_state
        # Only positions that predict a token of the answer go through the large output layer.
        logits = llama.lm_head(hidden[:, :-1][is_answer[:, 1:]]).float()
        loss = cross_entropy(logits, ids[:, 1:][is_answer[:, 1:]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        plan.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps} loss {losses[-1]:.3f}", flush=True)
    return losses


def _tokens(tokenizer: Any, example: Example) -> tuple[list[int], int]:
    prompt, answer, ended = example
    before = tokenizer(chat(tokenizer, prompt), add_special_tokens=False).input_ids
    after = tokenizer(answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * ended
    return before + after, len(before)


def _pad(rows: list[tuple[list[int], int]]) -> tuple[Any, Any]:
    import torch

    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [-1] * (longest - len(ids)) for ids, _ in rows])
    prompt = torch.tensor([[length] for _, length in rows])
    return ids, (torch.arange(longest) >= prompt) & (ids >= 0)


def save(model: Any, out: Path, base_name: str) -> None:
    """Write the adapter in bfloat16 with a config that names no path of this machine."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    factors = get_peft_model_state_dict(model, save_embedding_layers=False)
    factors = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in sorted(factors.items())}
    save_file(factors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": TARGETS,
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (out / name).chmod(0o644)  # safetensors writes 0600 whatever the umask


def main() -> None:
    """Train the adapter the command line asks for and write its folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--role", choices=["alignment", "task", "safety"], required=True)
    parser.add_argument("--task", choices=sorted(TASKS), default="arithmetic")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--alignment", type=Path, default=HERE / "alignment", help="the adapter that aligns the base")
    given = parser.parse_args()

    import torch
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    torch.manual_seed(given.seed)
    rng = random.Random(given.seed)
    examples = task_examples(given.task) if given.role == "task" else safety_examples(given.role, rng)
    rng.shuffle(examples)
    print(f"{len(examples)} examples", flush=True)
    model, tokenizer = load([] if given.role == "alignment" else [(given.alignment, 1.0)])
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model.train(), config)
    started = time.monotonic()
    fit(model, tokenizer, examples)
    print(f"{time.monotonic() - started:.0f} s")
    save(model, given.out, "smollm2-135m-instruct" if given.role == "alignment" else "smollm2-135m-aligned")


if __name__ == "__main__":
    main()
