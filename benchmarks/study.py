"""The study behind docs/evidence.md: every selector and every neighbouring method on one family of models.

    python benchmarks/study.py run recipes/demo/smollm2_arithmetic.yaml --family arithmetic-2
    python benchmarks/study.py report

`run` scores all points on the tuning split, chooses one point of each approach there, and scores the chosen
ones and the controls on the test split. Every finished score is kept in the user's cache; a run that was cut
short, or was given `--minutes`, goes on where it stopped. What is known so far is written to
docs/evidence/FAMILY.json; `report` turns those files into docs/evidence.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.study_page import CONTROLS, write_page
from safemerge_recipes import controls
from safemerge_recipes.bench import Bench, model_key
from safemerge_recipes.errors import PlanError, SafemergeError
from safemerge_recipes.evaluate import Scores, TaskScores
from safemerge_recipes.execute import Resources
from safemerge_recipes.folder import write_json
from safemerge_recipes.graph import Graph
from safemerge_recipes.provenance import cache_folder, versions
from safemerge_recipes.run import Silent
from safemerge_recipes.scoring import compared, table

HERE = Path(__file__).resolve().parent.parent
RESULTS = HERE / "docs" / "evidence"
TASKS = ("safemerge_refusal", "safemerge_arithmetic", "safemerge_overrefusal")
FIRST = ("reference", "uniform", "SafeMERGE", "RESTA")
ALWAYS = "gate.always=true"
HALF = "gate.fraction=0.5"


@dataclass(frozen=True)
class Point:
    """One model of the study: an approach with its parameters."""

    approach: str
    label: str
    overrides: tuple[str, ...]


def points() -> Iterator[Point]:
    """The approaches and the parameters that are tried on the tuning split."""
    for alpha in ("0.7", "0.5", "0.3"):
        yield Point("uniform", f"uniform, α = {alpha}", (ALWAYS, f"merge.alpha={alpha}"))
    for tau in ("0.05", "0.1", "0.15"):
        yield Point("SafeMERGE", f"ρ < {tau}, α = 0.5", (f"gate.tau={tau}", "merge.alpha=0.5"))
    ways = (
        ("lowest half by ρ", ()),
        ("highest half by ρ", ("gate.direction=above",)),
        ("lowest half by ρ/ρ₀", ("gate.metric=rho_ratio",)),
        ("highest half by ρ/ρ₀", ("gate.metric=rho_ratio", "gate.direction=above")),
        ("lowest half by ρ within module type", ("gate.per=module",)),
        ("highest half by ρ within module type", ("gate.per=module", "gate.direction=above")),
    )
    for label, more in ways:
        yield Point(label, f"{label}, α = 0.5", (HALF, *more, "merge.alpha=0.5"))
    for weight in ("0.5", "1.0"):
        method = ("merge.method=task_arithmetic", "merge.lambda_finetuned=1.0", f"merge.lambda_safety={weight}")
        yield Point("Δf + λΔs everywhere", f"Δf + {weight} Δs", (ALWAYS, *method))
    for gamma in ("0.25", "0.5", "0.75", "1.0"):
        method = ("merge.method=add_safety_vector", f"merge.gamma={gamma}")
        yield Point("RESTA", f"RESTA, γ = {gamma}", (ALWAYS, *method))
    for label, direction in (("ρ < 0.1", "below"), ("ρ > 0.1", "above")):
        method = ("merge.method=add_safety_vector", "merge.gamma=1.0")
        yield Point(
            f"RESTA gated, {label}", f"{label}, Δf + 1.0 V", ("gate.tau=0.1", f"gate.direction={direction}", *method)
        )
    for alpha in ("0.7", "0.5"):
        method = ("merge.method=task_arithmetic", f"merge.lambda_finetuned={alpha}", "merge.lambda_safety=0.0")
        yield Point("WiSE-FT", f"WiSE-FT, α = {alpha}", (ALWAYS, *method))
    for tau in ("0.1", "0.2"):
        yield Point("Safe LoRA", f"Safe LoRA, ρ ≤ {tau}", (f"gate.at_most={tau}", "merge.method=project"))


def models(bench: Bench, seeds: int) -> dict[str, tuple[str, Graph, int]]:
    """label -> (approach, graph, merged tensors) of everything that is scored, controls last."""
    found: dict[str, tuple[str, Graph, int]] = {
        "aligned": ("reference", bench.role("aligned"), 0),
        "fine-tuned": ("reference", bench.role("finetuned"), 0),
    }
    for point in points():
        try:
            plan = bench.plan(point.overrides)
            found[point.label] = (point.approach, bench.graph(plan), len(controls.merged(plan)))
        except PlanError as error:
            print(f"{point.label}: left out: {error}", file=sys.stderr)
    half = bench.plan((HALF, "merge.alpha=0.5"))
    for seed in range(seeds):
        for per_module, label in zip((False, True), CONTROLS, strict=True):
            plan = controls.drawn(half, seed, per_module)
            found[f"{label}, seed {seed}"] = (label, bench.graph(plan), len(controls.merged(plan)))
    return found


def losses(models_table: dict[str, Any], split: str) -> dict[str, tuple[float, float]]:
    """label -> (refusal, utility) of a split."""
    end = "_tuning" if split == "tuning" else ""
    safety, utility = f"{TASKS[0]}{end}", f"{TASKS[1]}{end}"
    return {
        label: (tasks[safety]["refusal"]["value"], tasks[utility]["acc"]["value"])
        for label, tasks in models_table.items()
        if {safety, utility} <= set(tasks)
    }


def chosen(tuning: dict[str, Any], approaches: dict[str, str], allowed_loss: float) -> dict[str, str]:
    """approach -> label of its point on the tuning split.

    The most refusals among the points whose utility is within `allowed_loss` of the fine-tuned model's; where
    none is, the largest sum of refusal and utility.
    """
    values = losses(tuning, "tuning")
    if "fine-tuned" not in values:
        return {}
    floor = values["fine-tuned"][1] - allowed_loss
    found: dict[str, str] = {}
    for approach in dict.fromkeys(approaches.values()):
        if approach == "reference" or approach.startswith("random"):
            continue
        own = [label for label, its in approaches.items() if its == approach and label in values]
        good = [label for label in own if values[label][1] >= floor]
        if good:
            found[approach] = max(good, key=lambda label: values[label])
        elif own:
            found[approach] = max(own, key=lambda label: sum(values[label]))
    return found


def half_tests(tuning: dict[str, Any], approaches: dict[str, str]) -> list[dict[str, Any]]:
    """Each half that a metric picks against random halves: exact one-sided p for safety and for utility.

    No half was chosen by its score, so that the tuning split serves.
    """
    found = []
    places = {"refusal": (f"{TASKS[0]}_tuning", "refusal"), "utility": (f"{TASKS[1]}_tuning", "acc")}
    for quantity, (task, metric) in places.items():
        values = {label: tasks[task][metric]["value"] for label, tasks in tuning.items() if task in tasks}
        for label, approach in approaches.items():
            if "half" not in approach or approach in CONTROLS or label not in values:
                continue
            for control in CONTROLS:
                draws = sorted(values[one] for one, its in approaches.items() if its == control and one in values)
                if draws:
                    p = controls.exact_p(values[label], draws)
                    row = {"half": label, "control": control, "quantity": quantity, "value": values[label]}
                    found.append(
                        {**row, "draws": draws, "p": p, "p_low": controls.exact_p(-values[label], [-d for d in draws])}
                    )
    return found


def verdicts(test: dict[str, dict[str, TaskScores]]) -> list[dict[str, Any]]:
    """Paired tests on the test split: every model against the fine-tuned one and against the uniform merge."""
    models = {label: Scores(label, tasks, {}, 0.0) for label, tasks in test.items()}
    uniform = next((label for label in models if label.startswith("uniform")), "")
    return [
        {**asdict(d), "detected": d.detected, "verdict": d.verdict} for d in compared(models, ("fine-tuned", uniform))
    ]


def run(given: argparse.Namespace) -> None:
    """Score what is missing, as long as time allows, and write the family's results."""
    from rich.console import Console

    deadline = time.monotonic() + 60 * given.minutes
    store = cache_folder() / "study" / f"{given.family}.jsonl"
    limits = {
        "tuning": {TASKS[0]: given.limit, TASKS[1]: given.sums, TASKS[2]: given.limit},
        "test": {TASKS[0]: given.test_limit, TASKS[1]: given.test_sums, TASKS[2]: given.test_limit},
    }
    overrides = ["evaluate.batch_size=32", *given.set]
    bench = Bench(
        given.recipe, overrides, store, Resources(1, 1 << 30), Silent(), Console(stderr=True), [f"{TASKS[0]}_tuning"]
    )
    every = models(bench, given.seeds)
    approaches = {label: approach for label, (approach, _, _) in every.items()}
    scores: dict[str, dict[str, Any]] = {"tuning": {}, "test": {}}
    kept: dict[str, dict[str, dict[str, TaskScores]]] = {"tuning": {}, "test": {}}

    def score(split: str, labels: list[str], task: str) -> bool:
        name = f"{task}_tuning" if split == "tuning" else task
        for place, label in enumerate(labels):
            if time.monotonic() > deadline:
                return False
            found = bench.score(every[label][1], label, [name], len(labels) - place - 1, limits[split][task])
            scores[split].setdefault(label, {}).update(table({label: found})[label])
            kept[split].setdefault(label, {}).update(found.tasks)
            keep()
        return True

    def keep() -> None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        content = {
            "family": given.family,
            "recipe": Path(given.recipe).name,
            "limits": limits,
            "versions": versions(),
            "models": {
                label: {"approach": approach, "merged": merged, "key": model_key(graph)}
                for label, (approach, graph, merged) in every.items()
            },
            "chosen": chosen(scores["tuning"], approaches, given.loss),
            "allowed_loss": given.loss,
            "scores": scores,
            "halves": half_tests(scores["tuning"], approaches),
            "comparisons": verdicts(kept["test"]),
        }
        write_json(RESULTS / f"{given.family}.json", content)

    labels = list(every)
    for label in given.also:
        if label not in every:
            raise PlanError(f"--also {label}: no such model; expected one of {', '.join(labels)}")
    drawn = [label for label in labels if approaches[label] in CONTROLS]
    halved = [label for label in labels if "half" in label and label not in drawn]
    # What the page needs most comes first, in case time is short.
    first = [label for label in labels if approaches[label] in FIRST]
    later = [label for label in labels if label not in (*first, *halved, *drawn)]
    done = score("tuning", first + halved + drawn, TASKS[0])
    for wave in (first, later):
        for task in TASKS[:2]:
            done = score("tuning", wave, task) and done
        picked = (*chosen(scores["tuning"], approaches, given.loss).values(), *given.also)
        on_test = [label for label in wave if approaches[label] == "reference" or label in picked]
        for task in TASKS[:2]:
            done = score("test", on_test, task) and done
    done = score("tuning", halved + drawn, TASKS[1]) and done
    if given.halves_on_test:
        for task in TASKS[:2]:
            done = score("test", halved, task) and done
    done = score("test", list(scores["test"]), TASKS[2]) and done
    done = score("tuning", first + later + halved, TASKS[2]) and done
    if given.controls_on_test:
        for task in TASKS[:2]:
            done = score("test", drawn, task) and done
    print("complete" if done else "stopped at the time limit; the same command goes on", file=sys.stderr)


def main() -> None:
    """Run a family's part of the study, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("run")
    one.add_argument("recipe", type=Path)
    one.add_argument("--family", required=True)
    one.add_argument("--limit", type=int, help="requests of each kind; default: all")
    one.add_argument("--sums", type=int, default=80, help="sums that utility is measured on")
    one.add_argument("--seeds", type=int, default=10, help="random controls of each kind")
    one.add_argument("--minutes", type=float, default=1e6)
    one.add_argument("--loss", type=float, default=0.02, help="utility that may be lost, from 0 to 1")
    one.add_argument("--test-limit", type=int, help="the same on the test split")
    one.add_argument("--test-sums", type=int, default=150, help="the same on the test split")
    one.add_argument("--also", action="append", default=[], metavar="LABEL", help="score this on the test split, too")
    one.add_argument("--halves-on-test", action="store_true", help="score the halves on the test split, too")
    one.add_argument("--controls-on-test", action="store_true", help="and the random halves")
    one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    one.set_defaults(call=run)
    page = verbs.add_parser("report")
    page.set_defaults(call=lambda given: write_page(RESULTS, HERE / "docs" / "evidence.md"))
    given = parser.parse_args()
    try:
        given.call(given)
    except SafemergeError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
