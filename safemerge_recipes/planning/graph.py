"""From a plan to work: one task for every output tensor, in the order of the output's bytes.

A task is a copy of stored bytes, a symbolic sum, or a kernel over two sums; what it reads and writes and how
much memory it needs follow from it without opening a file. Tasks share no data, so any executor may run
them in any order, on any number of workers, and get the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from safemerge_recipes.errors import RecipeError, SourceError
from safemerge_recipes.methods.base import Method, Sides
from safemerge_recipes.methods.on_compiled import fits, memory
from safemerge_recipes.methods.stacks import each_matrix
from safemerge_recipes.methods.work import Copy, Requantise, Sum, Work
from safemerge_recipes.planning.plan import Outlook, Plan, TensorPlan, told
from safemerge_recipes.planning.plugins import METHODS
from safemerge_recipes.planning.stored import copied
from safemerge_recipes.sources.family import Family
from safemerge_recipes.storage.dtypes import FLOAT_DTYPES
from safemerge_recipes.storage.layout import Layout, Slot, lay_out
from safemerge_recipes.storage.machine import device_name, instruction_set
from safemerge_recipes.storage.remote import read_ahead_of
from safemerge_recipes.weights.algebra import describe
from safemerge_recipes.weights.operands import plain_refs

ENGINE = 5
"""Version of the arithmetic: changes whenever the same task would write other bytes."""


@dataclass(frozen=True, slots=True)
class Task:
    """Produces one output tensor at its slot. `key` names its result: equal keys mean equal bytes."""

    slot: Slot
    work: Work
    key: str
    native: bool = False
    """Whether the compiled kernels do it."""

    @property
    def needs_torch(self) -> bool:
        """Whether torch must be loaded for it."""
        return not self.native and self.work.copied is None

    @property
    def bytes_read(self) -> int:
        """Bytes read from the sources, each counted once."""
        return sum(ref.nbytes for ref in self.work.refs)


@dataclass(frozen=True, slots=True)
class Graph:
    """All tasks of a run and the files they write into."""

    layout: Layout
    tasks: tuple[Task, ...]
    allow_overflow: bool = False
    """Whether infinities may be written where the output dtype cannot hold a value."""

    def by_file(self) -> list[tuple[int, tuple[Task, ...]]]:
        """(number of a file, its tasks in the order of its bytes), for every file that holds a tensor."""
        found: dict[int, list[Task]] = {}
        for task in self.tasks:
            found.setdefault(task.slot.shard, []).append(task)
        return [(shard, tuple(sorted(tasks, key=lambda t: t.slot.offset))) for shard, tasks in sorted(found.items())]

    def alone(self, shard: int) -> Graph:
        """The tasks of one file, in the order of its bytes, as a graph of its own."""
        tasks = dict(self.by_file()).get(shard, ())
        at = tuple(replace(task, slot=replace(task.slot, shard=0)) for task in tasks)
        return Graph(self.layout.alone(shard), at, self.allow_overflow)

    @property
    def bytes_read(self) -> int:
        """Bytes that the tasks read."""
        return sum(task.bytes_read for task in self.tasks)

    @property
    def bytes_written(self) -> int:
        """Bytes of the output's weight files."""
        return sum(self.layout.sizes)


def sides_of(name: str, family: Family) -> Sides:
    """What a method may use of one tensor."""
    weights = {role: model.weights[name] for role, model in family.models.items()}
    return Sides(name, family.inventory[name].shape, weights, family.masks)


def check_merges(outlooks: Sequence[Outlook], family: Family, methods: Mapping[str, Method] = METHODS) -> None:
    """Puts together the work of every tensor that may be merged, so that what cannot be is refused now.

    Reads headers only; meant for the time before anything is measured.

    Raises:
        RecipeError: a source is missing, or a method is not known or not available.
        SourceError: a source or a mask does not fit the method.
    """
    found: dict[str, Method] = {}
    for outlook in outlooks:
        if outlook.policy is None or outlook.policy.gate.selector[0] == "never":
            continue
        merge = outlook.policy.merge
        if merge.method not in found:
            found[merge.method] = find_method(merge.method, methods)
        elif found[merge.method].alike(merge):
            continue
        sides = sides_of(outlook.name, family)
        for role in merge.needs() if getattr(merge, "weights", None) else found[merge.method].needs:
            sides.need(role)
        found[merge.method].work(merge, sides)


def find_method(name: str, methods: Mapping[str, Method]) -> Method:
    """The method of that name. Raises RecipeError when there is none, or mergekit is not installed."""
    if name not in methods:
        raise RecipeError(
            f"merge.method: {name!r} is not known; expected one of {', '.join(methods)} or mergekit:<method>"
        )
    return methods[name]


