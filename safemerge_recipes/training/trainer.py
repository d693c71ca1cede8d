"""One training run by TRL's SFTTrainer with a PEFT LoRA: checkpoints, going on after a kill, the adapter's files.

Rows go in as conversations split into prompt and completion, so that the loss covers the answer whatever the model's
chat template. Knows neither files of rows nor scores.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import CheckError, PlanError, SourceError, WriteError
from safemerge_recipes.evaluation.quiet import quiet
from safemerge_recipes.events import Listener, TrainingStep, ignore
from safemerge_recipes.recipe.training import Lora, Schedule
from safemerge_recipes.storage.files import MAX_BYTES, content_of, write_file
from safemerge_recipes.training.chat import example, turn_end
from safemerge_recipes.training.rows import Row
from safemerge_recipes.training.steps import steps_of


def check_extra() -> None:
    """Raises PlanError where the libraries that train are not installed."""
    import importlib.util

    missing = [
        name for name in ("torch", "transformers", "peft", "trl", "datasets") if not importlib.util.find_spec(name)
    ]
    if missing:
        raise PlanError(f"train-adapter needs {', '.join(missing)}; try `pip install 'safemerge-recipes[train]'`")


def load_model(full: Path, adapter: Path | None, dtype: str, device: str) -> Any:
    """The model to be trained on; an adapter on it is merged in the model's own dtype while that is float32.

    Args:
        full: a folder with a checkpoint in safetensors.
        adapter: a PEFT adapter on it, or None.
        dtype: `float32` or `bfloat16`, of the frozen weights.
        device: a torch device.

    Raises:
        CheckError: transformers or PEFT cannot load it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    own = torch.float32 if adapter else getattr(torch, dtype)
    try:
        with quiet(False), _kept_quiet():
            model = AutoModelForCausalLM.from_pretrained(full, dtype=own)
            if adapter is not None:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        if adapter is not None:
            model = model.to(getattr(torch, dtype))
            for module in model.modules():  # what PEFT leaves behind would be taken for a model that has adapters
                if hasattr(module, "_hf_peft_config_loaded"):
                    module._hf_peft_config_loaded = False
            if hasattr(model, "peft_config"):
                del model.peft_config
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckError(f"{full}: cannot be loaded for training ({type(error).__name__}: {first})") from None
    return model.to(device)


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    lora: Lora,
    schedule: Schedule,
    folder: Path,
    base_name: str,
    on_event: Listener = ignore,
) -> dict[str, Any]:
    """Trains one adapter and writes its files into the folder; goes on from a checkpoint that is there.

    Args:
        model: The frozen model, on its device.
        tokenizer: With a chat template, unless the rows are put into Alpaca's.
        rows: In the order of the first epoch's draw; shuffled by the seed.
        lora: The adapter's shape.
        schedule: Rates, steps, seed.
        folder: Gets `adapter_model.safetensors` and `adapter_config.json`; `checkpoints/` while it goes on.
        base_name: What the adapter's config says of its base.
        on_event: Is told after every few steps.

    Returns:
        What happened: steps, loss (mean of the last tenth), seconds, resumed (steps that were there).

    Raises:
        CheckError: the loss or the gradient is no number.
        PlanError: the device's memory does not suffice.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTTrainer

    device = next(model.parameters()).device
    steps = steps_of(len(rows), schedule)
    losses: list[float] = []

    class _Tell(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not logs or "loss" not in logs:
                return
            losses.append(float(logs["loss"]))
            for name, value in (("loss", losses[-1]), ("gradient's norm", float(logs.get("grad_norm", 0.0)))):
                if not math.isfinite(value):
                    raise CheckError(_broken(name, value, state.global_step, checkpoints))
            on_event(TrainingStep(len(rows), state.global_step, steps, losses[-1]))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % schedule.save_steps == 0 or state.global_step == state.max_steps:
                control.should_log = True  # before it is saved, so that nothing kept follows a loss that is no number

    checkpoints = folder / "checkpoints"
    last = _last_checkpoint(checkpoints)
    every = max(1, min(steps // 20, 10))
    config = arguments(schedule, tokenizer, device, checkpoints, save_strategy="steps", logging_steps=every)
    shape = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets),
        task_type="CAUSAL_LM", bias="none",
    )  # fmt: skip
    started = time.monotonic()
    examples = [example(row, schedule) for row in rows]
    try:
        with _kept_quiet():
            trainer = SFTTrainer(
                model=model, args=config, train_dataset=Dataset.from_list(examples), processing_class=tokenizer,
                peft_config=shape, callbacks=[_Tell()],
            )  # fmt: skip
            trainer.remove_callback(_printer())
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    except (torch.OutOfMemoryError, MemoryError):
        raise PlanError(_too_large(schedule)) from None
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # as torch says of a processor's memory
            raise
        raise PlanError(_too_large(schedule)) from None
    except KeyboardInterrupt:
        raise WriteError(f"stopped; {folder} keeps the last checkpoint, the same command goes on from there") from None
    _save(trainer.model, lora, folder, base_name, schedule.save_dtype)
    trainer.model.unload()  # the model is as it was, for the next size
    shutil.rmtree(checkpoints, ignore_errors=True)
    recent = losses[-max(1, len(losses) // 10) :]
    return {
        "rows": len(rows),
        "steps": int(trainer.state.global_step),
        "loss": round(sum(recent) / len(recent), 4) if recent else None,
        "losses": [round(loss, 4) for loss in losses],
        "seconds": round(time.monotonic() - started, 1),
        "resumed": int(last.name.partition("-")[2]) if last else 0,
    }


def arguments(schedule: Schedule, tokenizer: Any, device: Any, checkpoints: Path, **more: Any) -> Any:
    """TRL's SFTConfig of a schedule: float32 arithmetic, no bars, checkpoints in the folder.

    Args:
        schedule: Rates, steps, seed.
        tokenizer: Whose template says how a turn ends.
        device: The model's torch device.
        checkpoints: The folder.
        more: Further fields of SFTConfig.
    """
    from trl import SFTConfig

    with _kept_quiet():
        return SFTConfig(
            output_dir=str(checkpoints), per_device_train_batch_size=schedule.micro,
            gradient_accumulation_steps=schedule.batch // schedule.micro, num_train_epochs=schedule.epochs,
            learning_rate=schedule.learning_rate, lr_scheduler_type=schedule.schedule,
            warmup_steps=schedule.warmup_steps,
            weight_decay=0.0, max_grad_norm=1.0, seed=schedule.seed % 2**32, data_seed=schedule.seed % 2**32,
            max_length=schedule.max_length, packing=False, completion_only_loss=schedule.loss_on == "answer",
            eos_token=turn_end(tokenizer) if schedule.template == "chat" else None,
            gradient_checkpointing=schedule.gradient_checkpointing, bf16=False, fp16=False,
            use_cpu=device.type == "cpu", dataloader_pin_memory=False,
            logging_nan_inf_filter=False, save_steps=schedule.save_steps, save_total_limit=1, report_to=[],
            disable_tqdm=True, **more,
        )  # fmt: skip


def _broken(name: str, value: float, step: int, checkpoints: Path) -> str:
    last = _last_checkpoint(checkpoints)
    kept = f"{last.name} before it is kept" if last else "there is no checkpoint before it"
    return f"step {step}: the {name} is {value}; {kept}. Try a lower train.learning_rate, or train.dtype: float32"


def _too_large(schedule: Schedule) -> str:
    return (
        f"out of memory with {schedule.micro} rows of up to {schedule.max_length} tokens at once; lower "
        "train.micro_batch or train.max_length, or say `train: {gradient_checkpointing: true}`"
    )


_NEEDED = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
"""Files without which training would not go on, or go on to other bytes."""


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; others are removed."""
    sound: Path | None = None
    for place in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.partition("-")[2] or 0)):
        try:
            json.loads(content_of(place / "trainer_state.json", MAX_BYTES))  # the last file that is written
            for name in _NEEDED:  # a removal that was cut short leaves some of them
                os.stat(place / name)
            sound = place
        except (OSError, SourceError, ValueError):
            shutil.rmtree(place, ignore_errors=True)
    return sound


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback


@contextlib.contextmanager
def _kept_quiet() -> Iterator[None]:
    """Without the bars and warnings of the libraries; the warnings that matter are given before."""
    import datasets
    import transformers

    bars = datasets.are_progress_bars_disabled()
    level = transformers.logging.get_verbosity()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _save(model: Any, lora: Lora, folder: Path, base_name: str, dtype: str) -> None:
    """Writes the adapter's two files; its config names no path of this machine."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    factors = get_peft_model_state_dict(model, save_embedding_layers=False)
    kept = {key: value.detach().to("cpu", getattr(torch, dtype)).contiguous() for key, value in sorted(factors.items())}
    config = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "peft_type": "LORA",
        "r": lora.r,
        "target_modules": list(lora.targets),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    write_file(folder / "adapter_model.safetensors", save(kept, metadata={"format": "pt"}))
    write_file(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
