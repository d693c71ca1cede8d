"""From a recipe's source to a local folder: a path, a hub id fetched into the hub's cache, a URL's mirror.

Only the files a merge needs are fetched: configs, tokenizer and licence, and the weight files that the index names. Of
a model's weights the headers alone can be had first (`Folder.away`), and the rest later (`complete`). No pickle is
downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Literal

from safemerge_recipes.errors import SourceError
from safemerge_recipes.events import Listener
from safemerge_recipes.recipe.builtins import ROLES
from safemerge_recipes.recipe.model import Source
from safemerge_recipes.sources.checkpoint import named_files
from safemerge_recipes.sources.hub import TEMPLATES, Away, Repository, fetch, head, open_repository
from safemerge_recipes.sources.instead import instead
from safemerge_recipes.sources.mirror import mirror
from safemerge_recipes.sources.peft.adapter import is_adapter
from safemerge_recipes.sources.peft.config import CONFIG_FILE
from safemerge_recipes.sources.peft.keys import INDEX as ADAPTER_INDEX
from safemerge_recipes.sources.peft.keys import WEIGHTS_FILE
from safemerge_recipes.storage.layout import INDEX_FILE, SINGLE_FILE
from safemerge_recipes.storage.remote import is_url

CONFIGS = ("config.json", CONFIG_FILE, INDEX_FILE, ADAPTER_INDEX)
"""Files that say what else is needed."""
SIDE_FILES = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.py",
    "README.md",
    "LICENSE*",
    "USE_POLICY*",
)
"""Files beside the weights that an output may have from its sources, or that say their licence."""
_NOT_NEEDED = ("*.index.json", "trainer_state.json", "optimizer*", "training_args*", "all_results.json", "safemerge_*")

Known = dict[tuple[str, str | None, str | None], Repository]
"""Repositories that were opened for other roles: two roles that name the same thing get the same commit."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A source on disk.

    Attributes:
        label: how the recipe names it.
        path: the folder.
        kind: what lies there.
        revision: the commit, where it has one.
        repository: where it comes from, if from the hub.
        away: the weight files of which only the header is here, by name.
    """

    label: str
    path: Path
    kind: Literal["model", "adapter"]
    revision: str | None
    repository: Repository | None = None
    away: Mapping[str, Away] = field(default_factory=dict)


def complete(folder: Folder, names: Collection[str] | None, on_event: Listener) -> Folder:
    """The folder with weight files fetched that were away.

    Args:
        folder: as `locate` found it.
        names: which; None: all.
        on_event: is told of bytes.

    Raises:
        SourceError: the hub does not give one.
    """
    wanted = [name for name in folder.away if names is None or name in names]
    if not wanted or folder.repository is None:
        return folder
    below = folder.path.relative_to(folder.repository.path)
    fetch(folder.repository, [(below / name).as_posix() for name in wanted], on_event)
    return replace(folder, away={name: away for name, away in folder.away.items() if name not in wanted})


def _repository(source: Source, name: str, label: str, known: Known) -> tuple[Repository, Path]:
    """(the repository at its commit, the folder of it that the source names), with configs and side files."""
    below = (source.subfolder or "").strip("/")
    key = (name, source.revision, below)
    if key not in known:
        known[key] = open_repository(name, source.revision, label, below, CONFIGS)
    repository = replace(known[key], label=label)
    fetch(repository, [name for name in repository.files or () if _is_side_file(name, below)])
    return repository, repository.path / below


def _is_side_file(name: str, below: str) -> bool:
    own = name.removeprefix(f"{below}/" if below else "")
    if own.startswith(f"{TEMPLATES}/"):
        return own.endswith(".jinja")
    return any(fnmatch(own, one) for one in SIDE_FILES) and not any(fnmatch(own, one) for one in _NOT_NEEDED)


def _weights(repository: Repository, path: Path, adapter: bool) -> Iterator[str]:
    """The weight files that are read, as `open_checkpoint` and `open_adapter` read them."""
    below = path.relative_to(repository.path)
    if adapter:
        whole = repository.has((below / WEIGHTS_FILE).as_posix()) or not (path / ADAPTER_INDEX).is_file()
        own = [WEIGHTS_FILE] if whole else named_files(path, ADAPTER_INDEX)
        yield from (name for name in own if repository.has((below / name).as_posix()))
    elif repository.has((below / SINGLE_FILE).as_posix()) or not (path / INDEX_FILE).is_file():
        if repository.files is not None and not repository.has((below / SINGLE_FILE).as_posix()):
            names = (Path(name).name for name in repository.files)
            raise SourceError(f"{repository.label}: {instead(repository.name, sorted(names))}")
        yield SINGLE_FILE
    else:
        for name in named_files(path):
            if repository.files is not None and not repository.has((below / name).as_posix()):
                raise SourceError(f"{repository.label}: {INDEX_FILE} names {name[:200]!r}, which the hub does not have")
            yield name


def _fetched(folder: Folder, headers: bool) -> Folder:
    """The folder with its weights, or with those of a model as headers."""
    repository = folder.repository
    if repository is None:
        return folder
    below, adapter = folder.path.relative_to(repository.path), folder.kind == "adapter"
    names = list(_weights(repository, folder.path, adapter))
    whole = {name: (below / name).as_posix() for name in names}
    if headers and not adapter and repository.files is not None:
        missing = set(repository.missing(list(whole.values())))
        return replace(folder, away={name: head(repository, path) for name, path in whole.items() if path in missing})
    fetch(repository, list(whole.values()))
    return folder


def locate(source: Source, role: str, directory: Path, *, headers: bool = False, known: Known | None = None) -> Folder:
    """The folder of a source, fetched if it is a hub id.

    Args:
        source: as the recipe has it.
        role: its role, for messages.
        directory: the recipe's folder; relative paths start there.
        headers: of a model's weights on the hub fetch the headers alone.
        known: repositories that were opened for other roles.

    Raises:
        SourceError: it is nowhere to be found, is not given by the hub, or is a model where an adapter was named (or
            the reverse).
    """
    name = source.adapter or source.model or source.location or ""
    label = f"sources.{role}: {name}"
    repository = None
    if source.subfolder and (Path(source.subfolder).is_absolute() or ".." in Path(source.subfolder).parts):
        raise SourceError(f"{label}: subfolder {source.subfolder[:80]!r} leads out of it; expected one inside")
    if is_url(name):
        if source.revision:
            raise SourceError(f"{label}: a URL has no revision here; remove `revision: {source.revision}`")
        url = "/".join((name.rstrip("/"), *PurePosixPath(source.subfolder or "").parts))
        return _of_kind(source, label, Folder(name, mirror(url, label, SIDE_FILES), "model", None))
    try:
        local = Path(os.path.normpath(directory / Path(name).expanduser())) if name else directory
        exists = local.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no such user, a zero byte
        raise SourceError(f"{label[:300]}: no path: {error}; expected a folder or a hub id") from None
    if local.is_dir():
        path = local / (source.subfolder or "")
        if source.revision:
            raise SourceError(f"{label}: a local folder has no revision; remove `revision: {source.revision}`")
    elif exists:
        raise SourceError(f"{label}: is a file; expected the folder that holds the model or adapter")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        other = f", or say --source {role}=PLACE" if role in ROLES else ""
        raise SourceError(f"{label}: no folder at {local}; check the path, it is relative to the recipe{other}")
    else:
        repository, path = _repository(source, name, label, {} if known is None else known)
    if source.subfolder and not path.is_dir():
        raise SourceError(f"{label}: has no folder {source.subfolder!r}; check `subfolder`")
    found = Folder(name, path, "model", repository.commit if repository else None, repository)
    return _fetched(_of_kind(source, label, found), headers)


def _of_kind(source: Source, label: str, folder: Folder) -> Folder:
    """The folder as a model or an adapter, whichever it is. Raises SourceError where the recipe says the other."""
    path = folder.path
    adapter = is_adapter(path)
    if source.adapter and not adapter:
        raise SourceError(f"{label}: has no adapter_config.json; expected a PEFT adapter, or say `model:`")
    if source.model and adapter and not (path / "config.json").exists():
        raise SourceError(f"{label}: is a PEFT adapter; say `adapter:` instead of `model:`")
    kind: Literal["model", "adapter"] = "adapter" if adapter and not source.model else "model"
    return replace(folder, kind=kind)
