"""Scores a finished output beside the models it came from, and says what the numbers support.

Every model answers the same prompts in the same loaded model (`live`); nothing but scores is written. What
is printed goes to the console given; files of the output folder are replaced whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes.engine.folder import REPORT_FILE, SCORES_FILE
from safemerge_recipes.engine.manifest import read_manifest, restamp
from safemerge_recipes.errors import CheckError
from safemerge_recipes.evaluation.harness import Metric, Scores, evaluate, expand
from safemerge_recipes.evaluation.statistics import Difference, compare, holm, wilson
from safemerge_recipes.pipeline import Prepared, as_source, provenance_of, render_documents
from safemerge_recipes.recipe.loading import LoadedRecipe
from safemerge_recipes.recipe.model import Evaluate, Role
from safemerge_recipes.report.scores import read_verdicts
from safemerge_recipes.storage.files import write_json

if TYPE_CHECKING:
    from rich.console import Console

    from safemerge_recipes.evaluation.live import LiveModel

FORMAT = 1
MERGED = "merged"
REFERENCES: tuple[Role, ...] = ("finetuned", "aligned")


def evaluate_live(live: LiveModel, settings: Evaluate, loaded: LoadedRecipe, name: str, **options: Any) -> Scores:
    """Scores the model that `live` is now, under the recipe's settings.

    Args:
        live: The loaded model.
        settings: The recipe's `evaluate`.
        loaded: The recipe, for its folder.
        name: What to call the model.
        options: Further arguments of `evaluate.evaluate`; they win.

    Raises:
        CheckError: A task is unknown or fails.
    """
    given: dict[str, Any] = {
        "limit": settings.limit,
        "batch_size": settings.batch_size,
        "num_fewshot": settings.num_fewshot,
        "chat_template": settings.chat_template,
        "task_path": loaded.resolve(settings.task_path) if settings.task_path else None,
        "seed": settings.seed,
        "threads": threads(),
    }
    tasks = options.pop("tasks", settings.tasks)
    return evaluate(live.model, tasks, tokenizer=live.tokenizer, name=name, **(given | options))


def threads() -> int | None:
    """Torch threads for scoring a model on a CPU; None leaves torch's own choice.

    OMP_NUM_THREADS says how many. Otherwise half of the cores at most are asked for while others keep them
    busy: threads that wait for each other cost more than they bring.
    """
    import os

    if os.environ.get("OMP_NUM_THREADS"):
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = cores - os.getloadavg()[0]
    except OSError:
        return None
    return max(1, min(cores, round(free))) if cores > 1 else 1


def interval(metric: Metric) -> tuple[float | None, float | None]:
    """The 95 % interval of a metric: Wilson's for a rate, else ± 1.96 standard errors."""
    if metric.value is None or not metric.n:
        return None, None
    outcomes = list(metric.outcomes.values())
    if outcomes and all(value in (0.0, 1.0) for value in outcomes):
        return wilson(round(sum(outcomes)), len(outcomes))
    if metric.stderr is None:
        return None, None
    return metric.value - 1.96 * metric.stderr, metric.value + 1.96 * metric.stderr


def compared(scores: Mapping[str, Scores], references: Sequence[str], model: str | None = None) -> list[Difference]:
    """Paired differences to each reference, Holm's correction over all of them.

    Compliance is left out where refusal is tested: the two and `degenerate` sum to one.

    Args:
        scores: By model.
        references: Models to compare with; those without scores are skipped.
        model: Compare only this model; None: all.
    """
    found: list[Difference] = []
    for reference in references:
        if reference not in scores:
            continue
        others = {name: s for name, s in scores.items() if model in (None, name) or name == reference}
        done = {(d.reference, d.model) for d in found}
        found += [
            d
            for d in compare(others, reference).differences
            if not (d.metric == "compliance" and "refusal" in scores[d.model].tasks[d.task].metrics)
            and (d.model, d.reference) not in done
        ]
    adjusted = holm([d.p for d in found])
    return [replace(d, p_holm=p) for d, p in zip(found, adjusted, strict=True)]


