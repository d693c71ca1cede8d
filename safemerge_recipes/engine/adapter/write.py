"""Writes an adapter: computed in memory, as it is small, and always anew."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes.errors import SourceError
from safemerge_recipes.events import BytesDone, Listener
from safemerge_recipes.methods import on_torch
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.planning.graph import Graph
from safemerge_recipes.planning.plan import Plan
from safemerge_recipes.sources.family import Family
from safemerge_recipes.sources.peft.config import CONFIG_FILE
from safemerge_recipes.sources.peft.keys import WEIGHTS_FILE
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.dtypes import BY_TORCH_NAME
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import header_bytes

if TYPE_CHECKING:
    import torch


from safemerge_recipes.engine.adapter.config import finished
from safemerge_recipes.engine.adapter.parts import Collector
from safemerge_recipes.storage.files import write_file


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
        collected = Collector(plan, family, graph, reader, memory)
        for task in graph.tasks:
            if task.slot.dtype == "F16" and task.work.copied is None and not plan.recipe.output.allow_overflow:
                for _ in on_torch.rounded(task.work, task.slot, Tools(reader, Arena(), 0), threading.Event(), False):
                    pass  # what a model with this adapter could not hold is refused here as it would be there
            collected.add(task.slot.name)
            on_event(BytesDone(task.slot.nbytes))
        tensors, config = finished(collected)
    files = {
        WEIGHTS_FILE: _serialized(tensors),
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
    }
    for name, content in files.items():
        write_file(folder / name, content)
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}, collected.parts.notes


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
