"""The bytes of one output tensor, piece by piece: what every executor calls, wherever the bytes go."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

from safemerge_recipes.methods import on_compiled, on_torch
from safemerge_recipes.methods.on_codes import requantised
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.methods.work import Requantise
from safemerge_recipes.planning.graph import Task
from safemerge_recipes.storage.safetensors import TensorRef

COPIED = 1 << 21
"""Bytes of a stored tensor that are read at once: whole elements of any dtype."""


def produce(task: Task, tools: Tools, stop: threading.Event, *, allow_overflow: bool = False) -> Iterator[memoryview]:
    """The task's bytes in order, each piece valid until the next.

    Args:
        task: what to compute, or which stored tensor to read.
        tools: open files, the worker's buffers, bytes it may hold between passes.
        stop: once it is set, StoppedError is raised at the next piece.
        allow_overflow: let infinities pass where the output dtype cannot hold a value.

    Raises:
        ReadError: a source failed while being read.
        SourceError: a source ended early, or a computed value is not finite. Copied values are not looked at.
    """
    if task.work.copied is not None:
        return _stored(task.work.copied, tools)
    if isinstance(task.work, Requantise):
        work, slot = task.work.before_writing(task.slot)
        inside = replace(task, slot=slot, work=work)
        return requantised(task.work, lambda: produce(inside, tools, stop))
    if task.native:
        return on_compiled.rounded(task.work, task.slot, tools, stop, allow_overflow)
    return on_torch.rounded(task.work, task.slot, tools, stop, allow_overflow)


def _stored(ref: TensorRef, tools: Tools) -> Iterator[memoryview]:
    buffer = memoryview(tools.arena.array("copied", min(COPIED, ref.nbytes), "u1"))  # type: ignore[arg-type]  # buffer
    for at in range(0, ref.nbytes, COPIED):
        piece = buffer[: min(COPIED, ref.nbytes - at)]
        tools.reader.read_bytes(ref.path, ref.offset + at, piece)
        yield piece


def digest_of(pieces: Iterator[memoryview]) -> str:
    """xxh3 of bytes that come in pieces."""
    import xxhash

    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
