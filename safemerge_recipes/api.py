"""What Python programs call; the command line is one of them.

    import safemerge_recipes as sm

    recipe = sm.load_recipe("recipe.yaml", {"gate.tau": 0.3})
    plan = sm.plan(recipe)
    result = sm.run(plan, "out")

Every function raises a `SafemergeError` of a kind that says which phase failed, with one message for people, and
prints nothing: what goes on is told to `on_event`, in events of `safemerge_recipes.events`. Nothing heavy is
imported before it is needed. `__init__` offers the promised names; the others serve the command line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes.errors import PlanError, RecipeError, SafemergeError
from safemerge_recipes.events import Listener, Note, Step, ignore

if TYPE_CHECKING:
    from safemerge_recipes.engine.output import Result
    from safemerge_recipes.evaluation.experiments.workbench import Bench
    from safemerge_recipes.evaluation.suite import Suite
    from safemerge_recipes.planning.prepared import Prepared, Resolved
    from safemerge_recipes.recipe.loading import LoadedRecipe
    from safemerge_recipes.recipe.training import LoadedTraining
    from safemerge_recipes.storage.workers import Resources
    from safemerge_recipes.training.plan import TrainingPlan
    from safemerge_recipes.training.run import TrainedAdapter
    from safemerge_recipes.training.steps import TrainingStep

    RecipeLike = LoadedRecipe | str | Path

Overrides = Mapping[str, Any] | Sequence[str]


def load_recipe(
    path: str | Path, overrides: Overrides = (), *, sources: Mapping[str, str | Path] | Sequence[str] = ()
) -> LoadedRecipe:
    """Loads and checks a recipe. Opens no source.

    Args:
        path: the YAML file, the folder of an output, or `-` for standard input.
        overrides: values by dotted key, such as `{"gate.tau": 0.3}`, or `KEY=VALUE` texts; applied in order.
        sources: a folder or hub id by role, such as `{"finetuned": "my-lora"}`, or `ROLE=PLACE` texts; stands in for
            what the recipe names.

    Raises:
        RecipeError: the file cannot be read, or with every problem in it, a line each.
    """
    from safemerge_recipes.planning.load import load
    from safemerge_recipes.sharing.places import recipe_at

    return load(recipe_at(path), _texts(overrides), stand_ins=_stand_ins(sources))


def _stand_ins(sources: Mapping[str, str | Path] | Sequence[str]) -> dict[str, str]:
    from safemerge_recipes.recipe.builtins import ROLES

    if isinstance(sources, Mapping):
        given = [(role, str(place)) for role, place in sources.items()]
    else:
        given = [(role, place) for role, _, place in (text.partition("=") for text in sources)]
    for role, place in given:
        if role not in ROLES or not place:
            raise RecipeError(f"--source {role}={place}: expected ROLE=PLACE, with a role of {', '.join(ROLES)}")
    return dict(given)


def show(recipe: RecipeLike) -> str:
    """A recipe as YAML that stands alone: what it extends joined in, parameters filled in, every used value in full."""
    from safemerge_recipes.recipe.writing import dump_recipe

    return dump_recipe(_loaded(recipe).recipe)


def plan(
    recipe: RecipeLike,
    *,
    device: str = "auto",
    workers: int | None = None,
    max_memory: str | int = "2GB",
    on_event: Listener = ignore,
) -> Prepared:
    """Measures what is gated and decides every tensor. Reads headers and the gated tensors, writes nothing.

    Args:
        recipe: a loaded recipe, or its file.
        device: where gate and merge are computed: `auto`, `cpu`, `cuda` or `cuda:N`.
        workers: threads; by default one a core.
        max_memory: own memory, in bytes or as a text such as `2GB`; at least 64MB.
        on_event: is told what goes on.

    Returns:
        The plan. `.plan.tensors` holds a line for every tensor of the output, `.plan_json()` the content of
        safemerge_plan.json; in a notebook it shows itself.

    Raises:
        RecipeError: the recipe is wrong.
        SourceError: a source is missing, broken, or does not fit the others.
        PlanError: the plan cannot be made or carried out with these means.
    """
    resources = _resources(device, workers, max_memory)
    from safemerge_recipes.pipeline import prepare

    loaded = _loaded(recipe)
    _train_missing(loaded, False, on_event)
    return prepare(_resolved(loaded), resources, on_event)


def lock(recipe: RecipeLike) -> Path:
    """Writes `recipe.lock.yaml` beside a recipe: commit, size and sha256 of every file that it reads now.

    Returns:
        The lock.

    Raises:
        RecipeError: the recipe is wrong.
        SourceError: a source is missing, broken, or does not fit the others.
    """
    from safemerge_recipes.pipeline import resolve
    from safemerge_recipes.sharing.lock import write_lock

    return write_lock(resolve(_loaded(recipe)))


def _resolved(loaded: LoadedRecipe) -> Resolved:
    """Opens the sources, at their locked commits and with their locked files where there is a lock."""
    from safemerge_recipes.pipeline import resolve
    from safemerge_recipes.sharing.lock import check_lock, find_lock, pinned

    found = find_lock(loaded)
    if found is None:
        return resolve(loaded)
    resolved = resolve(pinned(loaded, found))
    check_lock(resolved, found)
    return resolved


def run(
    recipe: RecipeLike | Prepared,
    output: str | Path | None = None,
    *,
    force: bool = False,
    allow_empty: bool = False,
    evaluate: bool = True,
    device: str = "auto",
    workers: int | None = None,
    max_memory: str | int = "2GB",
    train: bool = False,
    executor: str = "local",
    ray_address: str | None = None,
    on_event: Listener = ignore,
) -> Result:
    """Writes the merged model, and scores it if its recipe says so. A run cut short is resumed by the same call.

    Args:
        recipe: a plan, which is carried out with its own device and memory, or a recipe, which is planned first.
        output: the folder; by default the recipe's `output.path`.
        force: replace a finished output.
        allow_empty: write the fine-tuned model where the gate merges nothing.
        evaluate: score the output if the recipe has `evaluate`.
        device: as in `plan`, like `workers` and `max_memory`.
        workers: threads.
        max_memory: own memory.
        train: train the adapter of a source that says `train: FILE` where it is not in the cache.
        executor: `local`, `ray` or a plugin's: what carries the plan out.
        ray_address: the Ray cluster, such as `auto` or `ray://host:10001`; None: one of its own on this machine.
        on_event: is told what goes on.

    Raises:
        RecipeError: the recipe is wrong, or says no output.
        SourceError: a source is missing, broken, does not fit the others, or changed.
        PlanError: the output is in the way, or memory or disk do not suffice.
        WriteError: stopped while writing; the same call goes on from there.
        CheckError: the output is written, but scoring it failed.
    """
    from safemerge_recipes.engine.executors import find
    from safemerge_recipes.engine.folder import check_place
    from safemerge_recipes.pipeline import carry_out, prepare
    from safemerge_recipes.planning.prepared import Prepared
    from safemerge_recipes.storage.digests import Digests

    planned = recipe if isinstance(recipe, Prepared) else None
    engine = find(executor, ray_address)
    resources = planned.resources if planned else _resources(device, workers, max_memory)
    loaded = planned.resolved.loaded if planned else _loaded(recipe)  # type: ignore[arg-type]  # the other kind
    target = target_of(loaded, output)
    if planned is None:
        _train_missing(loaded, train, on_event)
    suite = None
    if evaluate and loaded.recipe.evaluate is not None:  # what can be wrong with it is known before it costs
        from safemerge_recipes.evaluation.scoring import suite_of

        suite = suite_of(loaded)
    check_place(target, force)
    resolved = planned.resolved if planned else _resolved(loaded)
    if suite is not None:
        _warn_of_template(resolved, on_event)
    digests = Digests(resolved.identities)  # hashing takes long: it begins at once
    try:
        prepared = planned or prepare(resolved, resources, on_event, executor=engine)
        result = carry_out(prepared, target, digests, on_event, force=force, allow_empty=allow_empty, executor=engine)
    finally:
        digests.cancelled.set()
        engine.close()
    return result if suite is None else _scored(result, loaded, suite, on_event, told=bool(output))


def _train_missing(loaded: LoadedRecipe, train: bool, on_event: Listener) -> None:
    """Says of every adapter that is still to be trained what that takes; trains it if that is asked for."""
    if not any(source.train for source in loaded.recipe.sources.roles().values()):
        return
    from safemerge_recipes.sources.trained import to_train
    from safemerge_recipes.training.plan import plan_training as plan_it
    from safemerge_recipes.training.run import train_adapter as train_it

    for role, file in to_train(loaded).items():
        found = plan_it(file)
        if found.folder is None:
            steps = ", ".join(f"{size} rows in {steps} steps" for size, steps in found.steps().items())
            state = "trained now" if train else "still to be trained"
            on_event(
                Note(
                    f"sources.{role}: {file.path.name}: the adapter is {state}: {steps}, "
                    f"about {found.memory / 1e9:.1f} GB, very roughly {max(1, round(found.minutes))} min"
                )
            )
            if train:
                train_it(file, plan=found, say=lambda line: on_event(Note(line)))


def _warn_of_template(resolved: Resolved, on_event: Listener) -> None:
    from safemerge_recipes.evaluation.chat import check_template

    asked = resolved.recipe.evaluate
    warning = check_template(resolved.side_files, asked.chat_template) if asked else None
    if warning:
        on_event(Note(f"Warning: {warning}", warning=True))


def _scored(result: Result, loaded: LoadedRecipe, suite: Suite, on_event: Listener, told: bool) -> Result:
    """The run with its scores. What goes wrong says that the output stays, and how to go on."""
    from safemerge_recipes.evaluation.scoring import score_output

    try:
        scores = score_output(result.plan, result.output, loaded, _notes(on_event), suite=suite, listen=on_event)
    except SafemergeError as error:
        again = f"safemerge evaluate {loaded.path}" + (f" --output {result.output}" if told else "")
        raise type(error)(f"{error}\n{result.output} is merged and sound; `{again}` goes on from there") from None
    return replace(result, scores=scores)


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

    notes = _notes(on_event)
    if isinstance(target, str | Path) and not is_recipe(target):
        return evaluate_folder(Path(target), tasks, notes, limit=limit, device=device, listen=on_event)
    from safemerge_recipes.evaluation.scoring import score_output, suite_of
    from safemerge_recipes.pipeline import prepare, resolve
    from safemerge_recipes.planning.load import vary

    loaded = _loaded(target)
    more = [f"evaluate.limit={limit}"] if limit else []
    more += [f"evaluate.tasks={json.dumps(list(tasks))}"] if tasks else []
    loaded = vary(loaded, more) if more else loaded
    if loaded.recipe.evaluate is None:
        raise RecipeError(f"{loaded.path}: evaluate: missing; expected it there with tasks, or --tasks")
    folder, suite = target_of(loaded, output), suite_of(loaded)
    prepared = prepare(resolve(loaded), _resources(device, None, "2GB"), on_event)
    return score_output(prepared, folder, loaded, notes, suite=suite, listen=on_event)


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
    scores = score_models(named, tasks, _notes(on_event), limit=limit, device=device, listen=on_event)
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
    from safemerge_recipes.evaluation.judging import judge_folder
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


def sweep(
    recipe: str | Path,
    grid: Mapping[str, Sequence[Any]] | Sequence[str],
    output: str | Path = "safemerge-sweep",
    *,
    overrides: Overrides = (),
    tasks: Sequence[str] = (),
    tuning_tasks: Sequence[str] = (),
    limit: int | None = None,
    seeds: int = 10,
    allowed_loss: float = 0.02,
    device: str = "auto",
    on_event: Listener = ignore,
) -> dict[str, Any]:
    """Tries keys of a recipe without writing models; chooses on the tuning split, reports on the test split.

    Args:
        recipe: the recipe's file.
        grid: values by dotted key, such as `{"gate.tau": [0.2, 0.3]}`, or `KEY=V1,V2` texts.
        output: the folder for results; finished scores in it are used again.
        overrides: what holds at every point, as in `load_recipe`.
        tasks: what is reported on; by default the recipe's `evaluate.tasks`.
        tuning_tasks: what is chosen on; by default the tuning splits of the tasks.
        limit: only the first so many prompts of each task.
        seeds: random controls of each kind for the chosen point; 0: no controls.
        allowed_loss: utility that the choice may lose against the fine-tuned model, from 0 to 1.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        on_event: is told what goes on.

    Returns:
        The content of safemerge_sweep.json.

    Raises:
        SafemergeError: a point is no sound recipe, or scoring failed; what was scored is kept.
    """
    from safemerge_recipes.evaluation.experiments.sweep import sweep as run_sweep

    axes = _axes(grid)
    if not axes:
        raise RecipeError("sweep: found nothing to vary; expected --tau, --alpha or --grid KEY=V1,V2")
    bench = _bench(recipe, overrides, tasks, limit, Path(output), device, on_event, tuning_tasks)
    return run_sweep(
        bench, axes, Path(output), _notes(on_event), seeds=seeds, allowed_loss=allowed_loss, listen=on_event
    )


def probe(
    recipe: str | Path,
    by: str = "type",
    output: str | Path = "safemerge-probe",
    *,
    overrides: Overrides = (),
    tasks: Sequence[str] = (),
    limit: int | None = None,
    only: int | None = None,
    device: str = "auto",
    on_event: Listener = ignore,
) -> dict[str, Any]:
    """Merges one tensor, module type or block at a time; returns the content of safemerge_probe.json.

    `by` is `tensor`, `type` or `block`; `only` probes so many groups, spread evenly over the
    model; the rest is as in `sweep`.
    """
    from safemerge_recipes.evaluation.experiments.probe import probe as run_probe

    if by not in ("tensor", "type", "block"):
        raise RecipeError(f"--by {by}: expected tensor, type or block")
    bench = _bench(recipe, overrides, tasks, limit, Path(output), device, on_event)
    return run_probe(bench, by, Path(output), only=only, listen=on_event)  # type: ignore[arg-type]  # checked above


def write_controls(
    recipe: RecipeLike,
    output: str | Path | None = None,
    *,
    seeds: int = 3,
    device: str = "auto",
    workers: int | None = None,
    max_memory: str | int = "2GB",
    on_event: Listener = ignore,
) -> list[Path]:
    """Writes a recipe's controls as recipes, by default into RECIPE-controls beside it; returns their paths."""
    from safemerge_recipes.evaluation.experiments import controls

    loaded = _loaded(recipe)
    prepared = plan(loaded, device=device, workers=workers, max_memory=max_memory, on_event=on_event)
    folder = Path.cwd() / output if output else loaded.directory / f"{loaded.path.stem}-controls"
    return controls.write_controls(loaded, prepared.plan, folder, seeds)


