"""What a model answers to a task's prompts by itself: rows that teach an adapter to change nothing there.

Answers are drawn at temperature 1 from the model that the adapter will be trained on. The gradient of the loss of such
answers is zero on average at that model, so that what is learned of them is to stay where it is; greedy answers would
sharpen what the model leans to, and right answers would teach the task a second time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import CheckError, PlanError, RecipeError
from safemerge_recipes.events import Listener, Step, ignore
from safemerge_recipes.recipe.training import LoadedTraining, Schedule
from safemerge_recipes.sources.checkpoint import open_checkpoint
from safemerge_recipes.sources.peft.adapter import open_adapter
from safemerge_recipes.sources.trained import model_folders
from safemerge_recipes.training.chat import example
from safemerge_recipes.training.rows import Row, read_rows
from safemerge_recipes.training.run import base_name, model_of, tokenizer_of
from safemerge_recipes.training.trainer import check_extra

COUNT = 120
"""Most prompts that are answered."""
TOKENS = 24
"""Of an answer, before it is cut after its first sentence."""
BATCH = 24


def own_rows(task: Path, loaded: LoadedTraining, on_event: Listener = ignore) -> list[Row]:
    """Rows of a task with the answers of a training file's model in place of their own.

    Args:
        task: The task's rows, of which at most `COUNT` are taken, by the hash of their text; none that says harmful.
        loaded: Whose `model`, template, device, dtype and seed are used.
        on_event: Told of every batch.

    Raises:
        RecipeError: the file holds no rows.
        PlanError: a library is missing, or memory.
        SourceError, CheckError: the model cannot be loaded.
    """
    asked = [row for row in read_rows([task]) if row.kind != "harmful"]
    rows = sorted(asked, key=lambda row: hashlib.sha256(row.key.encode()).digest())[:COUNT]
    if not rows:
        raise RecipeError(f"{task}: found no rows; expected those of the task, whose prompts the model answers itself")
    check_extra()
    full, adapter = model_folders(loaded)
    open_checkpoint(full.path)  # what is cut short is told here, as before a training
    if adapter is not None:
        open_adapter(adapter.path)
    name, schedule = base_name(full, adapter), loaded.training.train
    tokenizer, model = tokenizer_of(loaded), model_of(loaded)[0]
    on_event(Step(name, 1, 1, "own answers", 0, len(rows)))
    answers: list[str] = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        answers += drawn_answers(model, tokenizer, part, schedule, schedule.seed + start)
        on_event(Step(name, 1, 1, "own answers", len(answers), len(rows)))
    pairs = zip(rows, answers, strict=True)
    return [replace(row, answer=answer, kind="task") for row, answer in pairs if answer]


def drawn_answers(model: Any, tokenizer: Any, rows: Sequence[Row], schedule: Schedule, seed: int) -> list[str]:
    """An answer to each row's prompt, drawn at temperature 1 and cut after its first sentence.

    Args:
        model: A causal model of transformers, on its device.
        tokenizer: Its tokenizer; pads on the left from here on.
        rows: One batch.
        schedule: Says how prompts are put to the model.
        seed: Of the draw.

    Raises:
        CheckError: the chat template fails on a row.
        PlanError: the device's memory does not suffice.
    """
    import torch

    prompts = [example(row, schedule)["prompt"] for row in rows]
    try:
        texts = [
            one
            if isinstance(one, str)
            else tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True)
            for one in prompts
        ]
    except Exception as error:  # a template is a stranger's program
        raise CheckError(f"the chat template fails on rows of the task, from {rows[0].where} on: {error}") from None
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}  # not the model's
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed % 2**32)
        try:
            output = model.eval().generate(
                **inputs, max_new_tokens=TOKENS, do_sample=True, pad_token_id=tokenizer.pad_token_id, **plain
            )
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):  # as torch says of a processor's, too
                raise
            longest = inputs.input_ids.shape[1]
            raise PlanError(f"out of memory with {len(rows)} prompts of up to {longest} tokens; shorten them") from None
    answers = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [first_sentence(answer) for answer in answers]


def first_sentence(text: str) -> str:
    """The text up to its first full stop or line end; all of it where there is none."""
    line = text.strip().split("\n", 1)[0].strip()
    end = line.find(". ")
    return line if end < 0 else line[: end + 1]
