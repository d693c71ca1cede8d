"""The study behind docs/evidence.md: every selector and every neighbouring method, over tasks and training seeds.

    python -m benchmarks.study run --minutes 60
    python -m benchmarks.study report

A family is one task adapter, told by task and training seed; those that are not shipped are trained into the
user's cache first. The families differ in how much of the study they get (`FAMILIES`): one of each task has
points chosen on the tuning split and random controls, the others report points that were fixed before they
were trained. Every finished score is kept in the cache; a run that was cut short, or was given `--minutes`, goes
on where it stopped. What is known is written to docs/evidence/FAMILY.json; `report` turns those files into
docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.study.page import write_page
from benchmarks.study.results import (
    ANCHORS,
    AS_MANY,
    CONTROLS,
    EVERYWHERE,
    GATED,
    HALVES,
    LOOKALIKES,
    MAIN,
    PAIRS,
    PROBES,
    REFUSAL,
)
from safemerge_recipes.engine.manifest import versions
from safemerge_recipes.errors import PlanError, SafemergeError
from safemerge_recipes.evaluation.experiments import controls
from safemerge_recipes.evaluation.experiments.probe import By, probe
from safemerge_recipes.evaluation.experiments.workbench import Bench
from safemerge_recipes.evaluation.harness import Scores, TaskScores
from safemerge_recipes.evaluation.rates import holm
from safemerge_recipes.evaluation.scoring import compared, model_key, table
from safemerge_recipes.evaluation.statistics import Difference
from safemerge_recipes.events import ignore
from safemerge_recipes.planning.graph import Graph
from safemerge_recipes.storage.cache import cache_folder
from safemerge_recipes.storage.files import write_json
from safemerge_recipes.storage.workers import Resources

HERE = Path(__file__).resolve().parents[2]
DEMO = HERE / "recipes" / "demo"
RESULTS = HERE / "docs" / "evidence"
ALWAYS = "gate.always=true"
HALF = "gate.fraction=0.5"
PROBED: dict[By, tuple[int, int | None]] = {"type": (90, None), "block": (60, 15)}  # prompts of each task; groups
ALLOWED_LOSS = 0.02  # of utility, for the choice on the tuning split


@dataclass(frozen=True)
class Family:
    """A task adapter and its part of the study.

    Attributes:
        task: What it was taught, as `recipes/demo/train.py` calls it.
        seed: Of its training.
        tuned: Whether all points are scored on the tuning split and the chosen ones on the test split, the gated
            safety vector is held against random tensors, and single groups of tensors are probed; else only the
            points of `ANCHORS` are scored, on the test split.
        draws: Random controls of each kind.
        limits: Prompts of (refusal, utility, over-refusal) on the tuning and on the test split; None: all.
    """

    task: str
    seed: int
    tuned: bool = False
    draws: int = 10
    limits: tuple[tuple[int | None, int, int], tuple[int, int, int]] = ((90, 60, 60), (90, 75, 60))

    @property
    def name(self) -> str:
        """What its results are called."""
        return f"{self.task}-{self.seed}"

    @property
    def utility(self) -> str:
        """The task its utility is measured on."""
        return f"safemerge_{self.task}"

    def limit(self, split: str, task: str) -> int | None:
        """How many prompts of a task are scored on a split."""
        place = (REFUSAL, self.utility, LOOKALIKES).index(task)
        return self.limits[0 if split == "tuning" else 1][place]

    def adapter(self) -> Path:
        """The adapter's folder, trained when it is neither shipped nor in the cache."""
        if (self.task, self.seed) == ("arithmetic", 2):
            return DEMO / "task-arithmetic"
        folder = cache_folder() / "demo" / "adapters" / self.name
        if not (folder / "adapter_config.json").exists():  # written last
            command = [sys.executable, str(DEMO / "train.py"), "--role", "task", "--task", self.task]
            subprocess.run([*command, "--seed", str(self.seed), "--out", str(folder)], check=True)
        return folder


FAMILIES = (
    Family("arithmetic", 2, tuned=True, limits=((None, 80, 60), (150, 100, 60))),
    Family("qa", 21, tuned=True, limits=((60, 60, 60), (90, 75, 60))),
    Family("arithmetic", 12),
    Family("qa", 22),
    Family("arithmetic", 13),
    Family("qa", 23),
)


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
    yield Point(
        "complement of SafeMERGE", "ρ > 0.1, α = 0.5", ("gate.tau=0.1", "gate.direction=above", "merge.alpha=0.5")
    )
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


RANDOM: tuple[controls.Kind, ...] = ("random", "random per module")


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
    gated = bench.plan(next(point.overrides for point in points() if point.label == GATED))
    for picked, kinds in ((half, HALVES), (gated, AS_MANY)):
        for seed in range(seeds):
            for kind, label in zip(RANDOM, kinds, strict=True):
                plan = bench.control(picked, controls.Control(kind, seed))
                found[f"{label}, seed {seed}"] = (label, bench.graph(plan), len(controls.merged(plan)))
    return found


