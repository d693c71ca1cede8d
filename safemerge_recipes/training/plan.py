"""What a training file comes to, before anything is trained: rows, steps, memory, the key, and what speaks against it.

Reads the rows and the headers of the model; imports no torch. Everything that is wrong with the data stops here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import PlanError, RecipeError, SourceError
from safemerge_recipes.evaluation.refusal import classify
from safemerge_recipes.evaluation.tasks.prompts import prompts
from safemerge_recipes.recipe.training import LoadedTraining, Rows
from safemerge_recipes.sources.checkpoint import open_checkpoint
from safemerge_recipes.sources.model_config import setting
from safemerge_recipes.sources.peft.adapter import open_adapter
from safemerge_recipes.sources.trained import data_files, device_class, model_folders, trained_adapter
from safemerge_recipes.storage.files import MAX_BYTES, text_of
from safemerge_recipes.training.rows import Kind, Near, Row, nested, read_rows, with_kind, without_copies
from safemerge_recipes.training.steps import steps_of

_SPEED = {"cpu": 6e10, "cuda": 8e13}
"""Floating-point operations a second that training may get, very roughly: one busy core, one data-centre GPU."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What will be trained. `folder` is where the adapter lies already, or None."""

    loaded: LoadedTraining
    key: str
    folder: Path | None
    rows: tuple[Row, ...]
    sizes: tuple[int, ...]
    dropped: int
    """Rows left out as near copies of others."""
    targets: int
    """Matrices that get an adapter."""
    parameters: int
    """Of the adapter."""
    model_parameters: int
    memory: int
    """Projected peak in bytes, where the training is done."""
    minutes: float
    """Very rough."""
    warnings: tuple[str, ...]

    def kinds(self, size: int | None = None) -> dict[str, int]:
        """Rows of each kind among the first `size`."""
        found = [row.kind or "task" for row in self.rows[:size]]
        return {kind: found.count(kind) for kind in ("harmful", "harmless", "task") if kind in found}

    def steps(self) -> dict[int, int]:
        """Optimizer steps of every size."""
        return {size: steps_of(size, self.loaded.training.train) for size in self.sizes}

    def as_json(self) -> dict[str, Any]:
        """The plan as `--json` prints it."""
        return {
            "key": self.key,
            "trained": self.folder is not None,
            "adapter": str(self.folder) if self.folder else None,
            "rows": {str(size): self.kinds(size) for size in self.sizes},
            "near_copies_dropped": self.dropped,
            "steps": {str(size): steps for size, steps in self.steps().items()},
            "matrices": self.targets,
            "parameters": self.parameters,
            "peak_memory": self.memory,
            "minutes": round(self.minutes, 1),
            "settings": self.loaded.training.model_dump(mode="json", exclude_none=True),
            "warnings": list(self.warnings),
        }


