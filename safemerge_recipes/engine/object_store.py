"""The store of a URL: each weight file one object, sent in parts as its bytes are made, there when it is complete.

Nothing is renamed, locked or read back. A file has one writer, who writes it in the order of its bytes; what a writer
leaves unfinished is no object, and is thrown away where the writer lives to do so.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

from safemerge_recipes.errors import WriteError
from safemerge_recipes.storage.layout import Layout
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.remote import fetch, filesystem, look, persistently, told
from safemerge_recipes.storage.safetensors import TensorRef

PART = 64 << 20
"""Bytes of a part of an upload; S3 takes 10 000 of a file."""


class ObjectStore:
    """The `Store` of a URL, for writers that go through each file in order."""

    tries = 3
    """Times that a file is written before a failing store is given up; its library tries each request again."""

    def __init__(self, url: str, layout: Layout) -> None:
        self.url, self.layout = url, layout
        self._uploads: dict[int, tuple[Any, int]] = {}

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[str, Layout]]:
        return ObjectStore, (self.url, self.layout)

    @property
    def place(self) -> str:
        """The URL."""
        return self.url

    def alone(self, shard: int) -> ObjectStore:
        """See `Store`."""
        return ObjectStore(self.url, self.layout.alone(shard))

    def _url(self, shard: int) -> str:
        return f"{self.url}/{self.layout.files[shard]}"

    def list(self) -> frozenset[int]:
        """See `Store`: by the sizes that one listing says."""
        fs, path = filesystem(self.url)
        try:
            listed = persistently(self.url, lambda: fs.ls(path, detail=True))
        except FileNotFoundError:
            return frozenset()
        sizes = {one["name"].rpartition("/")[2]: one.get("size") for one in listed}
        return frozenset(n for n, name in enumerate(self.layout.files) if sizes.get(name) == self.layout.sizes[n])

    def open(self) -> None:
        """See `Store`. Whether writing is allowed shows with the first small object of a run."""

    def write(self, shard: int, offset: int, view: memoryview) -> None:
        """See `Store`. Raises OSError also where bytes come out of order."""
        upload, at = self._upload(shard)
        if offset != at:
            raise OSError(errno.ESPIPE, f"{self.layout.files[shard]}: byte {offset} came at byte {at}")
        with told(self._url(shard)):
            upload.write(view)
        self._uploads[shard] = upload, at + len(view)

    def _upload(self, shard: int) -> tuple[Any, int]:
        if shard not in self._uploads:
            fs, path = filesystem(self._url(shard))
            header = self.layout.headers[shard]
            with told(self._url(shard)):
                upload = fs.open(path, "wb", block_size=PART)
                upload.write(header)
            self._uploads[shard] = upload, len(header)
        return self._uploads[shard]

    def copy(self, shard: int, offset: int, ref: TensorRef, reader: Reader) -> Iterator[int]:
        """See `Store`."""
        view = memoryview(bytearray(min(ref.nbytes, 1 << 22)))
        for at in range(0, ref.nbytes, len(view) or 1):
            piece = view[: min(len(view), ref.nbytes - at)]
            reader.read_bytes(ref.path, ref.offset + at, piece)
            self.write(shard, offset + at, piece)
            yield len(piece)

    def read_back(self, shard: int, offset: int, view: memoryview) -> None:
        """See `Store`."""
        view[:] = fetch(self._url(shard), offset, offset + len(view))

    def flush(self, shard: int, start: int, end: int) -> None:
        """See `Store`: parts are sent as they fill."""

    def seal(self, shard: int) -> None:
        """See `Store`: the upload is completed; the store must say the size that was sent."""
        upload, at = self._upload(shard)
        with told(self._url(shard)):
            upload.close()
        del self._uploads[shard]
        size = look(self._url(shard))[0]
        if at != self.layout.sizes[shard] or size != at:
            raise WriteError(
                f"{self._url(shard)}: the store says {size} bytes where {at} were sent, {self.layout.sizes[shard]} "
                "expected; is another program writing there? The same command writes the file again"
            )

    def commit(self) -> None:
        """See `Store`: what is sealed is durable."""

    def close(self) -> None:
        """See `Store`: what is not sealed is thrown away."""
        for upload, _ in self._uploads.values():
            with contextlib.suppress(Exception):  # whatever the library raises: nothing is lost
                upload.discard()
            with contextlib.suppress(AttributeError):
                upload.closed = True  # or the collector would complete it
        self._uploads.clear()
