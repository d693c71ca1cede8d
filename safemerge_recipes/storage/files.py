"""Small files on disk: written whole or not at all, under a name that nobody could have prepared.

Every write of a small file goes through here. Knows nothing of models, outputs and their states.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that appears under its name when all of it is on the disk.

    Until then it lies beside `path` under a random name that did not exist, so that no link that somebody put
    there is followed; the last rename replaces a link at `path` itself and never what it leads to.
    """
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    with os.fdopen(os.open(temporary, _NEW, 0o666), "wb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def read_file(path: Path, limit: int) -> bytes:
    """The content of a small file that a stranger may have made: a plain file, and of no more than `limit` bytes.

    Raises:
        OSError: it cannot be opened, or is no plain file (a pipe would wait for ever).
        ValueError: it is larger.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no plain file", str(path))
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path}: larger than {limit} bytes")
    return content


def write_file(path: Path, content: bytes | str) -> None:
    """Writes a small file so that it is either there in full or not at all, even after a power failure."""
    with written(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_left(folder: Path, names: Collection[str]) -> None:
    """Removes what killed writers of these files left beside them; nobody else may be writing them."""
    for path in folder.glob(".*.tmp"):
        made = re.fullmatch(r"\.(.+)\.[0-9a-f]{16}\.tmp", path.name)
        if made and made[1] in names and (path.is_symlink() or not path.is_dir()):
            path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON, one member a line."""
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network mounts sync no folders
            raise
    finally:
        os.close(descriptor)


def write_bytes(file: int, view: memoryview, at: int) -> None:
    """Writes all of `view` at byte `at`; short writes are continued."""
    done = 0
    while done < len(view):
        done += os.pwrite(file, view[done:], at + done)