def plan_training(loaded: LoadedTraining, max_memory: int | None = None) -> TrainingPlan:
    """The plan of a training file.

    Raises:
        RecipeError: the rows will not do; says which.
        SourceError: the model or the data are missing, or the model is one that is not read here.
        PlanError: it takes more memory than `max_memory` bytes.
    """
    training = loaded.training
    key, folder = trained_adapter(loaded)
    full, adapter = model_folders(loaded)
    checkpoint = open_checkpoint(full.path)
    if adapter is not None:
        open_adapter(adapter.path)
    shapes = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    adapted = _adapted(shapes, training.lora.targets, loaded)
    rows, dropped, warnings = _rows(loaded)
    sizes = training.data.sizes or (len(rows),)
    if sizes[-1] > len(rows):
        raise RecipeError(
            f"{loaded.path}: data.sizes: {sizes[-1]} rows are asked for and {len(rows)} are there ({_mixture(rows)}, "
            f"harmless_share {training.data.share:g}); lower sizes, or add rows"
        )
    tail = rows[sizes[-1] :]
    rows = rows[: sizes[-1]]
    if training.method == "safeinstruct":
        rows = [*rows, *(row for row in tail if row.kind == "task")]
    parameters = sum(training.lora.r * sum(shape) for shape in adapted.values())
    total = sum(math.prod(shape) for shape in shapes.values())
    device = device_class(training.train.device)
    longest = min(training.train.max_length, max(len(row.prompt) + len(row.answer) for row in rows) // 2 + 40)
    memory = _memory(checkpoint.config, total, parameters, longest, training.train, device)
    if max_memory is not None and memory > max_memory:
        raise PlanError(
            f"{loaded.path}: about {memory / 1e9:.1f} GB are needed, {max_memory / 1e9:.1f} GB allowed; lower "
            f"train.micro_batch (now {training.train.micro}) or train.max_length, or say "
            "`train: {gradient_checkpointing: true}`"
        )
    tokens = sum((len(row.prompt) + len(row.answer)) / 4 + 30 for row in rows) / len(rows)
    seen = sum(steps_of(size, training.train) for size in sizes) * training.train.batch
    minutes = 4 * total * tokens * seen / _SPEED[device] / 60
    return TrainingPlan(
        loaded, key, folder, tuple(rows), tuple(sizes), dropped, len(adapted), parameters, total, memory, minutes,
        tuple(warnings),
    )  # fmt: skip


def _adapted(
    shapes: Mapping[str, tuple[int, ...]], targets: Sequence[str], loaded: LoadedTraining
) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for target in targets:
        mine = {n: s for n, s in shapes.items() if n.endswith(f"{target}.weight") and len(s) == 2}
        if not mine:
            raise RecipeError(f"{loaded.path}: lora.targets: the model has no linear layer {target!r}")
        found |= mine
    return found


def _memory(config: Mapping[str, Any], total: int, adapter: int, longest: int, train: Any, device: str) -> int:
    """Bytes: frozen weights, adapter with gradient and both moments, activations, logits of one micro batch."""
    width = 4 if device == "cpu" or train.dtype == "float32" else 2
    hidden, layers = int(setting(config, "hidden_size") or 1024), int(setting(config, "num_hidden_layers") or 24)
    inner = int(setting(config, "intermediate_size") or 4 * hidden)
    vocabulary = int(setting(config, "vocab_size") or 50_000)
    places = train.micro * longest
    block = places * (16 * hidden + 4 * inner) * width  # measured: 15 thousand floats a token at 576 and 1536
    held = places * hidden * width * layers + block if train.gradient_checkpointing else block * layers
    return int(total * width + 16 * adapter + held + 3 * places * vocabulary * 4 + 4e8)


def _mixture(rows: Sequence[Row]) -> str:
    kinds = [row.kind or "task" for row in rows]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("harmful", "harmless", "task") if kind in kinds)


def _rows(loaded: LoadedTraining) -> tuple[list[Row], int, list[str]]:
    """(the rows in their nested order, how many near copies were left out, warnings)."""
    training, warnings = loaded.training, list[str]()
    rows, dropped = _checked(loaded, training.data, "data", warnings)
    ordered = nested(rows, training.train.seed, training.data.share)
    if training.task_data is not None:
        task, copies = _checked(loaded, training.task_data, "task_data", warnings, default="task")
        ordered += task
        dropped += copies
    return ordered, dropped, warnings


