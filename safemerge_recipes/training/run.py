"""From a training file to an adapter: plan → train every size → choose → card, kept in the cache under its key.

A folder under the key is complete; it is put together beside it and renamed, and a run that was killed goes on in
there. Prints nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safemerge_recipes.engine.folder import locked
from safemerge_recipes.errors import PlanError
from safemerge_recipes.events import Listener, Note, TrainingStep, ignore
from safemerge_recipes.recipe.training import LoadedTraining
from safemerge_recipes.sources.locate import Folder
from safemerge_recipes.sources.trained import RECORD_FILE, adapters_folder, data_files, model_folders
from safemerge_recipes.storage.files import MAX_BYTES, content_of, copy_file, remove_left, write_file
from safemerge_recipes.training.card import card
from safemerge_recipes.training.plan import TrainingPlan, plan_training
from safemerge_recipes.training.trainer import check_extra, load_model, train

FILES = ("adapter_config.json", "adapter_model.safetensors", RECORD_FILE, "README.md")


@dataclass(frozen=True, slots=True)
class TrainedAdapter:
    """A finished adapter in the cache."""

    path: Path
    key: str
    chosen: int
    """Rows of the size that was kept."""
    scores: dict[str, Any] | None
    warnings: tuple[str, ...]


def train_adapter(
    loaded: LoadedTraining,
    *,
    on_event: Listener = ignore,
    max_memory: int | None = None,
    plan: TrainingPlan | None = None,
) -> TrainedAdapter:
    """The adapter that a training file describes: from the cache, or trained now.

    Args:
        loaded: The training file.
        on_event: Told of steps, and a line at a time what goes on.
        max_memory: Bytes it may take.
        plan: Of the same file, where it is there already.

    Raises:
        SafemergeError: it cannot be trained; what is done stays done, and the next call goes on from there.
    """
    plan = plan or plan_training(loaded, max_memory)
    folder = plan.folder
    if folder is None:
        check_extra()
        folder = adapters_folder() / plan.key
        part = folder.with_name(f"{plan.key}.part")
        part.mkdir(parents=True, exist_ok=True)
        with locked(part, part.name):
            if not folder.is_dir():  # another run may have been faster
                _train(plan, part, on_event)
                for extra in part.iterdir():
                    if extra.is_dir():
                        shutil.rmtree(extra)
                remove_left(part, (*FILES, "scores.json"))
                os.replace(part, folder)
    if loaded.training.output is not None:
        copy_adapter(folder, loaded.resolve(loaded.training.output))
    record = json.loads(content_of(folder / RECORD_FILE, MAX_BYTES))
    scores = record.get("scores")
    return TrainedAdapter(folder, plan.key, record["rows"], scores, tuple((scores or {}).get("warnings", ())))


def copy_adapter(folder: Path, target: Path) -> None:
    """Copies an adapter's files; refuses a folder that holds something else.

    Raises:
        PlanError: there is something else.
    """
    if target.is_dir() and any(target.iterdir()) and not (target / "adapter_config.json").exists():
        raise PlanError(f"{target}: holds something that is no adapter; choose another output")
    target.mkdir(parents=True, exist_ok=True)
    remove_left(target, FILES)
    for name in FILES:
        copy_file(folder / name, target / name)


def _device(wanted: str) -> str:
    import torch

    if wanted == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if wanted != "cpu" and not torch.cuda.is_available():
        raise PlanError(f"train.device {wanted}: no CUDA device is visible; say cpu")
    return wanted


def _dtype(wanted: str, device: str) -> str:
    import torch

    if wanted == "auto":
        return "bfloat16" if device != "cpu" and torch.cuda.is_bf16_supported() else "float32"
    return wanted


def _train(plan: TrainingPlan, part: Path, on_event: Listener) -> None:
    from safemerge_recipes.training.chat import lengths, load_tokenizer

    loaded, training = plan.loaded, plan.loaded.training
    full, adapter = model_folders(loaded)
    device = _device(training.train.device)
    template = loaded.resolve(training.chat_template) if training.chat_template else None
    tokenizer = load_tokenizer(full.path, adapter.path if adapter else None, template, training.train)
    rows = list(plan.rows)
    cut = sum(n > training.train.max_length for n in lengths(rows, tokenizer, training.train))
    if cut > 0.05 * len(rows):
        raise PlanError(
            f"{loaded.path}: {cut} of {len(rows)} rows are longer than train.max_length {training.train.max_length} "
            "tokens; expected at most 5 %. Raise it, or shorten the rows"
        )
    dtype = _dtype(training.train.dtype, device)
    on_event(TrainingStep(plan.sizes[0], 0, plan.steps()[plan.sizes[0]]))
    model = load_model(full.path, adapter.path if adapter else None, dtype, device)
    runs: dict[int, dict[str, Any]] = {}
    for size in plan.sizes:
        place = part / f"size-{size}"
        place.mkdir(exist_ok=True)
        done = place / "run.json"
        if not done.exists():
            on_event(Note(f"training with {size} rows"))
            chosen = rows[:size] if training.method == "safety" else rows[:size] + rows[plan.sizes[-1] :]
            runs[size] = train(
                model, tokenizer, chosen, training.lora, training.train, place, base_name(full, adapter), on_event
            )
            write_file(done, json.dumps(runs[size]))
        runs[size] = json.loads(content_of(done, MAX_BYTES))
    scores = _scored(plan, part, model, tokenizer, on_event) if training.choose else None
    size = scores["chosen"] if scores else plan.sizes[-1]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        copy_file(part / f"size-{size}" / name, part / name)
    record = _record(plan, runs, size, scores, device, dtype, cut, base_name(full, adapter))
    write_file(part / "README.md", card(record))
    write_file(part / RECORD_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def base_name(full: Folder, adapter: Folder | None) -> str:
    """What an adapter's config says of its base: a hub id, or a folder's own name, never a path."""
    label = (adapter or full).label
    local = label.startswith((".", "/", "~")) or label.count("/") > 1
    name = (adapter or full).path.resolve().name if local else label
    return f"{full.path.resolve().name}+{name}" if adapter and local else name


def _scored(plan: TrainingPlan, part: Path, model: Any, tokenizer: Any, on_event: Listener) -> dict[str, Any]:
    from safemerge_recipes.evaluation.separation import Sides
    from safemerge_recipes.training.choose import carry_warning, choose, rates
    from safemerge_recipes.training.score import refusals

    ask = plan.loaded.training.choose
    assert ask is not None  # asked by the caller
    kept = part / "refusals.json"
    known: dict[str, Any] = json.loads(content_of(kept, MAX_BYTES)) if kept.exists() else {}

    def of(name: str, adapters: list[Path]) -> Sides:
        if name not in known:
            on_event(Note(f"scoring {name}"))
            known[name] = asdict(refusals(model, tokenizer, adapters, ask))
            write_file(kept, json.dumps(known))
        return Sides(**known[name])

    aligned = of("aligned", [])
    by_size = {size: of(f"aligned + Δs of {size} rows", [part / f"size-{size}"]) for size in plan.sizes}
    size, within = choose(aligned, by_size, ask.max_overrefusal)
    warnings = []
    if not within:
        rise = rates(by_size[size])["harmless"] - rates(aligned)["harmless"]
        warnings.append(
            f"over-refusal rises by {100 * rise:.0f} points, more than {100 * ask.max_overrefusal:.0f}, with every "
            "size; add harmless rows that look alike"
        )
    if ask.finetuned is not None:
        task = plan.loaded.resolve(ask.finetuned)
        finetuned = of("fine-tuned", [task])
        joined = of("fine-tuned + Δs", [task, part / f"size-{size}"])
        warnings += [text for text in [carry_warning(finetuned, joined)] if text]
    models = {name: rates(Sides(**one)) for name, one in known.items()}
    return {"chosen": size, "within": within, "models": models, "warnings": warnings}


def _record(
    plan: TrainingPlan,
    runs: dict[int, dict[str, Any]],
    size: int,
    scores: dict[str, Any] | None,
    device: str,
    dtype: str,
    cut: int,
    base: str,
) -> dict[str, Any]:
    loaded, training = plan.loaded, plan.loaded.training
    sources = [training.data, *([training.task_data] if training.task_data else [])]
    licences = [source.licence or "apache-2.0" for source in sources]
    settings = training.model_dump(mode="json", exclude={"output"})
    return {
        "format": 1,
        "key": plan.key,
        "base": base,
        "rows": size,
        "data": {
            "files": [path.name for source in sources for path in data_files(loaded, source)],
            "licence": ", ".join(dict.fromkeys(licences)),
            "kinds": plan.kinds(size),
            "near_copies_dropped": plan.dropped,
            "cut": cut,
        },
        "settings": settings,
        "matrices": plan.targets,
        "parameters": plan.parameters,
        "device": device.partition(":")[0],
        "dtype": dtype,
        "run": runs[size],
        "runs": {str(key): value for key, value in runs.items()},
        "scores": scores,
        "warnings": list(plan.warnings),
        "versions": {name: importlib.metadata.version(name) for name in ("peft", "trl", "transformers", "torch")},
    }
