"""Writes weight files each in the order of its bytes, by one writer that hashes and seals as it goes.

For where tasks are whole files: on other machines, and in stores that take no bytes out of order. Nothing is read
back but what an earlier run left.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator

from safemerge_recipes.engine.executor import Done, Sealed
from safemerge_recipes.engine.produce import produce
from safemerge_recipes.engine.seal import FLUSH_CHUNK, HASH_CHUNK, check_digest, refuse_copied
from safemerge_recipes.engine.store import Store
from safemerge_recipes.errors import WriteError
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.planning.graph import Graph, Task
from safemerge_recipes.planning.memory import room_of
from safemerge_recipes.storage import remote
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.finite import non_finite
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.remote import is_final
from safemerge_recipes.storage.workers import Attempt, Resources, check, run_parallel


def write_files(
    graph: Graph,
    store: Store,
    resources: Resources,
    done: Done,
    stop: threading.Event,
    tell: Callable[[int], None],
) -> Sealed:
    """Writes and seals every file of a graph, `resources.workers` files at a time.

    Args:
        graph: the work.
        store: where the bytes go; opened and closed here.
        resources: what may be used.
        done: what an earlier run left.
        stop: once it is set, the work is left at the next piece.
        tell: told the bytes of every piece.

    Raises:
        SafemergeError: as an `Executor`.
        StoppedError: `stop` was set.
    """
    told = [0]

    def count(nbytes: int) -> None:
        told[0] += nbytes
        tell(nbytes)

    for attempt in range(store.tries):
        try:
            return _write_once(graph, store, resources, done, Attempt(stop), count)
        except OSError as error:
            if is_final(error) or attempt == store.tries - 1:
                raise WriteError(
                    f"{store.place}: {error.strerror} while writing; mend it and run the same command"
                ) from None
            tell(-told[0])
            told[0] = 0
            time.sleep(remote.WAIT * 2**attempt)
    raise AssertionError("unreachable")


def _write_once(
    graph: Graph,
    store: Store,
    resources: Resources,
    done: Done,
    stop: threading.Event,
    tell: Callable[[int], None],
) -> Sealed:
    """See `write_files`; raises OSError where the store fails."""
    files: dict[str, str] = {}
    tensors: dict[str, str] = {}
    try:
        store.open()
        with Reader(resources.workers) as reader:

            def work(one: tuple[int, tuple[Task, ...]], arena: Arena) -> None:
                shard, tasks = one
                digest = hashlib.sha256(store.layout.headers[shard])
                flushed = at = len(store.layout.headers[shard])
                for task in tasks:
                    tools = Tools(reader, arena, room_of(task, resources.share))
                    for piece in _written(task, tools, store, done, stop, graph.allow_overflow, tensors):
                        digest.update(piece)
                        at += len(piece)
                        tell(len(piece))
                        check(stop)
                        if at - flushed >= FLUSH_CHUNK:
                            store.flush(shard, flushed, at)
                            flushed = at
                store.seal(shard)
                files[store.layout.files[shard]] = digest.hexdigest()

            light = not any(task.needs_torch for task in graph.tasks if task.slot.name not in done)
            run_parallel(graph.by_file(), work, resources.workers, resources.device, stop, light=light)
            store.commit()
    finally:
        store.close()
    return Sealed(files, tensors)


def _written(
    task: Task,
    tools: Tools,
    store: Store,
    done: Done,
    stop: threading.Event,
    allow_overflow: bool,
    tensors: dict[str, str],
) -> Iterator[memoryview]:
    """A tensor's bytes when they are in the store, and at the end its digest in `tensors`."""
    import xxhash

    slot, own, bad = task.slot, xxhash.xxh3_128(), 0
    there, copied = slot.name in done, task.work.copied is not None
    at = slot.offset
    for piece in _left(task, store) if there else produce(task, tools, stop, allow_overflow=allow_overflow):
        if not there:
            store.write(slot.shard, at, piece)
        bad += non_finite(piece, slot.dtype) if copied else 0
        own.update(piece)
        at += len(piece)
        yield piece
    if bad:
        refuse_copied(task, bad)
    check_digest(store, slot.name, own.hexdigest(), done.get(slot.name))
    tensors[slot.name] = own.hexdigest()


def _left(task: Task, store: Store) -> Iterator[memoryview]:
    """What an earlier run left of a tensor."""
    slot = task.slot
    buffer = memoryview(bytearray(min(HASH_CHUNK, slot.nbytes)))
    for at in range(0, slot.nbytes, HASH_CHUNK):
        piece = buffer[: min(HASH_CHUNK, slot.nbytes - at)]
        store.read_back(slot.shard, slot.offset + at, piece)
        yield piece
