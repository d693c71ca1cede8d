"""Compares recipes on one family: every recipe and its controls scored on the same prompts, in one loaded model.

Nothing is chosen, so all is on the test split. Recipes may read different sources as long as a role means one model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import RecipeError
from safemerge_recipes.evaluation.experiments import controls
from safemerge_recipes.evaluation.experiments.measures import measures
from safemerge_recipes.evaluation.experiments.sweep import SOURCES, control_tests, picture, scored
from safemerge_recipes.evaluation.experiments.workbench import Bench
from safemerge_recipes.evaluation.scoring import compared, table
from safemerge_recipes.events import Note
from safemerge_recipes.planning.plan import Plan
from safemerge_recipes.recipe.builtins import Role
from safemerge_recipes.recipe.loading import LoadedRecipe
from safemerge_recipes.recipe.source import Source
from safemerge_recipes.storage.files import write_file, write_json

FORMAT = 1
RESULT_FILE = "safemerge_recipes.json"
PICTURE_FILE = "safemerge_recipes.svg"


def one_family(recipes: Sequence[LoadedRecipe]) -> tuple[LoadedRecipe, dict[str, LoadedRecipe]]:
    """(the first recipe with the sources of all of them, all recipes by label), with absolute paths.

    Raises:
        RecipeError: two go by one name, or a role means different models.
    """
    found: dict[str, LoadedRecipe] = {}
    sources: dict[Role, Source] = {}
    of: dict[Role, str] = {}
    for loaded in recipes:
        label = loaded.path.stem
        if label in found:
            raise RecipeError(f"{loaded.path}: a second recipe that goes by {label}; expected names of their own")
        found[label] = replace(loaded, recipe=loaded.anchored())
        for role, source in found[label].recipe.sources.roles().items():
            if sources.setdefault(role, source) != source:
                raise RecipeError(
                    f"{loaded.path}: sources.{role}: is {source}, in {of[role]} it is {sources[role]}; expected "
                    "recipes of one family"
                )
            of.setdefault(role, label)
    first = next(iter(found.values()))
    joined = first.recipe.model_copy(update={"sources": first.recipe.sources.changed(sources)})
    return replace(first, recipe=joined), found


def compare(bench: Bench, recipes: Mapping[str, LoadedRecipe], folder: Path, *, seeds: int = 10) -> dict[str, Any]:
    """Scores the recipes, the fine-tuned and the aligned model, and every recipe's controls.

    Args:
        bench: The family, opened with the sources of all recipes.
        recipes: By label, from `one_family`.
        folder: Where results go; exists.
        seeds: Random controls of each of the two kinds for each recipe; 0: no controls.

    Returns:
        The content of `safemerge_recipes.json`.

    Raises:
        SafemergeError: a recipe does not fit the family, or scoring failed. What was scored is kept.
    """
    bench.share_masks(list(recipes.values()))
    plans: dict[str, Plan] = {label: bench.decided(one, label) for label, one in recipes.items()}
    kinds = controls.controls(seeds) if seeds else ()
    drawn: dict[str, dict[str, controls.Control]] = {label: {} for label in plans}
    graphs = {role: bench.role(role) for role in SOURCES} | {label: bench.graph(one) for label, one in plans.items()}
    for label, plan in plans.items():
        for kind in kinds:
            name = f"{label}: {kind.label}"
            drawn[label][name] = kind
            control = replace(recipes[label], recipe=kind.recipe(plan))
            graphs[name] = bench.graph(bench.decided(control, name))
    count = sum(map(len, drawn.values()))
    bench.on_event(Note(f"{len(plans)} recipes with {count} controls: {', '.join(bench.tasks)}"))
    scores = scored(bench, graphs, bench.tasks)
    by = measures(bench.suite(bench.tasks).better, tuple(bench.tasks))
    kept = {label: scores[label] for label in (*SOURCES, *plans)}
    tests = {
        label: control_tests(
            {label: scores[label], **{kind.label: scores[name] for name, kind in drawn[label].items()}},
            label, drawn[label].values(), by,
        )
        for label in plans
    }  # fmt: skip
    values = {label: by.of(one) for label, one in kept.items()}
    content = {
        "format": FORMAT,
        "tasks": bench.tasks,
        "safety": by.words,
        "recipes": {
            label: {
                "method": recipes[label].recipe.merge.method,
                "merged": len(controls.merged(plan)),
                "gated": len(plan.gated),
            }
            for label, plan in plans.items()
        },
        "values": {label: {"safety": pair[0], "utility": pair[1]} for label, pair in values.items()},
        "models": table(scores),
        "control_tests": tests,
        "verdicts": [
            {"model": d.model, "reference": d.reference, "task": d.task, "metric": d.metric, "verdict": d.verdict}
            for d in compared(kept, SOURCES)
        ],
    }
    write_json(folder / RESULT_FILE, content)
    write_file(folder / PICTURE_FILE, picture(kept, by, set()))
    return content
