"""Measures many tensors at once within a memory budget, and remembers what was measured.

The only place where planning reads tensor data. A remembered measurement is found again by the identities
of the files behind it and the exact operands, so another τ or α costs no reading.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add

from safemerge_recipes.events import BytesDone, Listener, ignore
from safemerge_recipes.gate.low_rank import needs_torch
from safemerge_recipes.gate.measure import measure
from safemerge_recipes.gate.memory import measure_memory
from safemerge_recipes.gate.moments import Effort, Moments
from safemerge_recipes.sources.family import Family
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.cache import recall, remember
from safemerge_recipes.storage.machine import device_name, instruction_set
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.remote import read_ahead_of
from safemerge_recipes.storage.workers import SLACK, Resources, StoppedError, fit_workers, run_parallel
from safemerge_recipes.weights.algebra import Weight, describe
from safemerge_recipes.weights.numpy_rows import one_blas_thread
from safemerge_recipes.weights.operands import member, transposed

ARITHMETIC = 5
"""Version of the measuring: changes whenever the same operands would give other numbers."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A tensor to measure.

    Attributes:
        name: the tensor.
        matrices: (name, (V, Δ)) of each matrix `(d_out, d_in)` that it is, one or those of a fused tensor's experts.
        nbytes: bytes of what is read.
        key: names what is found: equal keys, equal moments.
    """

    name: str
    matrices: tuple[tuple[str, tuple[Weight, Weight]], ...]
    nbytes: int
    key: str = ""

    @property
    def numel(self) -> int:
        """Elements of V."""
        return sum(math.prod(v.shape) if v.terms else 1 for _, (v, _) in self.matrices)

    @property
    def paths(self) -> frozenset[str]:
        """The files that are read."""
        return frozenset(ref.path for _, pair in self.matrices for weight in pair for ref in weight.refs)


@dataclass(frozen=True, slots=True)
class Measured:
    """Moments by tensor, and the bytes of own memory that finding them took at most."""

    moments: Mapping[str, Moments]
    peak: int


MeasureAll = Callable[[Sequence[Asked], Effort, int, bool, Resources, Listener], Measured]
"""Measures many tensors somewhere: `measure_all`, or the same on other machines."""


class Measurer:
    """Measures tensors of a family by name; the `Measure` that `plan.make_plan` wants."""

    def __init__(
        self,
        family: Family,
        resources: Resources,
        *,
        use_cache: bool = True,
        on_event: Listener = ignore,
        by: MeasureAll | None = None,
    ) -> None:
        self.family, self.resources, self.on_event = family, resources, on_event
        self.by = by or measure_all
        self.peak = 0
        self._identity = {one.path: one.key for one in family.identities}
        self._cache_key = self._make_key() if use_cache else None
        known = recall("measures", self._cache_key) if self._cache_key else None
        self._known: dict[str, dict[str, float]] = known if isinstance(known, dict) else {}

    def _make_key(self) -> str:
        from importlib.metadata import version

        roles = [r for r in ("base", "aligned", "finetuned") if r in self.family.models]
        files = sorted({self._identity[file] for r in roles for file in self.family.models[r].files})
        where = f"{device_name(self.resources.device)}|{instruction_set()}"
        return f"{ARITHMETIC}|{version('numpy')}|{version('torch')}|{where}|{files}"

    def _operands(self, name: str) -> tuple[Weight, Weight]:
        v = self.family.v(name)
        assert v is not None  # a measurer is only made for families with a base
        return v, self.family.delta("finetuned", name)

    def _matrices(self, name: str) -> list[tuple[str, tuple[Weight, Weight]]]:
        """(name, (V, Δ)) as matrices `(d_out, d_in)`: one, or those of a fused tensor's experts."""
        v, delta = self._operands(name)
        shape = self.family.inventory[name].shape
        found = [(name, (v, delta))]
        if len(shape) == 3:
            found = [(f"{name}[{i}]", (member(v, i), member(delta, i))) for i in range(shape[0])]
        if name in self.family.input_first:
            found = [(one, (transposed(v), transposed(delta))) for one, (v, delta) in found]
        return found

    def _key(self, name: str, effort: Effort, rank: int, null: bool) -> str:
        v, delta = self._operands(name)
        turned = name in self.family.input_first
        text = f"{name}|{effort}|{rank}|{null}|{turned}|{describe(v, self._identity)}|{describe(delta, self._identity)}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __call__(
        self, names: Sequence[str], effort: Effort, rank: int = 0, null: bool = False
    ) -> Mapping[str, Moments]:
        """Moments of the named tensors; the other arguments are as in `measure.measure`."""
        found: dict[str, Moments] = {}
        keys = {name: self._key(name, effort, rank, null) for name in names}
        todo = []
        for name in names:
            known = self._known.get(keys[name])
            if known is not None:
                found[name] = Moments(**known)  # type: ignore[arg-type]  # d_out is an int in JSON too
            else:
                todo.append(name)
        if todo:
            found.update(self._measure(todo, effort, rank, null))
            self._known |= {keys[name]: asdict(found[name]) for name in todo}
            if self._cache_key:
                remember("measures", self._cache_key, self._known)
        return {name: found[name] for name in names}

    def _measure(self, names: Sequence[str], effort: Effort, rank: int, null: bool) -> Mapping[str, Moments]:
        asked = [
            Asked(name, tuple(self._matrices(name)), self._nbytes(name), self._key(name, effort, rank, null))
            for name in names
        ]
        found = self.by(asked, effort, rank, null, self.resources, self.on_event)
        self.peak = max(self.peak, found.peak)
        return found.moments

    def _nbytes(self, name: str) -> int:
        v, delta = self._operands(name)
        return sum(ref.nbytes for ref in dict.fromkeys((*v.refs, *delta.refs)))


def measure_all(
    asked: Sequence[Asked], effort: Effort, rank: int, null: bool, resources: Resources, on_event: Listener
) -> Measured:
    """Measures tensors with threads of this process.

    Args:
        asked: the tensors.
        effort: as in `measure.measure`, like `rank` and `null`.
        rank: how many directions.
        null: whether ρ₀ matters.
        resources: what may be used.
        on_event: is told the bytes of every tensor.

    Raises:
        PlanError: not even one tensor fits the memory.
        SourceError: a source failed or holds values that are not finite.
    """
    needs = {
        one.name: read_ahead_of(one.paths)
        + max(measure_memory(v, delta, rank, effort == "exact", null) for _, (v, delta) in one.matrices)
        for one in asked
    }
    workers = fit_workers(needs.items(), resources.workers, resources.memory)
    share = (resources.memory - SLACK) // workers
    room = share - max(needs.values(), default=0)  # the same for all: what a worker holds stays with it
    found: dict[str, Moments] = {}
    stop = threading.Event()
    with Reader(workers) as reader:

        def work(one: Asked, arena: Arena) -> None:
            parts = [measure(name, *pair, reader, arena, room, effort, rank, null) for name, pair in one.matrices]
            found[one.name] = reduce(add, parts)
            on_event(BytesDone(one.nbytes))
            if stop.is_set():
                raise StoppedError

        rough = rank == 0 and not (null and effort == "exact")
        light = rough and not any(needs_torch(*pair, resources.device) for one in asked for _, pair in one.matrices)
        with one_blas_thread():
            run_parallel(asked, work, workers, resources.device, stop, light=light)
    held = (needs[one.name] if light else min(share, needs[one.name] + 8 * one.numel) for one in asked)
    return Measured(found, workers * max(held, default=0))
