"""What `evaluate` and `compare` name on the command line: folders, adapters on them, recipes, scores files.

Turns each into scores; knows nothing of printing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes.engine.documents import provenance_in, rendered, scores_in
from safemerge_recipes.engine.folder import MANIFEST_FILE, PICTURES, RECIPE_FILE, REPORT_FILE, SCORES_FILE
from safemerge_recipes.engine.manifest import replace_files
from safemerge_recipes.errors import CheckError, RecipeError, SourceError
from safemerge_recipes.evaluation import answers
from safemerge_recipes.evaluation.experiments.results import check_results
from safemerge_recipes.evaluation.harness import Subject, Tell, score
from safemerge_recipes.evaluation.rounds import Rounds
from safemerge_recipes.evaluation.scores import Scores
from safemerge_recipes.evaluation.scoring import (
    MERGED,
    attach,
    document,
    model_key,
    score_graph,
    side_key,
    suite_of,
    threads,
)
from safemerge_recipes.evaluation.store import Store, key_of, scores_folder
from safemerge_recipes.evaluation.suite import ANSWER_TOKENS, Suite, check_backend, check_extra, load_suite
from safemerge_recipes.events import Listener, Note
from safemerge_recipes.recipe.loading import load_recipe
from safemerge_recipes.storage.files import MAX_BYTES, content_of

if TYPE_CHECKING:
    from safemerge_recipes.recipe.model import Evaluate


def is_recipe(path: Path) -> bool:
    """Whether a command-line argument names a recipe rather than a folder."""
    return path.suffix in (".yaml", ".yml") and not path.is_dir()


@dataclass(frozen=True, slots=True)
class _Asked:
    """What holds for every model of a comparison."""

    tasks: tuple[str, ...]
    limit: int | None
    device: str
    on_event: Listener


def score_models(
    given: Sequence[str],
    tasks: Sequence[str],
    on_event: Listener,
    *,
    limit: int | None = None,
    device: str = "auto",
) -> dict[str, Scores]:
    """Scores every model named, by the name it goes by. Tasks, folders and names are checked before any is loaded.

    Args:
        given: Each a model folder, `MODEL+ADAPTER`, a recipe (its sources and its merge, patched in memory),
            or a scores file; `NAME=` before it names it.
        tasks: What is scored; empty: a recipe's own tasks, else all shipped ones.
        on_event: Told how far it is, and of every model that is scored.
        limit: Prompts of each task.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        CheckError: A model cannot be scored.
        RecipeError: Two go by one name.
    """
    asked = _Asked(tuple(tasks), limit, device, on_event)
    named = [_named(text) for text in given]
    folders = [(label, path) for label, path in named if path.suffix != ".json" and not is_recipe(path)]
    suite = load_suite(asked.tasks or ("safemerge",)) if folders else None
    for _, path in folders:
        _check_folder(path)
    taken = [label or _own_name(path) for label, path in folders]
    twice = next((name for name in taken if taken.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"a second model named {twice!r}; name it, as in NAME={folders[-1][1]}")
    found: dict[str, Scores] = {}
    for label, path in named:
        if path.suffix == ".json":
            scored = read_scores(path)
        elif is_recipe(path):
            scored = _recipe_models(path, asked)
        else:
            assert suite is not None  # there is a folder
            name, place = label or _own_name(path), folders.index((label, path)) + 1
            tell = Rounds(on_event, len(folders), suite, limit).of(place, name)
            scored = {name: _folder_scores(path, name, suite, asked, tell)}
        if label and (path.suffix == ".json" or is_recipe(path)):
            scored = {f"{label} {name}": one for name, one in scored.items()}
        for key in scored:
            if key in found:
                raise RecipeError(f"{path}: a second model named {key!r}; name it, as in NAME={path}")
        found |= scored
    return found


def _named(text: str) -> tuple[str | None, Path]:
    name, equals, rest = text.partition("=")
    return (name, Path(rest)) if equals else (None, Path(text))


def _parts(path: Path) -> tuple[Path, Path | None]:
    folder, plus, adapter = str(path).partition("+")
    return Path(folder), Path(adapter) if plus else None


def _own_name(path: Path) -> str:
    folder, adapter = _parts(path)
    return (adapter or folder).resolve().name


def _check_folder(path: Path) -> None:
    folder, adapter = _parts(path)
    if not (folder / "config.json").is_file():
        raise CheckError(f"model {folder}: found no config.json; expected a model folder")
    if adapter and not (adapter / "adapter_config.json").is_file():
        raise CheckError(f"adapter {adapter}: found no adapter_config.json; expected a PEFT adapter folder")


def _folder_scores(path: Path, name: str, suite: Suite, asked: _Asked, tell: Tell, **options: Any) -> Scores:
    folder, adapter = _parts(path)
    key = folder_key(folder, adapter)
    scores = score(
        Subject(name, key, lambda: (folder, None), adapter), suite, device=asked.device, threads=threads(),
        keep_answers=True, store=Store(scores_folder() / f"{key}.jsonl"), tell=tell,
        **({"limit": asked.limit} | options),
    )  # fmt: skip
    asked.on_event(Note(f"Scored {name} in {scores.seconds:.0f} s"))
    return scores


def folder_key(folder: Path, adapter: Path | None = None) -> str:
    """Names a model folder, with an adapter on it, by its files: places, sizes and times of change."""
    files = [path for place in (folder, adapter) if place for path in sorted(place.glob("*")) if path.is_file()]
    ignored = {REPORT_FILE, SCORES_FILE, MANIFEST_FILE, "README.md"}
    stats = [
        (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
        for path in files
        if path.name not in ignored
    ]
    return key_of(*stats)


def _recipe_models(path: Path, asked: _Asked) -> dict[str, Scores]:
    from safemerge_recipes.evaluation.live import LiveModel, WrittenModel
    from safemerge_recipes.events import ignore
    from safemerge_recipes.pipeline.opening import open_sources
    from safemerge_recipes.pipeline.preparing import as_source, choose_device, prepare
    from safemerge_recipes.recipe.model import Evaluate
    from safemerge_recipes.storage.workers import Resources

    loaded = load_recipe(path)
    settings = loaded.recipe.evaluate or Evaluate(tasks=asked.tasks or ("safemerge",))
    suite = suite_of(loaded, asked.tasks, settings)
    prepared = prepare(open_sources(loaded, ignore), Resources(1, 1 << 30, choose_device(asked.device)), ignore)
    names = (*prepared.family.models, MERGED)
    rounds = Rounds(asked.on_event, len(names), suite, asked.limit or settings.limit)
    beside = side_key(prepared.resolved.side_files)
    held: list[LiveModel | WrittenModel] = []

    def live() -> LiveModel | WrittenModel:
        if not held:
            hf = settings.backend == "hf"
            dtype = settings.dtype
            held.append(LiveModel(prepared, device=asked.device, dtype=dtype) if hf else WrittenModel(prepared))
        return held[0]

    found: dict[str, Scores] = {}
    for place, name in enumerate(names, 1):
        graph = prepared.graph if name == MERGED else as_source(prepared, name)
        store = Store(scores_folder() / f"{key_of(model_key(graph), beside)}.jsonl")
        found[name] = score_graph(
            live, graph, beside, name, suite, settings, store, rounds.of(place, name), asked.limit, asked.device
        )
        asked.on_event(Note(f"Scored {name} in {found[name].seconds:.0f} s"))
    return found


def read_scores(path: Path) -> dict[str, Scores]:
    """The scores in a `safemerge_scores.json`.

    Raises:
        CheckError: It is none.
    """
    try:
        details = json.loads(content_of(path, MAX_BYTES))["details"]
        return {name: Scores.from_json(json.dumps(one)) for name, one in details.items()}
    except (OSError, SourceError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckError(f"{path}: cannot be read as scores ({type(error).__name__}: {error})") from None


def evaluate_folder(
    folder: Path,
    tasks: Sequence[str],
    on_event: Listener,
    *,
    limit: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Scores one model folder; an output of this program gets the scores into its report and card.

    Returns:
        The content of a scores file.

    Raises:
        CheckError: It cannot be scored.
    """
    _check_folder(folder)
    ours = (folder / MANIFEST_FILE).exists() and (folder / RECIPE_FILE).exists()
    own = load_recipe(folder / RECIPE_FILE).recipe.evaluate if ours else None
    options = {} if own is None else _options(own)
    tokens = ANSWER_TOKENS if own is None else own.answer_tokens
    check_extra()
    check_backend("hf" if own is None else own.backend)
    suite = load_suite(tuple(tasks) or (own.tasks if own else ("safemerge",)), answer_tokens=tokens)
    limit = limit or options.get("limit")
    name = MERGED if ours else folder.resolve().name
    tell = Rounds(on_event, 1, suite, limit).of(1, name)
    asked = _Asked(tuple(tasks), limit, device, on_event)
    scores = {name: _folder_scores(folder, name, suite, asked, tell, **(options | {"limit": limit}))}
    content = document(scores, ())
    if ours:
        attach(folder, content, answers.lines(scores))
        on_event(Note(f"Put the scores into {folder}"))
    return content


