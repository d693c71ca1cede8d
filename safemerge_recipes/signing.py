"""Signatures of outputs, by sigstore's model-signing: that a manifest is its author's and not a stranger's.

An output is signed with a private key of one's own and verified with the public one, both PEM files of an elliptic
curve; nothing is asked of a network. The signature lies in the output and covers every other file of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from safemerge_recipes.engine.folder import LOCK_FILE, SIGNATURE_FILE
from safemerge_recipes.errors import CheckError, PlanError
from safemerge_recipes.storage.files import MAX_BYTES, content_of, remove_left, write_file

MAX_KEY_BYTES = 100_000
"""Largest key file, in bytes."""


def _library() -> tuple[ModuleType, ModuleType, ModuleType]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise PlanError(f"signatures: {error}; expected `pip install safemerge-recipes[sign]`") from None
    return hashing, signing, verifying


def _covered(folder: Path, hashing: ModuleType) -> object:
    """How the files are hashed: all but the signature and a lock."""
    return hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE_FILE, folder / LOCK_FILE])


def _done(folder: Path, key: Path, call: Callable[[], object], expected: str) -> None:
    for path in (folder, key):
        if not path.exists():
            raise CheckError(f"{path}: there is no such place; expected {'a key' if path == key else 'an output'}")
    try:
        content_of(key, MAX_KEY_BYTES, "any")  # the library would wait for a pipe, and read a device without end
        call()
    except Exception as error:  # the library raises its own, cryptography's and ValueError
        raise CheckError(f"{folder}: {str(error)[:300] or type(error).__name__}; expected {expected}") from None


def sign(folder: Path, private_key: Path) -> Path:
    """Signs a sound output; returns the signature's path.

    Raises:
        PlanError: model-signing is not installed.
        CheckError: the key cannot be used, or the folder not be read.
    """
    hashing, signing, _ = _library()
    remove_left(folder, [SIGNATURE_FILE])
    if (folder / SIGNATURE_FILE).is_dir():
        raise CheckError(f"{folder / SIGNATURE_FILE}: is a folder; expected a signature or nothing, move it")

    def call() -> None:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
        with tempfile.TemporaryDirectory() as place:
            made = Path(place) / SIGNATURE_FILE
            config.set_hashing_config(_covered(folder, hashing)).sign(folder, made)
            write_file(folder / SIGNATURE_FILE, content_of(made, MAX_BYTES))

    _done(folder, private_key, call, "an output, and an elliptic-curve key in a PEM file without a password")
    return folder / SIGNATURE_FILE


def check_signature(folder: Path, public_key: Path) -> None:
    """Verifies an output's signature.

    Raises:
        PlanError: model-signing is not installed.
        CheckError: it is missing, of another key, or a file is not as it was signed.
    """
    hashing, _, verifying = _library()
    if not (folder / SIGNATURE_FILE).is_file():
        raise CheckError(f"{folder / SIGNATURE_FILE}: missing; expected a signature, since --public-key was given")

    def call() -> None:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        config.set_hashing_config(_covered(folder, hashing)).verify(folder, folder / SIGNATURE_FILE)

    _done(folder, public_key, call, f"the signature of {public_key.name} over the files as they are")
