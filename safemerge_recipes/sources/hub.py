"""Repositories of the hub: found at a commit, listed, and of their files only those that are asked for.

A revision is resolved once; everything else is asked of that commit. Client, cache, endpoint, token and offline
switch are huggingface_hub's. What arrives is compared with the hash that the hub names before anybody reads it, and of
a weight file the header alone can be had. Knows nothing of roles and recipes.
"""

from __future__ import annotations

import glob
import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import SourceError
from safemerge_recipes.events import BytesDone, Listener, PhaseStarted, ignore
from safemerge_recipes.sources.refusals import told
from safemerge_recipes.storage.cache import cache_folder
from safemerge_recipes.storage.digests import file_digest
from safemerge_recipes.storage.files import write_file
from safemerge_recipes.storage.identity import FileIdentity
from safemerge_recipes.storage.safetensors import MAX_HEADER_BYTES

TEMPLATES = "additional_chat_templates"
"""The one folder beside a model whose files an output may have."""
FIRST_BYTES = 1 << 17
"""Bytes asked for at first to get a header: that of a shard of a 70 B model is a tenth of it."""


_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def is_id(text: str) -> bool:
    """Whether the hub may have a repository of this name."""
    return bool(_ID.fullmatch(text)) and ".." not in text and "--" not in text


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the hub lists it: bytes, and the sha256 of a large one."""

    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Away:
    """A weight file that is still on the hub: `header` holds its first bytes, the rest is what the hub says of it."""

    header: Path
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at a commit.

    Attributes:
        label: how messages call it.
        name: its id.
        commit: 40 hexadecimal digits.
        path: its folder in the hub's cache.
        files: what lies in the folder that was listed, by name; None where only the cache could be asked.
        folders: the names of the folders in the folder that was listed.
        reason: why the hub could not be asked.
    """

    label: str
    name: str
    commit: str
    path: Path
    files: Mapping[str, HubFile] | None = None
    folders: tuple[str, ...] = ()
    reason: str = ""

    def has(self, name: str) -> bool:
        """Whether it holds a file; of a cache alone, whether that does."""
        return name in self.files if self.files is not None else (self.path / name).is_file()

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of the files that are not in the cache."""
        return [name for name in names if not (self.path / name).is_file()]


def open_repository(
    name: str, revision: str | None, label: str, folder: str = "", first: Sequence[str] = ()
) -> Repository:
    """A repository at the commit that a revision names now, with some of its files fetched.

    Where the hub cannot be asked, the cache answers for it.

    Args:
        name: its id.
        revision: branch, tag or commit; None: the main branch.
        label: how messages call it.
        folder: the folder of it that is listed.
        first: files of that folder that are fetched if they are there.

    Raises:
        SourceError: it does not exist or is not given, or can neither be asked for nor found in the cache.
    """
    from huggingface_hub import snapshot_download

    prefix = f"{folder}/" if folder else ""
    wanted = [glob.escape(prefix + one) for one in first]
    with told(label, name, revision):
        found = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, tqdm_class=_counter(ignore)))
    repository = Repository(label, name, found.name, found)
    try:
        with told(label, name, revision):
            files, folders = _listed(name, found.name, folder)
            return replace(repository, files=files, folders=folders)
    except SourceError as error:
        return replace(repository, reason=str(error).removeprefix(f"{label}: "))


def _listed(name: str, commit: str, folder: str) -> tuple[dict[str, HubFile], tuple[str, ...]]:
    """(files of a folder and of its chat templates by name in the repository, names of its folders)."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    listed = list(HfApi().list_repo_tree(name, folder or None, revision=commit))
    files = {
        one.path: HubFile(one.size, one.lfs.sha256 if one.lfs else None) for one in listed if isinstance(one, RepoFile)
    }
    folders = tuple(Path(one.path).name for one in listed if not isinstance(one, RepoFile))
    if TEMPLATES in folders:
        files |= _listed(name, commit, f"{folder}/{TEMPLATES}" if folder else TEMPLATES)[0]
    return files, folders


def fetch(repository: Repository, names: Sequence[str], on_event: Listener = ignore) -> None:
    """Fetches files of a repository that are not in the cache yet. What has arrived in full stays there.

    Raises:
        SourceError: the hub does not give one, breaks off, or sends other bytes than it says.
    """
    missing = repository.missing(names)
    if not missing:
        return
    if repository.files is None:
        raise SourceError(f"{repository.label}: {missing[0]} is not in the hub's cache, and {repository.reason}")
    from huggingface_hub import snapshot_download

    on_event(PhaseStarted("fetch", sum(repository.files[name].size for name in missing)))
    patterns = [glob.escape(name) for name in missing]
    with told(repository.label, repository.name, repository.commit):
        snapshot_download(
            repository.name, revision=repository.commit, allow_patterns=patterns, tqdm_class=_counter(on_event)
        )
    for name in missing:
        _check(repository, name)


def _check(repository: Repository, name: str) -> None:
    """Removes a file that is not what the hub said of it, so that it is fetched again; raises SourceError then."""
    path, wanted = repository.path / name, (repository.files or {})[name].sha256
    try:
        found = file_digest(FileIdentity.of(path))  # compares with the name of its blob
        if found is None or (wanted and found.sha256 != wanted):
            raise SourceError("its sha256 is another")
    except SourceError:
        blob = path.resolve()
        for one in (path, blob):
            one.unlink(missing_ok=True)
        raise SourceError(
            f"{repository.label}: {name} arrived with other bytes than the hub says (sha256 {wanted or blob.name}); it "
            "was removed, run the same command again, and if that does not help ask whoever runs the hub or mirror"
        ) from None


def head(repository: Repository, name: str) -> Away:
    """The header of a safetensors file, by range requests; kept in this program's cache.

    Raises:
        SourceError: the hub does not give it.
    """
    known = (repository.files or {})[name]
    key = hashlib.sha256(f"{repository.name}@{repository.commit}/{name}".encode()).hexdigest()
    with told(repository.label, repository.name, repository.commit):
        path = cache_folder() / "headers" / f"{key}.safetensors"
        if not path.is_file():
            content = _part(repository, name, 0, FIRST_BYTES)
            length = 8 + struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else 0
            if len(content) < length <= min(known.size, 8 + MAX_HEADER_BYTES):
                content += _part(repository, name, len(content), length)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, content[: length or None], durable=False)
    return Away(path, known.size, known.sha256)


def _part(repository: Repository, name: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file, or fewer at its end."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    url = hf_hub_url(repository.name, name, revision=repository.commit)
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    answer = http_backoff("GET", url, headers=headers, max_retries=3, timeout=30)
    hf_raise_for_status(answer)
    content: bytes = answer.content
    return content[: end - start] if answer.status_code == 206 else content[start:end]


def _counter(on_event: Listener) -> type[Any]:
    """A class of bars that draw nothing and tell of bytes."""
    from tqdm.auto import tqdm

    class Counter(tqdm):
        def __init__(self, *args: Any, **given: Any) -> None:
            # One bar counts what is on the disk, another what came over the wire, a third files.
            self.tells = given.get("unit") == "B" and not str(given.get("desc")).startswith("Downloading bytes")
            super().__init__(*args, **{**given, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self.tells and n:
                on_event(BytesDone(int(n)))
            return None

    return Counter
