"""Scores one family, part by part: the choice on the tuning split, the carry check, the test split, the random draws.

Every finished score is kept in the study's folder and found again by the model's bytes, so that a part goes on where
it stopped and the aligned model of several families is scored once. What is known goes into the family's outcomes
after every model.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from benchmarks.study.families import FAMILIES, Family, Places
from benchmarks.study.models import (
    ALIGNED,
    CARRY,
    DRAW,
    FINE_TUNED,
    PAPER,
    Choice,
    added,
    points,
    tried,
)
from benchmarks.study.outcomes import LIKELIHOOD, Outcomes, read
from safemerge_recipes.engine.manifest import versions
from safemerge_recipes.errors import PlanError
from safemerge_recipes.evaluation.answers import requests_of
from safemerge_recipes.evaluation.experiments.controls import Control, merged
from safemerge_recipes.evaluation.experiments.measures import measures
from safemerge_recipes.evaluation.experiments.sweep import choose
from safemerge_recipes.evaluation.experiments.workbench import Bench
from safemerge_recipes.evaluation.likelihood import openings, refusal_likelihoods
from safemerge_recipes.evaluation.quiet import torch_threads
from safemerge_recipes.evaluation.scores import Scores, TaskScores
from safemerge_recipes.evaluation.scoring import model_key, threads
from safemerge_recipes.evaluation.separation import separation, sides
from safemerge_recipes.evaluation.store import Store, key_of
from safemerge_recipes.events import Event, Note
from safemerge_recipes.planning.graph import Graph
from safemerge_recipes.planning.load import load
from safemerge_recipes.storage.files import write_json
from safemerge_recipes.storage.workers import Resources
from safemerge_recipes.training.rows import Near, read_rows

REFUSAL, LOOKALIKES = "safemerge_refusal", "safemerge_overrefusal"
PUBLISHED = ("safemerge_harmbench", "safemerge_strongreject")
ALLOWED_LOSS = 0.02
"""Of utility, for the choice on the tuning split: the default of `safemerge sweep`."""


@dataclass(frozen=True)
class Settings:
    """How families are scored.

    Attributes:
        limit: The first so many prompts of each task; None: all.
        tokens: Of an answer.
        published: Also the harmful requests of HarmBench and StrongREJECT.
        draws: Random choices of tensors.
        given: τ, α and λ instead of the choice on the tuning split.
        deadline: When to stop, on the monotonic clock.
    """

    limit: int | None = None
    tokens: int = 128
    published: bool = True
    draws: int = 20
    given: Choice | None = None
    deadline: float = float("inf")

    def as_json(self) -> dict[str, Any]:
        return {"limit": self.limit, "tokens": self.tokens, "published": self.published}


class Study:
    """One family: its models, its scores, the file they go to.

    Args:
        family: The family; its adapters are there.
        places: Where they are.
        settings: How it is scored.
        results: The folder of outcomes.
        console: Told of every model.
    """

    def __init__(self, family: Family, places: Places, settings: Settings, results: Path, console: Console) -> None:
        self.family, self.places, self.settings, self.console = family, places, settings, console
        self.harmful = (REFUSAL, *(PUBLISHED if settings.published else ()))
        self.utility = f"safemerge_{family.task}"
        self.tasks = (*self.harmful, LOOKALIKES, self.utility)
        self.tuning = tuple(f"{task}_tuning" for task in (REFUSAL, LOOKALIKES, self.utility))
        self.bench = Bench(
            load(
                self._recipe(),
                ["evaluate.batch_size=96", "evaluate.dtype=float32", f"evaluate.answer_tokens={settings.tokens}"],
            ),
            places.own / "scores.jsonl",
            Resources(1, 1 << 30),
            self._tell,
        )
        self.results, self.file = results, results / f"{family.name}.jsonl"
        self.outcomes = self._outcomes()
        self.choice: Choice | None = settings.given or self._chosen()

    def _tell(self, event: Event) -> None:
        if isinstance(event, Note):
            self.console.print(event.text, markup=False, soft_wrap=True)

    def _recipe(self) -> Path:
        """The family as a recipe in the study's folder."""
        base = str((self.places.demo / "base").resolve())
        roles = {
            "aligned": self.places.aligned(self.family.alignment, "base"),
            "finetuned": {"adapter": str(self.places.folder(self.family.finetuned).resolve())},
            "safety": {"adapter": str(self.places.folder(self.family.safety).resolve())},
        }
        recipe = {
            "name": self.family.name,
            "sources": {"base": base, **roles},
            "gate": {"tau": 0.1},
            "merge": {"method": "linear", "alpha": 0.5},
            "evaluate": {"tasks": list(self.tasks)},
        }
        path = self.places.own / "recipes" / f"{self.family.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path

    # What is known

    def _outcomes(self) -> Outcomes:
        """The family's file where it was scored under the same settings, else nothing."""
        family = {**self.family.__dict__, "name": self.family.name}
        head: dict[str, Any] = {"family": family, "settings": self.settings.as_json(), "versions": versions()}
        head["tasks"] = {"harmful": list(self.harmful), "harmless": [LOOKALIKES], "utility": self.utility}
        head["near_training"] = self._near_training()
        if self.file.exists():
            found = read(self.file)
            if found.head["settings"] == head["settings"]:
                found.head |= head
                return found
        return Outcomes(head)

    def _near_training(self) -> list[str]:
        """Prompts that are near copies of a training row: they are scored and left out."""
        near = Near()
        for row in read_rows([self.places.rows(one) for one in self.family.adapters if not one.mean_of]):
            if row.kind != "task":
                near.add(row.prompt)
        asked = requests_of([*self.harmful, LOOKALIKES])
        return [f"{task}/{key}" for task, rows in asked.items() for key, text in rows.items() if near.find(text)]

    def _chosen(self) -> Choice | None:
        path = self._choice_file()
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        return Choice(**found["choice"]) if found["settings"] == self.settings.as_json() else None

    def _choice_file(self) -> Path:
        return self.results / f"choice-{self.family.task}.json"

    def write(self) -> None:
        """Writes what is known."""
        if self.choice is not None:
            self.outcomes.head["choice"] = self.choice.as_json()
            self.outcomes.head["models"] = {label: list(one) for label, one in points(self.choice).items()}
        self.outcomes.write(self.file)

    def _take(self, label: str, found: Scores) -> None:
        self.outcomes.take(label, found.tasks)
        self.write()

    # Parts

    def choose(self) -> bool:
        """Chooses τ, α and λ on the tuning split of the task's first family, unless they are given or chosen already.

        Raises:
            PlanError: this is another family.
        """
        if self.choice is not None:
            return True
        first = next(family for family in FAMILIES if family.task == self.family.task)
        if self.family != first:
            raise PlanError(f"{self.family.name}: τ, α and λ are chosen on {first.name}, run PART=choose for it first")
        graphs, counts = {FINE_TUNED: self.bench.role("finetuned")}, {}
        for label, overrides in tried().items():
            try:
                plan = self.bench.plan(overrides)
            except PlanError as error:
                self.console.print(f"{label}: left out: {error}", markup=False)
                continue
            graphs[label], counts[label] = self.bench.graph(plan), len(merged(plan))
        scores = self._scored(graphs, self.tuning)
        if len(scores) < len(graphs):
            return False
        by = measures(self.bench.suite(self.tuning).better, self.tuning)
        best = {
            kind: choose(
                {one: scores[one] for one in counts if one[0] == kind}, scores[FINE_TUNED], by, ALLOWED_LOSS, counts
            )
            for kind in ("τ", "λ")
        }
        tau, alpha, lambda_ = (float(number) for one in best.values() for number in re.findall(r"= (\S+?)(?:,|$)", one))
        self.choice = Choice(tau, alpha, lambda_, f"chosen on the tuning split of {self.family.name}")
        values = {label: [round(100 * one, 1) for one in by.of(found)] for label, found in scores.items()}
        content = {"choice": self.choice.as_json(), "settings": self.settings.as_json(), "merged": counts}
        self.results.mkdir(parents=True, exist_ok=True)
        write_json(self._choice_file(), content | {"J and utility on the tuning split": values})
        return True

    def carry(self) -> bool:
        """The carry check: J of Δf + Δs against that of Δf, on the tuning split."""
        graphs = {
            FINE_TUNED: self.bench.role("finetuned"),
            CARRY: self.bench.graph(self.bench.plan(added(1.0, "gate.always=true"))),
        }
        scores = self._scored(graphs, self.tuning[:2])
        if len(scores) < 2:
            return False
        before, after = (separation(next(iter(sides(scores[label]).values())))[0] for label in graphs)
        self.outcomes.head["carry"] = {"before": round(before, 4), "after": round(after, 4)}
        self.write()
        return True

    def score(self) -> bool:
        """The sources and the five merges on the test split."""
        scores = self._scored(self._models(), self.tasks, self._take)
        return len(scores) == 2 + len(points(self._known()))

    def _models(self) -> dict[str, Graph]:
        found = {ALIGNED: self.bench.role("aligned"), FINE_TUNED: self.bench.role("finetuned")}
        for label, overrides in points(self._known()).items():
            plan = self.bench.plan(overrides)
            found[label] = self.bench.graph(plan)
            self.outcomes.head.setdefault("merged", {})[label] = len(merged(plan))
        return found

    def _known(self) -> Choice:
        if self.choice is None:
            raise PlanError(f"{self.family.name}: τ, α and λ are not chosen yet; run PART=choose, or give them")
        return self.choice

    def draws(self) -> bool:
        """Random choices of as many tensors of each module type as the paper's merge takes, by likelihood alone."""
        plan = self.bench.plan(points(self._known())[PAPER])
        asked = self._asked()
        store = Store(self.places.own / "draws.jsonl")
        for seed in range(self.settings.draws):
            graph = self.bench.graph(self.bench.control(plan, Control("random per module", seed)))
            key = key_of(model_key(graph), asked, openings(), self.bench.live().dtype)
            found = store.get(key)
            if found is None:
                if time.monotonic() > self.settings.deadline:
                    return False
                found = self._likelihoods(graph, f"{DRAW} {seed}", asked)
                store.keep(key, found.model, found)
                left = self.settings.draws - seed - 1
                self.console.print(f"{found.model}: {found.seconds:.0f} s, {left} to go", markup=False)
            self._take(f"{DRAW} {seed}", found)
        return True

    def _asked(self) -> Mapping[str, dict[str, str]]:
        """task -> prompt id -> request, the first so many as lm-eval takes them."""
        asked = requests_of([*self.harmful, LOOKALIKES])
        return {task: dict(list(rows.items())[: self.settings.limit]) for task, rows in asked.items()}

    def _likelihoods(self, graph: Graph, label: str, asked: Mapping[str, dict[str, str]]) -> Scores:
        """How likely a refusal is, of every request; nothing is answered."""
        started, live, found = time.monotonic(), self.bench.live(), {}
        live.become(graph)
        with torch_threads(threads()):
            for task, rows in asked.items():
                contexts = [
                    live.tokenizer.apply_chat_template(
                        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
                    )
                    for text in rows.values()
                ]
                values = refusal_likelihoods(live.model, live.tokenizer, contexts, special_tokens=False)
                found[task] = TaskScores(LIKELIHOOD, {}, likelihoods=dict(zip(rows, values, strict=True)))
        return Scores(label, found, {}, round(time.monotonic() - started, 1))

    def _scored(self, graphs: Mapping[str, Graph], tasks: tuple[str, ...], take: Any = None) -> dict[str, Scores]:
        """Scores of as many models as time allows."""
        found: dict[str, Scores] = {}
        limit = self.settings.limit
        for place, (label, graph) in enumerate(graphs.items()):
            known = all(self.bench.has(graph, task, limit) for task in tasks)
            if not known and time.monotonic() > self.settings.deadline:
                continue  # but what is kept is taken
            found[label] = self.bench.score(graph, label, list(tasks), len(graphs) - place - 1, limit)
            if take is not None:
                take(label, found[label])
        return found
