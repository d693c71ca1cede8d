"""Seals weight files behind those who write them: reads back, checks, hashes, makes durable."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import deque
from collections.abc import Iterator
from itertools import cycle

from safemerge_recipes.engine.executor import Sealed
from safemerge_recipes.engine.store import Store
from safemerge_recipes.errors import SourceError, WriteError
from safemerge_recipes.events import FileSealed, Listener
from safemerge_recipes.planning.graph import Graph, Task
from safemerge_recipes.storage.finite import non_finite
from safemerge_recipes.storage.read_ahead import AHEAD, ahead
from safemerge_recipes.storage.threads import Thread
from safemerge_recipes.storage.workers import StoppedError

HASH_CHUNK = 1 << 21
"""Bytes hashed at once: whole elements of any dtype."""
LEAST_CHUNK = 1 << 18
"""The same where many files are sealed at a time, which together hold what one does."""
WORKERS_EACH = 4
"""Workers that write as fast as one thread hashes, or faster than most disks take."""
ALIGNED = 8
"""Bytes of the widest element."""
FLUSH_CHUNK = 1 << 26
"""Bytes after which the store is asked to begin making them durable."""


class Sealer:
    """Reads each file back behind the workers, checks and hashes it, seals it when its last tensor is there.

    Several files are sealed at a time where many workers write. Reading and checking a piece goes on while the one
    before is hashed, which takes longest.
    """

    def __init__(self, store: Store, graph: Graph, stop: threading.Event, on_event: Listener, workers: int = 1) -> None:
        self.store, self.graph, self.stop, self.on_event = store, graph, stop, on_event
        self._left = deque(graph.by_file())
        count = min(1 + workers // WORKERS_EACH, len(self._left))
        self.chunk = max(LEAST_CHUNK, HASH_CHUNK >> max(0, count - 1).bit_length())
        self._threads = [Thread(self._work, "seal") for _ in range(count)]
        self._digests: dict[str, str] = {}
        self._tensors: dict[str, str] = {}
        self._error: BaseException | None = None
        self._done: dict[str, str | None] = {}
        self._changed = threading.Condition()

    def finished(self, name: str, digest: str | None) -> None:
        """Tells that a tensor's bytes are written, and the digest they must have where it is known."""
        with self._changed:
            self._done[name] = digest
            self._changed.notify_all()

    def result(self) -> Sealed:
        """What was sealed, when all of it is. Raises what went wrong, StoppedError where the workers were stopped."""
        self.join()
        self._work()  # where the system had no thread left
        if self._error is not None:
            raise self._error
        files = {name: self._digests[name] for name in self.store.layout.files if name in self._digests}
        names = (task.slot.name for _, tasks in self.graph.by_file() for task in tasks)
        return Sealed(files, {name: self._tensors[name] for name in names})

    def _wait(self, name: str) -> None:
        with self._changed:
            while name not in self._done:
                if self.stop.is_set():
                    raise StoppedError
                self._changed.wait(0.2)

    def start(self) -> None:
        """Begins. Raises RuntimeError where the system starts no more threads; `result` does what is left."""
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Waits until nothing is done any more."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _work(self) -> None:
        """Follows the tasks in the order of the files' bytes, file after file until none is left."""
        try:
            while not self.stop.is_set() and (taken := self._next()):
                self._seal(*taken)
        except BaseException as error:  # raised again by `result`
            self._error = self._error or error
            self.stop.set()

    def _next(self) -> tuple[int, tuple[Task, ...]] | None:
        with contextlib.suppress(IndexError):
            return self._left.popleft()
        return None

    def _seal(self, shard: int, tasks: tuple[Task, ...]) -> None:
        name, header = self.store.layout.files[shard], self.store.layout.headers[shard]
        digest = hashlib.sha256(header)
        flushed = at = len(header)
        for piece in ahead(self._checked(tasks), self.stop):
            digest.update(piece)
            at += len(piece)
            if at - flushed >= FLUSH_CHUNK:
                self.store.flush(shard, flushed, at)
                flushed = at
        self.store.seal(shard)
        self._digests[name] = digest.hexdigest()
        self.on_event(FileSealed(name, self._digests[name]))

    def _checked(self, tasks: tuple[Task, ...]) -> Iterator[memoryview]:
        """The tensors' bytes of one file, in pieces that stay as they are while two more are made.

        Every tensor is compared with what was meant to be there when its last byte was read.
        """
        import xxhash

        buffers = cycle([memoryview(bytearray(self.chunk)) for _ in range(AHEAD)])
        piece, filled = next(buffers), 0
        for task in tasks:
            self._wait(task.slot.name)
            slot, own, bad = task.slot, xxhash.xxh3_128(), 0
            copied = task.work.copied is not None  # computed tensors were checked when they were rounded
            at, end = slot.offset, slot.offset + slot.nbytes
            if filled % ALIGNED:  # no element in two pieces
                yield piece[:filled]
                piece, filled = next(buffers), 0
            while at < end:
                part = piece[filled : min(filled + end - at, self.chunk)]
                self.store.read_back(slot.shard, at, part)
                own.update(part)
                bad += non_finite(part, slot.dtype) if copied else 0
                at, filled = at + len(part), filled + len(part)
                if filled == self.chunk:
                    yield piece
                    piece, filled = next(buffers), 0
            if bad:
                refuse_copied(task, bad)
            check_digest(self.store, slot.name, own.hexdigest(), self._done[slot.name])
            self._tensors[slot.name] = own.hexdigest()
        if filled:
            yield piece[:filled]


def refuse_copied(task: Task, bad: int) -> None:
    """Raises SourceError: a copied tensor holds values that are not finite."""
    ref = task.work.refs[0]
    raise SourceError(
        f"{ref.path}: {task.slot.name}: {bad} of {ref.numel} values are NaN or infinite; expected finite weights"
    )


def check_digest(store: Store, name: str, found: str, expected: str | None) -> None:
    """Raises WriteError where a tensor's bytes are not those that were written."""
    if expected not in (None, found):
        raise WriteError(
            f"{store.place}: {name}: the bytes read back are not those written; is the disk failing, or "
            "another program writing there? The same command writes the tensor again"
        )


def digest_of_region(store: Store, shard: int, offset: int, nbytes: int) -> str:
    """xxh3 of a region of a file that is being written, or that an earlier run left."""
    import xxhash

    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(HASH_CHUNK, nbytes)))
    for at in range(0, nbytes, HASH_CHUNK):
        piece = buffer[: min(HASH_CHUNK, nbytes - at)]
        store.read_back(shard, offset + at, piece)
        digest.update(piece)
    return digest.hexdigest()