def table(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """model -> task -> metric -> value, 95 % interval, n: the part of a scores file that report and card show."""
    return {
        model: {
            task: {
                name: {
                    "value": metric.value,
                    "low": interval(metric)[0],
                    "high": interval(metric)[1],
                    "n": metric.n,
                    "higher_is_better": metric.higher_is_better,
                }
                for name, metric in found.metrics.items()
            }
            for task, found in one.tasks.items()
        }
        for model, one in scores.items()
    }


def document(scores: Mapping[str, Scores], references: Sequence[str], model: str | None = None) -> dict[str, Any]:
    """The content of a scores file: what is shown, what was tested, the outcome of every prompt."""
    comparisons = compared(scores, references, model)
    cautions = [c for r in references if r in scores for c in compare(scores, r).cautions]
    return {
        "format": FORMAT,
        "models": table(scores),
        "comparisons": [{**asdict(d), "detected": d.detected, "verdict": d.verdict} for d in comparisons],
        "cautions": list(dict.fromkeys(cautions)),
        "details": {name: json.loads(one.to_json()) for name, one in scores.items()},
    }


def print_verdicts(content: Mapping[str, Any], console: Console) -> None:
    """Prints every comparison in words."""
    for told in read_verdicts(content):
        console.print(told, markup=False, soft_wrap=True)


def print_table(content: Mapping[str, Any], console: Console) -> None:
    """Prints every task and metric, a line a model, with 95 % intervals."""
    models = content["models"]
    width = max(map(len, models), default=0)
    for task, metric in dict.fromkeys((t, m) for tasks in models.values() for t in tasks for m in tasks[t]):
        console.print(f"{task}: {metric}", style="bold", markup=False)
        for model, tasks in models.items():
            entry = tasks.get(task, {}).get(metric)
            if entry is not None:
                console.print(f"  {model:<{width}}  {_cell(entry)}", markup=False, soft_wrap=True)


def _cell(entry: Mapping[str, Any]) -> str:
    if entry["value"] is None:
        return "no value"
    if entry["low"] is None:
        return f"{entry['value']:.3f}  n = {entry['n']}"
    return f"{entry['value']:>6.1%}  {100 * entry['low']:.1f} to {100 * entry['high']:.1f}  n = {entry['n']}"


def score_output(prepared: Prepared, output: Path, loaded: LoadedRecipe, console: Console) -> dict[str, Any]:
    """Scores a finished output and the roles its recipe compares; puts scores into report, card and manifest.

    Args:
        prepared: What the output was made from.
        output: The finished folder.
        loaded: The recipe, with `evaluate`.
        console: Told what goes on.

    Returns:
        The content of `safemerge_scores.json`.

    Raises:
        CheckError: The `eval` extra is missing, a task is unknown, or a model cannot be loaded or scored. The
            merge itself stays as it is.
    """
    from safemerge_recipes.evaluation.live import LiveModel

    settings = loaded.recipe.evaluate
    assert settings is not None  # the caller asks for scores only where the recipe does
    expand(settings.tasks)
    _check_output_is(prepared, output)
    live = LiveModel(prepared, output, device=_device(prepared))
    scores: dict[str, Scores] = {}
    for name in (MERGED, *settings.compare):
        if name != MERGED:
            live.become(as_source(prepared, name))  # type: ignore[arg-type]  # the recipe's own roles
        scores[name] = evaluate_live(live, settings, loaded, name)
        console.print(f"Scored {name} in {scores[name].seconds:.0f} s", markup=False)
    content = document(scores, REFERENCES, MERGED)
    print_verdicts(content, console)
    attach(output, content, prepared.plan_json(), provenance_of(prepared))
    return content


def _check_output_is(prepared: Prepared, output: Path) -> None:
    kept = read_manifest(output).tensors
    wanted = {task.slot.name: task.key for task in prepared.graph.tasks}
    different = [name for name, key in wanted.items() if name not in kept or kept[name][0] != key]
    if different:
        raise CheckError(
            f"{output}: {len(different)} tensors are not what the recipe gives now, first {different[0]!r}; "
            "expected its own output: run it again with --force"
        )


def _device(prepared: Prepared) -> str:
    device = prepared.resources.device
    return device if device.startswith("cuda") else "auto"


def attach(output: Path, content: dict[str, Any], plan: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Writes the scores into a finished folder: their file, report and card anew, the manifest's entries last."""
    write_json(output / SCORES_FILE, content)
    render_documents(output, plan, content, provenance)
    restamp(output, (SCORES_FILE, REPORT_FILE, "README.md"))
