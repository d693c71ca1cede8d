"""An aligned model whose every weight was trained, so that V has full rank.

`safemerge train-adapter` makes no such model. The rows, the template and the trainer are those of a training file; only
the adapter is left out.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safemerge_recipes.recipe.training import load_training
from safemerge_recipes.sources.trained import model_folders
from safemerge_recipes.storage.files import write_json
from safemerge_recipes.training.chat import example, load_tokenizer
from safemerge_recipes.training.plan import plan_training
from safemerge_recipes.training.trainer import arguments, load_model

RECORD = "train.json"


def train_all_weights(path: Path, folder: Path) -> None:
    """Trains all weights of a training file's model in float32 and writes the whole model, in float32 too.

    Some minutes for 135 M weights: a training that is cut short begins anew.

    Args:
        path: The training file; its `lora` says nothing here.
        folder: Gets a model that transformers loads, and the record of its training; there is none before.
    """
    from datasets import Dataset
    from trl import SFTTrainer

    plan = plan_training(load_training(path))
    schedule = plan.loaded.training.train
    full, _ = model_folders(plan.loaded)
    tokenizer = load_tokenizer(full.path, None, None, schedule)
    model = load_model(full.path, None, "float32", "cpu")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    config = arguments(schedule, tokenizer, model.device, part / "checkpoints", save_strategy="no", logging_steps=5)
    trainer: Any = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([example(row, schedule) for row in plan.rows]),
        processing_class=tokenizer,
    )
    trainer.train()
    shutil.rmtree(part / "checkpoints", ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    losses = [round(one["loss"], 4) for one in trainer.state.log_history if "loss" in one]
    record = {"settings": {"train": json.loads(schedule.model_dump_json())}, "rows": len(plan.rows), "losses": losses}
    write_json(part / RECORD, record)
    part.rename(folder)