def values_of(models_table: dict[str, Any], utility: str) -> dict[str, tuple[float, float]]:
    """label -> (refusal, utility) on the tuning split."""
    safety, skill = f"{REFUSAL}_tuning", f"{utility}_tuning"
    return {
        label: (tasks[safety]["refusal"]["value"], tasks[skill]["acc"]["value"])
        for label, tasks in models_table.items()
        if {safety, skill} <= set(tasks)
    }


def chosen(tuning: dict[str, Any], approaches: dict[str, str], utility: str) -> dict[str, str]:
    """approach -> label of its point on the tuning split.

    The most refusals among the points whose utility is within `ALLOWED_LOSS` of the fine-tuned model's; where
    none is, the largest sum of refusal and utility.
    """
    values = values_of(tuning, utility)
    if "fine-tuned" not in values:
        return {}
    floor = values["fine-tuned"][1] - ALLOWED_LOSS
    found: dict[str, str] = {}
    for approach in dict.fromkeys(approaches.values()):
        if approach in ("reference", *CONTROLS):
            continue
        own = [label for label, its in approaches.items() if its == approach and label in values]
        good = [label for label in own if values[label][1] >= floor]
        if good:
            found[approach] = max(good, key=lambda label: values[label])
        elif own:
            found[approach] = max(own, key=lambda label: sum(values[label]))
    return found


def differences(test: dict[str, dict[str, TaskScores]]) -> list[Difference]:
    """Paired differences on the test split: every model against the fine-tuned one, and the pairs of `PAIRS`."""
    models = {label: Scores(label, tasks, {}, 0.0) for label, tasks in test.items()}
    found = compared(models, ("fine-tuned",))
    for one, other in PAIRS:
        if one in models:
            found += compared(models, (other,), one)
    return found


