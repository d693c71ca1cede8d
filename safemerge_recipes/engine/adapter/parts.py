"""Collects an adapter tensor by tensor: factors where the update has them, rows or whole tensors elsewhere.

Where the merged update is a sum of LoRA products it is written exactly, factors side by side; elsewhere the
best approximation of the wanted rank is, and the plan says how much was lost. Tensors that are kept and are
no LoRA products (norms, embeddings, biases) are carried over whole. Whatever PEFT could not express is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from safemerge_recipes.errors import PlanError
from safemerge_recipes.methods.work import Sum, Work
from safemerge_recipes.planning.graph import Graph, Task
from safemerge_recipes.planning.plan import Plan
from safemerge_recipes.sources.checkpoint import same_bytes
from safemerge_recipes.sources.family import Family
from safemerge_recipes.sources.vocabulary import is_head
from safemerge_recipes.storage.arena import Arena, torch_dtype
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.tensor_names import is_block_matrix
from safemerge_recipes.weights.algebra import Stored, Weight
from safemerge_recipes.weights.factors import recompress, truncate
from safemerge_recipes.weights.operands import LowRankStack, Rows, member
from safemerge_recipes.weights.torch_factors import joined_factors

if TYPE_CHECKING:
    import torch


from safemerge_recipes.engine.adapter.experts import ExpertUpdates
from safemerge_recipes.engine.adapter.in_memory import in_memory
from safemerge_recipes.engine.adapter.update import evaluated, inner_products


@dataclass(slots=True)
class Parts:
    """What is written, by key without prefix, and what the config says of it."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)