def _part(tensor: TensorPlan, lines: Mapping[str, TensorPlan], family: Family, methods: Mapping[str, Method]) -> Work:
    """The work of a tensor that is a part of a quantised weight, whose codes carry the decision."""
    form = family.form(tensor.of)
    assert form is not None  # lines with `of` are made from these
    assert form.operand is not None
    decided, end = lines[form.codes], tensor.name.removeprefix(form.root)
    own = copied(decided, family)
    if own is not None or tensor.name not in (form.codes, form.scales):
        return Copy((own or form).parts[end])
    inner = _work(replace(decided, name=tensor.of, dtype="F32", shape=form.operand.shape, of=""), family, methods)
    return Requantise(inner, form.operand, "codes" if tensor.name == form.codes else "scales", form.powers)


def _work(tensor: TensorPlan, family: Family, methods: Mapping[str, Method]) -> Work:
    work: Work
    if tensor.action == "merge":
        assert tensor.policy is not None  # merged tensors are gated ones
        merge = tensor.policy.merge
        work = find_method(merge.method, methods).work(merge, sides_of(tensor.name, family))
        work = each_matrix(work, family.inventory[tensor.name].shape, tensor.name in family.input_first)
    else:
        work = Sum(family.weight(tensor.take, tensor.name))
    stored = None if work.sum is None else work.sum.stored
    if stored is not None and stored.dtype == tensor.dtype:
        return Copy(stored)
    masks = {ref for tensors in family.masks.values() if (ref := tensors.get(tensor.name)) is not None}
    for ref in dict.fromkeys(ref for weight in work.weights for ref in plain_refs(weight)):
        if ref not in masks and (ref.dtype not in FLOAT_DTYPES or tensor.dtype not in FLOAT_DTYPES):
            raise SourceError(
                f"{ref.path}: {tensor.name} is stored as {ref.dtype}, the aligned model's as {tensor.dtype}, and "
                "packed numbers are never converted; expected the same in every source, or a rule that keeps the "
                "aligned one"
            )
    return work


def _key(tensor: TensorPlan, work: Work, identity: Mapping[str, str], origin: str, arithmetic: str) -> str:
    """Names a result. `tensor` is the line that decides, for a part of a quantised weight that of its codes."""
    import xxhash

    text = work.written_as and f"{work.written_as}|"
    text += "|".join(describe(weight, identity) for weight in work.weights)
    if work.copied is not None:
        arithmetic = ""
    if work.is_named:
        assert tensor.policy is not None  # what is kept is a copy or a sum
        merge = tensor.policy.merge
        text = f"{tensor.name}|{origin}|{merge.method}{told(merge)!r}|{text}"
    return xxhash.xxh3_128_hexdigest(f"{ENGINE}|{arithmetic}|{tensor.dtype}|{tensor.shape}|{text}".encode())


def build_graph(
    plan: Plan,
    family: Family,
    methods: Mapping[str, Method] = METHODS,
    origin_of: Callable[[str], str] = lambda method: "",
    device: str = "cpu",
) -> Graph:
    """The tasks of a plan. Reads nothing.

    Args:
        plan: the decisions.
        family: the sources.
        methods: merge methods by name.
        origin_of: the distribution and version that brings a method; part of what names a result.
        device: where what the compiled kernels cannot do is computed. What they can is the processor's work in any
            case: it is bound by reading and writing, and its bytes are then those of every machine.

    Raises:
        RecipeError: a method is not known.
        SourceError: a tensor that must be computed is stored in a dtype that is only copied.
    """
    aligned = family.inventory
    layout = lay_out(
        {tensor.name: (tensor.dtype, tensor.shape, aligned[tensor.weight].path) for tensor in plan.tensors},
        plan.recipe.output.max_shard_size,
    )
    identity = {one.path: one.key for one in family.identities}
    lines = {tensor.name: tensor for tensor in plan.tensors}
    tasks = []
    for tensor in plan.tensors:
        work = _part(tensor, lines, family, methods) if tensor.of else _work(tensor, family, methods)
        decided = tensor
        if work.written_as:  # codes, or their scales
            form = family.form(tensor.of)
            decided = replace(lines[form.codes], dtype=tensor.dtype, shape=tensor.shape) if form else tensor
        origin = origin_of(decided.policy.merge.method) if decided.policy and decided.action == "merge" else ""
        made, values = work.before_writing(layout.slots[tensor.name])
        native = fits(made, values.dtype)
        where = "cpu" if native else device_name(device)
        if where == "cpu" and work.matrices:
            where = f"cpu {instruction_set()}"  # whole matrices: their products are rounded as the processor likes
        key = _key(decided, work, identity, origin, where)
        tasks.append(Task(layout.slots[tensor.name], work, key, native))
    return Graph(layout, tuple(tasks), plan.recipe.output.allow_overflow)


def task_memory(task: Task) -> int:
    """Bytes of its own that a worker needs for a task, without what it may hold between passes."""
    work, slot = task.work.before_writing(task.slot)
    own = (memory(work, slot) if task.native else work.memory(slot)) + task.work.encoding(task.slot)
    return own + read_ahead_of(ref.path for ref in task.work.refs)
