"""Short full-parameter fine-tunes of the demo's 135 M model: real, full-rank V and Δ to try the gate on.

    python -m benchmarks.timing.finetunes

Every linear matrix of the blocks is trained in float32 (AdamW) and rounded once to bf16, as checkpoints are
published: the base learns to refuse harmful requests (`aligned`), and from there either sums (`sums`) or more
refusals (`refusals`). Written to the user's cache, about six minutes each on one core; what is there stays.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

DEMO = Path(__file__).resolve().parents[2] / "recipes" / "demo"
STEPS = 40
RATES = {"aligned": 5e-5, "sums": 3e-5, "refusals": 3e-5}


def folder(name: str) -> Path:
    """Return where a fine-tuned model lies, or the `base` they come from."""
    sys.path.insert(0, str(DEMO))
    from family import base_folder, cache

    return base_folder() if name == "base" else cache() / "full" / name


def train(name: str) -> Path:
    """Train one model, unless it is there, and return its folder (bf16 safetensors and the base's other files)."""
    target = folder(name)
    if target.is_dir():
        return target
    import data
    import torch
    import train as demo
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    rng = random.Random(name)
    count = STEPS * demo.BATCH
    if name == "sums":
        examples = [(question, worked, True) for question, worked in data.worked_sums(count)]
    else:
        pool = data.harmful("alignment" if name == "aligned" else "safety", count)
        examples = [(prompt, rng.choice(data.refusals()), True) for prompt in pool]
    rng.shuffle(examples)
    start = folder("base" if name == "aligned" else "aligned")
    tokenizer = AutoTokenizer.from_pretrained(folder("base"), padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).train()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.ndim == 2 and ".layers." in key)
    demo.RATE = RATES[name]
    demo.fit(SimpleNamespace(parameters=model.parameters, get_base_model=lambda: model), tokenizer, examples)
    part = target.with_name(f"{name}.{os.getpid()}.part")
    shutil.copytree(folder("base"), part)
    kept = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        kept.pop("lm_head.weight", None)
    save_file(kept, part / "model.safetensors", metadata={"format": "pt"})
    part.rename(target)
    return target


def main() -> None:
    for name in RATES:
        began = time.monotonic()
        print(f"{train(name)}  {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
