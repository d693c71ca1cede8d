"""Sends an output to the hub, to a branch or as a pull request; cut short, the same call goes on.

Large files go first, one by one, and stay on the hub's side once they are there; then one commit names all of them, so
that nobody ever sees half an output.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import PlanError, SafemergeError, WriteError
from safemerge_recipes.events import BytesDone, Listener, PhaseStarted
from safemerge_recipes.sharing.parcel import Parcel
from safemerge_recipes.sources.refusals import HubError, told
from safemerge_recipes.storage.files import content_of

SMALL = 16_000_000
"""Bytes from which on a file is no text that git itself would hold."""
STALE = (".safetensors", ".safetensors.index.json")
"""Endings of files in the repository that would be taken for a part of the model."""


@dataclass(frozen=True, slots=True)
class Published:
    """Where an output is on the hub.

    Attributes:
        repository: its id.
        revision: the branch, or `refs/pr/N`.
        commit: the commit.
        url: the pull request or the branch, for a browser.
        sent: the files that were sent now.
        removed: files of an earlier model that were removed there.
    """

    repository: str
    revision: str
    commit: str
    url: str
    sent: tuple[str, ...]
    removed: tuple[str, ...]


_PATIENCE = 120.0
"""Seconds without a byte after which a hub is silent."""


@contextmanager
def _asking(repository: str) -> Iterator[None]:
    """Says in one message why a repository cannot be written to; a hub that falls silent is given up after a while.

    Raises:
        WriteError: the same call goes on later.
        PlanError: it is not allowed.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    client = get_session()
    patience, client.timeout = client.timeout, _PATIENCE  # the client itself would wait without end
    try:
        with told(repository, repository, write=True):
            try:
                yield
            except RuntimeError as error:  # an upload in one of the client's threads
                raise OSError(str(error)) from error
    except HubError as error:
        kind: type[SafemergeError] = WriteError if error.again else PlanError
        raise kind(str(error)) from None
    finally:
        client.timeout = patience
        if not quiet:
            enable_progress_bars()


@dataclass(frozen=True, slots=True)
class There:
    """What a repository has already of what would be sent.

    Attributes:
        states: file -> `new`, `changed` or `unchanged`; empty where the hub could not be asked.
        removed: the files of an earlier model that would be removed there.
        note: what this was compared with, in words.
    """

    states: Mapping[str, str]
    removed: tuple[str, ...]
    note: str


def look(parcel: Parcel, repository: str, branch: str | None) -> There:
    """Compares a parcel with what a branch of the repository holds; changes nothing, and never fails for the hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api, compared = HfApi(), branch or "main"
    try:
        with _asking(repository):
            try:
                there = _tree(api, repository, compared)
            except RevisionNotFoundError:
                there, compared = _tree(api, repository, "main"), "main"
            except RepositoryNotFoundError:
                note = f"{repository} is not there yet, or not for everybody to see"
                return There(dict.fromkeys(parcel.files, "new"), (), note)
    except (PlanError, WriteError) as error:
        return There({}, (), f"what is there already is not known ({error})")
    states = {
        name: "unchanged" if _same(parcel, name, there.get(name)) else "changed" if name in there else "new"
        for name in parcel.files
    }
    stale = tuple(name for name in there if _is_stale(name, parcel))
    found = Counter(states.values())
    counts = ", ".join(f"{found[one]} {one}" for one in ("unchanged", "changed", "new"))
    return There(states, stale, f"{counts}, compared with {compared} of {repository}")


def send(
    parcel: Parcel, repository: str, branch: str | None, on_event: Listener, *, private: bool = False, title: str = ""
) -> Published:
    """Sends a parcel. What is there already is not sent again.

    Args:
        parcel: the files.
        repository: the id; made where it does not exist.
        branch: the branch, made where it does not exist; None: a pull request to the main branch, the open one of the
            same title if there is one.
        on_event: is told of bytes.
        private: whether a new repository is private.
        title: of the commit and the pull request.

    Raises:
        PlanError: the hub does not allow it.
        WriteError: broken off; the same call goes on.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with _asking(repository):
        user = api.whoami()["name"]
        api.create_repo(repository, private=private, exist_ok=True)
        revision = branch or _pull_request(api, repository, user, title)
        if branch is not None and branch != "main":
            api.create_branch(repository, branch=branch, exist_ok=True)
        there = _tree(api, repository, revision)
        additions = [CommitOperationAdd(name, _held(content)) for name, content in parcel.files.items()]
        stale = [name for name in there if _is_stale(name, parcel)]
        on_event(PhaseStarted("upload", sum(one.upload_info.size for one in additions)))
        for one in additions:
            api.preupload_lfs_files(repository, [one], revision=revision, free_memory=False)
            on_event(BytesDone(one.upload_info.size))
        made = api.create_commit(
            repository, [*additions, *(CommitOperationDelete(name) for name in stale)],
            commit_message=title, revision=revision,
        )  # fmt: skip
    number = revision.removeprefix("refs/pr/")
    url = f"{api.endpoint}/{repository}/" + (f"tree/{branch}" if branch else f"discussions/{number}")
    sent = tuple(name for name in parcel.files if not _same(parcel, name, there.get(name)))
    return Published(repository, revision, made.oid, url, sent, tuple(stale))


def _held(content: Path | bytes) -> Any:
    return content if isinstance(content, bytes) else str(content)


def _tree(api: Any, repository: str, revision: str) -> dict[str, Any]:
    """Name -> what the hub says of each file of a revision."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repository, revision=revision, recursive=True)
    return {one.path: one for one in tree if isinstance(one, RepoFile)}


def _same(parcel: Parcel, name: str, there: Any) -> bool:
    """Whether the hub has a file already: a large one by its sha256, a small one by git's sha1."""
    if there is None or there.size != parcel.size(name):
        return False
    if there.lfs:
        return bool(there.lfs.sha256 == parcel.sha256(name))
    if parcel.size(name) >= SMALL:
        return False
    held = parcel.files[name]
    content = held if isinstance(held, bytes) else content_of(held, SMALL)
    return bool(there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest())


def _is_stale(name: str, parcel: Parcel) -> bool:
    """Whether a file of the repository belongs to an earlier model, and would be taken for a part of this one."""
    return name not in parcel.files and "/" not in name and (name.endswith(STALE) or name.startswith("safemerge_"))


def _pull_request(api: Any, repository: str, user: str, title: str) -> str:
    """The revision of a pull request: of the user's own open one of this title, or of a new one."""
    for one in api.get_repo_discussions(repository, author=user, discussion_type="pull_request"):
        if one.is_pull_request and one.title == title and one.status in ("open", "draft"):
            return f"refs/pr/{one.num}"
    return f"refs/pr/{api.create_pull_request(repository, title).num}"
