"""From a recipe's source to a local folder: a path as given, or a hub id fetched into the hub's own cache.

Only the files a merge needs are fetched. The hub's cache, endpoint, token and offline switches are those of
huggingface_hub; no code and no pickle is ever downloaded on purpose.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safemerge_recipes.errors import SourceError
from safemerge_recipes.recipe.model import Source
from safemerge_recipes.sources.peft.apply import is_adapter

WEIGHTS = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
)
SIDE_FILES = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.py",
    "*.md",
    "LICENSE*",
    "USE_POLICY*",
    "additional_chat_templates/*",
)


@dataclass(frozen=True, slots=True)
class Folder:
    """A source on disk. `label` is how the recipe names it; `revision` the commit, where it has one."""

    label: str
    path: Path
    kind: Literal["model", "adapter"]
    revision: str | None


def _fetch(repo: str, revision: str | None, subfolder: str | None, label: str) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    patterns = [prefix + pattern for pattern in (*WEIGHTS, *SIDE_FILES)]
    ignore = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "optimizer*", "training_args*", "model.fp32*"]
    try:
        path = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=ignore))
    except HFValidationError:
        raise SourceError(
            f"{label}: no such folder, and not a hub id either; expected a folder (relative to the recipe), "
            "or an id such as org/name or org/name@revision"
        ) from None
    except LocalEntryNotFoundError:
        raise SourceError(
            f"{label}: not a folder here, not in the hub's cache, and the hub cannot be reached; "
            "check the spelling, go online, or download it first"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        reason = type(error).__name__
        raise SourceError(
            f"{label}: the hub does not give it ({reason}); check the id and the revision, and for gated models "
            "accept the terms on its page and log in with `hf auth login`"
        ) from None
    revision = path.name if path.parent.name == "snapshots" else revision
    return path, revision


def locate(source: Source, role: str, directory: Path) -> Folder:
    """The folder of a source, fetched if it is a hub id.

    Args:
        source: as the recipe has it.
        role: its role, for messages.
        directory: the recipe's folder; relative paths start there.

    Raises:
        SourceError: it is nowhere to be found, or is a model where an adapter was named (or the reverse).
    """
    name = source.adapter or source.model or source.location or ""
    label = f"sources.{role}: {name}"
    revision = None
    try:
        local = Path(os.path.normpath(directory / Path(name).expanduser())) if name else directory
        exists = local.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no such user, a zero byte
        raise SourceError(f"{label[:300]}: no path: {error}; expected a folder or a hub id") from None
    if local.is_dir():
        path = local
        if source.revision:
            raise SourceError(f"{label}: a local folder has no revision; remove `revision: {source.revision}`")
    elif exists:
        raise SourceError(f"{label}: is a file; expected the folder that holds the model or adapter")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SourceError(f"{label}: no folder at {local}; check the path, it is relative to the recipe")
    else:
        path, revision = _fetch(name, source.revision, source.subfolder, label)
    if source.subfolder:
        if Path(source.subfolder).is_absolute() or ".." in Path(source.subfolder).parts:
            raise SourceError(f"{label}: subfolder {source.subfolder[:80]!r} leads out of it; expected one inside")
        path = path / source.subfolder
        if not path.is_dir():
            raise SourceError(f"{label}: has no folder {source.subfolder!r}; check `subfolder`")
    adapter = is_adapter(path)
    if source.adapter and not adapter:
        raise SourceError(f"{label}: has no adapter_config.json; expected a PEFT adapter, or say `model:`")
    if source.model and adapter and not (path / "config.json").exists():
        raise SourceError(f"{label}: is a PEFT adapter; say `adapter:` instead of `model:`")
    kind: Literal["model", "adapter"] = "adapter" if adapter and not source.model else "model"
    return Folder(name, path, kind, revision)
