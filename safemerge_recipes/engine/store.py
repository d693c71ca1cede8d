"""The store protocol: where the weight files of one output are written, read back, and made visible.

A store knows the output's layout and nothing of models or arithmetic. The reader of `storage` is the read side of what
is finished; a store reads back only what is being written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from safemerge_recipes.storage.layout import Layout
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import TensorRef


class Store(Protocol):
    """The weight files of one output. Files are told by their number in the layout; safe to share between threads."""

    @property
    def tries(self) -> int:
        """Times that a whole file is written before a failure that may pass is given up."""

    @property
    def held(self) -> int:
        """Bytes of its own for each file that is being written."""

    @property
    def layout(self) -> Layout:
        """What lies where."""

    @property
    def place(self) -> str:
        """What messages call it."""

    def alone(self, shard: int) -> Store:
        """The store of one file of it, which may be sent to another process or machine."""

    def list(self) -> frozenset[int]:
        """The files that an earlier run left whole in size and with the right opening bytes, sealed or not."""

    def open(self) -> None:
        """Gets ready for writing; what an earlier run left is kept.

        Raises:
            PlanError: there is no room, or no permission.
        """

    def write(self, shard: int, offset: int, view: memoryview) -> None:
        """Writes bytes at their final offset in a file. Raises OSError."""

    def copy(self, shard: int, offset: int, ref: TensorRef, reader: Reader) -> Iterator[int]:
        """Writes a stored tensor unchanged, by the shortest way; yields the bytes of each finished part.

        Raises:
            OSError: writing failed.
            SourceError: the source ended early.
        """

    def read_back(self, shard: int, offset: int, view: memoryview) -> None:
        """Fills `view` from a byte of a file that is listed or open.

        Raises:
            OSError: reading failed.
            WriteError: the file ends early.
        """

    def flush(self, shard: int, start: int, end: int) -> None:
        """Begins to make a region durable and does not wait, so that less is left to do when sealing."""

    def seal(self, shard: int) -> None:
        """Makes a complete file durable and gives it its final name. Raises OSError."""

    def commit(self) -> None:
        """Makes the names of all sealed files durable. Raises OSError."""

    def close(self) -> None:
        """Lets go of everything; what is written stays."""