def verify(
    folder: str | Path,
    *,
    deep: bool = False,
    sample: int | None = None,
    seed: int = 0,
    public_key: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    max_memory: str | int = "2GB",
    on_event: Listener = ignore,
) -> dict[str, Any]:
    """Checks an output against its manifest and plan.

    Args:
        folder: the output.
        deep: compute every tensor again from the sources and compare the bytes.
        sample: only so many of them, drawn with `seed`; implies `deep`.
        seed: which sample.
        public_key: a PEM file; the output has to be signed with its private one.
        device: as in `plan`, like `workers` and `max_memory`.
        workers: threads.
        max_memory: own memory.
        on_event: is told what goes on.

    Returns:
        Numbers of `files`, `bytes`, `tensors`, and of tensors `recomputed`; what was `checked` and what `unchecked`.

    Raises:
        CheckError: something is not as it was written; the message names the file and, if it can, the tensor.
        SourceError: a source that a deep check needs is missing.
    """
    from safemerge_recipes.verification import verify as check

    deep = deep or sample is not None
    resources = _resources(device if deep else "cpu", workers, max_memory)
    if public_key is not None:
        from safemerge_recipes.signing import check_signature

        check_signature(Path(folder), Path(public_key))
    result = check(Path(folder), resources, on_event, deep=deep, sample=sample, seed=seed)
    if public_key is not None:
        result["checked"].append(f"signature: every file, by the key of {Path(public_key).name}")
        result["unchecked"] = [line for line in result["unchecked"] if not line.startswith("who wrote")]
    return result


