"""Carries out a graph: each task reads by offset, computes block by block, and writes at its final offset.

Files are `.part` files of their full size from the start; a seal thread follows the finished bytes of each,
takes the sha256, flushes it to the disk and gives it its name. Memory is a few blocks a worker, plus what a
method may hold between passes within the budget. Knows no recipe, no gate and no arithmetic.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from safemerge_recipes.engine.journal import Journal
from safemerge_recipes.errors import PlanError, SourceError, WriteError
from safemerge_recipes.events import BytesDone, FileSealed, Listener, TensorDone, ignore
from safemerge_recipes.methods import on_compiled, on_torch
from safemerge_recipes.methods.base import Copy, Tools
from safemerge_recipes.planning.graph import Graph, Task
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.files import write_bytes
from safemerge_recipes.storage.finite import non_finite
from safemerge_recipes.storage.layout import Layout
from safemerge_recipes.storage.read_ahead import AHEAD, ahead
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.workers import Resources, StoppedError, check, run_parallel

HASH_CHUNK = 1 << 21
"""Bytes hashed at once: whole elements of any dtype."""
ALIGNED = 8
"""Bytes of the widest element."""
FLUSH_CHUNK = 1 << 26
"""Bytes after which the kernel is asked to begin writing to the disk."""
_WRITE = 2
"""SYNC_FILE_RANGE_WRITE of Linux."""
_ALONE: AbstractContextManager[Any] = contextlib.nullcontext()


def _system_call(name: str, *arguments: type[ctypes._SimpleCData[int]]) -> Callable[..., int] | None:
    """A function of the C library that Python does not offer, where there is one."""
    found = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if found is not None:
        found.argtypes = arguments
    return found


_start_writing = _system_call("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


@dataclass(frozen=True, slots=True)
class Sealed:
    """What was written: file name -> sha256, and tensor -> xxh3 of its bytes, both as read back."""

    files: Mapping[str, str]
    tensors: Mapping[str, str]


class Files:
    """The `.part` files of an output: opened at full size, renamed when sealed."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        """Creates what is missing. Raises PlanError when the disk has no room for all of it."""
        self.folder, self.layout = folder, layout
        self.descriptors: list[int] = []
        self._check_room()
        try:
            for name, header, size in zip(layout.files, layout.headers, layout.sizes, strict=True):
                self.descriptors.append(self._open(folder / f"{name}.part", header, size))
        except OSError as error:
            self.close()
            raise PlanError(f"{folder}: {error.strerror}; free some space or choose another --output") from None

    def _check_room(self) -> None:
        """A full disk shows now, before anything is computed; nothing is reserved, as that slows writing down."""
        there = 0
        for name, size in zip(self.layout.files, self.layout.sizes, strict=True):
            with contextlib.suppress(FileNotFoundError):
                there += min(size, os.stat(self.folder / f"{name}.part").st_blocks * 512)
        disk = os.statvfs(self.folder)
        needed, free = sum(self.layout.sizes) - there, disk.f_bavail * disk.f_frsize
        if needed > free:
            raise PlanError(
                f"{self.folder}: {needed} bytes are needed, {free} are free; free some space or choose another --output"
            )

    @staticmethod
    def _open(path: Path, header: bytes, size: int) -> int:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(file, size)
            write_bytes(file, memoryview(header), 0)
        except OSError:
            os.close(file)
            raise
        return file

    def flush(self, shard: int, start: int, end: int) -> None:
        """Begins to write a region to the disk and does not wait, so that less is left to do when sealing."""
        if _start_writing is not None:
            _start_writing(self.descriptors[shard], start, end - start, _WRITE)

    def seal(self, shard: int) -> None:
        """Flushes a file to the disk and gives it its final name."""
        os.fsync(self.descriptors[shard])
        name = self.layout.files[shard]
        os.rename(self.folder / f"{name}.part", self.folder / name)

    def close(self) -> None:
        """Closes all files."""
        for file in self.descriptors:
            os.close(file)
        self.descriptors = []


class Sealer(threading.Thread):
    """Reads each file back behind the workers, checks and hashes it, seals it when its last tensor is there.

    Reading and checking a piece goes on while the one before is hashed, which takes longest.
    """

    def __init__(self, files: Files, tasks: tuple[Task, ...], stop: threading.Event, on_event: Listener) -> None:
        super().__init__(daemon=True)
        self.files, self.tasks, self.stop, self.on_event = files, tasks, stop, on_event
        self.digests: dict[str, str] = {}
        self.tensors: dict[str, str] = {}
        self.error: BaseException | None = None
        self._done: dict[str, str | None] = {}
        self._changed = threading.Condition()

    def finished(self, name: str, digest: str | None) -> None:
        """Tells that a tensor's bytes are written, and the digest they must have where it is known."""
        with self._changed:
            self._done[name] = digest
            self._changed.notify()

    def _wait(self, name: str) -> None:
        with self._changed:
            while name not in self._done:
                if self.stop.is_set():
                    raise StoppedError
                self._changed.wait(0.2)

    def run(self) -> None:
        """Follows the tasks in the order of the files' bytes."""
        try:
            by_shard: dict[int, list[Task]] = {}
            for task in self.tasks:
                by_shard.setdefault(task.slot.shard, []).append(task)
            for shard, tasks in sorted(by_shard.items()):
                digest = hashlib.sha256(self.files.layout.headers[shard])
                flushed = at = len(self.files.layout.headers[shard])
                for piece in ahead(self._checked(sorted(tasks, key=lambda task: task.slot.offset)), self.stop):
                    digest.update(piece)
                    at += len(piece)
                    if at - flushed >= FLUSH_CHUNK:
                        self.files.flush(shard, flushed, at)
                        flushed = at
                self.files.seal(shard)
                name = self.files.layout.files[shard]
                self.digests[name] = digest.hexdigest()
                self.on_event(FileSealed(name, self.digests[name]))
        except StoppedError:
            pass
        except BaseException as error:  # raised again by `execute`
            self.error = error
            self.stop.set()

    def _checked(self, tasks: list[Task]) -> Iterator[memoryview]:
        """The tensors' bytes of one file, in pieces that stay as they are while two more are made.

        Every tensor is compared with what was meant to be there when its last byte was read.
        """
        import xxhash

        buffers = cycle([memoryview(bytearray(HASH_CHUNK)) for _ in range(AHEAD)])
        piece, filled = next(buffers), 0
        for task in tasks:
            self._wait(task.slot.name)
            slot, own, bad = task.slot, xxhash.xxh3_128(), 0
            copied = isinstance(task.work, Copy)  # computed tensors were checked when they were rounded
            at, end = slot.offset, slot.offset + slot.nbytes
            if filled % ALIGNED:  # no element in two pieces
                yield piece[:filled]
                piece, filled = next(buffers), 0
            while at < end:
                part = piece[filled : min(filled + end - at, HASH_CHUNK)]
                _fill(self.files.descriptors[slot.shard], at, part)
                own.update(part)
                bad += non_finite(part, slot.dtype) if copied else 0
                at, filled = at + len(part), filled + len(part)
                if filled == HASH_CHUNK:
                    yield piece
                    piece, filled = next(buffers), 0
            self._check(task, own.hexdigest(), bad)
        if filled:
            yield piece[:filled]

    def _check(self, task: Task, found: str, bad: int) -> None:
        name = task.slot.name
        self.tensors[name] = found
        if bad:
            ref = task.work.refs[0]
            raise SourceError(
                f"{ref.path}: {name}: {bad} of {ref.numel} values are NaN or infinite; expected finite weights"
            )
        if self._done[name] not in (None, found):
            raise WriteError(
                f"{self.files.folder}: {name}: the bytes read back are not those written; is the disk failing, or "
                "another program writing there? The same command writes the tensor again"
            )