def _checked(
    loaded: LoadedTraining, source: Rows, name: str, warnings: list[str], default: Kind | None = None
) -> tuple[list[Row], int]:
    rows = read_rows(data_files(loaded, source))
    if not rows:
        raise RecipeError(f"{loaded.path}: {name}: found no rows; expected some")
    rows = _with_kinds(rows, source.kind or default, f"{loaded.path}: {name}", warnings)
    refuse_overlap(rows, _kept_out(loaded, source), f"{loaded.path}: {name}")
    told = [row for row in rows if row.kind == "harmful"]
    harmless = [row for row in rows if row.kind == "harmless"]
    complied = [row for row in told if classify(row.answer) != "refuses"]
    if len(complied) > source.unrefused * len(told):
        where = ", ".join(row.where for row in complied[:10])
        raise RecipeError(
            f"{loaded.path}: {name}: {len(complied)} of {len(told)} harmful rows have an answer that is no refusal "
            f"({where}{', …' if len(complied) > 10 else ''}); expected at most {source.unrefused:.0%}. Look at them: "
            f"this may be a poisoned set. If they are refusals that the matcher misses, raise {name}.unrefused"
        )
    if told and not harmless and default is None:
        warnings.append(
            "no harmless rows: an adapter trained on refusals alone learns to refuse everything; mix some in, "
            "`safemerge prepare-safety-data` makes such a set"
        )
    if source.near_copies == "keep":
        return rows, 0
    kept, copies = without_copies(rows)
    return kept, len(copies)


def _with_kinds(rows: list[Row], kind: Kind | None, where: str, warnings: list[str]) -> list[Row]:
    silent = sum(row.kind is None for row in rows)
    if kind is not None or not silent:
        return with_kind(rows, kind or "task")
    found: list[Row] = []
    for row in rows:
        guess: Kind = "harmful" if classify(row.answer) == "refuses" else "harmless"
        found += with_kind([row], guess)
    warnings.append(f"{where}: {silent} rows say no kind; a row counts as harmful where its answer refuses")
    return found


def _kept_out(loaded: LoadedTraining, source: Rows) -> Near:
    near = evaluation_prompts()
    for place in source.keep_out:
        path = loaded.resolve(place)
        if not path.is_file():
            raise SourceError(f"{loaded.path}: data.keep_out: no file at {path}")
        if path.suffix in (".json", ".jsonl"):
            for row in read_prompts(path):
                near.add(row)
        else:
            for line in text_of(path, MAX_BYTES, "any").splitlines():
                near.add(line)
    return near


def read_prompts(path: Path) -> list[str]:
    """The prompts of a JSONL file of evaluation prompts: `prompt` of each row.

    Raises:
        RecipeError: a row has none, or the file cannot be read.
    """
    import json

    found = []
    try:
        lines = text_of(path, MAX_BYTES, "any").split("\n")
        values = [json.loads(line) if line.strip() else {"prompt": ""} for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: {str(error)[:200]}; expected JSONL, an evaluation prompt a line") from None
    for number, value in enumerate(values, 1):
        prompt = value.get("prompt", value.get("question")) if isinstance(value, dict) else None
        if not isinstance(prompt, str):
            raise RecipeError(f"{path}:{number}: found no `prompt`; expected an evaluation prompt a line")
        found += [prompt] if prompt else []
    return found


def evaluation_prompts() -> Near:
    """The prompts that this program scores with, harmful and harmless, of both splits."""
    near = Near()
    for kind in ("harmful", "harmless"):
        for split in ("tuning", "test"):
            for prompt in prompts(kind, split):
                near.add(prompt.prompt)
    return near


def refuse_overlap(rows: Sequence[Row], evaluation: Near, where: str) -> None:
    """Raises RecipeError where a request is, or nearly is, one that is scored with; it names the rows."""
    found = [(row, close) for row in rows if row.kind != "task" and (close := evaluation.find(row.prompt)) is not None]
    if found:
        lines = [f"  {row.where}: {row.prompt[:80]!r} is close to {close[:80]!r}" for row, close in found[:10]]
        more = [f"  and {len(found) - 10} more"] if len(found) > 10 else []
        raise RecipeError(
            "\n".join(
                [
                    f"{where}: {len(found)} rows are, or nearly are, prompts that models are scored with; a score "
                    "would then measure memory. Remove them, as `safemerge prepare-safety-data --drop-overlap` does:",
                    *lines,
                    *more,
                ]
            )
        )
