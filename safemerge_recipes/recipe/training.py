"""The training file: what an adapter is trained on and how, as frozen and strictly checked values.

`safemerge train-adapter FILE` carries it out, and a recipe names it as `safety: {train: FILE}`. The docstring under
each field is its documentation. Knows nothing of rows, of models and of torch.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from safemerge_recipes.errors import RecipeError, SourceError
from safemerge_recipes.recipe.fields import Seed, Text
from safemerge_recipes.recipe.source import Source, split_revision
from safemerge_recipes.recipe.yaml_text import MAX_BYTES, Keys, YamlError, describe, read_yaml
from safemerge_recipes.storage.files import content_of

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama or Qwen block."""

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "paper": {
        "lora": {"r": 8, "alpha": 8, "dropout": 0.0, "targets": ("q_proj", "v_proj")},
        "train": {
            "learning_rate": 1e-4, "epochs": 10, "batch": 32, "schedule": "linear", "warmup_steps": 0,
            "max_length": 1024, "loss_on": "answer", "seed": 3407,
        },
    },
    "bianchi": {
        "lora": {"r": 8, "alpha": 16, "dropout": 0.05, "targets": ("q_proj", "v_proj")},
        "train": {
            "learning_rate": 3e-4, "epochs": 3, "batch": 128, "schedule": "linear", "warmup_steps": 10,
            "max_length": 256, "loss_on": "all", "template": "alpaca", "seed": 42,
        },
    },
    "small": {
        "lora": {"r": 8, "alpha": 16, "dropout": 0.0, "targets": SEVEN},
        "train": {
            "learning_rate": 1e-3, "epochs": 1, "batch": 8, "schedule": "linear", "warmup_steps": 5,
            "max_length": 256, "loss_on": "answer", "seed": 1,
        },
    },
}  # fmt: skip
"""Settings by name; keys of the file overrule them.

`paper`: rank, alpha and targets as in the adapter configs of the published models; rate, epochs, batch and seed as
far as the authors' side says, unconfirmed. `bianchi`: the defaults of the safety-tuned-llamas script, whose seed is
none. `small`: for a model of some hundred million parameters.
"""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class BaseSource(_Model):
    """The model an adapter is trained on: a folder or hub id, or an adapter on one."""

    location: Text | None = None
    """A checkpoint: local folder or hub id, or `id@revision`; the long form of plain text."""
    adapter: Text | None = None
    """A PEFT adapter that makes the model out of `onto`."""
    onto: Text | None = None
    """The checkpoint that `adapter` applies to. Also written `on`."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"location": value}
        if isinstance(value, dict) and "on" in value:
            value = {**value, "onto": value["on"]}
            del value["on"]
        return value

    @model_validator(mode="after")
    def _check(self) -> BaseSource:
        if (self.location is None) == (self.adapter is None):
            raise ValueError("expected a folder or hub id, or `{adapter: …, on: …}`")
        if (self.adapter is None) != (self.onto is None):
            raise ValueError("expected `adapter` and `on` together: which adapter, on which model")
        return self

    def sources(self, directory: Path) -> tuple[Source, Source | None]:
        """(the full model, the adapter on it or None), as sources of a recipe."""
        name, revision = split_revision(self.onto or self.location or "", directory)
        full = Source(model=name, revision=revision)
        if self.adapter is None:
            return full, None
        name, revision = split_revision(self.adapter, directory)
        return full, Source(adapter=name, revision=revision)


def _listed(value: object) -> object:
    return (value,) if isinstance(value, (int, str)) and not isinstance(value, bool) else value


class Rows(_Model):
    """Where the rows come from, and how many are used."""

    path: Annotated[tuple[Text, ...], Field(strict=False, min_length=1), BeforeValidator(_listed)] | None = None
    """JSONL or JSON files, relative to the training file."""
    package: Text | None = None
    """`distribution:path/in/it.jsonl`, a file of an installed package."""
    hub: Text | None = None
    """`org/dataset@revision:file.jsonl`, a file of a dataset on the hub."""
    default: Literal[True] | None = None
    """The small set that ships with this program."""
    licence: Text | None = None
    """Of the rows; goes into the card. Needed, but for the shipped set."""
    kind: Literal["harmful", "harmless", "task"] | None = None
    """Of rows that do not say it; without it the answer decides: a refusal makes a row harmful."""
    sizes: Annotated[
        tuple[Annotated[int, Field(ge=1, le=10_000_000)], ...],
        Field(strict=False, min_length=1),
        BeforeValidator(_listed),
    ] | None = None  # fmt: skip
    """Numbers of rows to train with, each the beginning of the next; one adapter is chosen. Without it: all rows."""
    harmless_share: float | None = Field(default=None, ge=0, le=1)
    """Part of every size that is harmless, where both kinds are there; 0.3 where `sizes` are given, which is this
    program's own (the paper trains on safety rows alone), else the mixture of the files."""
    near_copies: Literal["drop", "keep"] = "drop"
    """What becomes of a request that shares most of its content words with an earlier one."""
    unrefused: float = Field(default=0.02, ge=0, le=1)
    """Part of the harmful rows whose answer may be no refusal by the matcher."""
    keep_out: Annotated[tuple[Text, ...], Field(strict=False), BeforeValidator(_listed)] = ()
    """Files with further evaluation prompts that no row may be close to; `prompt` of each row, or plain lines."""

    @model_validator(mode="after")
    def _check(self) -> Rows:
        given = [key for key in ("path", "package", "hub", "default") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"found {' and '.join(given) or 'none'}; expected one of path, package, hub and default")
        if self.licence is None and self.default is None:
            raise ValueError("licence is missing; say under what terms the rows may be used, or `licence: none stated`")
        if self.sizes is not None and list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError("sizes: expected each larger than the one before")
        return self

    @property
    def share(self) -> float | None:
        """The part of harmless rows that is kept to; None leaves the mixture of the files."""
        return 0.3 if self.harmless_share is None and self.sizes is not None else self.harmless_share