def _fill(file: int, offset: int, view: memoryview) -> None:
    """Reads all of `view` from byte `offset` on."""
    done = 0
    while done < len(view):
        got = os.preadv(file, [view[done:]], offset + done)
        if not got:
            raise WriteError("a weight file became shorter while it was written; is another program changing it?")
        done += got


def region_digest(file: int, offset: int, nbytes: int) -> str:
    """xxh3 of a region of an open file."""
    import xxhash

    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(HASH_CHUNK, nbytes)))
    for at in range(0, nbytes, HASH_CHUNK):
        piece = buffer[: min(HASH_CHUNK, nbytes - at)]
        _fill(file, offset + at, piece)
        digest.update(piece)
    return digest.hexdigest()


def produce(
    task: Task,
    tools: Tools,
    file: int,
    stop: threading.Event,
    *,
    allow_overflow: bool = False,
    on_event: Listener = ignore,
    turn: AbstractContextManager[Any] = _ALONE,
) -> str | None:
    """Writes one tensor into an open file; returns the xxh3 of its bytes, None for a copy.

    `turn` is held while writing, as the kernel lets one thread at a time write to a file and has the others spin.
    """
    import xxhash

    at, digest = task.slot.offset, xxhash.xxh3_128()
    if isinstance(task.work, Copy):
        ref = task.work.source
        for done in tools.reader.copy_bytes(ref.path, ref.offset, ref.nbytes, file, at):
            on_event(BytesDone(done))
            check(stop)
        return None
    for view in _blocks(task, tools, stop, allow_overflow):
        with turn:
            write_bytes(file, view, at)
        digest.update(view)
        at += len(view)
        on_event(BytesDone(len(view)))
        check(stop)
    return digest.hexdigest()


