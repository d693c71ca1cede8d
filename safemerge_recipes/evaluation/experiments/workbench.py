"""Scores many merges of one family in one loaded model, and keeps every result that was ever finished.

One gate pass serves all: measurements are shared, and no shard is written. A result is found again by the
bytes its model has and the settings it was scored under, so equal merges are scored once whatever they are
called, and a run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from safemerge_recipes.errors import CheckError, RecipeError
from safemerge_recipes.evaluation.experiments.controls import Control
from safemerge_recipes.evaluation.experiments.measures import measures, tuning
from safemerge_recipes.evaluation.harness import Tell, result_keys
from safemerge_recipes.evaluation.live import LiveModel
from safemerge_recipes.evaluation.scores import Scores
from safemerge_recipes.evaluation.scoring import conditions, graph_subject, score_graph, side_key, suite_of
from safemerge_recipes.evaluation.store import Store
from safemerge_recipes.evaluation.suite import Suite, expand
from safemerge_recipes.events import Listener, Note, ignore
from safemerge_recipes.pipeline.opening import open_sources, resolve
from safemerge_recipes.pipeline.preparing import as_source, build, decide, measurer_of, prepare
from safemerge_recipes.planning.graph import Graph
from safemerge_recipes.planning.load import vary
from safemerge_recipes.planning.plan import Plan
from safemerge_recipes.planning.prepared import Prepared
from safemerge_recipes.recipe.loading import LoadedRecipe
from safemerge_recipes.recipe.model import Evaluate, Role
from safemerge_recipes.sources.family import with_masks
from safemerge_recipes.sources.masks import open_masks
from safemerge_recipes.storage.workers import Resources


class Bench:
    """A family of models, loaded once.

    Args:
        loaded: The recipe, with what holds for every point.
        store: A JSONL file of finished scores; made when missing.
        resources: What measuring may use.
        on_event: Told of the gate pass, and of every score.
        tasks: What is scored unless said otherwise; the recipe's `evaluate.tasks` by default.
        tuning_tasks: Tasks to choose on; none given: the tuning splits of the others; None: nothing is chosen.

    Attributes:
        tuning: The tasks to choose on.

    Raises:
        SafemergeError: As `pipeline.preparing.prepare`; CheckError when there are no tasks.
    """

    def __init__(
        self,
        loaded: LoadedRecipe,
        store: Path,
        resources: Resources,
        on_event: Listener = ignore,
        tasks: Sequence[str] = (),
        tuning_tasks: Sequence[str] | None = None,
    ) -> None:
        self.loaded, self.store, self.on_event = loaded, Store(store), on_event
        given = self.loaded.recipe.evaluate
        if given is None and not tasks:
            raise RecipeError(f"{loaded.path}: evaluate: missing; expected it there with tasks, or --tasks")
        self.settings: Evaluate = given or Evaluate(tasks=tuple(tasks))
        if self.settings.backend != "hf":
            raise CheckError(
                f"evaluate.backend {self.settings.backend}: many merges are scored in one loaded model, which hf alone "
                "can patch; try `--set evaluate.backend=hf`"
            )
        self.tasks = expand(tuple(tasks) or self.settings.tasks)
        self._suites: dict[tuple[str, ...], Suite] = {}
        self.tuning: list[str] = [] if tuning_tasks is None else expand(tuple(tuning_tasks) or tuning(self.tasks))
        for names in filter(None, (self.tasks, self.tuning)):  # all of this is known before anything is measured
            suite = self.suite(names)
            if tuning_tasks is not None:
                caution = measures(suite.better, tuple(suite.tasks)).caution
                if caution and names == self.tuning:
                    on_event(Note(f"Mind: {caution}", warning=True))
        self.prepared: Prepared = prepare(open_sources(self.loaded, on_event), resources, on_event)
        self.measurer = measurer_of(self.prepared.resolved, resources)
        self._device = resources.device if resources.device.startswith("cuda") else "auto"
        self._beside = side_key(self.prepared.resolved.side_files)
        self._live: LiveModel | None = None
        self._spent, self._scored, self._opened = 0.0, 0, 0

    # Plans

    def load(self, overrides: Sequence[str] = ()) -> LoadedRecipe:
        """The recipe with further overrides. Raises RecipeError when one is wrong."""
        return vary(self.loaded, overrides)

    def plan(self, overrides: Sequence[str] = ()) -> Plan:
        """The plan of the recipe with further overrides; measures nothing twice.

        Raises:
            RecipeError: an override is wrong, or changes the sources.
            PlanError: the selector cannot be satisfied.
        """
        return self.decided(self.load(overrides), ", ".join(overrides))

    def control(self, plan: Plan, control: Control) -> Plan:
        """The plan of a plan's control."""
        return self.decided(replace(self.loaded, recipe=control.recipe(plan)), control.label)

    def share_masks(self, recipes: Sequence[LoadedRecipe]) -> None:
        """Opens the mask files of further recipes of the family, whose paths are absolute. Raises SourceError."""
        masks = {path: header for one in recipes for path, header in open_masks(one.recipe, one.directory).items()}
        resolved = replace(self.prepared.resolved, family=with_masks(self.prepared.family, masks))
        self.prepared = replace(self.prepared, resolved=resolved)

    def decided(self, loaded: LoadedRecipe, label: str) -> Plan:
        """The plan of another recipe of the family; `label` names it in a refusal."""
        known = self.prepared.recipe.sources.roles()
        if any(known.get(role) != source for role, source in loaded.recipe.sources.roles().items()):
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
        self,
        graph: Graph,
        label: str,
        tasks: Sequence[str] = (),
        left: int | None = None,
        limit: int | None = None,
        tell: Tell | None = None,
    ) -> Scores:
        """Scores a model on tasks, each task once.

        Args:
            graph: The model, from `graph` or `role`.
            label: What it is called.
            tasks: By default the bench's own.
            left: How many scores are still to come, for the time left that is shown.
            limit: Only the first so many prompts of each task; the recipe's by default.
            tell: Told how far it is.

        Raises:
            CheckError: scoring failed.
        """
        suite, opened = self.suite(tasks or self.tasks), self._opened
        started = time.monotonic()
        found = score_graph(
            self.live, graph, self._beside, label, suite, self.settings, self.store, tell, limit, self._device
        )
        if self._opened > opened:
            self._spent += time.monotonic() - started
            self._scored += 1
            assert self._live is not None  # it was opened
            self._tell(label, self._live.patched, left)
        return found

    def has(self, graph: Graph, task: str, limit: int | None = None) -> bool:
        """Whether a score is there already, so that `score` would not run the model."""
        subject = graph_subject(self.live, graph, self._beside, "")
        keys = result_keys(subject, self.suite([task]), **conditions(self.settings, limit, self._device))
        return all(self.store.get(key) is not None for key in keys.values())

    def suite(self, tasks: Sequence[str]) -> Suite:
        """Loaded tasks; each is loaded once.

        Raises:
            CheckError: a task is unknown or its data is missing.
        """
        names = tuple(expand(tasks))
        if names not in self._suites:
            self._suites[names] = suite_of(self.loaded, names, self.settings)
        return self._suites[names]

    def _tell(self, label: str, patched: int, left: int | None) -> None:
        text = f"{label}: scored ({patched} tensors patched; {self._spent / self._scored:.0f} s a model)"
        if left:
            minutes = left * self._spent / self._scored / 60
            text += f"; {left} to go, about {minutes:.0f} min" if minutes >= 1 else f"; {left} to go"
        self.on_event(Note(text))

    def live(self) -> LiveModel:
        """The loaded model that becomes one merge after the other; opened once."""
        self._opened += 1
        if self._live is None:
            self._live = LiveModel(self.prepared, device=self._device, dtype=self.settings.dtype)
        return self._live
