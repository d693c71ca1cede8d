"""The output folder around the weights: its working name, its lock, its states.

A folder is written under the name `<output>.part`, which no reader takes for a model: it has no config until
the weights are complete. It gets its real name in one rename, after the manifest. One process at a time works
on an output: it holds a lock on a file in the folder, which goes with the folder wherever it is renamed to.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safemerge_recipes.engine.journal import JOURNAL_FILE, is_journal
from safemerge_recipes.errors import PlanError, ReadError, SafemergeError, SourceError
from safemerge_recipes.storage.files import own_file, reading, sync_folder

MANIFEST_FILE = "safemerge_manifest.json"
PLAN_FILE = "safemerge_plan.json"
RECIPE_FILE = "safemerge_recipe.yaml"
REPORT_FILE = "safemerge_report.html"
SCORES_FILE = "safemerge_scores.json"
ANSWERS_FILE = "safemerge_answers.jsonl"
LOCK_FILE = "safemerge.lock"
PARTS = "safemerge_parts"
"""Folder of an unfinished output that holds receipts, and what part workers tell each other."""
SIGNATURE_FILE = "model.sig"
"""What model-signing writes; it covers the manifest, so the manifest cannot hold it."""
PICTURES = {"Sweep": "safemerge_sweep.svg", "Probe": "safemerge_probe.svg"}
"""Pictures that the report shows where an output has them, by title."""
MAX_PICTURE_BYTES = 16_000_000
"""Largest picture that a report shows, in bytes."""
DOCUMENTS = frozenset(
    [
        "README.md",
        MANIFEST_FILE,
        PLAN_FILE,
        RECIPE_FILE,
        REPORT_FILE,
        SCORES_FILE,
        ANSWERS_FILE,
        *PICTURES.values(),
        *(picture.replace(".svg", ".json") for picture in PICTURES.values()),
    ]
)
"""What this program writes beside weights and side files."""


def part_of(output: Path) -> Path:
    """The working folder of an output."""
    return output.with_name(output.name + ".part")


def check_output(output: Path, force: bool) -> None:
    """Refuses an output that is in the way.

    Raises:
        PlanError: it is a file, a finished output without `force`, or a folder this program did not write.
    """
    try:
        if not output.name:
            raise PlanError(f"{output}: cannot be an output; expected a folder that does not exist yet")
        if output.is_symlink() or (output.exists() and not output.is_dir()):
            raise PlanError(f"{output}: is in the way; expected a folder that does not exist yet")
        if not output.exists() or not any(output.iterdir()):
            return
        finished = (output / MANIFEST_FILE).exists()
    except OSError as error:
        raise PlanError(f"{output}: {error.strerror}; choose another --output") from None
    if not finished:
        raise PlanError(f"{output}: is not empty and not an output of safemerge; choose another --output or empty it")
    if not force:
        raise PlanError(f"{output}: holds a finished output; say --force to replace it, or choose another --output")


def check_place(output: Path, force: bool) -> None:
    """Refuses, before anything is computed, an output that could not be put in its place when it is finished.

    Raises:
        PlanError: see `check_output` and `check_part`; or its name leaves no room for the working ones, or it is the
            root of a file system, or the lower layer of an overlay, which cannot be renamed.
    """
    check_output(output, force)
    part, there = part_of(output), next(parent for parent in output.absolute().parents if parent.exists())
    longest = max(len(os.fsencode(name)) for name in (part.name, _replaced(output).name))
    with suppress(OSError, ValueError):  # a file system need not say how long names may be
        if longest > (most := os.pathconf(there, "PC_NAME_MAX")):
            allowed = most - longest + len(os.fsencode(output.name))
            raise PlanError(
                f"{output.name[:40]}…: a name of {len(os.fsencode(output.name))} bytes, and working names are longer; "
                f"expected at most {allowed} here, choose another --output"
            )
    if output.is_mount():
        raise PlanError(f"{output}: is the root of a file system, and cannot be renamed; choose a folder inside it")
    check_part(part)
    if output.exists() and not os.access(output.parent, os.W_OK | os.X_OK):
        raise PlanError(f"{output.parent}: must not be written to; choose another --output")


def _check_rename(output: Path, part: Path) -> None:
    """Refuses an output that cannot be renamed: of the lower layer of an overlay. `part` holds a lock.

    Raises:
        PlanError: it cannot.
    """
    try:
        if output.exists() and any(output.iterdir()):
            os.rename(output, part)  # never done: that one is not empty
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise PlanError(
                f"{output}: lies in a lower layer of an overlay file system and cannot be replaced; choose another "
                "--output, or copy it and remove the original"
            ) from None


def _replaced(output: Path) -> Path:
    """Where an output lies for the moment in which another takes its name."""
    return output.with_name(f".{output.name}.safemerge-replaced")


def check_part(part: Path) -> None:
    """Refuses a working folder that this program did not make: nothing of the user's is ever emptied.

    Ours is a real folder that is empty, but for a lock, or holds the journal of a run, or a lock that was taken for
    this name: of a run that was killed just before its last rename. A finished output that is named like a working
    folder has neither.

    Raises:
        PlanError: something else is there; the message says whose it seems to be.
    """
    choose = "move it away, or choose another --output"
    try:
        if part.is_symlink():
            raise PlanError(f"{part}: is a link, where the working folder is to be made; {choose}")
        if not part.exists():
            return
        if not part.is_dir():
            raise PlanError(f"{part}: is a file, where the working folder is to be made; {choose}")
        names = {path.name for path in part.iterdir()} - {LOCK_FILE}
    except OSError as error:
        raise PlanError(f"{part}: {error.strerror}; {choose}") from None
    if not names or is_journal(part / JOURNAL_FILE) or _lock_names(part):
        return
    if MANIFEST_FILE in names:
        raise PlanError(f"{part}: holds a finished output, where the working folder is to be made; {choose}")
    shown = ", ".join(sorted(names)[:3]) + (" and more" if len(names) > 3 else "")
    raise PlanError(f"{part}: holds {shown} and no journal of safemerge, so it seems to be yours; {choose}")


def _lock_names(part: Path) -> bool:
    """Whether the lock in a folder was taken for a working folder of its name."""
    try:
        with reading(part / LOCK_FILE, links="none") as file:
            return file.read(8192).split(b"\n")[1:2] == [part.name.encode()]
    except (OSError, SourceError):
        return False


@contextmanager
def locked(folder: Path, name: str, *, shared: bool = False) -> Iterator[None]:
    """Holds a folder for this process; released by the system even if the process is killed.

    Args:
        folder: the folder.
        name: the working folder's name, which the lock keeps: see `check_part`.
        shared: with others who share it, as part workers do.

    Raises:
        PlanError: another run holds it; the message names its process.
    """
    path = folder / LOCK_FILE
    try:
        file = own_file(path)
    except SourceError as error:
        raise PlanError(f"{error}; remove it, or choose another --output") from None
    except OSError as error:
        raise PlanError(f"{path}: cannot be locked: {error.strerror}; remove it, or choose another --output") from None
    try:
        with _tolerant():
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(file, 200, 0).decode("utf-8", "replace").partition("\n")[0]
                raise PlanError(f"{folder}: another run is writing it ({holder}); wait for it or stop it") from None
        if not path.exists() or not os.path.samestat(os.stat(path), os.fstat(file)):
            raise PlanError(f"{folder}: another run has just finished it; look at its output, then run again")
        told = f"process {os.getpid()} on {socket.gethostname()}\n{name}\n".encode()
        os.pwrite(file, told, 0)  # over what an earlier run wrote: cut short, the name is still the same
        os.ftruncate(file, len(told))
        yield
    finally:
        os.close(file)


@contextmanager
def _tolerant() -> Iterator[None]:
    """Lets a file system without locks pass: nothing better is to be had there."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF):
            raise