def sign(folder: str | Path, private_key: str | Path) -> Path:
    """Signs a finished output with a private key (PEM, elliptic curve), after verifying it; returns the signature.

    Raises:
        PlanError: the extra `sign` is not installed.
        CheckError: the output is not sound, or the key cannot be used.
    """
    from safemerge_recipes import signing

    verify(folder)
    return signing.sign(Path(folder), Path(private_key))


def render(folder: str | Path, include: Sequence[str | Path] = ()) -> Path:
    """Writes report and card of a finished output anew, with its scores; returns the report's path.

    Raises:
        CheckError: the folder is no finished output, or one of `include` holds no result of a sweep or probe.
    """
    from safemerge_recipes.engine.folder import REPORT_FILE
    from safemerge_recipes.evaluation.compare import render_again

    render_again(Path(folder), [Path(one) for one in include])
    return Path(folder) / REPORT_FILE


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe."""
    from safemerge_recipes.recipe.model import json_schema

    return json_schema()


def compiled() -> bool:
    """Whether the compiled kernels are there; without them the same is computed by torch, more slowly."""
    from safemerge_recipes.weights.compiled import LIBRARY

    return LIBRARY is not None


def results_of(kind: str, folder: str | Path) -> tuple[Path, ...]:
    """The files for people that a `sweep` or `probe` leaves in its folder: its picture, then the recipe it chose."""
    from safemerge_recipes.evaluation.experiments import probe, sweep

    names = (sweep.PICTURE_FILE, sweep.CHOSEN_FILE) if kind == "sweep" else (probe.PICTURE_FILE,)
    return tuple(Path(folder) / name for name in names)


def registered() -> list[dict[str, str]]:
    """What recipes may name: kind, name, the distribution that brings it, and where its object lies.

    The last line may stand for all methods of mergekit, without a place.

    Raises:
        RecipeError: two distributions bring one name, or an object cannot be imported.
    """
    from safemerge_recipes.planning.plugins import KINDS, read_registry

    known = read_registry()
    entries = [entry for kind in KINDS for entry in known.entries[kind].values()]
    for entry in entries:
        entry.load()
    rows = [{"kind": e.kind, "name": e.name, "origin": e.origin, "target": e.target} for e in entries]
    if origin := known.origin("methods", "mergekit:"):
        rows.append({"kind": "methods", "name": "mergekit:<any of its methods>", "origin": origin, "target": ""})
    return rows


def is_recipe(path: str | Path) -> bool:
    """Whether a path names a recipe rather than a folder, by its name alone."""
    return Path(path).suffix in (".yaml", ".yml") and not Path(path).is_dir()


def target_of(loaded: LoadedRecipe, output: str | Path | None) -> Path:
    """The output folder. Raises RecipeError when neither the caller nor the recipe says it."""
    if output is not None:
        return Path.cwd() / output
    if loaded.recipe.output.path is not None:
        return loaded.resolve(loaded.recipe.output.path)
    raise RecipeError(f"{loaded.path}: output.path: missing; expected it there, or --output DIR")


# What callers give, as the phases take it


def _loaded(recipe: RecipeLike) -> LoadedRecipe:
    return load_recipe(recipe) if isinstance(recipe, str | Path) else recipe


def _texts(overrides: Overrides) -> tuple[str, ...]:
    if not isinstance(overrides, Mapping):
        return tuple(overrides)
    return tuple(f"{key}={json.dumps(value, default=os.fspath)}" for key, value in overrides.items())


def _axes(grid: Mapping[str, Sequence[Any]] | Sequence[str]) -> list[str]:
    if not isinstance(grid, Mapping):
        return list(grid)
    return [f"{key}={','.join(json.dumps(value) for value in values)}" for key, values in grid.items()]


def _resources(device: str, workers: int | None, max_memory: str | int) -> Resources:
    memory = _memory(max_memory)
    from safemerge_recipes.pipeline import choose_device
    from safemerge_recipes.storage.workers import Resources

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Resources(workers or cores, memory, choose_device(device))


def _memory(given: str | int) -> int:
    from safemerge_recipes.recipe.model import parse_size

    try:
        size = parse_size(given)
    except ValueError as error:
        raise RecipeError(f"--max-memory {given}: {error}") from None
    if not isinstance(size, int) or size < 64_000_000:
        raise RecipeError(f"--max-memory {given}: too little; expected at least 64MB")
    return size


def _bench(
    recipe: str | Path,
    overrides: Overrides,
    tasks: Sequence[str],
    limit: int | None,
    folder: Path,
    device: str,
    on_event: Listener,
    tuning_tasks: Sequence[str] = (),
) -> Bench:
    from safemerge_recipes.evaluation.experiments.sweep import STORE_FILE
    from safemerge_recipes.evaluation.experiments.workbench import Bench

    if str(recipe) == "-":
        raise RecipeError("standard input: found it given as the recipe, which is read several times; expected a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"--output {folder}: {error.strerror}; expected a folder that can be made") from None
    given = [*_texts(overrides), *([f"evaluate.limit={limit}"] if limit else [])]
    resources = _resources(device, None, "2GB")
    return Bench(Path(recipe), given, folder / STORE_FILE, resources, on_event, _notes(on_event), tasks, tuning_tasks)


class _Lines:
    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def print(self, text: object, **_: object) -> None:
        self._listener(Note(str(text)))


def _notes(listener: Listener) -> Any:
    """A console that hands its lines on as events."""
    return _Lines(listener)


def plan_training(file: LoadedTraining | str | Path, *, max_memory: str | int | None = None) -> TrainingPlan:
    """What a training file comes to: rows, steps, memory and the key. Trains nothing.

    Args:
        file: the training file, or one that is loaded.
        max_memory: own memory that may not be exceeded.

    Raises:
        RecipeError: the file or its rows are wrong.
        SourceError: the model or the data are missing.
        PlanError: it takes more memory.
    """
    from safemerge_recipes.recipe.training import load_training
    from safemerge_recipes.training.plan import plan_training as plan_it

    loaded = load_training(file) if isinstance(file, str | Path) else file
    return plan_it(loaded, None if max_memory is None else _memory(max_memory))


def train_adapter(
    file: TrainingPlan | LoadedTraining | str | Path,
    *,
    output: str | Path | None = None,
    listen: Callable[[TrainingStep], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> TrainedAdapter:
    """The adapter of a training file, from the cache or trained now. Cut short, the same call goes on.

    Args:
        file: the training file, or its plan.
        output: a folder that gets a copy.
        listen: is told of steps.
        say: is told, a line at a time, what goes on.

    Raises:
        SafemergeError: it cannot be trained.
    """
    from safemerge_recipes.training.plan import TrainingPlan
    from safemerge_recipes.training.run import copy_adapter
    from safemerge_recipes.training.run import train_adapter as train

    planned = file if isinstance(file, TrainingPlan) else plan_training(file)
    found = train(planned.loaded, listen=listen, say=say, plan=planned)
    if output is not None:
        copy_adapter(found.path, Path(output))
    return found
