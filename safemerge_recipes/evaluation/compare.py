"""What `evaluate` and `compare` name on the command line: folders, adapters on them, recipes, scores files.

Turns each into scores; knows nothing of printing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes.engine.folder import MANIFEST_FILE, PICTURES, PLAN_FILE, RECIPE_FILE
from safemerge_recipes.engine.manifest import read_record, restamp
from safemerge_recipes.errors import CheckError, RecipeError
from safemerge_recipes.evaluation.harness import Scores, evaluate, expand
from safemerge_recipes.evaluation.scoring import MERGED, attach, document, threads
from safemerge_recipes.recipe.loading import load_recipe
from safemerge_recipes.storage.files import write_file

if TYPE_CHECKING:
    from rich.console import Console

    from safemerge_recipes.recipe.model import Evaluate


def is_recipe(path: Path) -> bool:
    """Whether a command-line argument names a recipe rather than a folder."""
    return path.suffix in (".yaml", ".yml") and not path.is_dir()


def score_models(
    given: Sequence[str], tasks: Sequence[str], console: Console, *, limit: int | None = None, device: str = "auto"
) -> dict[str, Scores]:
    """Scores every model named, by the name it goes by.

    Args:
        given: Each a model folder, `MODEL+ADAPTER`, a recipe (its sources and its merge, patched in memory),
            or a scores file; `NAME=` before it names it.
        tasks: What is scored; empty: a recipe's own tasks, else all shipped ones.
        console: Told what goes on.
        limit: Prompts of each task.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        CheckError: A model cannot be scored.
        RecipeError: Two go by one name.
    """
    found: dict[str, Scores] = {}
    for text in given:
        name, equals, rest = text.partition("=")
        path = Path(rest if equals else text)
        label = name if equals else None
        scored = _scored(path, label, tasks, console, limit, device)
        for key in scored:
            if key in found:
                raise RecipeError(f"{text}: a second model named {key!r}; name it, as in NAME={path}")
        found |= scored
    return found


def _scored(
    path: Path, label: str | None, tasks: Sequence[str], console: Console, limit: int | None, device: str
) -> dict[str, Scores]:
    if path.suffix == ".json":
        return {f"{label} {name}" if label else name: one for name, one in read_scores(path).items()}
    if is_recipe(path):
        found = _recipe_models(path, tasks, console, limit, device)
        return {f"{label} {name}" if label else name: one for name, one in found.items()}
    folder, plus, adapter = str(path).partition("+")
    name = label or Path(adapter if plus else folder).name
    scores = evaluate(
        folder, tasks or ["safemerge"], limit=limit, device=device, peft=adapter or None, name=name, threads=threads()
    )
    console.print(f"Scored {name} in {scores.seconds:.0f} s", markup=False)
    return {name: scores}


def _recipe_models(
    path: Path, tasks: Sequence[str], console: Console, limit: int | None, device: str
) -> dict[str, Scores]:
    from safemerge_recipes.evaluation.live import LiveModel
    from safemerge_recipes.evaluation.scoring import evaluate_live
    from safemerge_recipes.pipeline import Silent, as_source, choose_device, prepare, resolve
    from safemerge_recipes.recipe.model import Evaluate

    from safemerge_recipes.storage.workers import Resources  # isort: skip

    loaded = load_recipe(path)
    settings = loaded.recipe.evaluate or Evaluate(tasks=tuple(tasks or ["safemerge"]))
    prepared = prepare(resolve(loaded), Resources(1, 1 << 30, choose_device(device)), Silent())
    live = LiveModel(prepared, device=device)
    found: dict[str, Scores] = {}
    options: dict[str, Any] = ({"tasks": tasks} if tasks else {}) | ({"limit": limit} if limit else {})
    for name in (*prepared.family.models, MERGED):
        live.become(prepared.graph if name == MERGED else as_source(prepared, name))  # type: ignore[arg-type]
        found[name] = evaluate_live(live, settings, loaded, name, **options)
        console.print(f"Scored {name} in {found[name].seconds:.0f} s", markup=False)
    return found


def read_scores(path: Path) -> dict[str, Scores]:
    """The scores in a `safemerge_scores.json`.

    Raises:
        CheckError: It is none.
    """
    try:
        details = json.loads(path.read_text(encoding="utf-8"))["details"]
        return {name: Scores.from_json(json.dumps(one)) for name, one in details.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckError(f"{path}: cannot be read as scores ({type(error).__name__}: {error})") from None


def evaluate_folder(
    folder: Path, tasks: Sequence[str], console: Console, *, limit: int | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Scores one model folder; an output of this program gets the scores into its report and card.

    Returns:
        The content of a scores file.

    Raises:
        CheckError: It cannot be scored.
    """
    ours = (folder / MANIFEST_FILE).exists() and (folder / RECIPE_FILE).exists()
    own = load_recipe(folder / RECIPE_FILE).recipe.evaluate if ours else None
    options = {} if own is None else _options(own)
    names = expand(tuple(tasks) or (own.tasks if own else ("safemerge",)))
    if limit is not None:
        options["limit"] = limit
    name = MERGED if ours else folder.resolve().name
    scores = evaluate(folder, names, device=device, name=name, threads=threads(), **options)
    content = document({name: scores}, ())
    if ours:
        attach(folder, content, read_record(folder / PLAN_FILE), provenance_in(folder))
        console.print(f"Put the scores into {folder}", markup=False)
    return content