class Study:
    """One family's scores, those of an earlier run included, and the file they go to.

    Args:
        family: The family.
        deadline: When to stop, on the monotonic clock.
        keep: Build on the scores in the family's results file instead of measuring them again.
    """

    def __init__(self, family: Family, deadline: float, keep: bool) -> None:
        from rich.console import Console

        self.family, self.deadline = family, deadline
        self.tasks = (REFUSAL, family.utility, LOOKALIKES)
        self.bench = Bench(
            DEMO / "smollm2_arithmetic_linear.yaml",
            ["evaluate.batch_size=96", f"sources.finetuned.adapter={family.adapter()}"],
            cache_folder() / "study" / "scores.jsonl",
            Resources(1, 1 << 30),
            ignore,
            Console(stderr=True),
            [f"{REFUSAL}_tuning"],
        )
        self.models = models(self.bench, family.draws)
        self.approaches = {label: approach for label, (approach, _, _) in self.models.items()}
        self.file = RESULTS / f"{family.name}.json"
        self.scores: dict[str, dict[str, Any]] = {"tuning": {}, "test": {}}
        self.outcomes: dict[str, dict[str, TaskScores]] = {}
        self.earlier: list[Difference] = []
        if keep and self.file.exists():
            self._take(json.loads(self.file.read_text(encoding="utf-8")))

    def _take(self, earlier: dict[str, Any]) -> None:
        """Take an earlier run's scores by the models' labels."""
        for split, found in earlier["scores"].items():
            self.scores[split] = {label: tasks for label, tasks in found.items() if label in self.models}
        names = {field.name for field in fields(Difference)}
        rows = (Difference(**{key: row[key] for key in names}) for row in earlier["comparisons"])
        self.earlier = [d for d in rows if d.reference == "fine-tuned" or (d.model, d.reference) in PAIRS]

    def score(self, split: str, labels: Sequence[str], *tasks: str) -> bool:
        """Score models on tasks, as long as time allows; return whether all are scored."""
        done = True
        for task in tasks:
            name, limit = f"{task}_tuning" if split == "tuning" else task, self.family.limit(split, task)
            for place, label in enumerate(labels):
                graph = self.models[label][1]
                cached = self.bench.has(graph, name, limit)
                if not cached and name in self.scores[split].get(label, {}):
                    continue  # from the results file
                if not cached and time.monotonic() > self.deadline:
                    done = False  # but what is cached is taken
                    continue
                found = self.bench.score(graph, label, [name], len(labels) - place - 1, limit)
                self.scores[split].setdefault(label, {}).update(table({label: found})[label])
                if split == "test":
                    self.outcomes.setdefault(label, {}).update(found.tasks)
                if not cached:
                    self.write()
        return done

    def write(self) -> None:
        """Write what is known."""
        order = [label for label in self.models if any(label in found for found in self.scores.values())]
        content = {
            "family": self.family.name,
            "task": self.family.task,
            "seed": self.family.seed,
            "tuned": self.family.tuned,
            "draws": self.family.draws,
            "limits": {split: {t: self.family.limit(split, t) for t in self.tasks} for split in self.scores},
            "versions": versions(),
            "models": {
                label: {"approach": approach, "merged": merged, "key": model_key(graph)}
                for label, (approach, graph, merged) in self.models.items()
            },
            "chosen": chosen(self.scores["tuning"], self.approaches, self.family.utility) if self.family.tuned else {},
            "scores": {
                split: {label: found[label] for label in order if label in found}
                for split, found in self.scores.items()
            },
            "comparisons": self._comparisons(),
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_json(self.file, content)

    def _comparisons(self) -> list[dict[str, Any]]:
        """Paired tests, those of an earlier run included; Holm's correction over all of them."""
        scored = {label: tasks for label, tasks in self.outcomes.items() if self.approaches[label] not in CONTROLS}
        known = {(d.model, d.reference, d.task, d.metric): d for d in (*self.earlier, *differences(scored))}
        adjusted = holm([d.p for d in known.values()])
        both = [replace(d, p_holm=p) for d, p in zip(known.values(), adjusted, strict=True)]
        return [{**asdict(d), "detected": d.detected, "verdict": d.verdict} for d in both]

    def halves(self) -> tuple[list[str], list[str]]:
        """The halves that a metric picks, and the random ones."""
        drawn = self.drawn(HALVES)
        return [label for label in self.models if "half" in label and label not in drawn], drawn

    def drawn(self, kinds: Sequence[str]) -> list[str]:
        """The random controls of some kinds."""
        return [label for label, approach in self.approaches.items() if approach in kinds]

    # What is scored, most needed first.

    def main(self) -> bool:
        """Sources and the main points on the test split: refusal and utility."""
        return self.score("test", self._main(), *self.tasks[:2])

    def test(self) -> bool:
        """The same for all fixed and chosen points."""
        picked = chosen(self.scores["tuning"], self.approaches, self.family.utility) if self.family.tuned else {}
        halved, _ = self.halves()
        wanted = [*self._main(), *ANCHORS, *(label for label in picked.values() if label not in halved)]
        return self.score("test", [label for label in dict.fromkeys(wanted) if label in self.models], *self.tasks[:2])

    def overrefusal(self) -> bool:
        """How often sources and main points refuse harmless look-alikes."""
        return self.score("test", self._main(), LOOKALIKES)

    def _main(self) -> list[str]:
        return [label for label in ("aligned", "fine-tuned", *MAIN) if label in self.models]

    def tuning(self) -> bool:
        """Every point on the tuning split."""
        if not self.family.tuned:
            return True
        points = [label for label in self.models if label not in (*self.halves()[0], *self.drawn(CONTROLS))]
        return self.score("tuning", points, *self.tasks[:2])

    def gate(self) -> bool:
        """The halves and the random halves, refusal only."""
        halved, drawn = self.halves()
        wanted = ["aligned", "fine-tuned", *halved, *drawn]
        return self.score("tuning", wanted, REFUSAL)

    def vector(self) -> bool:
        """The gated safety vector against as many random tensors, on the test split."""
        if not self.family.tuned:
            return True
        done = [self.score("test", [GATED, *self.drawn([kind])], task) for task in self.tasks[:2] for kind in AS_MANY]
        return all(done)

    def probe(self) -> bool:
        """What the safety vector does in one module type or block at a time; not stopped by the deadline."""
        if not self.family.tuned:
            return True
        tasks = [f"{task}_tuning" for task in self.tasks[:2]]
        everywhere = next(point.overrides for point in points() if point.label == EVERYWHERE)
        (RESULTS / PROBES).mkdir(parents=True, exist_ok=True)
        for by, (limit, only) in PROBED.items():
            if time.monotonic() > self.deadline:
                return False
            with tempfile.TemporaryDirectory() as folder:
                found = probe(self.bench, by, Path(folder), tasks=tasks, overrides=everywhere, limit=limit, only=only)
            write_json(RESULTS / PROBES / f"{self.family.name}-{by}.json", found)
        return True


def run(given: argparse.Namespace) -> None:
    """Score what is missing, as long as time allows, and write the results."""
    deadline = time.monotonic() + 60 * given.minutes
    names = [family.name for family in FAMILIES]
    for name in given.families:
        if name not in names:
            raise PlanError(f"{name}: no such family; expected one of {', '.join(names)}")
    done = True
    for family in FAMILIES:
        if given.families and family.name not in given.families:
            continue
        if time.monotonic() > deadline:
            done = False
            break
        study = Study(family, deadline, given.keep)
        for part in (study.tuning, study.main, study.test, study.gate, study.vector, study.overrefusal, study.probe):
            if given.part in (None, part.__name__):
                done = part() and done
        study.write()
    print("complete" if done else "stopped at the time limit; the same command goes on", file=sys.stderr)


def main() -> None:
    """Run the study, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("run")
    one.add_argument("families", nargs="*", help="such as qa-21; default: all")
    one.add_argument("--minutes", type=float, default=1e6)
    one.add_argument(
        "--part", choices=["tuning", "main", "test", "gate", "vector", "overrefusal", "probe"], help="only this part"
    )
    one.add_argument("--keep", action="store_true", help="build on the scores in docs/evidence, whatever made them")
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
