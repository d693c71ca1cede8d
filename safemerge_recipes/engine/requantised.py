"""What quantising again lost, measured on what was written: the codes and scales in the files against the values.

A pass of its own over the sources, for those tensors alone: so the figure is the same whoever wrote them, and whenever.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safemerge_recipes.engine.produce import produce
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.methods.work import Requantise
from safemerge_recipes.planning.graph import Task
from safemerge_recipes.planning.memory import room_of
from safemerge_recipes.planning.prepared import Prepared
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.storage.workers import run_parallel

ERROR = "requantized_error"
"""The key of a tensor's line: ‖written − merged‖ / ‖merged‖."""


def note_lines(plan: Mapping[str, Any], notes: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds what is known only after writing to the lines of a plan, by the tensor's name."""
    for line in plan["tensors"]:
        line.update(notes.get(line["name"], {}))


def requantised_errors(prepared: Prepared, folder: Path) -> dict[str, dict[str, float]]:
    """Codes -> their `ERROR`, for every weight that was quantised again into the weight files of `folder`."""
    graph = prepared.graph
    lines = {tensor.name: tensor for tensor in prepared.plan.tensors}
    found: dict[str, dict[str, float]] = {}

    def written(name: str) -> TensorRef:
        slot = graph.layout.slots[name]
        return TensorRef(str(folder / graph.layout.files[slot.shard]), slot.offset, slot.nbytes, slot.dtype, slot.shape)

    with Reader() as reader:

        def work(task: Task, arena: Arena) -> None:
            form = prepared.family.form(lines[task.slot.name].of)
            assert form is not None  # codes are written for those alone
            pair = written(form.codes), written(form.scales)
            room = room_of(task, prepared.resources.share)
            found[task.slot.name] = {ERROR: _error(task, pair, Tools(reader, arena, room))}

        codes = [task for task in graph.tasks if isinstance(task.work, Requantise) and task.work.part == "codes"]
        light = not any(task.needs_torch for task in codes)
        resources = prepared.resources
        run_parallel(codes, work, resources.workers, resources.device, threading.Event(), light=light)
    return found


def _error(task: Task, written: tuple[TensorRef, TensorRef], tools: Tools) -> float:
    """‖written − merged‖ / ‖merged‖, squares summed in float64; 0 where both are zero."""
    from dataclasses import replace

    import numpy as np

    from safemerge_recipes.weights.dequantise import Dequantiser

    assert isinstance(task.work, Requantise)
    own = replace(task.work.form, codes=written[0], scales=written[1])
    codes = Dequantiser(own, tools.reader, tools.arena, "written")
    work, slot = task.work.before_writing(task.slot)
    inside = replace(task, slot=slot, work=work)
    at = lost = size = 0.0
    for piece in produce(inside, tools, threading.Event()):
        values = np.frombuffer(piece, np.float32)
        again = tools.arena.array("again", len(values), np.float32)
        codes.fill(int(at), int(at) + len(values), again)
        again -= values
        lost += float(np.square(again).sum(dtype=np.float64))
        size += float(np.square(values).sum(dtype=np.float64))
        at += len(values)
    return math.sqrt(lost / size) if size else 0.0
