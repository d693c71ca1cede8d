"""Receipts: what says that a weight file is whole, beside it, where writers share no journal.

Written by whoever sealed the file, with the sha256 that was found while its bytes were made. A receipt counts if the
file has its size and every tensor the key that is wanted now.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from safemerge_recipes.engine.executor import Sealed
from safemerge_recipes.planning.graph import ENGINE, Graph
from safemerge_recipes.storage.place import Place

_FOLDER = "receipts"


@dataclass(frozen=True, slots=True)
class Receipt:
    """What is known of a sealed weight file.

    Attributes:
        sha256: of its bytes.
        tensors: tensor -> (result key, xxh3 of its bytes).
    """

    sha256: str
    tensors: Mapping[str, tuple[str, str]]


class Receipts:
    """Writes receipts; stands in a run where a `Journal` stands in a folder of one's own.

    Args:
        place: where they go.
        graph: the work of the whole output.
    """

    def __init__(self, place: Place, graph: Graph) -> None:
        self._place, self._files = place, graph.layout.files
        self._shards = {name: slot.shard for name, slot in graph.layout.slots.items()}
        self._open: dict[str, dict[str, tuple[str, str | None]]] = {}

    def done(self, name: str, key: str, digest: str | None) -> None:
        """Notes a finished tensor of a file that is not sealed yet."""
        self._open.setdefault(self._files[self._shards[name]], {})[name] = key, digest

    def sealed(self, file: str, sha256: str) -> None:
        """Writes the receipt of a file. Raises OSError."""
        value = {"engine": ENGINE, "sha256": sha256, "tensors": self._open.pop(file, {})}
        self._place.write(f"{_FOLDER}/{file}.json", json.dumps(value).encode())

    def close(self) -> None:
        """Holds nothing open."""


def forget_receipt(place: Place, file: str) -> None:
    """Removes the receipt of a file that is about to be written anew. Raises OSError."""
    place.remove(f"{_FOLDER}/{file}.json")


def read_receipts(place: Place, graph: Graph, there: frozenset[int]) -> dict[int, Receipt]:
    """Number of a file -> its receipt, for the files that count as finished.

    Args:
        place: where receipts lie.
        graph: the work of the whole output, as it is wanted now.
        there: the files that have the right size, see `Store.list`.

    Raises:
        OSError: the place cannot be read.
    """
    listed = set(place.names(_FOLDER))
    found = {}
    for shard, tasks in graph.by_file():
        name = f"{graph.layout.files[shard]}.json"
        if shard not in there or name not in listed:
            continue
        receipt = _parsed(place.read(f"{_FOLDER}/{name}"))
        if receipt is not None and {name: key for name, (key, _) in receipt.tensors.items()} == {
            task.slot.name: task.key for task in tasks
        }:
            found[shard] = receipt
    return found


def _parsed(content: bytes | None) -> Receipt | None:
    try:
        value = json.loads(content or b"")
        tensors = {name: (str(key), str(digest)) for name, (key, digest) in value["tensors"].items()}
        return Receipt(str(value["sha256"]), tensors) if value["engine"] == ENGINE else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def joined(receipts: Mapping[int, Receipt], graph: Graph) -> Sealed:
    """What receipts say, as a run says what it sealed."""
    files = {graph.layout.files[shard]: one.sha256 for shard, one in receipts.items()}
    return Sealed(files, {name: digest for one in receipts.values() for name, (_, digest) in one.tensors.items()})


def without(graph: Graph, shards: Mapping[int, Receipt]) -> Graph:
    """The work that is left when some files are finished."""
    return Graph(graph.layout, tuple(t for t in graph.tasks if t.slot.shard not in shards), graph.allow_overflow)
