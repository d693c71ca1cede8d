"""Merges one tensor, module type or block at a time and records what safety and utility become.

What a gate should find is where merging helps; the rank correlation between the measured change and ρ says
whether ρ finds it, and that with ‖V‖ whether mere size finds it as well. Where the two go together, V added at equal
norm tells them apart. Scored on the tuning split.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from safemerge_recipes.errors import PlanError
from safemerge_recipes.evaluation.experiments import controls
from safemerge_recipes.evaluation.experiments.measures import measures
from safemerge_recipes.evaluation.experiments.results import write_results
from safemerge_recipes.evaluation.experiments.workbench import Bench
from safemerge_recipes.evaluation.rates import spearman
from safemerge_recipes.evaluation.rounds import Rounds
from safemerge_recipes.gate.moments import Moments
from safemerge_recipes.planning.plan import Plan
from safemerge_recipes.report.scatter import heat_map
from safemerge_recipes.tensor_names import block_of, module_type

PROBE_FILE = "safemerge_probe.json"
PICTURE_FILE = "safemerge_probe.svg"
By = Literal["tensor", "type", "block"]
SYMBOLS = {"rho": "ρ", "rho_ratio": "ρ/ρ₀", "v_norm": "‖V‖"}


def groups(plan: Plan, by: By) -> dict[str, tuple[str, ...]]:
    """Tensors that are merged together, by the group's name, in checkpoint order."""
    wanted = set(controls.choosable(plan))
    found: dict[str, tuple[str, ...]] = {}
    for tensor in plan.gated:
        if tensor.name in wanted:
            name = tensor.name
            key = name if by == "tensor" else module_type(name) if by == "type" else block_of(name) or name
            found[key] = (*found.get(key, ()), name)
    return found


def measured(plan: Plan, members: Sequence[str]) -> dict[str, float | None]:
    """ρ, ρ/ρ₀ and ‖V‖ of a group: those of its concatenated updates; None where nothing was measured."""
    parts = [t.moments for t in plan.gated if t.name in set(members)]
    known: list[Moments] = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return dict.fromkeys(SYMBOLS)
    total = known[0]
    for part in known[1:]:
        total = total + part
    ratio = None if total.rho is None or not total.rho_null else total.rho / total.rho_null
    return {"rho": total.rho, "rho_ratio": ratio, "v_norm": math.sqrt(total.v)}


def probe(
    bench: Bench,
    by: By,
    folder: Path,
    *,
    tasks: Sequence[str] = (),
    overrides: Sequence[str] = (),
    limit: int | None = None,
    only: int | None = None,
    equal_norm: bool = False,
) -> dict[str, Any]:
    """Scores every group merged alone, and writes `safemerge_probe.json` and its picture.

    Args:
        bench: The family.
        by: What is merged at a time.
        folder: Where results go; exists.
        tasks: By default the tuning splits of the bench's tasks.
        overrides: `KEY=VALUE` texts on top of the bench's: what merging means.
        limit: Only the first so many prompts of each task; the recipe's by default.
        only: Probe only so many groups, spread evenly over the model.
        equal_norm: Add to every group a change of the same Frobenius norm, γ times the median ‖V‖ of the groups.

    Raises:
        PlanError: nothing is gated; or V of equal norm is asked for, of a recipe that adds no V or measures none.
        CheckError: scoring failed. What was scored is kept.
    """
    names = list(tasks) or bench.tuning
    plan = bench.plan(overrides)
    found = groups(plan, by)
    if not found:
        raise PlanError("no tensor is gated, so there is nothing to probe; check gate.scope and the rules")
    if only is not None and only < len(found):
        keys = list(found)
        found = {keys[i * len(keys) // only]: found[keys[i * len(keys) // only]] for i in range(only)}
    gammas = equal_gammas(plan, found) if equal_norm else {}
    suite = bench.suite(names)
    weigh = measures(suite.better, names)
    rounds = Rounds(bench.on_event, 1 + len(found), suite, limit or bench.settings.limit)
    graph = bench.graph(controls.with_merged(plan, (), "probe"))
    none = bench.score(graph, "merge none", names, len(found), limit, rounds.of(1, "merge none"))
    safety, utility = weigh.of(none)
    rows: dict[str, dict[str, Any]] = {}
    for place, (name, members) in enumerate(found.items()):
        own = bench.plan((*overrides, f"merge.gamma={gammas[name]!r}")) if equal_norm else plan
        graph = bench.graph(controls.with_merged(own, members, f"probe: {name}"))
        scores = bench.score(graph, name, names, len(found) - place - 1, limit, rounds.of(place + 2, name))
        one = weigh.of(scores)
        change = {"safety": one[0] - safety, "utility": one[1] - utility}
        gamma = {"gamma": gammas[name]} if equal_norm else {}
        rows[name] = {"tensors": len(members), **measured(plan, members), **gamma, **change}
    content = {
        "by": by,
        "equal_norm": equal_norm,
        "tasks": names,
        "safety": weigh.words,
        "merge_none": {"safety": safety, "utility": utility},
        "groups": rows,
        "correlations": correlations(rows),
    }
    return write_results(folder, PROBE_FILE, content, {PICTURE_FILE: picture(rows, by)})


def equal_gammas(plan: Plan, found: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Group -> the γ with which γ‖V‖ is the same for all: the recipe's γ times the median ‖V‖ over the groups'.

    Raises:
        PlanError: the recipe adds no V, or its gate measures none.
    """
    merge = plan.recipe.merge
    gamma = getattr(merge, "gamma", None)
    if merge.method != "add_safety_vector" or gamma is None:
        raise PlanError(
            f"merge.method {merge.method}: expected add_safety_vector, whose V can be scaled to equal norm; try "
            "`--set merge.method=add_safety_vector --set merge.gamma=1`"
        )
    norms = {name: measured(plan, members)["v_norm"] for name, members in found.items()}
    known = [norm for norm in norms.values() if norm]
    if len(known) < len(norms):
        raise PlanError("gate: V is not measured in every group; expected a gate by ρ, such as `--set gate.fraction=1`")
    return {name: gamma * statistics.median(known) / norm for name, norm in norms.items() if norm}


def correlations(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Spearman's correlation of each change with each measure, with permutation p; constant columns have none."""
    found = []
    for metric in SYMBOLS:
        for change in ("safety", "utility"):
            pairs = [(row[metric], row[change]) for row in rows.values() if row[metric] is not None]
            try:
                value, p = spearman([a for a, _ in pairs], [b for _, b in pairs])
            except ValueError:
                value, p = None, None
            found.append({"metric": metric, "change": change, "n": len(pairs), "spearman": value, "p": p})
    return found


def picture(rows: Mapping[str, Mapping[str, Any]], by: By) -> str:
    """The heat map: ρ and ‖V‖ beside the changes in points, one row a group."""
    columns = {"ρ": "rho", "‖V‖": "v_norm", "safety": "safety", "utility": "utility"}
    cells = {
        (name, ""): {title: row[key] for title, key in columns.items() if row[key] is not None}
        for name, row in rows.items()
    }
    return heat_map(cells, tuple(columns), f"change when one {by} is merged, beside ρ", ("safety", "utility"))
