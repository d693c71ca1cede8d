"""From opened sources to a plan and the work that carries it out: measure, decide, build. The one place that plans.

A run, every point of a sweep, a source in a live model and a deep check come through here. Prints nothing; what
happens is told as events.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safemerge_recipes.engine.executor import Executor
from safemerge_recipes.engine.executors.threads import LOCAL
from safemerge_recipes.errors import PlanError
from safemerge_recipes.events import Listener, PhaseStarted, ignore
from safemerge_recipes.planning.decisions import Measure, make_plan
from safemerge_recipes.planning.graph import Graph, build_graph, task_memory
from safemerge_recipes.planning.memory import projected_peak
from safemerge_recipes.planning.plan import Plan
from safemerge_recipes.planning.prepared import Prepared, Resolved
from safemerge_recipes.recipe.model import Role
from safemerge_recipes.storage.workers import Resources, fit_workers, worst

if TYPE_CHECKING:
    from safemerge_recipes.gate.measurer import Measurer
from safemerge_recipes.pipeline.opening import measured_files


def choose_device(device: str) -> str:
    """`auto` becomes cuda where there is one. Raises PlanError for a device that is not there."""
    if device == "cpu" or (device == "auto" and not Path("/dev/nvidiactl").exists()):
        return "cpu"  # without asking torch, which takes a second to load
    import torch

    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if not device.startswith("cuda"):
        raise PlanError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(device.partition(":")[2] or 0) if device.partition(":")[2].isdigit() or device == "cuda" else -1
    if not 0 <= number < count:
        raise PlanError(f"--device {device}: {count} CUDA devices are visible; try --device cpu")
    return f"cuda:{number}"


def decide(resolved: Resolved, measure: Measure | None) -> Plan:
    """The plan: every tensor decided, measured as far as its gate needs.

    Raises:
        SafemergeError: the plan cannot be made.
    """
    known = resolved.registry
    return make_plan(resolved.recipe, resolved.family, resolved.outlooks, measure, known.metrics, known.selectors)


def build(plan: Plan, resolved: Resolved, device: str) -> Graph:
    """The work of a plan of a family, for a device. Reads nothing.

    Raises:
        SafemergeError: a tensor cannot be computed from what is stored.
    """
    known = resolved.registry
    return build_graph(plan, resolved.family, known.methods, known.brings, device)


def as_source(prepared: Prepared, role: Role) -> Graph:
    """The work that writes a source's own model, in the output's dtypes. Reads nothing.

    Raises:
        PlanError: the recipe does not have it.
    """
    if role not in prepared.family.models:
        raise PlanError(f"sources.{role}: missing; expected it in the recipe")
    tensors = (replace(t, action="keep", gated=False, take=role, policy=None) for t in prepared.plan.tensors)
    return build(Plan(prepared.recipe, tuple(tensors), ()), prepared.resolved, prepared.resources.device)


def prepare(
    resolved: Resolved,
    resources: Resources,
    on_event: Listener,
    *,
    use_cache: bool = True,
    executor: Executor = LOCAL,
) -> Prepared:
    """Measures what is gated, decides every tensor and builds the work.

    Raises:
        SafemergeError: the plan cannot be made or carried out; nothing has been written.
    """
    begun = time.perf_counter()
    measurer = measurer_of(resolved, resources, on_event, use_cache=use_cache, executor=executor)
    plan = decide(resolved, _of_what_is_here(resolved, measurer))
    measured = time.perf_counter()
    graph = build(plan, resolved, resources.device)
    largest = worst((task.slot.name, task_memory(task)) for task in graph.tasks)
    workers = fit_workers([largest], resources.workers, resources.memory)
    peak = projected_peak(largest[1], workers, measurer.peak if measurer else 0)
    timings = {"measure": measured - begun, "plan": time.perf_counter() - measured}
    return Prepared(resolved, plan, graph, replace(resources, workers=workers), peak, timings)


def _of_what_is_here(resolved: Resolved, measure: Measure | None) -> Measure | None:
    """Measures only what needs no file that is still on the hub; such a gate decides without being measured."""
    away = resolved.family.away
    if measure is None or not away:
        return measure
    return lambda names, *how: measure(
        [name for name in names if away.keys().isdisjoint(measured_files(resolved.family, name))], *how
    )


def measurer_of(
    resolved: Resolved,
    resources: Resources,
    on_event: Listener = ignore,
    *,
    use_cache: bool = True,
    executor: Executor = LOCAL,
) -> Measurer | None:
    """What measures the family's tensors; None where nothing is gated or there is no base and so no V."""
    family, away = resolved.family, resolved.family.away
    gated = [outlook.name for outlook in resolved.outlooks if outlook.policy]
    gated = [name for name in gated if not away or away.keys().isdisjoint(measured_files(family, name))]
    if "base" not in family.models or not gated:
        return None
    from safemerge_recipes.gate.measurer import Measurer

    refs = (
        ref
        for name in gated
        for ref in dict.fromkeys(
            (*(family.v(name) or family.delta("base", name)).refs, *family.delta("finetuned", name).refs)
        )
    )
    on_event(PhaseStarted("measure", sum(ref.nbytes for ref in refs)))
    return Measurer(family, resources, use_cache=use_cache, on_event=on_event, by=executor.measure)
