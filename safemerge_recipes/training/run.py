"""From a training file to an adapter: plan → train every size → choose → card, kept in the cache under its key.

A folder under the key is complete; it is put together beside it and renamed, and a run that was killed goes on in
there. Prints nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes.engine.folder import locked
from safemerge_recipes.errors import PlanError
from safemerge_recipes.events import Listener, Note, TrainingStep, ignore
from safemerge_recipes.recipe.training import LoadedTraining
from safemerge_recipes.sources.locate import Folder
from safemerge_recipes.sources.peft.adapter import open_adapter
from safemerge_recipes.sources.trained import RECORD_FILE, adapters_folder, carry_file, data_files, model_folders
from safemerge_recipes.storage.files import MAX_BYTES, content_of, copy_file, left_in, remove_left, write_file
from safemerge_recipes.training.card import card
from safemerge_recipes.training.plan import TrainingPlan, plan_training
from safemerge_recipes.training.trainer import check_extra, load_model, train

if TYPE_CHECKING:
    from safemerge_recipes.evaluation.separation import Sides

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
    record: dict[str, Any]
    """What is known of it, with the carry check of the fine-tuned adapter that was named now."""


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
    if loaded.training.output is not None:
        check_target(loaded.resolve(loaded.training.output))
    folder = plan.folder
    if folder is None:
        check_extra()
        folder = adapters_folder() / plan.key
        part = folder.with_name(f"{plan.key}.part")
        part.mkdir(parents=True, exist_ok=True)
        with locked(part, part.name):
            if not folder.is_dir():  # another run may have been faster
                if not all((part / name).is_file() for name in FILES):  # the last steps take their own inputs away
                    _train(plan, part, on_event)
                for extra in part.iterdir():
                    if extra.is_dir():
                        shutil.rmtree(extra)
                remove_left(part, (*FILES, "scores.json"))
                os.replace(part, folder)
    record = json.loads(content_of(folder / RECORD_FILE, MAX_BYTES))
    if (ask := loaded.training.choose) is not None:
        record["settings"]["choose"]["finetuned"] = ask.finetuned
        if ask.finetuned is not None:
            record = with_carry(record, _carried(plan, folder, folder, None, on_event))
    if loaded.training.output is not None:
        copy_adapter(folder, loaded.resolve(loaded.training.output), record)
    scores = record.get("scores")
    return TrainedAdapter(folder, plan.key, record["rows"], scores, tuple((scores or {}).get("warnings", ())), record)


def copy_adapter(folder: Path, target: Path, record: dict[str, Any]) -> None:
    """Copies an adapter's files, with what is known of it now, into a folder that is empty or holds such a copy.

    Raises:
        PlanError: see `check_target`.
    """
    check_target(target)
    target.mkdir(parents=True, exist_ok=True)
    remove_left(target, FILES)
    _write_record(target, record)  # first: by it the folder is known as such a copy, whatever else it lacks
    for name in FILES[:2]:
        copy_file(folder / name, target / name)


def check_target(target: Path) -> None:
    """Refuses a folder for a copy that holds anything but an earlier copy, whole or not.

    Raises:
        PlanError: it does, or is no folder.
    """
    try:
        strange = set(target.iterdir()) - {*left_in(target, FILES)}
    except FileNotFoundError:
        return
    except OSError as error:
        raise PlanError(f"{target}: {error.strerror}; choose another output") from None
    if strange and not (target / RECORD_FILE).is_file():
        raise PlanError(f"{target}: holds something that no training wrote; choose another output")


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
    from safemerge_recipes.training.chat import lengths

    loaded, training = plan.loaded, plan.loaded.training
    full, adapter = model_folders(loaded)
    tokenizer = tokenizer_of(loaded)
    rows = list(plan.rows)
    cut = sum(n > training.train.max_length for n in lengths(rows, tokenizer, training.train))
    if cut > 0.05 * len(rows):
        raise PlanError(
            f"{loaded.path}: {cut} of {len(rows)} rows are longer than train.max_length {training.train.max_length} "
            "tokens; expected at most 5 %. Raise it, or shorten the rows"
        )
    on_event(TrainingStep(plan.sizes[0], 0, plan.steps()[plan.sizes[0]]))
    model, device, dtype = model_of(loaded)
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
    if training.choose is not None and training.choose.finetuned is not None:
        _carried(plan, part, part / f"size-{size}", model, on_event)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        copy_file(part / f"size-{size}" / name, part / name)
    record = _record(plan, runs, size, scores, device, dtype, cut, base_name(full, adapter))
    _write_record(part, record)


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    write_file(folder / RECORD_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    write_file(folder / "README.md", card(record))


def tokenizer_of(loaded: LoadedTraining) -> Any:
    """The tokenizer of the model that a training file names, with the template it is trained in."""
    from safemerge_recipes.training.chat import load_tokenizer

    training = loaded.training
    full, adapter = model_folders(loaded)
    template = loaded.resolve(training.chat_template) if training.chat_template else None
    return load_tokenizer(full.path, adapter.path if adapter else None, template, training.train)


def model_of(loaded: LoadedTraining) -> tuple[Any, str, str]:
    """(the frozen model, its device, its dtype)."""
    full, adapter = model_folders(loaded)
    device = _device(loaded.training.train.device)
    dtype = _dtype(loaded.training.train.dtype, device)
    return load_model(full.path, adapter.path if adapter else None, dtype, device), device, dtype


def base_name(full: Folder, adapter: Folder | None) -> str:
    """What an adapter's config says of its base: a hub id, or a folder's own name, never a path."""
    label = (adapter or full).label
    local = label.startswith((".", "/", "~")) or label.count("/") > 1
    name = (adapter or full).path.resolve().name if local else label
    return f"{full.path.resolve().name}+{name}" if adapter and local else name


def _scored(plan: TrainingPlan, part: Path, model: Any, tokenizer: Any, on_event: Listener) -> dict[str, Any]:
    """Which size is kept, with the refusals of each."""
    from safemerge_recipes.training.choose import choose, rates

    ask = plan.loaded.training.choose
    assert ask is not None  # asked by the caller
    adapters = {"aligned": [], **{f"aligned + Δs of {size} rows": [part / f"size-{size}"] for size in plan.sizes}}
    known = _refusals(plan, part / "refusals.json", adapters, model, tokenizer, on_event)
    aligned, *by_size = (known[name] for name in adapters)
    candidates = dict(zip(plan.sizes, by_size, strict=True))
    size, within = choose(aligned, candidates, ask.max_overrefusal)
    warnings = []
    if not within:
        rise = rates(candidates[size])["harmless"] - rates(aligned)["harmless"]
        warnings.append(
            f"over-refusal rises by {100 * rise:.0f} points, more than {100 * ask.max_overrefusal:.0f}, with every "
            "size; add harmless rows that look alike"
        )
    models = {name: rates(one) for name, one in known.items()}
    return {"chosen": size, "within": within, "models": models, "warnings": warnings}


def _carried(plan: TrainingPlan, kept: Path, adapter: Path, model: Any | None, on_event: Listener) -> dict[str, Any]:
    """The carry check: the fine-tuned model without and with the adapter, kept beside it for each fine-tuned one.

    Args:
        plan: Whose training file names the fine-tuned adapter.
        kept: The folder they are kept in.
        adapter: The safety adapter.
        model: The aligned model where it is loaded already.
        on_event: Told what goes on.
    """
    from safemerge_recipes.training.choose import carry_warning, rates

    loaded = plan.loaded
    assert loaded.training.choose is not None  # asked by the caller
    assert loaded.training.choose.finetuned is not None
    task = loaded.resolve(loaded.training.choose.finetuned)
    open_adapter(task)
    adapters = {"fine-tuned": [task], "fine-tuned + Δs": [task, adapter]}
    file = kept / carry_file(task)
    if not file.exists():
        found = _refusals(plan, file.with_name(f"refusals-{file.name}"), adapters, model, None, on_event)
        warning = carry_warning(*found.values())
        write_file(file, json.dumps({"models": {name: rates(one) for name, one in found.items()}, "warning": warning}))
    carry: dict[str, Any] = json.loads(content_of(file, MAX_BYTES))
    return carry


def _refusals(
    plan: TrainingPlan,
    file: Path,
    adapters: Mapping[str, list[Path]],
    model: Any | None,
    tokenizer: Any | None,
    on_event: Listener,
) -> dict[str, Sides]:
    """name -> refusals of the aligned model with these adapters, kept in a file one after the other."""
    from safemerge_recipes.evaluation.separation import Sides
    from safemerge_recipes.training.score import refusals

    ask = plan.loaded.training.choose
    assert ask is not None  # asked by the caller
    known: dict[str, Any] = json.loads(content_of(file, MAX_BYTES)) if file.exists() else {}
    for name, folders in adapters.items():
        if name not in known:
            on_event(Note(f"scoring {name}"))
            if model is None:
                check_extra()
                model = model_of(plan.loaded)[0]
            tokenizer = tokenizer or tokenizer_of(plan.loaded)
            known[name] = asdict(refusals(model, tokenizer, folders, ask))
            write_file(file, json.dumps(known))
    return {name: Sides(**one) for name, one in known.items()}


def with_carry(record: dict[str, Any], carry: Mapping[str, Any]) -> dict[str, Any]:
    """A record that also says whether the adapter carries anything to one fine-tuned model."""
    scores = record["scores"]
    warnings = [*scores["warnings"], *([carry["warning"]] if carry["warning"] else [])]
    return record | {"scores": scores | {"models": scores["models"] | carry["models"], "warnings": warnings}}


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