class Collector:
    """Collects the parts of the adapter, tensor by tensor."""

    def __init__(self, plan: Plan, family: Family, graph: Graph, reader: Reader, memory: int) -> None:
        self.plan, self.family, self.reader, self.memory = plan, family, reader, memory
        self.tasks = {task.slot.name: task for task in graph.tasks}
        self.lines = {tensor.name: tensor for tensor in plan.tensors}
        self.rank = plan.recipe.output.rank
        self.parts = Parts()
        self.arena = Arena()
        self.seen = in_memory(family)
        self.in_memory = dict(self.seen.names) if self.seen else {}
        self.in_memory |= {disk: name for model in family.models.values() for name, disk in model.translated}
        self.experts = ExpertUpdates.of({name: ref.shape for name, ref in family.inventory.items()})

    def reference(self, name: str) -> Weight:
        """The weight that the adapter will lie on: that of the full model underneath the aligned one.

        Zero where that has another number of rows. A head that it has not is its embedding, to which it is tied.
        """
        form = self.family.form(name)
        if form is not None and form.operand is not None:
            return Weight.of(form.operand)
        tensors, shape = self.family.models["aligned"].checkpoint.tensors, self.family.inventory[name].shape
        ref = tensors.get(name)
        if ref is None and is_head(name) and self.family.embedding is not None:
            ref = tensors.get(self.family.embedding)
        if ref is None or ref.shape[1:] != shape[1:]:
            raise PlanError(
                f"output.format: adapter: {name} is not in the aligned model, and an adapter changes what is there; "
                "say `format: full`"
            )
        return Weight.of(Stored(ref)) if ref.shape == shape else Weight()

    def in_place(self, name: str) -> bool:
        """Whether an embedding or head is set as a whole, without a module of its own.

        PEFT loads such a tensor into the model itself, which may have been given rows, and in which the head may be
        tied to the embedding.
        """
        if self.family.form(name) is not None:
            return False
        tied = name == self.family.embedding and not any(is_head(one) for one in self.family.inventory)
        return tied or self.reference(name).is_zero

    def module(self, name: str) -> str:
        """The module's path in memory."""
        return self.in_memory.get(name, name).rpartition(".")[0]

    def add(self, name: str) -> None:
        """Takes up one tensor of the output."""
        task, line = self.tasks[name], self.lines[name]
        name, form = line.weight, self.family.form(line.weight)
        reference = self.reference(name)
        work = task.work.less(reference)
        if line.of and form is not None and form.operand is not None:
            if line.name != form.codes:
                return  # scales, which go with the codes
            task = replace(task, slot=replace(task.slot, name=name, dtype="F32", shape=form.operand.shape))
            if task.work.copied is not None:
                work = Sum(self.family.weight(line.take, name) - reference)
        if all(weight.is_zero for weight in work.weights):
            return
        base, copied = reference.stored, task.work.copied
        if copied is not None and base is not None and same_bytes(copied, base):
            return
        if self.experts.fused(name) or self.experts.place(name) is not None:
            self.expert(name, task, work)
            return
        if self.in_place(name):
            if not self.tokens(name, task.work):
                self.parts.tensors[self.in_memory.get(name, name)] = self.whole(task)
            return
        if self.seen is not None and name.endswith(".weight") and self.module(name) not in self.seen.linear:
            self.parts.whole[self.in_memory.get(name, name)] = self.whole(task)  # a norm, or the router of a mixture
            return
        work = work.factored(inner_products(self.reader, self.arena))
        if work.sum is not None and work.sum.low_rank:
            self.exact(name, work.sum)
        elif is_block_matrix(name, task.slot.shape):
            self.approximate(name, task, work)
        elif not self.tokens(name, task.work):
            self.parts.whole[self.in_memory.get(name, name)] = self.whole(task)

    def exact(self, name: str, weight: Weight) -> None:
        """A sum of LoRA products: factors side by side, or recompressed where that exceeds the wanted rank."""
        import torch

        pair = joined_factors(weight, self.reader, torch.float64, self.arena.device)
        assert pair is not None
        b, a = pair
        lost = 0.0
        if self.rank is not None and b.shape[1] > self.rank:
            b, a, lost = recompress(b, a, self.rank)
        self.write(name, b, a, lost)

    def approximate(self, name: str, task: Task, work: Work) -> None:
        """A dense update, truncated to the wanted rank."""
        rank = self.wanted(name, work.ranked)
        b, a, lost = truncate(self.dense(name, task, work), rank)
        self.write(name, b, a, lost)

    def wanted(self, name: str, weights: Sequence[Weight]) -> int:
        """The rank to truncate to: the recipe's, or the bound that updates of low rank have together."""
        own = [operand.rank for weight in weights for _, operand in weight if hasattr(operand, "rank")]
        rank = self.rank or (sum(own) if all(weight.low_rank for weight in weights) else 0)
        if not rank:
            raise PlanError(
                f"output.format: adapter: {name}: its update has no small exact rank; say `output.rank`, "
                "or `format: full`"
            )
        return rank

    def dense(self, name: str, task: Task, work: Work) -> torch.Tensor:
        """All values of an update, float32, where memory allows."""
        need = 4 * 4 * math.prod(task.slot.shape)
        if need > self.memory:
            raise PlanError(f"--max-memory: truncating {name} needs {need} bytes; raise it, or say `format: full`")
        return evaluated(task, work, self.reader, self.arena)

    def expert(self, name: str, task: Task, work: Work) -> None:
        """The update of a parameter of all experts, or of one expert's matrix: factors for each matrix."""
        import torch

        place = self.experts.place(name)
        if place is not None:
            parent, parameter, number, which = place
            places = [(number, which)]
        else:
            parent, _, parameter = name.rpartition(".")
            places = [(number, 0) for number in range(task.slot.shape[0])]

        def of(weight: Weight, number: int) -> Weight:
            return weight if place is not None else member(weight, number)

        inputs = [[of(weight, number) for weight in work.ranked] for number, _ in places]
        total, values, lost, rank = work.sum, None, 0.0, 0
        stacked = [operand for weight in work.weights for _, operand in weight if isinstance(operand, LowRankStack)]
        turned = stacked[0].transposed if stacked else self.turned(name)
        for (number, which), own in zip(places, inputs, strict=True):
            update = Weight() if total is None else of(total, number)
            if total is not None and update.is_zero:
                continue
            if update.low_rank:
                pair = joined_factors(update, self.reader, torch.float64, self.arena.device)
                assert pair is not None
                b, a, part = *pair, 0.0
                if self.rank is not None and b.shape[1] > self.rank:
                    b, a, part = recompress(b, a, self.rank)
            else:
                values = self.dense(name, task, work) if values is None else values
                matrix = values if place is not None else values[number]
                b, a, part = truncate(matrix, self.wanted(name, [weight for weight in own if not weight.is_zero]))
            self.experts.put(parent, parameter, number, which, (b.double(), a.double()), turned and place is None)
            lost, rank = max(lost, part), max(rank, b.shape[1])
        if rank:
            self.parts.notes[name] = {"rank": rank, "lost_energy": lost}

    def turned(self, name: str) -> bool:
        """Whether PEFT takes a parameter of experts as `(count, d_in, d_out)`."""
        if self.seen is None:
            return name in self.family.input_first
        return self.in_memory.get(name, name) in self.seen.turned

    def write(self, name: str, b: torch.Tensor, a: torch.Tensor, lost: float) -> None:
        """Factors of a layer's or an embedding's update, in the orientation that PEFT stores."""
        module, rank = self.module(name), b.shape[1]
        b, a = b.float(), a.float()
        if name == self.family.embedding:
            self.parts.embeddings.add(module)
            self.parts.tensors[f"{module}.lora_embedding_A"] = b.T.contiguous()
            self.parts.tensors[f"{module}.lora_embedding_B"] = a.T.contiguous()
        else:
            if name in self.family.input_first:
                b, a = a.T, b.T
            self.parts.tensors[f"{module}.lora_A.weight"] = a.contiguous()
            self.parts.tensors[f"{module}.lora_B.weight"] = b.contiguous()
        self.parts.ranks[module] = rank
        self.parts.notes[name] = {"rank": rank, "lost_energy": lost}

    def tokens(self, name: str, work: Work) -> bool:
        """Trained rows of the embedding pass through; True if the tensor is nothing else."""
        if work.sum is None or len(work.sum.terms) != 1:
            return False
        operand = work.sum.terms[0][1]
        if not isinstance(operand, Rows) or len(operand.parts) != 2 or operand.parts[0] != self.reference(name):
            return False
        ref = operand.parts[1].stored
        if ref is None:
            return False
        starts, at = [], 0
        for part, first, count in operand.runs:
            starts += [(first + i, at + i) for i in range(count)] if part == 1 else []
            at += count
        module = self.module(name)
        self.parts.tokens[module] = [row for _, row in sorted(starts)]
        self.parts.tensors[f"{module}.token_adapter.trainable_tokens_delta"] = self.load(ref)
        return True

    def load(self, ref: TensorRef) -> torch.Tensor:
        """A stored tensor as it is."""
        return self.reader.read(ref, 0, ref.numel, Arena(), "load").clone().view(ref.shape)

    def whole(self, task: Task) -> torch.Tensor:
        """A tensor's values, rounded as the full output would have it."""
        work = task.work.less(Weight())  # a copy as a sum, which has values
        return evaluated(task, work, self.reader, self.arena).to(torch_dtype(task.slot.dtype))