class Lora(_Model):
    """The shape of the adapter."""

    r: int = Field(default=8, ge=1, le=4096)
    """Rank."""
    alpha: float = Field(default=8, gt=0, le=65536)
    """ΔW = alpha / r · B·A."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the adapter's input, while training."""
    targets: Annotated[tuple[Text, ...], Field(strict=False, min_length=1), BeforeValidator(_listed)] = ("q_proj",)
    """Names of the linear layers that are adapted."""

    @model_validator(mode="after")
    def _check(self) -> Lora:
        bad = [name for name in self.targets if "embed" in name or "head" in name]
        if bad:
            raise ValueError(
                f"targets: found {bad[0]!r}, a matrix over the vocabulary, which the gate does not judge and which may "
                "be shared with another; expected linear layers of the blocks"
            )
        return self


class Schedule(_Model):
    """How it is trained."""

    learning_rate: float = Field(default=1e-4, gt=0, le=1)
    """The highest rate of AdamW; there is no weight decay."""
    epochs: float = Field(default=1.0, gt=0, le=10_000)
    """Times each row is seen."""
    batch: int = Field(default=32, ge=1, le=65536)
    """Rows of one step."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Rows that are in memory at once; divides `batch`. Without it the largest divisor up to 8."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """What becomes of the rate after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps until the rate is at its highest."""
    max_length: int = Field(default=1024, ge=16, le=1_000_000)
    """Tokens of prompt and answer together; longer rows are cut and counted."""
    loss_on: Literal["answer", "all"] = "answer"
    """Which tokens are learned."""
    template: Literal["chat", "alpaca"] = "chat"
    """The model's own chat template, or Alpaca's text."""
    seed: Seed = 3407
    """Of the order of the rows and of the adapter's first values."""
    device: Text = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen weights; `auto` is bfloat16 on a GPU that has it, else float32. The adapter is float32."""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the adapter's file."""
    gradient_checkpointing: bool = False
    """Less memory for about a third more time."""
    save_steps: int = Field(default=50, ge=1)
    """Steps between checkpoints; a run that was killed goes on from the last."""

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch: {self.micro_batch} does not divide batch {self.batch}")
        return self

    @property
    def micro(self) -> int:
        """Rows that are in memory at once."""
        return self.micro_batch or next(n for n in range(min(8, self.batch), 0, -1) if self.batch % n == 0)


class Choose(_Model):
    """Which size is kept, and whether the adapter carries anything."""

    task: Text = "safemerge_refusal_tuning"
    """Of harmful requests: the more it refuses the better. A tuning split, never the one that is reported."""
    overrefusal_task: Text = "safemerge_overrefusal_tuning"
    """Of harmless requests."""
    max_overrefusal: float = Field(default=0.05, ge=0, le=1)
    """How far over the aligned model's rate the refusals of harmless requests may rise."""
    finetuned: Text | None = None
    """A fine-tuned adapter for the carry check: aligned + Δf + Δs must beat aligned + Δf on J."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts of each task."""


