"""The executor protocol: carries out a graph somewhere, into a store. It knows no recipe, no gate and no arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from safemerge_recipes.engine.journal import Notes
from safemerge_recipes.engine.store import Store
from safemerge_recipes.events import Listener
from safemerge_recipes.planning.graph import Graph
from safemerge_recipes.storage.digests import Digests, threads_for
from safemerge_recipes.storage.identity import FileIdentity
from safemerge_recipes.storage.workers import Resources

if TYPE_CHECKING:
    from safemerge_recipes.gate.measurer import Asked, Measured
    from safemerge_recipes.gate.moments import Effort


Done = Mapping[str, "str | None"]
"""Tensors that are already there, with the digest that their bytes must have, None where it is not known."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """What was written.

    Attributes:
        files: name -> sha256 of every weight file.
        tensors: name -> xxh3 of the bytes of every tensor.
    """

    files: Mapping[str, str]
    tensors: Mapping[str, str]


def digests_of(by: Executor, identities: Sequence[FileIdentity], resources: Resources) -> Digests:
    """Begins to hash the inputs: as the executor does, where it has `digests(identities, resources)`, else here."""
    begin = getattr(by, "digests", None)
    if begin is None:
        return Digests(identities, threads=threads_for(resources.workers, resources.memory))
    found: Digests = begin(identities, resources)
    return found


class Executor(Protocol):
    """Does all tasks of a graph, in any order and place: tasks share no data, and each has bytes and offset fixed."""

    def measure(
        self, asked: Sequence[Asked], effort: Effort, rank: int, null: bool, resources: Resources, on_event: Listener
    ) -> Measured:
        """Measures tensors for the gate; see `gate.measurer.measure_all`, whose numbers it must find."""

    def close(self) -> None:
        """Lets go of whatever it holds between calls."""

    def run(
        self, graph: Graph, store: Store, resources: Resources, done: Done, journal: Notes, on_event: Listener
    ) -> Sealed:
        """Writes every tensor that is not `done` into the store and seals every file.

        Args:
            graph: the work.
            store: where the bytes go; opened and closed here.
            resources: what may be used.
            done: what an earlier run left.
            journal: notes every finished tensor, in this process alone.
            on_event: is told bytes, tensors and files as they are done.

        Raises:
            PlanError: there is no room for the output.
            ReadError: a source failed while being read.
            SourceError: a source ended early, or holds values that are not finite.
            WriteError: writing failed; the same call goes on where it stopped.
        """
