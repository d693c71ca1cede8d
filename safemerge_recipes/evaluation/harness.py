"""Scores a model on lm-eval tasks: the shipped ones, or any that lm-eval knows.

A model is a folder on disk or an already loaded transformers model. The result is a plain, frozen value
with the outcome of every prompt, so that two models can be compared on the same prompts (`statistics`).
Needs the `eval` extra, which is imported only when a function here is called. Knows nothing of merging.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import CheckError
from safemerge_recipes.evaluation import benchmarks
from safemerge_recipes.evaluation.refusal import MATCHER_VERSION
from safemerge_recipes.evaluation.tasks import FOLDER, PUBLISHED_TASKS, TAGS, TASKS, TUNING_TASKS

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of one task.

    `value` is lm-eval's aggregate, `stderr` its standard error (None where it has none). `outcomes` holds
    the score of every prompt by prompt id, in task order; empty for metrics that are not a mean over prompts.
    """

    value: float | None
    stderr: float | None
    n: int
    higher_is_better: bool | None = None
    outcomes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskScores:
    """The metrics of one task by name; lm-eval's filter follows after a comma where the task has several.

    `answers` holds what the model wrote, by prompt id, when it was asked to be kept; `source` says title, licence,
    origin and number of rows of a published benchmark.
    """

    version: str
    metrics: dict[str, Metric]
    answers: dict[str, str] = field(default_factory=dict)
    source: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """What one model scored. `settings` says under which conditions; `seconds` is wall time with loading."""

    model: str
    tasks: dict[str, TaskScores]
    settings: dict[str, Any]
    seconds: float

    def metric(self, task: str, metric: str) -> Metric:
        """Return one metric.

        Raises:
            CheckError: The task was not run, or has no such metric.
        """
        if task not in self.tasks:
            raise CheckError(f"scores of {self.model}: no task {task!r}; there are {', '.join(self.tasks)}")
        if metric not in self.tasks[task].metrics:
            known = ", ".join(self.tasks[task].metrics)
            raise CheckError(f"scores of {self.model}, task {task}: no metric {metric!r}; there are {known}")
        return self.tasks[task].metrics[metric]

    def to_json(self) -> str:
        """Return strict JSON: no NaN, no infinities."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Scores:
        """Return the scores that `to_json` wrote.

        Raises:
            CheckError: The text is not such a file.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError(f"this version reads format {FORMAT}")
            tasks = {
                name: TaskScores(
                    version=task["version"],
                    metrics={key: Metric(**metric) for key, metric in task["metrics"].items()},
                    answers=task["answers"],
                    source=task.get("source"),
                )
                for name, task in data.pop("tasks").items()
            }
            return cls(tasks=tasks, **data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckError(f"scores: not a safemerge scores file ({type(error).__name__}: {error})") from error


def evaluate(
    model: Path | str | Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    peft: Path | str | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    keep_answers: bool = False,
    progress: bool = False,
    threads: int | None = None,
    name: str | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = True,
    task_path: Path | str | None = None,
) -> Scores:
    """Return the scores of a model.

    The tokenizer's chat template is applied when it has one; `settings` records the template's hash, for
    safety depends on it strongly. Compare only scores whose settings agree.

    Args:
        model: A model folder, or a loaded transformers (or PEFT) model, which then needs `tokenizer` and
            stays on its device in its dtype.
        tasks: Names of tasks, or the tags `safemerge` and `safemerge_tuning`.
        limit: Only the first so many prompts of each task. The shipped prompts come round robin over their
            categories, so that the first ones are balanced.
        batch_size: Prompts in a batch; 32 on a CPU and 64 elsewhere unless said.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: `auto`, `bfloat16`, `float16` or `float32`. `auto` is the checkpoint's on an accelerator; on a
            CPU bfloat16 where the processor computes in it, else float32.
        peft: An adapter folder to apply to the model folder.
        tokenizer: Of a loaded model.
        seed: Of everything that is random; the shipped tasks decode greedily.
        keep_answers: Keep what the model wrote.
        progress: Let lm-eval print its progress.
        threads: On a CPU; torch's own choice unless said. Where other work shares the cores, 1 is fastest:
            threads that wait for each other cost more than they bring.
        name: What to call the model in the scores; its folder's name unless said.
        num_fewshot: Examples in the prompt; the task's own number unless said.
        chat_template: Apply the tokenizer's chat template when it has one.
        task_path: A folder with further lm-eval tasks.

    Raises:
        CheckError: The extra is missing, a task is unknown, or the model cannot be loaded or scored. Unknown
            tasks are found before the model is loaded.
    """
    start = time.perf_counter()
    names = expand(tasks)
    if limit is not None and limit < 1:
        raise CheckError(f"limit: found {limit}; expected at least 1 prompt")
    sources = _published(names)
    with quiet(progress), _kept_mode(model):
        manager = _task_manager(names, task_path)
        with _torch_threads(threads):
            loaded, settings = _load(model, tokenizer, peft, device, dtype, batch_size)
            if not chat_template:
                settings["chat_template_sha256"] = None
            settings |= {"limit": limit, "seed": seed, "num_fewshot": num_fewshot}
            chat = settings["chat_template_sha256"] is not None
            raw = _run(loaded, names, manager, limit, seed, num_fewshot, chat)
    scores = {task: replace(_task_scores(task, raw, keep_answers), source=sources.get(task)) for task in raw["samples"]}
    label = name or (Path(model).name if isinstance(model, str | Path) else type(model).__name__)
    return Scores(label, scores, settings, round(time.perf_counter() - start, 3))


def expand(tasks: Sequence[str]) -> list[str]:
    """Replace tags by their tasks; drop repeats; keep the order."""
    if isinstance(tasks, str):
        tasks = [tasks]
    names = [name for task in tasks for name in TAGS.get(task, (task,))]
    if not names:
        raise CheckError(f"tasks: found none; expected at least one, such as {TASKS[0]}")
    return list(dict.fromkeys(names))


def _published(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What published benchmarks are, by task; says where to get their prompts before a model is loaded for nothing."""
    found = {name: benchmarks.load(name.removeprefix("safemerge_")) for name in names if name in PUBLISHED_TASKS}
    return {
        task: {"title": one.title, "licence": one.licence, "origin": one.origin, "rows": len(one)}
        for task, one in found.items()
    }


def _task_manager(names: Sequence[str], task_path: Path | str | None) -> Any:
    shipped = {*TASKS, *TUNING_TASKS, *PUBLISHED_TASKS}
    others = [name for name in names if name not in shipped]
    if others:
        # A misspelt shipped name is worth a quick answer: lm-eval's own index takes seconds to read.
        for name in others:
            if name.startswith("safemerge") and task_path is None:
                raise _unknown(name, sorted({*shipped, *TAGS}))
    # Read when lm-eval is imported; its pool of bootstrap workers outlasts the work it is given.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CheckError(
            f"evaluation: {error.name or 'lm_eval'} cannot be imported; needed are lm-eval, transformers "
            "and peft. Try `pip install 'safemerge-recipes[eval]'`."
        ) from error
    if task_path is not None and not Path(task_path).is_dir():
        raise CheckError(f"evaluate.task_path: {task_path}: found no folder; expected one with lm-eval tasks")
    folders: list[str | Path] = [str(FOLDER), *([] if task_path is None else [str(task_path)])]
    manager = TaskManager(include_path=folders, include_defaults=bool(others))
    for name in others:
        if name not in manager.all_tasks:
            raise _unknown(name, manager.all_tasks)
    return manager


def _unknown(name: str, known: Sequence[str]) -> CheckError:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"shipped tasks are {', '.join(TASKS)}"
    return CheckError(f"task {name!r}: unknown here and to lm-eval; {hint}")


def _load(
    model: Any, tokenizer: Any, peft: Path | str | None, device: str, dtype: str, batch_size: int | None
) -> tuple[Any, dict[str, Any]]:
    """Return lm-eval's wrapper of the model and the settings it runs under."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    if isinstance(model, str | Path):
        folder = Path(model).resolve()
        if not (folder / "config.json").is_file():
            raise CheckError(f"model {model}: found no config.json; expected a model folder")
        device, dtype = choose(device, dtype)
        batch_size = batch_size or (32 if device == "cpu" else 64)
        adapter = None if peft is None else str(Path(peft).resolve())
        if adapter and not Path(adapter, "adapter_config.json").is_file():
            raise CheckError(f"adapter {peft}: found no adapter_config.json; expected a PEFT adapter folder")
        try:
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
            wrapped = HFLM(
                pretrained=str(folder),
                tokenizer=tokenizer,
                dtype=dtype,
                device=device,
                batch_size=batch_size,
                peft=adapter,
            )
        except Exception as error:
            what = f"{type(error).__name__}: {_first_line(error)}"
            raise CheckError(
                f"model {model}: transformers could not load it ({what}). "
                "`safemerge verify` checks a merged folder tensor by tensor."
            ) from error
    else:
        if tokenizer is None:
            raise CheckError("evaluation of a loaded model: found no tokenizer; expected `tokenizer=`")
        if peft is not None:
            raise CheckError("evaluation of a loaded model: apply the adapter before, or pass the folder")
        batch_size = batch_size or (32 if model.device.type == "cpu" else 64)
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    parameter = next(wrapped.model.parameters())
    template = getattr(tokenizer, "chat_template", None)
    settings = {
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "batch_size": batch_size,
        "threads": torch.get_num_threads() if parameter.device.type == "cpu" else None,
        "chat_template_sha256": None if template is None else _sha256(json.dumps(template)),
        "refusal_matcher": MATCHER_VERSION,
        "versions": {
            package: metadata.version(package) for package in ("lm_eval", "transformers", "tokenizers", "torch", "peft")
        },
    }
    return wrapped, settings


def _run(
    wrapped: Any, names: Sequence[str], manager: Any, limit: int | None, seed: int, shots: int | None, chat: bool
) -> Any:
    import lm_eval

    try:
        with _without_inventory():
            return lm_eval.simple_evaluate(
                model=wrapped,
                tasks=list(names),
                task_manager=manager,
                limit=limit,
                num_fewshot=shots,
                log_samples=True,
                apply_chat_template=chat,
                bootstrap_iters=1000,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except Exception as error:
        hint = " Tasks that are not shipped load their data from the hub." if set(names) - {*TASKS} else ""
        raise CheckError(
            f"evaluation of {', '.join(names)} failed: {type(error).__name__}: {_first_line(error)}.{hint}"
        ) from error


def _task_scores(task: str, raw: Mapping[str, Any], keep_answers: bool) -> TaskScores:
    """Turn lm-eval's results of one task into ours."""
    samples = raw["samples"][task]
    better = raw.get("higher_is_better", {}).get(task, {})
    metrics = {}
    for key, value in raw["results"][task].items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr"):
            continue
        rows = [row for row in samples if row.get("filter", "none") == chosen]
        outcomes = {_prompt_id(row): float(row[metric]) for row in rows if _is_number(row.get(metric))}
        metrics[metric if chosen == "none" else key] = Metric(
            value=_finite(value),
            stderr=_finite(raw["results"][task].get(f"{metric}_stderr,{chosen}")),
            n=len(rows),
            higher_is_better=better.get(metric),
            outcomes=outcomes if len(outcomes) == len(rows) else {},
        )
    answers = {}
    if keep_answers:
        for row in samples:
            text = row["resps"][0][0]
            # Multiple choice has likelihoods instead of an answer.
            if isinstance(text, str):
                answers[_prompt_id(row)] = text
    return TaskScores(str(raw["versions"].get(task)), metrics, answers)


def _prompt_id(row: Mapping[str, Any]) -> str:
    """Return the row's own id where the task has one, else lm-eval's hash of the row."""
    own = row["doc"].get("id") if isinstance(row["doc"], dict) else None
    return str(own if own is not None else row["doc_hash"])


def _is_number(value: Any) -> bool:
    return _finite(value) is not None


def _finite(value: Any) -> float | None:
    """Return numbers, also numpy's, as floats; NaN, infinities and words as None."""
    if value is None or isinstance(value, str | tuple | list | dict):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def choose(device: str, dtype: str) -> tuple[str, str]:
    """Return the device and dtype that `auto` stands for here; see `evaluate`."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise CheckError(f"device {device}: no CUDA device is available here. Try `--device cpu`.")
    if dtype == "auto" and device == "cpu":
        dtype = "bfloat16" if _cpu_has_bfloat16() else "float32"
    return device, dtype


def _cpu_has_bfloat16() -> bool:
    """Return whether the processor computes in bfloat16; emulated, it is far slower than float32."""
    import torch

    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        supported = getattr(torch.cpu, probe, None)
        if supported is not None and supported():
            return True
    return False


def _sha256(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _kept_mode(model: Any) -> Iterator[None]:
    """Put a loaded model back into training mode if it was in it; lm-eval switches it off."""
    was_training = getattr(model, "training", False)
    try:
        yield
    finally:
        if was_training:
            model.train()


@contextlib.contextmanager
def _without_inventory() -> Iterator[None]:
    """Keep lm-eval from listing every package and device of the machine, which takes it seconds a call.

    What matters of them is in the settings.
    """
    from lm_eval import evaluator

    inventory = getattr(evaluator, "add_env_info", None)
    if inventory is None:  # a release that does not
        yield
        return
    evaluator.add_env_info = lambda results: None
    try:
        yield
    finally:
        evaluator.add_env_info = inventory


@contextlib.contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    if threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def quiet(progress: bool) -> Iterator[None]:
    """Keep lm-eval's log, bars and printed remarks off the terminal; failures come as exceptions."""
    if progress:
        yield
        return
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers", "accelerate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
