"""The mean of LoRA adapters, as one adapter whose rank is the sum of theirs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path


def write_mean(folders: Sequence[Path], into: Path, base: Path) -> None:
    """Writes the adapter whose update is the mean of the updates of others, exactly, by their factors side by side.

    What one seed makes an adapter lean to, another may not: the mean keeps what they have in common.

    Args:
        folders: Adapters of one base model.
        into: The folder of the mean.
        base: Folder of the base model.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    names = [f"part-{place}" for place in range(len(folders))]
    alone = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)  # the mean takes its dtype
    model = PeftModel.from_pretrained(alone, str(folders[0]), names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(str(folder), name)
    model.add_weighted_adapter(names, [1 / len(names)] * len(names), "mean", combination_type="cat")
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=".") as part:
        model.save_pretrained(part, selected_adapters=["mean"])
        (Path(part) / "mean").rename(into)