class Training(_Model):
    """A training file."""

    name: Text | None = None
    """For the card."""
    model: BaseSource
    """The model the adapter is trained on: a recipe's `aligned`."""
    chat_template: Text | None = None
    """A Jinja file, for a model that has none."""
    method: Literal["safety", "safeinstruct"] = "safety"
    """`safeinstruct` trains on `task_data` and the safety rows in one set: the paper's baseline, a fine-tuned model."""
    data: Rows
    """The rows."""
    task_data: Rows | None = None
    """The task's rows, for `safeinstruct`."""
    preset: Literal["paper", "bianchi", "small"] = "paper"
    """Settings that the keys below overrule."""
    lora: Lora = Lora()
    """The shape of the adapter."""
    train: Schedule = Schedule()
    """How it is trained."""
    choose: Choose | None = None
    """Which size is kept. Without it the largest, unjudged."""
    output: Text | None = None
    """A folder that gets a copy of the adapter, beside the cache."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, dict):
            return value
        preset = PRESETS.get(value.get("preset", "paper"), {}) if isinstance(value.get("preset", ""), str) else {}
        merged = dict(value)
        for part, settings in preset.items():
            own = value.get(part, {})
            if isinstance(own, dict):
                merged[part] = {**settings, **own}
        return merged

    @model_validator(mode="after")
    def _check(self) -> Training:
        if (self.method == "safeinstruct") != (self.task_data is not None):
            raise ValueError("`method: safeinstruct` and `task_data` go together")
        sizes = self.data.sizes or ()
        if len(sizes) > 1 and self.choose is None:
            raise ValueError("several sizes need `choose`, which says on what tasks one is kept")
        return self


@dataclass(frozen=True, slots=True)
class LoadedTraining:
    """A training file with the place it came from; relative paths start at `directory`."""

    training: Training
    path: Path
    directory: Path

    def resolve(self, path: str) -> Path:
        """The absolute form of a path written in the file."""
        return Path(os.path.normpath(self.directory / Path(path).expanduser()))


def load_training(path: str | Path) -> LoadedTraining:
    """The checked training file.

    Raises:
        RecipeError: it cannot be read, or with every problem in it, a line each.
    """
    path = Path(path)
    try:
        text = content_of(path, MAX_BYTES, "any").decode("utf-8-sig")
    except SourceError as error:
        raise RecipeError(str(error)) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RecipeError(f"{path}: {reason}; expected a training file, see docs/training.md") from None
    try:
        document = read_yaml(text)
    except YamlError as error:
        raise RecipeError(f"{path}:{error.line}: {error}") from None
    if not isinstance(document.value, dict):
        raise RecipeError(f"{path}: found {describe(document.value)}; expected a mapping with model and data")
    problems = [(line, f"{path}:{line} {_dotted(keys)}: {message}") for line, keys, message in document.problems]
    training = None
    try:
        training = Training.model_validate(document.value)
    except ValidationError as errors:
        for one in errors.errors(include_url=False):
            keys = tuple(one["loc"])
            line = next(document.lines[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in document.lines)
            problems.append((line, f"{path}:{line} {_dotted(keys)}: {_words(one, keys)}".replace(" : ", ": ")))
    if problems or training is None:
        raise RecipeError("\n".join(dict.fromkeys(text for _, text in sorted(problems))))
    directory = Path(os.path.normpath(Path.cwd() / path.parent))
    return LoadedTraining(training, path, directory)


_PARTS: dict[str, type[BaseModel]] = {
    "model": BaseSource, "data": Rows, "task_data": Rows, "lora": Lora, "train": Schedule, "choose": Choose,
}  # fmt: skip


def _dotted(keys: Keys) -> str:
    return ".".join(str(key) for key in keys)


def _words(error: Any, keys: Keys) -> str:
    if error["type"] == "extra_forbidden":
        model: type[BaseModel] = Training
        for key in keys[:-1]:
            model = _PARTS.get(str(key), model)
        close = difflib.get_close_matches(str(keys[-1]), model.model_fields, n=1)
        return f'unknown key; did you mean "{close[0]}"?' if close else (
            f"unknown key; expected one of {', '.join(model.model_fields)}"
        )  # fmt: skip
    if error["type"] == "missing":
        return "missing; expected this key"
    message = str(error["msg"]).removeprefix("Value error, ")
    return message if error["type"] == "value_error" else f"found {describe(error['input'])}; {message}"