def _options(own: Evaluate) -> dict[str, Any]:
    kept = own.model_dump(exclude={"tasks", "compare", "task_path", "judge", "answer_tokens"})
    return {key: value for key, value in kept.items() if value is not None}


def render_again(folder: Path, results: Sequence[Path] = ()) -> None:
    """Writes the report and card of a finished output anew, with its scores if it has any.

    Args:
        folder: The output.
        results: Folders of sweeps and probes; what they found is copied into the output and shown.

    Raises:
        CheckError: The folder is no finished output, or a result folder holds no result.
    """
    provenance_in(folder)  # before anything is changed
    copied = {name: data for place in results for name, data in _results(place).items()}
    if copied:
        replace_files(folder, copied)
    replace_files(folder, rendered(folder, scores_in(folder)))


def _results(place: Path) -> dict[str, bytes]:
    names = [Path(picture).with_suffix(end).name for picture in PICTURES.values() for end in (".svg", ".json")]
    found = {name: content_of(place / name, MAX_BYTES) for name in names if (place / name).is_file()}
    if not found:
        raise CheckError(f"{place}: holds no result of a sweep or probe; expected {' or '.join(names[1::2])} there")
    check_results(place)
    for name, content in found.items():
        try:
            content.decode("utf-8")
        except ValueError:
            raise CheckError(f"{place / name}: is no text; expected it as the sweep or probe wrote it") from None
    return found