def _options(own: Evaluate) -> dict[str, Any]:
    kept = own.model_dump(exclude={"tasks", "compare", "task_path"})
    return {key: value for key, value in kept.items() if value is not None}


def provenance_in(folder: Path) -> dict[str, Any]:
    """What report and card say of sources and versions, from a finished output alone.

    Raises:
        CheckError: The folder is no finished output.
    """
    try:
        manifest = read_record(folder / MANIFEST_FILE)
        text = (folder / RECIPE_FILE).read_text(encoding="utf-8")
        given = load_recipe(folder / RECIPE_FILE).recipe.sources.roles()
        sources = {}
        for role, source in given.items():
            label = str(source.model or source.adapter or source.location)
            sources[role] = {
                "label": label if source.revision else Path(label).name,
                "kind": "adapter" if _is_adapter(folder, source) else "model",
                "revision": source.revision,
            }
        return {"sources": sources, "versions": manifest["versions"], "recipe": text}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckError(
            f"{folder}: no finished output of safemerge ({type(error).__name__}: {error}); expected {MANIFEST_FILE}, "
            f"{PLAN_FILE} and {RECIPE_FILE} there"
        ) from None


def _is_adapter(folder: Path, source: Any) -> bool:
    if source.adapter is not None:
        return True
    return source.location is not None and (folder / source.location / "adapter_config.json").exists()


def render_again(folder: Path, results: Sequence[Path] = ()) -> None:
    """Writes the report and card of a finished output anew, with its scores if it has any.

    Args:
        folder: The output.
        results: Folders of sweeps and probes; what they found is copied into the output and shown.

    Raises:
        CheckError: The folder is no finished output, or a result folder holds no result.
    """
    from safemerge_recipes.engine.folder import REPORT_FILE, SCORES_FILE
    from safemerge_recipes.pipeline import render_documents

    provenance = provenance_in(folder)
    plan = read_record(folder / PLAN_FILE)
    scores = read_record(folder / SCORES_FILE) if (folder / SCORES_FILE).exists() else None
    copied = [name for place in results for name in _copy_results(place, folder)]
    render_documents(folder, plan, scores, provenance)
    restamp(folder, (*copied, REPORT_FILE, "README.md"))


def _copy_results(place: Path, folder: Path) -> list[str]:
    names = [Path(picture).with_suffix(end).name for picture in PICTURES.values() for end in (".svg", ".json")]
    found = [name for name in names if (place / name).is_file()]
    if not found:
        raise CheckError(f"{place}: holds no result of a sweep or probe; expected {' or '.join(names[1::2])} there")
    for name in found:
        write_file(folder / name, (place / name).read_bytes())
    return found
