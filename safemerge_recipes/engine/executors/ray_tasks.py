"""What a Ray worker is told and does: write one weight file, measure some tensors, hash a source. Imports no Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safemerge_recipes._version import __version__
from safemerge_recipes.engine.executor import Sealed
from safemerge_recipes.engine.store import Store
from safemerge_recipes.engine.whole_file import write_files
from safemerge_recipes.errors import PlanError, ReadError, SafemergeError, SourceError
from safemerge_recipes.events import ignore
from safemerge_recipes.planning.graph import ENGINE, Graph
from safemerge_recipes.storage.digests import file_digest
from safemerge_recipes.storage.identity import FileIdentity, fingerprint
from safemerge_recipes.storage.workers import Resources
from safemerge_recipes.weights import compiled

if TYPE_CHECKING:
    from safemerge_recipes.gate.measurer import Asked, Measured
    from safemerge_recipes.gate.moments import Effort

SPOKEN = 0.5
"""Seconds between two words of a worker about its progress, and between two looks of the driver."""


@dataclass(frozen=True, slots=True)
class WriteJob:
    """One weight file to write: everything a worker is told.

    Attributes:
        shard: its number in the whole output.
        graph: its tasks, as a graph of their own.
        store: where it goes.
        resources: what the worker may use.
        done: its tensors that are there from an earlier run, with their digests.
        inputs: fingerprint of every file that is read.
        versions: what the worker must have installed.
    """

    shard: int
    graph: Graph
    store: Store
    resources: Resources
    done: Mapping[str, str | None]
    inputs: Mapping[str, tuple[int, str]]
    versions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MeasureJob:
    """Some tensors to measure, and as in `WriteJob` what a worker must know besides."""

    asked: tuple[Asked, ...]
    effort: Effort
    rank: int
    null: bool
    resources: Resources
    inputs: Mapping[str, tuple[int, str]]
    versions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HashJob:
    """A source file to hash, and as in `WriteJob` what a worker must know besides."""

    path: str
    inputs: Mapping[str, tuple[int, str]]
    versions: tuple[str, ...]


class Board:
    """An actor that keeps how many bytes of each file are done, for the driver's progress bar."""

    def __init__(self) -> None:
        self.done: dict[int, int] = {}

    def tell(self, shard: int, nbytes: int) -> None:
        """A worker's word."""
        self.done[shard] = nbytes

    def read(self) -> dict[int, int]:
        """All words."""
        return self.done


def versions() -> tuple[str, ...]:
    """What decides about bytes: package, arithmetic, compiled kernels."""
    return __version__, f"arithmetic {ENGINE}", "compiled" if compiled.LIBRARY is not None else "not compiled"


def write(job: WriteJob, board: Any) -> Sealed | SafemergeError:
    """What a worker does with a job. Errors for people are returned, as Ray would wrap them in its own."""
    try:
        check(job)
        done, spoken = 0, time.monotonic()

        def tell(nbytes: int) -> None:
            nonlocal done, spoken
            done += nbytes
            if time.monotonic() - spoken > SPOKEN:
                spoken = time.monotonic()
                board.tell.remote(job.shard, done)

        return write_files(job.graph, job.store, job.resources, job.done, threading.Event(), tell)
    except SafemergeError as error:
        return error


def measure(job: MeasureJob) -> Measured | SafemergeError:
    """The same for a job of the gate."""
    from safemerge_recipes.gate.measurer import measure_all

    try:
        check(job)
        return measure_all(job.asked, job.effort, job.rank, job.null, job.resources, ignore)
    except SafemergeError as error:
        return error


def sha256(job: HashJob) -> str | SafemergeError:
    """The sha256 of a source file, remembered on this node as by a local run."""
    try:
        check(job)
        found = file_digest(FileIdentity.of(job.path))
        assert found is not None  # nobody stops it
        return found.sha256
    except SafemergeError as error:
        return error
    except OSError as error:
        return ReadError(f"{job.path}: {error.strerror}; it was readable when planned")


def check(job: WriteJob | MeasureJob | HashJob) -> None:
    """Raises SafemergeError where the worker is no place for this job."""
    import socket

    here = socket.gethostname()
    if versions() != job.versions:
        raise PlanError(
            f"--executor ray: the worker on {here} has safemerge-recipes {', '.join(versions())}; expected "
            f"{', '.join(job.versions)} as on the driver, install the same on all nodes"
        )
    for path, expected in job.inputs.items():
        try:
            found = fingerprint(path)
        except OSError as error:
            raise SourceError(
                f"{path}: {error.strerror} on {here}; expected every source on a file system that all nodes mount "
                "at the same place"
            ) from None
        if found != expected:
            raise SourceError(f"{path}: another file on {here} than on the driver, or changed; expected one for all")
