"""Sweeps a recipe's keys: scores every point on the tuning split, chooses one, reports it on the test split.

The chosen point meets its controls on the test split, which had no part in choosing it: the same number of
tensors drawn at random, drawn within each module type, the complement, all, none.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import CheckError, RecipeError
from safemerge_recipes.evaluation.experiments import controls
from safemerge_recipes.evaluation.experiments.measures import Measures, measures
from safemerge_recipes.evaluation.experiments.results import write_results
from safemerge_recipes.evaluation.experiments.workbench import Bench
from safemerge_recipes.evaluation.rounds import Rounds
from safemerge_recipes.evaluation.scores import Scores
from safemerge_recipes.evaluation.scoring import compared, interval, table
from safemerge_recipes.events import Note
from safemerge_recipes.planning.graph import Graph
from safemerge_recipes.planning.plan import Plan
from safemerge_recipes.recipe.writing import dump_recipe
from safemerge_recipes.report.scatter import Mark, scatter

SWEEP_FILE = "safemerge_sweep.json"
PICTURE_FILE = "safemerge_sweep.svg"
CHOSEN_FILE = "chosen.yaml"
SOURCES = ("finetuned", "aligned")


def parse_grid(axes: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of `KEY=V1,V2,…` axes, each as `KEY=VALUE` texts. Commas inside brackets do not split.

    Raises:
        RecipeError: an axis has no key or no value.
    """
    lists: list[list[str]] = []
    for axis in axes:
        key, equals, rest = axis.partition("=")
        values = [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", rest)]
        if not key.strip() or not equals or "" in values:
            raise RecipeError(f"{axis}: not an axis of a grid; expected KEY=V1,V2, such as gate.tau=0.1,0.2")
        lists.append([f"{key.strip()}={value}" for value in dict.fromkeys(values)])
    return list(itertools.product(*lists))


def choose(
    points: Mapping[str, Scores],
    finetuned: Scores,
    by: Measures,
    allowed_loss: float,
    merged: Mapping[str, int] | None = None,
) -> str:
    """The label of the point that separates best among those that lose little utility.

    What a prompt or two decide is decided otherwise (one standard error, Breiman et al. 1984): points whose safety is
    within one standard error of the best one's tie, and the one with the most utility is taken; among those within one
    standard error of its utility the safest, then the one that merges fewest.

    Args:
        points: label -> scores; not empty.
        finetuned: Scores of the model whose utility is not to be lost.
        by: What is weighed.
        allowed_loss: How much utility may be lost, give or take a standard error; where every point loses more, the
            largest sum of safety and utility wins.
        merged: label -> how many tensors it merges.
    """
    values = {label: by.of(one) for label, one in points.items()}
    pool = [label for label, one in points.items() if affordable(one, finetuned, by, allowed_loss)]
    if not pool:
        return max(values, key=lambda label: sum(values[label]))
    safest = max(pool, key=lambda label: values[label])
    pool = [label for label in pool if _ties(by.changes(points[safest], points[label])[0])]
    useful = max(pool, key=lambda label: values[label][::-1])
    pool = [label for label in pool if _ties(by.changes(points[useful], points[label])[1])]
    return max(pool, key=lambda label: (values[label], -(merged or {}).get(label, 0)))


def affordable(point: Scores, finetuned: Scores, by: Measures, allowed_loss: float) -> bool:
    """Whether a point loses no more utility than is allowed, give or take a standard error; no safety is asked for."""
    loss, error = by.utility_change(point, finetuned)
    return loss >= -allowed_loss - error - 1e-12


def _ties(change: tuple[float, float]) -> bool:
    value, error = change
    return value <= error + 1e-12


def sweep(
    bench: Bench,
    axes: Sequence[str],
    folder: Path,
    *,
    seeds: int = 10,
    allowed_loss: float = 0.02,
) -> dict[str, Any]:
    """Scores the grid and its controls and writes everything into a folder.

    Args:
        bench: The family.
        axes: `KEY=V1,V2,…` texts.
        folder: Where results go; exists.
        seeds: Random controls of each of the two kinds; 0: no controls.
        allowed_loss: Utility that the chosen point may lose against the fine-tuned model, from 0 to 1.

    Returns:
        The content of `safemerge_sweep.json`.

    Raises:
        SafemergeError: a point of the grid is no sound recipe, or scoring failed. What was scored is kept.
    """
    first, second = bench.tuning, bench.tasks
    if set(first) & set(second):
        raise CheckError(f"tasks: {', '.join(sorted(set(first) & set(second)))}: chosen and reported on the same split")
    plans: dict[str, tuple[tuple[str, ...], Plan]] = {}
    for overrides in parse_grid(axes):
        plans[", ".join(overrides)] = (overrides, bench.plan(overrides))
    sources = {role: bench.role(role) for role in SOURCES}
    tried = {**sources, **{label: bench.graph(plan) for label, (_, plan) in plans.items()}}
    bench.on_event(Note(f"{len(plans)} points on the tuning split: {', '.join(first)}"))
    on_tuning = scored(bench, tried, first)
    by = measures(bench.suite(first).better, first)
    counts = {label: len(controls.merged(one)) for label, (_, one) in plans.items()}
    best = choose({label: on_tuning[label] for label in plans}, on_tuning["finetuned"], by, allowed_loss, counts)
    overrides, plan = plans[best]
    bench.on_event(Note(f"Chosen: {best}"))
    reported = {**sources, best: tried[best]}
    kinds = {one.label: one for one in (controls.controls(seeds) if seeds else ())}
    drawn = {label: bench.graph(bench.control(plan, one)) for label, one in kinds.items()}
    bench.on_event(Note(f"{len(drawn)} controls on the test split: {', '.join(second)}"))
    on_test = scored(bench, {**reported, **drawn}, second)
    content = {
        "axes": list(axes),
        "safety": by.words,
        "tuning": {"tasks": first, "models": table(on_tuning)},
        "merged": counts,
        "gated": len(plan.gated),
        "chosen": {"label": best, "overrides": list(overrides), "allowed_loss": allowed_loss},
        "test": {"tasks": second, "models": table(on_test)},
        "control_tests": control_tests(on_test, best, kinds.values(), measures(bench.suite(second).better, second)),
        "verdicts": [
            {"model": d.model, "reference": d.reference, "task": d.task, "metric": d.metric, "verdict": d.verdict}
            for d in compared({label: on_test[label] for label in reported}, SOURCES, best)
        ],
    }
    chosen = dump_recipe(bench.load(overrides).anchored())
    beside = {PICTURE_FILE: picture(on_tuning, by, {best}), CHOSEN_FILE: chosen}
    return write_results(folder, SWEEP_FILE, content, beside)


def scored(bench: Bench, graphs: Mapping[str, Graph], tasks: Sequence[str]) -> dict[str, Scores]:
    """The scores of models on tasks, by their labels; what was scored before is found again."""
    rounds = Rounds(bench.on_event, len(graphs), bench.suite(tasks), bench.settings.limit)
    return {
        label: bench.score(graph, label, tasks, len(graphs) - place, tell=rounds.of(place, label))
        for place, (label, graph) in enumerate(graphs.items(), 1)
    }


def control_tests(
    scores: Mapping[str, Scores], label: str, kinds: Iterable[controls.Control], by: Measures
) -> list[dict[str, Any]]:
    """How many random controls of each kind do as well as the point or better, with exact one-sided p.

    Each control keeps the count, so that only the choice of tensors differs.
    """
    found: list[dict[str, Any]] = []
    drawn = [one for one in kinds if one.seed is not None]
    for kind in ("random per module", "random"):
        own = [one.label for one in drawn if one.kind == kind]
        for place, quantity in enumerate(("safety", "utility", "sum")):
            if not own:
                continue

            def value(one: str, place: int = place) -> float:
                pair = by.of(scores[one])
                return sum(pair) if place == 2 else pair[place]

            draws = sorted(value(one) for one in own)
            found.append(
                {
                    "control": kind,
                    "quantity": quantity,
                    "value": value(label),
                    "draws": draws,
                    "reached": sum(draw >= value(label) for draw in draws),
                    "p": controls.exact_p(value(label), draws),
                }
            )
    return found


def picture(scores: Mapping[str, Scores], by: Measures, chosen: set[str]) -> str:
    """The sweep as SVG: safety against utility with intervals and the front of what is not beaten."""
    marks = []
    for label, one in scores.items():
        safety, utility = by.of(one)
        kind = "chosen" if label in chosen else "reference" if label in SOURCES else "point"
        low, high = by.safety(one)[1]
        pair = interval(one.metric(*by.utility[0])) if len(by.utility) == 1 else (None, None)
        marks.append(
            Mark(
                label, kind, utility, safety,
                (pair[0], pair[1]) if pair[0] is not None and pair[1] is not None else None,
                (low, high),
            )
        )  # fmt: skip
    return scatter(marks, "utility", by.words)
