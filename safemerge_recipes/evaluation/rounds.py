"""How far the scoring of several models is, for whoever shows it. Knows no models and no screen."""

from __future__ import annotations

from dataclasses import dataclass

from safemerge_recipes.evaluation.harness import Tell
from safemerge_recipes.evaluation.suite import Suite
from safemerge_recipes.events import Listener, Step


@dataclass(frozen=True, slots=True)
class Rounds:
    """So many models that answer the same tasks.

    Attributes:
        on_event: Told every step.
        models: How many there are.
        suite: The tasks.
        limit: Prompts of each task.
    """

    on_event: Listener
    models: int
    suite: Suite
    limit: int | None

    def of(self, place: int, model: str) -> Tell:
        """What `harness.score` is given for one model; places count from 1."""
        sizes = {task: self.suite.size(task, self.limit) for task in self.suite.tasks}
        each = sum(sizes.values())
        finished: dict[str, int] = {}

        def tell(task: str, done: int, total: int) -> None:
            finished[task] = done
            so_far = (place - 1) * each + sum(finished.values())
            self.on_event(Step(model, place, self.models, task, so_far, self.models * each))

        return tell
