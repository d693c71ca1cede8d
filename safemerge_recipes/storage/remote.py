"""Files in object storage, by fsspec URL: told apart, looked at, read by ranges with read-ahead and retries.

Knows no model. What the stores' own libraries know of credentials, endpoints and regions is theirs (environment,
profiles, roles): a URL that holds any is refused, so none gets into a recipe, a manifest or a message.
"""

from __future__ import annotations

import errno
import io
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeGuard

from safemerge_recipes.errors import PlanError, ReadError, SourceError

SCHEMES = {"s3": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "hf": "", "memory": ""}
"""Protocol -> the extra of this package that brings its library, if it is not there anyway."""
CHUNK = 1 << 22
"""Bytes of a range request."""
CHUNKS = 12
"""Chunks held for each worker: the one in use and the next of so many operands as a merge has."""
HELD = CHUNK * CHUNKS
"""Bytes that they take."""
TRIES, WAIT = 5, 0.5
"""Requests before a range is given up, and seconds before the second; doubled every time, with some chance."""
FETCHERS = 8
"""Requests under way at a time."""
_URL = re.compile(r"([a-z][a-z0-9+]+)://([^/]+)(/.*)?", re.DOTALL)


def is_url(place: object) -> TypeGuard[str]:
    """Whether a source or an output is named by a URL and not by a path."""
    return isinstance(place, str) and _URL.fullmatch(place) is not None


def check_url(url: str, label: str) -> str:
    """The URL in one form, without a slash at its end.

    Raises:
        PlanError: its protocol is not known or its library not installed, or it holds credentials or a query.
    """
    found = _URL.fullmatch(url)
    protocol = found[1] if found else ""
    if found is None or protocol not in SCHEMES:
        raise PlanError(f"{label}: {protocol}:// is not known; expected {', '.join(f'{one}://' for one in SCHEMES)}")
    if "@" in found[2] and protocol not in ("hf", "abfs", "az"):
        raise PlanError(
            f"{label}: holds credentials; expected a URL without any: they come from the environment or the profile "
            f"of {protocol}'s own library"
        )
    if any(mark in url for mark in "?#") or "::" in url or not url.isprintable():
        raise PlanError(f"{label}: expected a plain URL such as {protocol}://bucket/folder, without query or chain")
    filesystem(url)
    return url.rstrip("/")


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path there. Raises PlanError where its library is not installed."""
    protocol = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        fs, path = url_to_fs(url, use_listings_cache=False)
        return fs, str(path)
    except ImportError:
        extra = SCHEMES.get(protocol) or "s3"
        raise PlanError(
            f"{protocol}://: its library is not installed; install it with `pip install 'safemerge-recipes[{extra}]'`"
        ) from None


FULL = {"507", "InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"}
"""Codes and statuses of stores that take no more: WebDAV's and proxies', Ceph's, MinIO's. AWS has no limit."""


def _codes(error: BaseException | None) -> Iterator[str]:
    """What a store's answer calls itself: code and status of a library's error and of those it was made from."""
    while error is not None:
        answer = getattr(error, "response", None)  # botocore's
        if isinstance(answer, dict):
            yield str(answer.get("Error", {}).get("Code"))
            yield str(answer.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        for name in ("status", "status_code", "error_code", "code"):  # aiohttp's, Azure's, gcsfs's
            yield str(getattr(error, name, None))
        error = error.__cause__


@contextmanager
def told(url: str) -> Iterator[None]:
    """What a store's library raises, as an OSError with one line for people and no secret in it."""
    try:
        yield
    except (SourceError, PlanError):
        raise
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "not there", url) from None
    except Exception as error:  # botocore's, aiohttp's, gcsfs's own: each library has its tree
        if not FULL.isdisjoint(_codes(error)):  # some say 403 with it
            raise OSError(errno.ENOSPC, f"no space left in the store ({_line(error)})", url) from None
        if isinstance(error, PermissionError):
            raise PermissionError(errno.EACCES, f"not allowed ({_line(error)}); check the credentials", url) from None
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"):
            raise PermissionError(errno.EACCES, f"{_line(error)}; see its library's documentation", url) from None
        code = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        raise OSError(code, _line(error), url) from None


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"(?i)((key|secret|token|signature|credential)[\w-]*[=:]\s*)\S+", r"\1…", text)[:200]


def is_final(error: OSError) -> bool:
    """Whether the same request would fail again: what is missing, forbidden or full stays so."""
    return isinstance(error, FileNotFoundError | PermissionError) or error.errno in (errno.ENOSPC, errno.EDQUOT)


