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
from safemerge_recipes.storage import heap
from safemerge_recipes.storage.layout import Layout
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.remote import fetch, filesystem, look, persistently, told
from safemerge_recipes.storage.safetensors import TensorRef

PART = 33 << 20
"""Bytes of a part of an upload; S3 takes 10 000 of a file. glibc keeps for itself what is smaller than 32 MiB, so that
parts that grow there take more and more memory."""
COPIES = 3
"""Of a part: as it is filled, and as its library takes and sends it."""

LARGE = 1 << 20
"""Bytes of a block that goes back when it is freed. Parts and pieces of many sizes come and go beside each other, and
uploads of 7 GB left holes of 50 to 100 MB without it."""


class _Upload:
    """An upload under way, which its library is given a whole part at a time.

    Args:
        file: fsspec's.
    """

    def __init__(self, file: Any) -> None:
        self.file, self.at = file, 0
        self._part, self._filled = memoryview(bytearray(PART)), 0

    def write(self, view: memoryview) -> None:
        """Adds bytes."""
        view = view.cast("B")
        self.at += len(view)
        while view:
            taken = view[: PART - self._filled]
            self._part[self._filled : self._filled + len(taken)] = taken
            self._filled, view = self._filled + len(taken), view[len(taken) :]
            if self._filled == PART:
                self._send()

    def _send(self) -> None:
        self.file.write(self._part[: self._filled])
        self._filled = 0

    def complete(self) -> None:
        """Sends what is left and makes the object."""
        self._send()
        self.file.close()

    def discard(self) -> None:
        """Throws it away."""
        with contextlib.suppress(Exception):  # whatever the library raises: nothing is lost
            self.file.discard()
        with contextlib.suppress(AttributeError):
            self.file.closed = True  # or the collector would complete it


class ObjectStore:
    """The `Store` of a URL, for writers that go through each file in order."""

    tries = 3
    """Times that a file is written before a failing store is given up; its library tries each request again."""
    held = COPIES * PART
    """See `Store`."""

    def __init__(self, url: str, layout: Layout) -> None:
        self.url, self.layout = url, layout
        self._uploads: dict[int, _Upload] = {}

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
        heap.map_alone(LARGE)

    def write(self, shard: int, offset: int, view: memoryview) -> None:
        """See `Store`. Raises OSError also where bytes come out of order."""
        upload = self._upload(shard)
        if offset != upload.at:
            raise OSError(errno.ESPIPE, f"{self.layout.files[shard]}: byte {offset} came at byte {upload.at}")
        with told(self._url(shard)):
            upload.write(view)

    def _upload(self, shard: int) -> _Upload:
        if shard not in self._uploads:
            fs, path = filesystem(self._url(shard))
            with told(self._url(shard)):
                self._uploads[shard] = _Upload(fs.open(path, "wb", block_size=PART))
                self._uploads[shard].write(memoryview(self.layout.headers[shard]))
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
        upload = self._upload(shard)
        with told(self._url(shard)):
            upload.complete()
        del self._uploads[shard]
        at, size = upload.at, look(self._url(shard))[0]
        if at != self.layout.sizes[shard] or size != at:
            raise WriteError(
                f"{self._url(shard)}: the store says {size} bytes where {at} were sent, {self.layout.sizes[shard]} "
                "expected; is another program writing there? The same command writes the file again"
            )

    def commit(self) -> None:
        """See `Store`: what is sealed is durable."""

    def close(self) -> None:
        """See `Store`: what is not sealed is thrown away."""
        for upload in self._uploads.values():
            upload.discard()
        self._uploads.clear()
        heap.map_alone(heap.GROWN)
