"""The merged update as a PEFT adapter on the aligned model, for `output.format: adapter`.

Where the merged update is a sum of LoRA products it is written exactly, factors side by side; elsewhere the
best approximation of the wanted rank is, and the plan says how much was lost. Tensors that are kept and are
no LoRA products (norms, embeddings, biases) are carried over whole. Whatever PEFT could not express is refused.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes.errors import PlanError, SourceError
from safemerge_recipes.events import BytesDone, Listener
from safemerge_recipes.methods import on_torch
from safemerge_recipes.methods.base import Apply, Copy, Prepare, Sum, Tools, Work
from safemerge_recipes.methods.kernels import Slerp
from safemerge_recipes.planning.graph import Graph, Task
from safemerge_recipes.planning.plan import Plan
from safemerge_recipes.sources.checkpoint import same_bytes
from safemerge_recipes.sources.family import Family
from safemerge_recipes.sources.peft.config import CONFIG_FILE
from safemerge_recipes.sources.peft.keys import KEY_PREFIX, WEIGHTS_FILE
from safemerge_recipes.sources.provenance import origin
from safemerge_recipes.storage.arena import Arena, torch_dtype
from safemerge_recipes.storage.dtypes import BY_TORCH_NAME
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import TensorRef, header_bytes
from safemerge_recipes.tensor_names import is_block_matrix
from safemerge_recipes.weights.algebra import Stored, Weight, exact
from safemerge_recipes.weights.factors import recompress, truncate
from safemerge_recipes.weights.operands import LowRankStack, Rescaled, Rows
from safemerge_recipes.weights.torch_factors import joined_factors

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class _Parts:
    """What is written, by key without prefix, and what the config says of it."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)


def _evaluated(task: Task, work: Sum | Apply | Prepare, reader: Reader, arena: Arena) -> torch.Tensor:
    """All values of a task's work, float32, in the tensor's shape."""
    import torch

    parts = []
    for block in on_torch.values(work, task.slot, Tools(reader, arena, 0), threading.Event()):
        if not bool(block.sum().isfinite()):
            on_torch.refuse(work, task.slot, block, block, False)
        parts.append(block.float().clone())
    return torch.cat(parts).view(task.slot.shape)


def _update(work: Work, reference: Weight) -> Sum | Apply | Prepare:
    """The work less the reference weight, symbolically, so that what cancels is never computed."""
    if isinstance(work, Copy):
        return Sum(Weight.of(Stored(work.source)) - reference)
    if isinstance(work, Sum):
        return Sum(work.weight - reference)
    return replace(work, origin=work.origin - reference)


def _weights(work: Sum | Apply | Prepare) -> tuple[Weight, ...]:
    """Every weight of an update that is not zero."""
    weights = (work.weight,) if isinstance(work, Sum) else (work.origin, *work.inputs)
    return tuple(weight for weight in weights if not weight.is_zero)


def _thin(*weights: Weight) -> bool:
    """Whether all of them are sums of LoRA products, or zero."""
    return all(weight.is_zero or weight.low_rank for weight in weights)


def _slerp(work: Apply, reader: Reader, arena: Arena) -> Weight:
    """Slerp of two low-rank updates as a sum: its coefficients follow from the factors' inner products."""
    import torch

    kernel = work.kernel
    assert isinstance(kernel, Slerp)
    left, right = work.inputs
    x, y = (joined_factors(weight, reader, torch.float64, arena.device) for weight in work.inputs)

    def inner(one: tuple[torch.Tensor, torch.Tensor] | None, other: tuple[torch.Tensor, torch.Tensor] | None) -> float:
        if one is None or other is None:  # zero
            return 0.0
        return float(((one[0].T @ other[0]) * (one[1] @ other[1].T)).sum())

    first, second = kernel.coefficients(inner(x, x), inner(y, y), inner(x, y))
    return exact(first) * left + exact(second) * right


def _refuse_unfit(name: str, weight: Weight) -> None:
    for _, operand in weight:
        if isinstance(operand, Rescaled):
            raise PlanError(
                f"output.format: adapter: {name}: a DoRA update has no plain-LoRA equivalent; say `format: full`"
            )
        if isinstance(operand, LowRankStack) or ".experts." in f".{name}.":
            raise PlanError(
                f"output.format: adapter: {name}: updates of experts are not written as adapters; say `format: full`"
            )