@contextmanager
def working_folder(output: Path, force: bool, reusable: Callable[[Path], bool]) -> Iterator[Path]:
    """The folder `<output>.part`, held for this process, made or found as an earlier run left it.

    A finished output that is being replaced becomes the working folder if it is `reusable`, else it stays until
    `publish`. When the body fails for good, and the folder was new, nothing of it remains.

    Raises:
        PlanError: the output is in the way, held by another run, or cannot be made.
    """
    check_place(output, force)
    part = part_of(output)
    parents = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if force and not part.exists() and (output / MANIFEST_FILE).exists() and reusable(output):
            with locked(output, part.name):
                try:
                    os.rename(output, part)
                except OSError:  # of a lower layer of an overlay: see `_check_rename`
                    (output / LOCK_FILE).unlink(missing_ok=True)
        part.mkdir(exist_ok=True)
    except OSError as error:
        raise PlanError(f"{output}: cannot be made: {error.strerror}; choose another --output") from None
    try:
        with locked(part, part.name):
            check_part(part)
            fresh = all(path.name == LOCK_FILE for path in part.iterdir())
            try:
                check_output(output, force)  # again: another run may have finished it meanwhile
                _check_rename(output, part)
                yield part
            except (SourceError, PlanError) as error:
                if fresh and not isinstance(error, ReadError):
                    shutil.rmtree(part, ignore_errors=True)
                raise
    except SafemergeError:
        with suppress(OSError):
            for parent in parents:
                parent.rmdir()  # stops at the first that holds something
        raise


def keep_only(part: Path, names: set[str]) -> None:
    """Removes everything from the working folder but these files, the lock and the journal."""
    for path in sorted(part.iterdir(), key=lambda path: not path.name.startswith("config")):  # readers want a config
        if path.name in names or path.name in (LOCK_FILE, JOURNAL_FILE):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def publish(part: Path, output: Path, force: bool) -> None:
    """Gives the finished folder its real name, in one rename, replacing what `check_output` allows.

    Killed anywhere in here, the folder is either the output or still complete under its working name.
    """
    check_output(output, force)
    (part / JOURNAL_FILE).unlink(missing_ok=True)
    shutil.rmtree(part / PARTS, ignore_errors=True)
    for folder in (part, *(path for path in part.iterdir() if path.is_dir())):
        sync_folder(folder)
    old = _replaced(output)
    if old.is_symlink() or old.exists():
        if old.is_symlink() or not (old / MANIFEST_FILE).is_file():
            raise PlanError(f"{old}: is in the way and holds no output of safemerge; move it away")
        shutil.rmtree(old)
    if output.exists():
        os.rename(output, old)
    os.rename(part, output)
    sync_folder(output.parent)
    with suppress(OSError):
        (output / LOCK_FILE).unlink()
    shutil.rmtree(old, ignore_errors=True)
