"""What must not leave this machine with an output: paths of it, and tokens."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safemerge_recipes.engine.folder import SIGNATURE_FILE
from safemerge_recipes.errors import PlanError
from safemerge_recipes.storage.cache import cache_folder
from safemerge_recipes.storage.files import MAX_BYTES, content_of

NO_TEXT = (".safetensors", SIGNATURE_FILE)
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
"""Files of words, which are no place for a path."""
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")


def own_places() -> list[str]:
    """Folders of this machine that a path may start with, the longest first."""
    given = [Path.cwd(), Path(tempfile.gettempdir())]
    given += [Path(os.environ[key]) for key in ("HF_HOME", "HF_HUB_CACHE", "TMPDIR") if os.environ.get(key)]
    with contextlib.suppress(RuntimeError, OSError):  # nobody without a home folder has paths in it
        given += [Path.home(), cache_folder()]
    found = {str(place) for one in given for place in (one.absolute(), one.resolve())}
    return sorted((place for place in found if len(place) > 1), key=len, reverse=True)


def check_leaks(folder: Path, files: Mapping[str, Path | bytes]) -> None:
    """Refuses text with a path of this machine or a token in it. Raises PlanError."""
    from huggingface_hub import get_token

    here = [*own_places(), str(folder.absolute().parent), str(folder.resolve().parent)]
    paths = [place.encode() for place in here if len(place) > 1]
    tokens = [token.encode() for token in (get_token(), os.environ.get("HF_TOKEN")) if token]
    for name, held in files.items():
        if name.endswith(NO_TEXT):
            continue
        content = held if isinstance(held, bytes) else content_of(held, MAX_BYTES)
        found = _TOKEN.search(content)
        if found or any(token in content for token in tokens):
            raise PlanError(f"{folder / name}: holds an access token; remove it and revoke the token, then publish")
        hits = (re.search(re.escape(path) + rb"(?=[/\"'\s<:]|$)", content) for path in paths)
        hit = next((one for one in hits if one), None)
        if hit is not None and name not in VOCABULARIES:
            shown = content[hit.start() : hit.start() + 80].split(b"\n")[0].decode("utf-8", "replace")
            raise PlanError(
                f"{folder / name}: holds a path of this machine, {shown!r}; nothing was sent. Remove it there, or "
                "merge again from a recipe without it, then publish"
            )


def is_here(value: bytes) -> bool:
    """Whether a text is a path of this machine."""
    text = value.decode("utf-8", "replace")
    return any(text == place or text.startswith(f"{place}/") for place in own_places()) or (
        text.startswith(("/", "~", "./", "../")) and Path(text).expanduser().exists()
    )