class AdapterWriter:
    """Collects the parts of the adapter, tensor by tensor."""

    def __init__(self, plan: Plan, family: Family, graph: Graph, reader: Reader, memory: int) -> None:
        self.plan, self.family, self.reader, self.memory = plan, family, reader, memory
        self.tasks = {task.slot.name: task for task in graph.tasks}
        self.rank = plan.recipe.output.rank
        self.parts = _Parts()
        self.arena = Arena()
        self.in_memory = {disk: name for model in family.models.values() for name, disk in model.translated}

    def reference(self, name: str) -> Weight:
        """The weight that the adapter will lie on: that of the full model underneath the aligned one."""
        ref = self.family.models["aligned"].checkpoint.tensors.get(name)
        if ref is None or ref.shape != self.family.inventory[name].shape:
            raise PlanError(
                f"output.format: adapter: {name} is not in the aligned model in this form (a head of its own, or "
                "another vocabulary); say `format: full`"
            )
        return Weight.of(Stored(ref))

    def module(self, name: str) -> str:
        """The module's path in memory."""
        return self.in_memory.get(name, name).rpartition(".")[0]

    def add(self, name: str) -> None:
        """Takes up one tensor of the output."""
        task, reference = self.tasks[name], self.reference(name)
        work = _update(task.work, reference)
        weights = _weights(work)
        if not weights:
            return
        base = reference.stored
        if isinstance(task.work, Copy) and base is not None and same_bytes(task.work.source, base):
            return
        for weight in weights:
            _refuse_unfit(name, weight)
        if isinstance(work, Apply) and isinstance(work.kernel, Slerp) and work.origin.is_zero and _thin(*weights):
            work = Sum(_slerp(work, self.reader, self.arena))
        if isinstance(work, Sum) and work.weight.low_rank:
            self.exact(name, work.weight)
        elif is_block_matrix(name, task.slot.shape):
            self.approximate(name, task, work)
        elif not self.tokens(name, task.work):
            self.carry(name, task)

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

    def approximate(self, name: str, task: Task, work: Sum | Apply | Prepare) -> None:
        """A dense update, truncated to the wanted rank."""
        weights = _weights(work)
        if isinstance(work, Prepare):  # its rank is at most that of the updates among its inputs
            weights = tuple(weight for weight in weights if weight.low_rank)
        own = [operand.rank for weight in weights for _, operand in weight if hasattr(operand, "rank")]
        rank = self.rank or (sum(own) if _thin(*weights) else 0)
        if not rank:
            raise PlanError(
                f"output.format: adapter: {name}: its update has no small exact rank; say `output.rank`, "
                "or `format: full`"
            )
        rows, columns = task.slot.shape
        need = 4 * 4 * rows * columns
        if need > self.memory:
            raise PlanError(f"--max-memory: truncating {name} needs {need} bytes; raise it, or say `format: full`")
        b, a, lost = truncate(_evaluated(task, work, self.reader, self.arena), rank)
        self.write(name, b, a, lost)

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
        if not isinstance(work, Sum) or len(work.weight.terms) != 1:
            return False
        operand = work.weight.terms[0][1]
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

    def carry(self, name: str, task: Task) -> None:
        """A tensor that is carried over whole, rounded as the full output would have it."""
        work = Sum(Weight.of(Stored(task.work.source))) if isinstance(task.work, Copy) else task.work
        if name == self.family.embedding and self.family.models["aligned"].checkpoint.tied:
            raise PlanError(
                f"output.format: adapter: {name} changed and is tied to the head, which an adapter would untie; "
                "say `format: full`"
            )
        self.parts.whole[self.in_memory.get(name, name)] = _evaluated(task, work, self.reader, self.arena).to(
            torch_dtype(task.slot.dtype)
        )

    def finish(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All tensors by key, and the config."""
        parts = self.parts
        if not parts.tensors and not parts.whole:
            raise PlanError("output.format: adapter: the merged model is the aligned model; there is nothing to write")
        rank = Counter(parts.ranks.values()).most_common(1)[0][0] if parts.ranks else 8
        other = {module: own for module, own in parts.ranks.items() if own != rank}
        saved, bias = [], "none"
        for name, tensor in parts.whole.items():
            module, _, kind = name.rpartition(".")
            if module in parts.ranks:
                bias = "lora_only"
                parts.tensors[f"{module}.base_layer.{kind}"] = tensor
            else:
                saved.append(module)
                parts.tensors[name] = tensor
        for module in {*saved, *(parts.ranks if bias == "lora_only" else ())}:
            self._complete(module, whole=module in saved)
        base, revision = self.base()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": dict(sorted(other.items())),
            "alpha_pattern": dict(sorted(other.items())),
            "target_modules": sorted(parts.ranks),
            "modules_to_save": sorted(set(saved)) or None,
            "trainable_token_indices": parts.tokens or None,
            "bias": bias,
            "lora_bias": False,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "fan_in_fan_out": any(name in self.family.input_first for name in parts.notes),
            "inference_mode": True,
        }
        if revision is not None:
            config["revision"] = revision
        return {f"{KEY_PREFIX}{name}": parts.tensors[name] for name in sorted(parts.tensors)}, config

    def _complete(self, module: str, whole: bool) -> None:
        """PEFT wants all tensors of a saved module, and with bias: lora_only the biases of all adapted ones."""
        known = next((disk for disk, name in self.in_memory.items() if name.rpartition(".")[0] == module), f"{module}.")
        for kind in ("weight", "bias") if whole else ("bias",):
            disk = f"{known.rpartition('.')[0]}.{kind}"
            key = f"{module}.{kind}" if whole else f"{module}.base_layer.{kind}"
            if disk in self.family.inventory and key not in self.parts.tensors:
                self.parts.tensors[key] = self.load(self.family.inventory[disk])

    def base(self) -> tuple[str, str | None]:
        """What the adapter's config calls the model it lies on, and its commit: a hub id, or a folder's full path.

        PEFT takes a path relative to wherever the program runs, so only a full one can be found from elsewhere.
        """
        aligned = self.family.models["aligned"]
        full = (m for m in self.family.models.values() if m.adapter is None and m.checkpoint is aligned.checkpoint)
        folder = next(full, aligned).folder
        name, revision = origin(folder)
        return (name, revision) if revision else (str(folder.path.resolve()), None)


def write_adapter(
    plan: Plan, family: Family, graph: Graph, folder: Path, memory: int, on_event: Listener
) -> tuple[dict[str, str], Mapping[str, Mapping[str, Any]]]:
    """Writes adapter_config.json and adapter_model.safetensors.

    Args:
        plan: the decisions.
        family: the sources.
        graph: the work that a full output would do.
        folder: where; exists.
        memory: bytes that may be used.
        on_event: told the bytes of the full output that each tensor stands for.

    Returns:
        The sha256 of each file by name, and `rank` and `lost_energy` by tensor.

    Raises:
        PlanError: the update cannot be written as a plain adapter, or does not fit the memory.
        SourceError: a source failed or holds values that are not finite.
    """
    with Reader() as reader:
        writer = AdapterWriter(plan, family, graph, reader, memory)
        for task in graph.tasks:
            if task.slot.dtype == "F16" and not isinstance(task.work, Copy) and not plan.recipe.output.allow_overflow:
                for _ in on_torch.rounded(task.work, task.slot, Tools(reader, Arena(), 0), threading.Event(), False):
                    pass  # what a model with this adapter could not hold is refused here as it would be there
            writer.add(task.slot.name)
            on_event(BytesDone(task.slot.nbytes))
        tensors, config = writer.finish()
    files = {
        WEIGHTS_FILE: _serialized(tensors),
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
    }
    from safemerge_recipes.storage.files import write_file

    for name, content in files.items():
        write_file(folder / name, content)
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}, writer.parts.notes


def _serialized(tensors: Mapping[str, torch.Tensor]) -> bytes:
    import torch

    at, entries, data = 0, {}, []
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise SourceError(f"{name}: NaN or infinite values; expected finite weights in the sources")
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")]
        entries[name] = (dtype, tuple(tensor.shape), at, at + len(content))
        at += len(content)
        data.append(content)
    return header_bytes(entries) + b"".join(data)
