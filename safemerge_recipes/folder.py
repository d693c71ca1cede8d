"""The output folder around the weights: side files byte for byte, small files written atomically, states.

A folder is written under the name `<output>.part`, which no reader takes for a model: it has no config until
the weights are complete. It gets its real name in one rename, after the manifest.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import PlanError
from safemerge_recipes.roles import Family

MANIFEST_FILE = "safemerge_manifest.json"
PLAN_FILE = "safemerge_plan.json"
RECIPE_FILE = "safemerge_recipe.yaml"
REPORT_FILE = "safemerge_report.html"
SCORES_FILE = "safemerge_scores.json"
LOCK_FILE = "safemerge.lock"

CONFIG_FILES = ("config.json", "generation_config.json")
_TOKENIZER = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "vocab",
    "merges",
    "chat_template",
    "spiece",
    "sentencepiece",
)
_TOKENIZER_FOLDERS = ("additional_chat_templates",)
_NEVER = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".part",
    ".index.json",
)
_NEVER_NAMES = ("README.md", ".gitattributes", ".gitignore", "training_args.bin", "trainer_state.json")


def part_of(output: Path) -> Path:
    """The working folder of an output."""
    return output.with_name(output.name + ".part")


def _plain_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        name = path.name
        ours = name.startswith(("safemerge_", "safemerge.", "adapter_", "."))
        if path.is_file() and not ours and not name.endswith(_NEVER) and name not in _NEVER_NAMES:
            yield path


def _is_tokenizer(name: str) -> bool:
    return name.startswith(_TOKENIZER) or name.endswith((".model", ".tiktoken", ".jinja"))


def _chain(family: Family) -> list[Path]:
    """Folders that may own side files: those of the vocabulary's owner first, then what it was trained on."""
    models, owner = family.models, family.models[family.owner]
    folders = [owner.folder.path, owner.checkpoint.directory]
    if owner.folder.kind == "adapter":
        folders[1:1] = [models["aligned"].folder.path]
    folders += [models["aligned"].folder.path, models["aligned"].checkpoint.directory]
    return list(dict.fromkeys(folders))


def side_files(family: Family) -> dict[str, Path]:
    """Relative name -> source of every file that is copied beside the weights, and nothing else.

    Config files and all others come from the first full model of the fine-tuned side; the tokenizer with
    its chat templates comes as one from the first folder of that side that has one, be it an adapter's.
    """
    chain = _chain(family)
    chosen: dict[str, Path] = {}
    owner = next((f for f in chain if (f / "config.json").exists()), None)
    tokenizer = next((f for f in chain if any(_is_tokenizer(path.name) for path in _plain_files(f))), None)
    if owner is not None:
        chosen.update({path.name: path for path in _plain_files(owner) if not _is_tokenizer(path.name)})
    if tokenizer is not None:
        chosen.update(tokenizer_files(tokenizer))
    return dict(sorted(chosen.items()))


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Relative name -> file of a folder's tokenizer and chat templates."""
    found = {path.name: path for path in _plain_files(folder) if _is_tokenizer(path.name)}
    for name in _TOKENIZER_FOLDERS:
        found.update({f"{name}/{path.name}": path for path in sorted((folder / name).glob("*")) if path.is_file()})
    return found


def copy_side_files(files: dict[str, Path], folder: Path, config_edits: Mapping[str, Any] | None = None) -> None:
    """Copies side files byte for byte, with the user's permissions; config.json with the edits it must have."""
    for name, source in files.items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        content = source.read_bytes()
        write_file(target, edited(content, config_edits) if name == "config.json" and config_edits else content)


def edited(content: bytes, edits: Mapping[str, Any]) -> bytes:
    """A config.json with some values changed wherever they stand, and every other byte as it was."""
    text = content.decode("utf-8")
    for key, value in edits.items():
        new = json.dumps(value)
        text, count = re.subn(rf'("{key}"\s*:\s*)(?:true|false|null|\d+)', rf"\g<1>{new}", text)
        if not count:
            text = text.replace("{", f'{{\n  "{key}": {new},', 1)
    json.loads(text)  # as sound as it was
    return text.encode("utf-8")


def write_file(path: Path, content: bytes | str) -> None:
    """Writes a small file so that it is either there in full or not at all, even after a power failure."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON, one member a line."""
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(output: Path, force: bool) -> None:
    """Refuses an output that is in the way.

    Raises:
        PlanError: it is a file, a finished output without `force`, or a folder this program did not write.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise PlanError(f"{output}: is in the way; expected a folder that does not exist yet")
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / MANIFEST_FILE).exists():
        raise PlanError(f"{output}: is not empty and not an output of safemerge; choose another --output or empty it")
    if not force:
        raise PlanError(f"{output}: holds a finished output; say --force to replace it, or choose another --output")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the working folder for this process; released by the system even if the process is killed.

    Raises:
        PlanError: another run holds it; the message names its process.
    """
    path = folder / LOCK_FILE
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 200, 0).decode("utf-8", "replace").strip()
            raise PlanError(f"{folder}: another run is writing it ({holder}); wait for it or stop it") from None
        except OSError:
            pass  # a file system without locks: nothing better is to be had
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(file)


def publish(part: Path, output: Path) -> None:
    """Gives the finished folder its real name, replacing what `check_output` allowed."""
    (part / LOCK_FILE).unlink(missing_ok=True)
    sync_folder(part)
    old = output.with_name(output.name + ".old")
    if output.exists():
        if any(output.iterdir()):
            if old.exists():
                shutil.rmtree(old)
            os.rename(output, old)
        else:
            output.rmdir()
    os.rename(part, output)
    sync_folder(output.parent)
    if old.exists() and (old / MANIFEST_FILE).exists():
        shutil.rmtree(old)
