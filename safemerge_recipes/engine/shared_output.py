"""An output that several writers share, in a folder that all mount or below a URL: how it is taken, told and finished.

Files are sealed one by one with a receipt each. What finishes an output is its manifest, which comes last; in a
folder the rename to its real name as well. Whoever comes later goes on from the receipts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safemerge_recipes.engine.documents import write_documents
from safemerge_recipes.engine.folder import (
    LOCK_FILE,
    MANIFEST_FILE,
    PARTS,
    check_output,
    check_part,
    check_place,
    keep_only,
    locked,
    part_of,
    publish,
)
from safemerge_recipes.engine.journal import JOURNAL_FILE
from safemerge_recipes.engine.object_store import ObjectStore
from safemerge_recipes.engine.part_store import PartStore
from safemerge_recipes.engine.receipts import Receipt, joined, read_receipts
from safemerge_recipes.engine.store import Store
from safemerge_recipes.errors import PlanError
from safemerge_recipes.planning.graph import Graph
from safemerge_recipes.planning.prepared import Prepared
from safemerge_recipes.storage.digests import InputDigest
from safemerge_recipes.storage.files import content_of, write_file
from safemerge_recipes.storage.identity import FileIdentity
from safemerge_recipes.storage.layout import INDEX_FILE, Layout
from safemerge_recipes.storage.place import FolderPlace, Place, UrlPlace
from safemerge_recipes.storage.remote import check_url, is_url

_WORK = "work.json"
_INPUTS = "inputs"
_LARGEST = 2_000_000_000
"""Bytes of a file beside the weights, at most."""


@dataclass(frozen=True, slots=True)
class SharedOutput:
    """An output that is being written.

    Attributes:
        output: its folder or URL.
        place: where its writers tell each other.
    """

    output: Path | str
    place: Place

    def store(self, layout: Layout) -> Store:
        """Where its weight files go."""
        if isinstance(self.output, str):
            return ObjectStore(self.output, layout)
        return PartStore(part_of(self.output), layout)

    def receipts(self, graph: Graph) -> dict[int, Receipt]:
        """The receipts that count. Raises OSError."""
        return read_receipts(self.place, graph, self.store(graph.layout).list())

    def agree(self, graph: Graph, *, anew: bool = False) -> None:
        """Makes sure that all writers do the same work; `anew` says what it is from now on.

        Raises:
            PlanError: others do another.
        """
        text = json.dumps([[task.slot.name, task.key, task.slot.shard, task.slot.offset] for task in graph.tasks])
        own = json.dumps({"work": hashlib.sha256(text.encode()).hexdigest()}).encode()
        if anew:
            return self.place.write(_WORK, own)
        if self.place.offer(_WORK, own) != own:
            raise PlanError(
                f"{self.place.name}: other workers write this output from another recipe, other sources or another "
                "version; expected the same for all. Remove what they left, or choose another --output"
            )
        return None

    # What went in

    def tell_inputs(self, number: int, count: int, digests: Mapping[FileIdentity, InputDigest]) -> None:
        """Says the sha256 of some inputs, so that whoever finishes need not read them. Raises OSError."""
        found = {_input(identity): digest.sha256 for identity, digest in digests.items()}
        self.place.write(f"{_INPUTS}/{number}-of-{count}.json", json.dumps(found).encode())

    def inputs(self, identities: tuple[FileIdentity, ...]) -> dict[str, InputDigest]:
        """path -> sha256 of the inputs that workers have read. Raises OSError."""
        known: dict[str, str] = {}
        for name in self.place.names(_INPUTS):
            with contextlib.suppress(ValueError, AttributeError, TypeError):
                known.update(json.loads(self.place.read(f"{_INPUTS}/{name}") or b"{}"))
        return {
            one.path: InputDigest(known[_input(one)], "now")
            for one in identities
            if len(known.get(_input(one), "")) == 64
        }

    # The end

    def finish(
        self, prepared: Prepared, inputs: Mapping[str, InputDigest], timings: Mapping[str, float], force: bool
    ) -> dict[str, float]:
        """Writes index, documents and manifest, when every weight file is there; returns the timings of all phases."""
        graph = prepared.graph
        receipts = self.receipts(graph)
        sealed = joined(receipts, graph)
        keys = {task.slot.name: task.key for task in graph.tasks}
        tensors: dict[str, tuple[str, str | None]] = {n: (keys[n], digest) for n, digest in sealed.tensors.items()}
        index = graph.layout.index_bytes()
        with self._staging() as folder:
            if isinstance(self.output, Path):
                keep_only(folder, {*graph.layout.files, PARTS})
            if index is not None:
                write_file(folder / INDEX_FILE, index)
            away = dict(zip(graph.layout.files, graph.layout.sizes, strict=True))
            timings = write_documents(
                prepared, folder, self.output, prepared.plan_json(), inputs, sealed.files, tensors, timings,
                away if isinstance(self.output, str) else {},
            )  # fmt: skip
            self.publish(folder, force)
        return dict(timings)

    @contextlib.contextmanager
    def _staging(self) -> Iterator[Path]:
        """The folder in which an output gets what lies beside its weights."""
        if isinstance(self.output, Path):
            yield part_of(self.output)
            return
        with tempfile.TemporaryDirectory(prefix="safemerge-") as folder:
            yield Path(folder)

    def publish(self, folder: Path, force: bool) -> None:
        """Makes a folder with a manifest the output; of a URL, puts all of it there, the manifest last."""
        if isinstance(self.output, Path):
            return publish(folder, self.output, force)
        place = UrlPlace(self.output)
        own = [path for path in folder.rglob("*") if path.is_file() and path.name not in (JOURNAL_FILE, LOCK_FILE)]
        for path in sorted(own, key=lambda path: path.name == MANIFEST_FILE):
            place.write(path.relative_to(folder).as_posix(), content_of(path, _LARGEST))
        with contextlib.suppress(OSError):  # nobody reads them any more
            for name in ("receipts", "moments", "leases", _INPUTS):
                for one in self.place.names(name):
                    self.place.remove(f"{name}/{one}")
            self.place.remove(_WORK)
        return None


def _input(identity: FileIdentity) -> str:
    return f"{os.path.basename(identity.path)}|{identity.key}"


@contextlib.contextmanager
def shared_output(output: Path | str, force: bool, *, alone: bool = False) -> Iterator[SharedOutput]:
    """An output taken for writing, together with others or `alone`; a folder is locked where its file system locks.

    Raises:
        PlanError: it is finished and not to be replaced, in the way, held, or must not be written to.
    """
    if isinstance(output, str):
        yield SharedOutput(output, UrlPlace(f"{output}/{PARTS}"))
        return
    check_place(output, force)
    part = part_of(output)
    try:
        part.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"{output}: cannot be made: {error.strerror}; choose another --output") from None
    with locked(part, part.name, shared=not alone):
        check_part(part)
        check_output(output, force)
        yield SharedOutput(output, FolderPlace(part / PARTS))


def check_target(output: Path | str, force: bool) -> None:
    """Refuses an output, before anything is computed, that could not be written or is in the way.

    Raises:
        PlanError: see `check_place`; of a URL: it holds a finished output, or must not be written to.
    """
    if isinstance(output, Path):
        return check_place(output, force)
    check_url(output, f"--output {output}")
    place = UrlPlace(output)
    try:
        if place.read(MANIFEST_FILE) is not None:
            if not force:
                raise PlanError(
                    f"{output}: holds a finished output; say --force to replace it, or choose another --output"
                )
            place.remove(MANIFEST_FILE)  # from now on nobody takes it for finished
        place.write(f"{PARTS}/started", b"")
        place.remove(f"{PARTS}/started")
    except OSError as error:
        raise PlanError(
            f"{output}: {error.strerror}; expected a bucket that may be read, listed and written, with credentials in "
            "the environment or profile of its library"
        ) from None
    return None


def as_target(output: str | Path) -> Path | str:
    """A caller's output: a URL in one form, or a path."""
    return check_url(output, f"--output {output}") if is_url(output) else Path(output)
