"""From a plan to work: one task for every output tensor, in the order of the output's bytes.

A task is a copy of stored bytes, a symbolic sum, or a kernel over two sums; what it reads and writes and how
much memory it needs follow from it without opening a file. Tasks share no data, so any executor may run
them in any order, on any number of workers, and get the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from safemerge_recipes.algebra import Stored, Weight
from safemerge_recipes.checkpoint import FileIdentity
from safemerge_recipes.errors import PlanError, SourceError
from safemerge_recipes.header import DTYPE_BITS, FLOAT_DTYPES, TensorRef
from safemerge_recipes.kernels import BLOCK, as_interpolation
from safemerge_recipes.methods import FORMS, KERNELS
from safemerge_recipes.plan import Plan, TensorPlan
from safemerge_recipes.recipe import Merge
from safemerge_recipes.roles import Family, delta_or_zero
from safemerge_recipes.shards import Layout, Slot, lay_out

ENGINE = 1
"""Version of the arithmetic: changes whenever the same task would write other bytes."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Write the stored bytes of `source` unchanged."""

    source: TensorRef

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """What is read."""
        return (self.source,)


@dataclass(frozen=True, slots=True)
class Sum:
    """Evaluate `weight` and round it to the output dtype."""

    weight: Weight

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """What is read."""
        return self.weight.refs


@dataclass(frozen=True, slots=True)
class Apply:
    """Evaluate origin + kernel(x, y) and round it to the output dtype."""

    origin: Weight
    x: Weight
    y: Weight
    merge: Merge

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """What is read."""
        return tuple(dict.fromkeys((*self.origin.refs, *self.x.refs, *self.y.refs)))


@dataclass(frozen=True, slots=True)
class Task:
    """Produces one output tensor at its slot. `key` names its result: equal keys mean equal bytes."""

    slot: Slot
    work: Copy | Sum | Apply
    key: str

    @property
    def bytes_read(self) -> int:
        """Bytes read from the sources, each counted once."""
        return sum(ref.nbytes for ref in self.work.refs)


@dataclass(frozen=True, slots=True)
class Graph:
    """All tasks of a run and the files they write into."""

    layout: Layout
    tasks: tuple[Task, ...]

    @property
    def bytes_read(self) -> int:
        """Bytes that the tasks read."""
        return sum(task.bytes_read for task in self.tasks)

    @property
    def bytes_written(self) -> int:
        """Bytes of the output's weight files."""
        return sum(self.layout.sizes)


def _merged(tensor: TensorPlan, family: Family) -> Sum | Apply:
    assert tensor.policy is not None  # merged tensors are gated ones
    merge, name = tensor.policy.merge, tensor.name
    aligned = family.weight("aligned", name)
    if merge.space == "weights":
        origin, x = Weight(), family.weight("finetuned", name)
        y = family.weight("safety", name) if "safety" in family.models else Weight()
    else:
        origin, x, y = aligned, family.delta("finetuned", name), delta_or_zero(family, "safety", name)
    if merge.method in FORMS:
        v = family.v(name) or Weight()
        return Sum(origin + FORMS[merge.method](merge, x, y, v))
    if merge.method in KERNELS:
        return Apply(origin, x, y, merge)
    raise PlanError(f"merge.method: {merge.method!r} is not available; expected one of {', '.join([*FORMS, *KERNELS])}")


def _work(tensor: TensorPlan, family: Family) -> Copy | Sum | Apply:
    work = _merged(tensor, family) if tensor.action == "merge" else Sum(family.weight(tensor.take, tensor.name))
    if isinstance(work, Sum):
        stored = work.weight.stored
        if stored is not None and stored.dtype == tensor.dtype:
            return Copy(stored)
    for ref in work.refs:
        if ref.dtype not in FLOAT_DTYPES or tensor.dtype not in FLOAT_DTYPES:
            raise SourceError(
                f"{ref.path}: {tensor.name} is stored as {ref.dtype}, the aligned model's as {tensor.dtype}, and "
                "packed numbers are never converted; expected the same in every source, or a rule that keeps the "
                "aligned one"
            )
    return work


def describe(weight: Weight, identity: Mapping[str, str]) -> str:
    """A weight as text that names its operands by the identity of their files: equal texts, equal numbers."""
    return weight.describe(lambda r: f"{identity[r.path]}@{r.offset}+{r.nbytes}:{r.dtype}{r.shape}")


def _key(tensor: TensorPlan, work: Copy | Sum | Apply, identity: Mapping[str, str]) -> str:
    import xxhash

    if isinstance(work, Copy):
        text = describe(Weight.of(Stored(work.source)), identity)
    elif isinstance(work, Sum):
        text = describe(work.weight, identity)
    else:
        sums = [describe(weight, identity) for weight in (work.origin, work.x, work.y)]
        text = f"{tensor.name}|{work.merge.method}{work.merge.parameters()!r}|{'|'.join(sums)}"
    return xxhash.xxh3_128_hexdigest(f"{ENGINE}|{tensor.dtype}|{tensor.shape}|{text}".encode())


def build_graph(plan: Plan, family: Family, identities: tuple[FileIdentity, ...]) -> Graph:
    """The tasks of a plan. Reads nothing.

    Raises:
        PlanError: a method is not available.
        SourceError: a tensor that must be computed is stored in a dtype that is only copied.
    """
    aligned = family.inventory
    layout = lay_out(
        {tensor.name: (tensor.dtype, tensor.shape, aligned[tensor.name].path) for tensor in plan.tensors},
        plan.recipe.output.max_shard_size,
    )
    identity = {one.path: one.key for one in identities}
    tasks = []
    for tensor in plan.tensors:
        work = _work(tensor, family)
        tasks.append(Task(layout.slots[tensor.name], work, _key(tensor, work, identity)))
    return Graph(layout, tuple(tasks))


def block_elements(shape: tuple[int, ...]) -> int:
    """Elements of the largest block of a tensor of this shape."""
    total = 1
    for size in shape:
        total *= size
    return min(total, max(BLOCK, shape[-1] if shape else 1))


def task_memory(task: Task) -> int:
    """Bytes of its own that a worker needs for a task, without what it may hold between passes."""
    work, block = task.work, block_elements(task.slot.shape)
    width = 8 if "F64" in {ref.dtype for ref in work.refs} else 4
    if isinstance(work, Copy):
        return 1 << 22
    if isinstance(work, Sum):
        if as_interpolation(work.weight, task.slot.dtype):
            return 3 * block * DTYPE_BITS[task.slot.dtype] // 8
        return block * (3 * width + 8) + work.weight.memory(block)
    slots = 18 if KERNELS else 0  # three sums of two buffers each, the kernel's scratch, temporaries
    collected = (  # as pieces, joined, and partitioned
        3 * int(0.06 * task.slot.nbytes) * 8 // DTYPE_BITS[task.slot.dtype] * 8 if work.merge.method == "ties" else 0
    )
    return block * slots * width + collected + sum(weight.memory(block) for weight in (work.origin, work.x, work.y))