def persistently(url: str, ask: Any, tries: int = TRIES) -> Any:
    """What `ask()` returns, asked again while it fails for no final reason. Raises OSError."""
    for attempt in range(tries):
        try:
            with told(url):
                return ask()
        except OSError as error:
            if is_final(error) or attempt == tries - 1:
                raise
            time.sleep(WAIT * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def look(url: str) -> tuple[int, str]:
    """(size in bytes, what the store says of its content: an etag, version or time). Raises OSError."""
    fs, path = filesystem(url)
    found = persistently(url, lambda: fs.info(path))
    if found.get("type") == "directory" or found.get("size") is None:
        raise FileNotFoundError(errno.ENOENT, "not there", url)
    return int(found["size"]), tag_of(found)


def tag_of(info: dict[str, Any]) -> str:
    """What a listing says of an object's content."""
    for key in ("ETag", "etag", "md5Hash", "content_md5", "blob_id", "VersionId", "generation", "mtime", "created"):
        if info.get(key):
            return str(info[key]).strip('"')
    return str(info.get("LastModified") or info.get("last_modified") or "")


def fetch(url: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file, asked for again where the answer was cut off.

    Raises:
        ReadError: the store does not give them.
        SourceError: the file ends before them.
    """
    fs, path = filesystem(url)
    got = b""
    for attempt in range(TRIES):
        at = start + len(got)
        try:
            piece = persistently(url, lambda at=at: fs.cat_file(path, start=at, end=end), TRIES)
        except OSError as error:
            raise ReadError(f"{url}: byte {at}: {error.strerror}; it was readable when planned") from None
        if len(piece) > end - at:
            raise ReadError(f"{url}: byte {at}: {len(piece)} bytes for {end - at}; does the store know ranges?")
        got += piece
        if len(got) == end - start:
            return got
        time.sleep(WAIT * 2**attempt * random.uniform(0, 0.2))
    raise SourceError(
        f"{url}: ends at byte {start + len(got)}, {end - start - len(got)} bytes early; was it changed, or does the "
        "store say a wrong size?"
    )


class Ranges:
    """Reads files in chunks, the next one while the last is used; holds a bounded number. Safe to share.

    Args:
        chunks: how many it holds.
    """

    def __init__(self, chunks: int = CHUNKS) -> None:
        self._room = chunks
        self._chunks: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()
        self._fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="range")

    def read(self, url: str, offset: int, view: memoryview) -> None:
        """Fills `view` from a byte on. Raises as `fetch`."""
        done = 0
        while done < len(view):
            at = offset + done
            number = at // CHUNK
            chunk = self._chunk(url, number)
            self._ask(url, number + 1)
            part = memoryview(chunk)[at - number * CHUNK :][: len(view) - done]
            if not part:
                raise SourceError(f"{url}: ends at byte {at}, {len(view) - done} bytes early; was it changed?")
            view[done : done + len(part)] = part
            done += len(part)

    def _size(self, url: str) -> int:
        if url not in self._sizes:
            try:
                self._sizes[url] = look(url)[0]
            except OSError as error:
                raise ReadError(f"{url}: {error.strerror}; it was readable when planned") from None
        return self._sizes[url]

    def _chunk(self, url: str, number: int) -> bytes:
        future = self._ask(url, number)
        if future is None:
            return b""
        try:
            return future.result()
        except BaseException:
            with self._lock:
                self._chunks.pop((url, number), None)
            raise

    def _ask(self, url: str, number: int) -> Future[bytes] | None:
        """The chunk, on its way; None behind the end."""
        start, size = number * CHUNK, self._size(url)
        if start >= size:
            return None
        with self._lock:
            key = (url, number)
            if key not in self._chunks:
                while len(self._chunks) >= self._room:
                    self._chunks.popitem(last=False)
                self._chunks[key] = self._fetchers.submit(fetch, url, start, min(start + CHUNK, size))
            self._chunks.move_to_end(key)
            return self._chunks[key]

    def close(self) -> None:
        """Forgets everything."""
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._chunks.clear()


class _Raw(io.RawIOBase):
    """A file in object storage, seekable; what is read is fetched, no more."""

    def __init__(self, url: str, size: int) -> None:
        self.url, self.size, self.at = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.size - self.at))
        if count:
            buffer[:count] = fetch(self.url, self.at, self.at + count)
            self.at += count
        return count


def opened(url: str) -> io.BufferedReader:
    """A file to read from any byte on, as far as it is needed. Raises OSError."""
    return io.BufferedReader(_Raw(url, look(url)[0]), 1 << 17)


def pieces(url: str) -> Iterator[memoryview]:
    """A whole file in order, with the next pieces on their way. Raises OSError, ReadError, SourceError."""
    size = look(url)[0]
    ranges = Ranges(2)
    buffer = memoryview(bytearray(min(CHUNK, size)))
    try:
        for at in range(0, size, CHUNK):
            piece = buffer[: min(CHUNK, size - at)]
            ranges.read(url, at, piece)
            yield piece
    finally:
        ranges.close()


def read_ahead_of(paths: Iterable[str]) -> int:
    """Bytes that reading these files holds for a worker, besides its own buffers."""
    return HELD if any(is_url(path) for path in paths) else 0
