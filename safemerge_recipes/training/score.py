"""Refusals of a loaded model with adapters added in memory, on the tuning split."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safemerge_recipes.evaluation.harness import evaluate
from safemerge_recipes.evaluation.separation import Sides
from safemerge_recipes.recipe.training import Choose
from safemerge_recipes.storage.files import MAX_BYTES, content_of

MAX_ADAPTER_BYTES = 1 << 32
"""Largest adapter read, in bytes."""


@contextlib.contextmanager
def with_adapters(model: Any, adapters: Sequence[Path]) -> Iterator[Any]:
    """The model with the sum of the adapters' updates, in its own dtype; as it was afterwards, byte for byte."""
    import torch
    from safetensors.torch import load

    own: dict[str, Any] = dict(model.named_parameters())
    updates: dict[str, Any] = {}
    for folder in adapters:
        config = json.loads(content_of(folder / "adapter_config.json", MAX_BYTES))
        factors = load(content_of(folder / "adapter_model.safetensors", MAX_ADAPTER_BYTES))
        for key in (key for key in factors if key.endswith(".lora_A.weight")):
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            update = factors[key.replace("lora_A", "lora_B")].float() @ factors[key].float()
            updates[name] = updates.get(name, 0) + config["lora_alpha"] / config["r"] * update
    before = {name: own[name].detach().clone() for name in updates}
    try:
        with torch.no_grad():
            for name, update in updates.items():
                own[name].copy_(own[name].float() + update.to(own[name].device))
        yield model
    finally:
        with torch.no_grad():
            for name, values in before.items():
                own[name].copy_(values)


def refusals(model: Any, tokenizer: Any, adapters: Sequence[Path], choose: Choose) -> Sides:
    """Which requests of the two tasks the model with the adapters refuses.

    Raises:
        CheckError: a task is unknown or cannot be scored.
    """
    tasks = (choose.task, choose.overrefusal_task)
    with with_adapters(model, adapters) as subject:
        scores = evaluate(subject, tasks, limit=choose.limit, tokenizer=tokenizer, auroc=False)
    return Sides(*(scores.metric(task, "refusal").outcomes for task in tasks))
