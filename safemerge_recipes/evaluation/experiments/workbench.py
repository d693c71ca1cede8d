"""Scores many merges of one family in one loaded model, and keeps every result that was ever finished.

One gate pass serves all: measurements are shared, and no shard is written. A result is found again by the
bytes its model has and the settings it was scored under, so equal merges are scored once whatever they are
called, and a run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes.errors import CheckError, PlanError, RecipeError
from safemerge_recipes.evaluation.experiments.controls import Control
from safemerge_recipes.evaluation.harness import Scores, expand
from safemerge_recipes.evaluation.live import LiveModel
from safemerge_recipes.evaluation.refusal import MATCHER_VERSION
from safemerge_recipes.evaluation.scoring import evaluate_live
from safemerge_recipes.pipeline import (
    Prepared,
    Progress,
    Silent,
    as_source,
    build,
    decide,
    load,
    measurer_of,
    prepare,
    resolve,
)
from safemerge_recipes.planning.graph import Graph
from safemerge_recipes.planning.plan import Plan
from safemerge_recipes.recipe.loading import LoadedRecipe
from safemerge_recipes.recipe.model import Evaluate, Role
from safemerge_recipes.storage.workers import Resources

if TYPE_CHECKING:
    from rich.console import Console


class Bench:
    """A family of models, loaded once.

    Args:
        recipe: The recipe's file.
        overrides: `KEY=VALUE` texts that hold for every point.
        store: A JSONL file of finished scores; made when missing.
        resources: What measuring may use.
        progress: Told of the gate pass.
        console: Told of every score.
        tasks: What is scored unless said otherwise; the recipe's `evaluate.tasks` by default.

    Raises:
        SafemergeError: As `pipeline.prepare`; CheckError when there are no tasks.
    """

    def __init__(
        self,
        recipe: Path,
        overrides: Sequence[str],
        store: Path,
        resources: Resources,
        progress: Progress,
        console: Console,
        tasks: Sequence[str] = (),
    ) -> None:
        self.path, self.overrides, self.store, self.console = recipe, tuple(overrides), store, console
        self.loaded: LoadedRecipe = load(recipe, overrides)
        given = self.loaded.recipe.evaluate
        if given is None and not tasks:
            raise RecipeError(f"{recipe}: evaluate: missing; expected it there with tasks, or --tasks")
        self.settings: Evaluate = given or Evaluate(tasks=tuple(tasks))
        self.tasks = expand(tuple(tasks) or self.settings.tasks)
        self.prepared: Prepared = prepare(resolve(self.loaded), resources, progress)
        self.measurer = measurer_of(self.prepared.resolved, resources, Silent())
        self._live: LiveModel | None = None
        self._known = self._read()
        self._begun, self._spent, self._scored = time.monotonic(), 0.0, 0

    # Plans

    def load(self, overrides: Sequence[str] = ()) -> LoadedRecipe:
        """The recipe with further overrides. Raises RecipeError when one is wrong."""
        return load(self.path, (*self.overrides, *overrides))

    def plan(self, overrides: Sequence[str] = ()) -> Plan:
        """The plan of the recipe with further overrides; measures nothing twice.

        Raises:
            RecipeError: an override is wrong, or changes the sources.
            PlanError: the selector cannot be satisfied.
        """
        return self._decided(self.load(overrides), ", ".join(overrides))

    def control(self, plan: Plan, control: Control) -> Plan:
        """The plan of a plan's control."""
        return self._decided(replace(self.loaded, recipe=control.recipe(plan)), control.label)

    def _decided(self, loaded: LoadedRecipe, label: str) -> Plan:
        if loaded.recipe.sources != self.prepared.recipe.sources:
            raise RecipeError(f"{label}: changes the sources; expected one family in one sweep")
        return decide(resolve(loaded, self.prepared.family), self.measurer)

    def graph(self, plan: Plan) -> Graph:
        """The work of a plan."""
        return build(plan, self.prepared.resolved, self.prepared.resources.device)

    def role(self, role: Role) -> Graph:
        """The work of writing a source itself. Raises PlanError when the recipe does not have it."""
        return as_source(self.prepared, role)

    # Scores

    def score(
        self, graph: Graph, label: str, tasks: Sequence[str] = (), left: int | None = None, limit: int | None = None
    ) -> Scores:
        """Scores a model on tasks, each task once.

        Args:
            graph: The model, from `graph` or `role`.
            label: What it is called.
            tasks: By default the bench's own.
            left: How many scores are still to come, for the time left that is shown.
            limit: Only the first so many prompts of each task; the recipe's by default.

        Raises:
            CheckError: scoring failed.
        """
        model = model_key(graph)
        names = expand(tuple(tasks) or self.tasks)
        limit = limit or self.settings.limit
        keys = {task: self._key(model, task, limit) for task in names}
        missing = [task for task in names if keys[task] not in self._known]
        if missing:
            started = time.monotonic()
            live = self._model()
            live.become(graph)
            for task in missing:  # one after the other: each is kept as soon as it is there
                found = evaluate_live(live, self.settings, self.loaded, label, tasks=[task], limit=limit)
                self._keep(keys[task], label, found)
            self._spent += time.monotonic() - started
            self._scored += 1
            self._tell(label, live.patched, left)
        parts = [self._known[keys[task]] for task in names]
        merged = {task: part.tasks[task] for task, part in zip(names, parts, strict=True)}
        return Scores(label, merged, parts[0].settings, round(sum(part.seconds for part in parts), 3))

    def has(self, graph: Graph, task: str, limit: int | None = None) -> bool:
        """Whether a score is there already, so that `score` would not run the model."""
        return self._key(model_key(graph), task, limit or self.settings.limit) in self._known

    def _tell(self, label: str, patched: int, left: int | None) -> None:
        text = f"{label}: scored ({patched} tensors patched; {self._spent / self._scored:.0f} s a model)"
        if left:
            minutes = left * self._spent / self._scored / 60
            text += f"; {left} to go, about {minutes:.0f} min" if minutes >= 1 else f"; {left} to go"
        self.console.print(text, markup=False, soft_wrap=True)

    def _model(self) -> LiveModel:
        if self._live is None:
            device = self.prepared.resources.device
            self._live = LiveModel(self.prepared, device=device if device.startswith("cuda") else "auto")
        return self._live

    # The store

    def _key(self, model: str, task: str, limit: int | None) -> str:
        kept = self.settings.model_dump(exclude={"tasks", "compare"}) | {"limit": limit}
        text = json.dumps([model, task, kept, MATCHER_VERSION], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _read(self) -> dict[str, Scores]:
        known: dict[str, Scores] = {}
        try:
            lines = self.store.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return known
        except OSError as error:
            raise PlanError(f"{self.store}: {error.strerror}; expected a file of scores or none") from None
        for line in lines:
            try:
                entry = json.loads(line)
                known[entry["key"]] = Scores.from_json(json.dumps(entry["scores"]))
            except (ValueError, KeyError, TypeError, CheckError):
                continue  # a torn last line, or a format of another version: scored again
        return known

    def _keep(self, key: str, label: str, scores: Scores) -> None:
        self._known[key] = scores
        entry: dict[str, Any] = {"key": key, "label": label, "scores": json.loads(scores.to_json())}
        self.store.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"
        with open(self.store, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # torn by an interruption
                    line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def model_key(graph: Graph) -> str:
    """Names a model by its bytes: equal keys mean equal tensors."""
    text = "\n".join(sorted(f"{task.slot.name} {task.key}" for task in graph.tasks))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
