"""Scores: what models are worth, on the same prompts, and how that is shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes.api.given import is_recipe, loaded_of, resources_of, target_of
from safemerge_recipes.errors import RecipeError
from safemerge_recipes.events import Listener, Step, ignore

if TYPE_CHECKING:
    from safemerge_recipes.api.given import RecipeLike


def evaluate(
    target: RecipeLike,
    *,
    output: str | Path | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    device: str = "auto",
    on_event: Listener = ignore,
) -> dict[str, Any]:
    """Scores a model folder, or a recipe's finished output beside its sources, and puts the scores into its report.

    Args:
        target: a model folder, a loaded recipe, or its file.
        output: the recipe's finished output; by default its `output.path`.
        tasks: what is scored; by default the recipe's tasks, for a folder without one all shipped ones.
        limit: only the first so many prompts of each task.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        on_event: is told what goes on.

    Returns:
        The content of safemerge_scores.json: rates from 0 to 1 with 95 % intervals, paired tests, outcomes.

    Raises:
        RecipeError: the recipe is wrong or has nothing to evaluate.
        CheckError: the model cannot be loaded or scored, or is not what the recipe gives now.
    """
    from safemerge_recipes.evaluation.compare import evaluate_folder

    if isinstance(target, str | Path) and not is_recipe(target):
        return evaluate_folder(Path(target), tasks, on_event, limit=limit, device=device)
    from safemerge_recipes.evaluation.scoring import score_output, suite_of
    from safemerge_recipes.pipeline.opening import open_sources
    from safemerge_recipes.pipeline.preparing import prepare
    from safemerge_recipes.planning.load import vary

    loaded = loaded_of(target)
    more = [f"evaluate.limit={limit}"] if limit else []
    more += [f"evaluate.tasks={json.dumps(list(tasks))}"] if tasks else []
    loaded = vary(loaded, more) if more else loaded
    if loaded.recipe.evaluate is None:
        raise RecipeError(f"{loaded.path}: evaluate: missing; expected it there with tasks, or --tasks")
    folder, suite = target_of(loaded, output), suite_of(loaded)
    if isinstance(folder, str):
        raise RecipeError(f"{folder}: scoring reads a folder; expected a copy of the output")
    prepared = prepare(open_sources(loaded, on_event), resources_of(device, None, "2GB"), on_event)
    return score_output(prepared, folder, loaded, on_event, suite=suite)


def compare(
    models: Sequence[str | Path],
    *,
    tasks: Sequence[str] = (),
    references: Sequence[str] = (),
    limit: int | None = None,
    device: str = "auto",
    on_event: Listener = ignore,
) -> dict[str, Any]:
    """Scores models on the same prompts and says, with paired tests, where they differ.

    Args:
        models: model folders, `MODEL+ADAPTER`, recipes (their sources and merge) or scores files; `NAME=` before
            one names it.
        tasks: what is scored; by default a recipe's own tasks, else all shipped ones.
        references: names of those that the others are compared with; by default the first.
        limit: only the first so many prompts of each task.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        on_event: is told what goes on.

    Returns:
        What a scores file holds, see `evaluate`.

    Raises:
        RecipeError: two models go by one name, or a reference by none.
        CheckError: a model cannot be scored.
    """
    from safemerge_recipes.evaluation.compare import score_models
    from safemerge_recipes.evaluation.scoring import document

    named = [str(model) for model in models]
    scores = score_models(named, tasks, on_event, limit=limit, device=device)
    references = list(references) or [next(iter(scores))]
    for name in references:
        if name not in scores:
            raise RecipeError(f"--reference {name}: no model goes by it; expected one of {', '.join(scores)}")
    return document(scores, references)


def judge(
    folder: str | Path,
    *,
    kind: str | None = None,
    model: str | None = None,
    prompt: str | None = None,
    url: str | None = None,
    device: str = "auto",
    on_event: Listener = ignore,
) -> dict[str, Any]:
    """Lets another model judge the answers that lie beside the scores of a finished output.

    Args:
        folder: the output.
        kind: `llama-guard-3`, `chat` or `openai`; by default what the output's recipe says in `evaluate.judge`.
        model: the judge's folder or hub id, or its name at the server.
        prompt: how it is asked, see the recipe's `evaluate.judge.prompt`.
        url: the server's base address.
        device: where a judge is loaded.
        on_event: is told what goes on.

    Returns:
        The content of safemerge_scores.json, with `unsafe` and `unjudged`.

    Raises:
        RecipeError: no judge is named, or not soundly.
        CheckError: there are no answers, or the judge does not answer. What it said is kept.
    """
    from pydantic import ValidationError

    from safemerge_recipes.engine.folder import RECIPE_FILE
    from safemerge_recipes.evaluation.judge import judge_of
    from safemerge_recipes.evaluation.judge_folder import judge_folder
    from safemerge_recipes.planning.load import load
    from safemerge_recipes.recipe.model import Judge

    folder = Path(folder)
    given = {key: value for key, value in (("model", model), ("prompt", prompt), ("url", url)) if value is not None}
    stored = load(folder / RECIPE_FILE).recipe.evaluate if kind is None and (folder / RECIPE_FILE).exists() else None
    asked = stored.judge.model_dump(exclude_none=True) if stored is not None and stored.judge is not None else {}
    if kind is None and not asked:
        raise RecipeError(f"{folder}: its recipe names no judge; expected --kind and --model")
    try:
        named = Judge.model_validate({**asked, **given, **({"kind": kind} if kind else {})})
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "judge"
        raise RecipeError(f"--{where}: {problem['msg'].removeprefix('Value error, ')}") from None
    place = None if kind else folder
    who = judge_of(named.kind, named.model, prompt=named.prompt, url=named.url, folder=place, device=device)

    def tell(name: str, done: int, total: int) -> None:
        on_event(Step(name, 1, 1, "answers judged", done, total))

    return judge_folder(folder, who, tell)


def render(folder: str | Path, include: Sequence[str | Path] = ()) -> Path:
    """Writes report and card of a finished output anew, with its scores; returns the report's path.

    Raises:
        CheckError: the folder is no finished output, or one of `include` holds no result of a sweep or probe.
    """
    from safemerge_recipes.engine.folder import REPORT_FILE
    from safemerge_recipes.evaluation.compare import render_again

    render_again(Path(folder), [Path(one) for one in include])
    return Path(folder) / REPORT_FILE
