"""Files on disk: the one way to open what a stranger may have made, and the one way to write.

A model, an adapter or an output may come from anywhere, so what lies under an expected name may be a link to
elsewhere, a device, a pipe that never ends or a file of a terabyte. Everything that is read by its path goes through
`open_file`, everything that is written through `written` or `own_file`. Knows nothing of models, outputs and their
states.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, Literal

from safemerge_recipes.errors import SourceError
from safemerge_recipes.storage.blobs import BlobClaim
from safemerge_recipes.storage.remote import is_url, opened

Links = Literal["none", "inside", "any"]
"""Which links are followed: none, those that stay in the file's own folder, or any, for what the user named."""

MAX_BYTES = 128_000_000
"""Largest file that is read whole, in bytes, where nothing smaller is asked for: a plan of 200 000 tensors."""
MAX_NAME = 200
"""Longest file name accepted, in characters; file systems take 255 bytes, and working names are longer."""
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_OWN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def inside(directory: Path, name: str) -> Path:
    """The path of file `name` of `directory`, refused when it leads out of it.

    The hub's cache keeps snapshot files as links into the repository's own `blobs` folder, and older downloads into
    a folder of one's own (`local_dir`) do the same: those count as inside.

    Raises:
        SourceError: the name is not a plain file name, or a link leads elsewhere.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or not name.isprintable() or len(name) > MAX_NAME:
        raise SourceError(f"{directory}: names the file {name[:200]!r}; expected a plain file name of this folder")
    path = directory / name
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    allowed = [home, *(place.parent / "blobs" for place in home.parents if place.name == "snapshots")]
    if real.parent.name == "blobs" and real.parent.parent.name.startswith(("models--", "datasets--")):
        allowed.append(real.parent)  # where older versions of the hub's library let a folder's links lead
    if not any(real.is_relative_to(place) for place in allowed):
        raise SourceError(f"{path}: a link that leads out of its folder; expected a file inside, copy it there")
    return path


def within(directory: Path, path: Path) -> Path:
    """The path, refused when it lies, or a link leads, outside the directory and everything below it.

    Raises:
        SourceError: it does.
    """
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory)):
        raise SourceError(f"{path}: lies outside {directory}; expected a file in that folder, copy it there")
    return path


def _refuse_irregular(path: Path | str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no file")
        raise SourceError(f"{path}: is {kind}; expected a regular file")


def open_file(path: Path | str, links: Links = "inside") -> int:
    """A descriptor to read a regular file; what is not one is neither opened nor waited for.

    Raises:
        SourceError: it is not a regular file, or a link leads where `links` forbids it.
        OSError: it is missing, or must not be read.
    """
    path = Path(path)
    if links == "inside":
        inside(path.parent, path.name)
    _refuse_irregular(path, os.stat(path, follow_symlinks=links != "none"))  # not even opened: devices may react
    return _regular(path, os.open(path, _READ | (os.O_NOFOLLOW if links == "none" else 0)))


def _regular(path: Path, descriptor: int) -> int:
    """The descriptor, if it is one of a regular file; else it is closed and SourceError raised."""
    try:
        _refuse_irregular(path, os.fstat(descriptor))
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def reading(path: Path | str, limit: int | None = None, links: Links = "inside") -> BufferedReader:
    """A regular file, or one in object storage, to read, of at most `limit` bytes.

    Raises as `open_file` and `check_size` do.
    """
    if is_url(path):
        found = opened(str(path))
        if limit is not None:
            _check_size(path, found.seek(0, os.SEEK_END), limit)
            found.seek(0)
        return found
    file = os.fdopen(open_file(path, links), "rb")
    try:
        if limit is not None:
            _check_size(path, os.fstat(file.fileno()).st_size, limit)
        return file
    except BaseException:
        file.close()
        raise


def content_of(path: Path | str, limit: int, links: Links = "inside") -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        SourceError: it is larger, is not a regular file, a link leads where `links` forbids it, or it is a blob of the
            hub's cache and not what its name says.
        OSError: it is missing, or cannot be read.
    """
    with reading(path, limit, links) as file:
        content = file.read(os.fstat(file.fileno()).st_size)  # no more, should it grow meanwhile
    claim = BlobClaim.of(path, len(content))
    if claim is not None:
        claim.update(content)
        claim.check()
    return content


def pieces_of(path: Path, limit: int | None = None) -> Iterator[bytes]:
    """The content of a regular file, a MiB at a time. Raises as `content_of` does, for a blob after the last piece."""
    with reading(path, limit) as file:
        claim = BlobClaim.of(path, os.fstat(file.fileno()).st_size)
        while piece := file.read(1 << 20):
            if claim is not None:
                claim.update(piece)
            yield piece
    if claim is not None:
        claim.check()


def text_of(path: Path | str, limit: int, links: Links = "inside") -> str:
    """Like `content_of`, of a file that holds UTF-8. Raises ValueError where it does not."""
    return content_of(path, limit, links).decode("utf-8")


def check_file(path: Path, limit: int, links: Links = "inside") -> None:
    """Refuses, without reading it, what `content_of` would refuse. Raises SourceError, or OSError."""
    reading(path, limit, links).close()


def _check_size(path: Path | str, size: int, limit: int) -> None:
    if size > limit:
        raise SourceError(f"{path}: larger than {limit} bytes; expected an ordinary file of its kind")


def own_file(path: Path, flags: int = 0) -> int:
    """A descriptor to read and write a file of this program's own, made where it is missing; never through a link.

    For files that grow in place: locks, journals, stores, weights while they are written.

    Raises:
        SourceError: something else than a regular file lies there.
        OSError: it cannot be made, or is a link.
    """
    return _regular(path, os.open(path, _OWN | flags, 0o666))


def null_device() -> int:
    """A descriptor of the null device, to read and to write."""
    return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)


@contextmanager
def written(path: Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write that appears under its name when all of it is on the disk.

    Until then it lies beside `path`, in the folder that was there at the start, under a random name that did not
    exist, so that no link that somebody put there is followed; the last rename replaces a link at `path` itself and
    never what it leads to. What need not survive a power failure is not `durable`.
    """
    temporary = f".{path.name[:100]}.{os.urandom(8).hex()}.tmp"
    folder = _open_folder(path.parent)
    try:
        with os.fdopen(os.open(temporary, _NEW, 0o666, dir_fd=folder), "wb") as file:
            try:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
                os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                raise
    finally:
        os.close(folder)


def write_file(path: Path, content: bytes | str, durable: bool = True) -> None:
    """Writes a small file: it is there in full or not at all; if `durable`, even after a power failure."""
    with written(path, durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file: the copy is there in full or not at all."""
    with written(target) as file:
        for piece in pieces_of(source):
            file.write(piece)


def left_in(folder: Path, names: Collection[str]) -> list[Path]:
    """What killed writers of these files left beside them."""
    found = []
    for path in folder.glob(".*.tmp"):
        made = re.fullmatch(r"\.(.+)\.[0-9a-f]{16}\.tmp", path.name)
        if made and made[1] in names and (path.is_symlink() or not path.is_dir()):
            found.append(path)
    return found


def remove_left(folder: Path, names: Collection[str]) -> None:
    """Removes what killed writers of these files left beside them; nobody else may be writing them."""
    for path in left_in(folder, names):
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON, one member a line."""
    write_file(path, json_text(value))


def json_text(value: Any) -> str:
    """Strict JSON, one member a line."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    descriptor = _open_folder(folder)
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