def _blocks(task: Task, tools: Tools, stop: threading.Event, allow_overflow: bool) -> Iterator[memoryview]:
    """The task's bytes, however they are computed."""
    if task.native:
        return on_compiled.rounded(task.work, task.slot, tools, stop, allow_overflow)  # type: ignore[arg-type]  # fits
    return on_torch.rounded(task.work, task.slot, tools, stop, allow_overflow)


def execute(
    graph: Graph,
    folder: Path,
    resources: Resources,
    done: Mapping[str, str | None],
    journal: Journal,
    *,
    allow_overflow: bool = False,
    on_event: Listener = ignore,
) -> Sealed:
    """Writes every tensor that is not `done` and seals every file.

    Args:
        graph: the work.
        folder: where the files are written; exists.
        resources: what may be used.
        done: tensors already there, from an earlier run.
        journal: notes what is finished.
        allow_overflow: write infinities where the output dtype cannot hold a value.
        on_event: told every finished piece, tensor and file.

    Raises:
        PlanError: there is no room on the disk.
        ReadError: a source failed while being read.
        SourceError: a source ended early, or holds values that are not finite.
        WriteError: writing failed; the same call goes on where it stopped.
    """
    from safemerge_recipes.planning.memory import room_of

    files = Files(folder, graph.layout)
    turns = [threading.Lock() for _ in graph.layout.files]
    stop = threading.Event()
    sealer = Sealer(files, graph.tasks, stop, on_event)
    for name, digest in done.items():
        sealer.finished(name, digest)
        on_event(BytesDone(graph.layout.slots[name].nbytes))
        on_event(TensorDone(name, resumed=True))
    sealer.start()
    with Reader() as reader:

        def work(task: Task, arena: Arena) -> None:
            digest = produce(
                task, Tools(reader, arena, room_of(task, resources.share)), files.descriptors[task.slot.shard], stop,
                allow_overflow=allow_overflow, on_event=on_event, turn=turns[task.slot.shard],
            )  # fmt: skip
            journal.done(task.slot.name, task.key, digest)
            sealer.finished(task.slot.name, digest)
            on_event(TensorDone(task.slot.name))

        open_ = [task for task in graph.tasks if task.slot.name not in done]
        try:
            light = not any(task.needs_torch for task in open_)
            run_parallel(open_, work, resources.workers, resources.device, stop, light=light)
            sealer.join()
            if sealer.error is not None:
                raise sealer.error
        except OSError as error:
            raise WriteError(f"{folder}: {error.strerror} while writing; mend it and run the same command") from None
        finally:
            stop.set()
            sealer.join()
            files.close()
    return Sealed(sealer.digests, sealer.tensors)
