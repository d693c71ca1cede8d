"""What the hub refused, or what broke on the way to it, as one message that says what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safemerge_recipes.errors import SourceError


class HubError(SourceError):
    """The hub refused, or could not be asked. `again`: whether the same may work later."""

    def __init__(self, message: str, again: bool = False) -> None:
        super().__init__(message)
        self.again = again


@contextmanager
def told(label: str, name: str, revision: str | None = None, *, write: bool = False) -> Iterator[None]:
    """Says in one message what the hub refused, or what broke on the way. Raises HubError."""
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it warns of every attempt
    try:
        yield
    except (OSError, ValueError, errors.HTTPError) as error:
        reason = _reason(error, name, revision, write)
        raise HubError(f"{label}: {reason}", again=reason.endswith(_KEPT)) from None
    finally:
        logging.set_verbosity(before)


_KEPT = "what has arrived is kept, and the same command goes on from there"


def _reason(error: BaseException, name: str, revision: str | None, write: bool) -> str:
    from huggingface_hub import constants, errors

    chain = list(_chain(error))
    if isinstance(error, errors.HFValidationError):
        return (
            "no such folder, and not a hub id either; expected a folder (relative to the recipe), or an id such as "
            "org/name or org/name@revision"
        )
    for one in chain:
        if isinstance(one, errors.HfHubHTTPError):
            return _refusal(one, name, revision, write)
    if constants.HF_HUB_OFFLINE or any(isinstance(one, errors.OfflineModeIsEnabled) for one in chain):
        return "not a folder here, not in the hub's cache, and HF_HUB_OFFLINE forbids to ask; unset it, or download it"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "needs a token: log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"not a folder here, not in the hub's cache, and the hub cannot be reached ({constants.ENDPOINT}); check "
            "the spelling, go online, or download it first"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left for the hub's cache ({constants.HF_HUB_CACHE}); free some, or set HF_HOME; {_KEPT}"
    if isinstance(error, OSError) and error.errno is not None and error.filename:
        return f"{error.filename}: {error.strerror}; expected a cache that can be written, see HF_HOME"
    what = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return f"{what}; expected what the hub at {constants.ENDPOINT} takes, and answers that are its own"
    return f"the connection to {constants.ENDPOINT} broke off ({what}); {_KEPT}"


def _refusal(error: Any, name: str, revision: str | None, write: bool) -> str:
    """What an HTTP status of the hub means, and what to do."""
    from huggingface_hub import constants, errors, get_token

    status = getattr(error.response, "status_code", 0)
    place = f"{constants.ENDPOINT}/{name}"
    may = "a token that may write there" if write else "a token that may read it"
    login = f"log in with `hf auth login` or set HF_TOKEN to {may}" if get_token() is None else f"use {may}"
    if isinstance(error, errors.GatedRepoError):
        return f"gated ({status}): accept its terms at {place}, then {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision!r}; expected a branch, a tag or a commit of {place}"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return f"the hub knows no such repository, or it is private ({status}); check the id, and {login}"
    if isinstance(error, errors.EntryNotFoundError):
        return f"the hub lists a file that it does not have ({status}); try again, or another revision"
    if status == 403:
        return f"the hub does not allow it (403); {login}"
    if status == 429:
        return f"the hub asks to slow down (429); wait some minutes: {_KEPT}"
    return f"the hub answers with an error of its own ({status}); try again later: {_KEPT}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
