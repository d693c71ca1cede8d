"""Scores a model on lm-eval tasks: the shipped ones, or any that lm-eval knows.

A model is a folder on disk or an already loaded transformers model. Tasks are scored one after the other: each result
is kept as soon as it is there, each answer of the one in work, too. Needs the `eval` extra, which is imported only
when a function here is called. Knows nothing of merging.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import CheckError, WriteError
from safemerge_recipes.evaluation.choices import class_metrics
from safemerge_recipes.evaluation.likelihood import refusal_likelihoods
from safemerge_recipes.evaluation.quiet import alone, first_line, kept_mode, quiet, torch_threads
from safemerge_recipes.evaluation.refusal import MATCHER_VERSION
from safemerge_recipes.evaluation.scores import Metric, Scores, TaskScores
from safemerge_recipes.evaluation.store import Store, key_of
from safemerge_recipes.evaluation.suite import (
    ANSWER_TOKENS,
    BACKENDS,
    PACKAGES,
    Suite,
    check_backend,
    expand,
    load_suite,
)

__all__ = ["Metric", "Scores", "Subject", "TaskScores", "choose", "evaluate", "expand", "result_keys", "score"]


Tell = Callable[[str, int, int], None]
"""Is told a task, how many of its prompts are done, and of how many."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is scored.

    Attributes:
        name: What it is called in the scores.
        key: Names its bytes, so that its scores are found again; None: nothing is kept.
        open: Returns the model, loaded or its folder, and its tokenizer (None: the folder's).
        peft: An adapter folder to apply to the model folder.
    """

    name: str
    key: str | None
    open: Callable[[], tuple[Any, Any]]
    peft: Path | str | None = None


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
    threads: int | None = None,
    name: str | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = True,
    task_path: Path | str | None = None,
    answer_tokens: int = ANSWER_TOKENS,
    auroc: bool = True,
    backend: str = "hf",
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
        threads: On a CPU; torch's own choice unless said. Where other work shares the cores, 1 is fastest:
            threads that wait for each other cost more than they bring.
        name: What to call the model in the scores; its folder's name unless said.
        num_fewshot: Examples in the prompt; the task's own number unless said.
        chat_template: Apply the tokenizer's chat template when it has one.
        task_path: A folder with further lm-eval tasks.
        answer_tokens: Tokens that an answer to a harmful or harmless request may have.
        auroc: Also measure how likely a refusal is, of harmful and harmless requests (`likelihood`).
        backend: Which of lm-eval's models runs a folder, by its own name; no AUROC but with `hf`.

    Raises:
        CheckError: The extra is missing, a task is unknown, or the model cannot be loaded or scored. Unknown
            tasks are found before the model is loaded.
    """
    if limit is not None and limit < 1:
        raise CheckError(f"limit: found {limit}; expected at least 1 prompt")
    suite = load_suite(tasks, task_path=task_path, answer_tokens=answer_tokens)
    check_backend(backend)
    label = name or (Path(model).name if isinstance(model, str | Path) else type(model).__name__)
    subject = Subject(label, None, lambda: (model, tokenizer), peft)
    return score(
        subject, suite, limit=limit, batch_size=batch_size, device=device, dtype=dtype, seed=seed,
        keep_answers=keep_answers, threads=threads, num_fewshot=num_fewshot, chat_template=chat_template,
        auroc=auroc, backend=backend,
    )  # fmt: skip


def score(
    subject: Subject,
    suite: Suite,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    keep_answers: bool = False,
    threads: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = True,
    auroc: bool = True,
    backend: str = "hf",
    store: Store | None = None,
    tell: Tell | None = None,
) -> Scores:
    """Return the scores of a model on loaded tasks; what the store has is not scored again.

    Args:
        subject: The model; opened only when something is missing.
        suite: The tasks.
        limit, batch_size, device, dtype, seed, keep_answers, threads, num_fewshot, chat_template, backend: See
            `evaluate`.
        auroc: Also measure how likely a refusal is, of harmful and harmless requests (`likelihood`).
        store: Where results are kept.
        tell: Told how far it is.

    Raises:
        CheckError: The model cannot be loaded or scored. What was scored is kept.
    """
    start = time.perf_counter()
    told: Tell = tell or (lambda task, done, total: None)
    sizes = {task: suite.size(task, limit) for task in suite.tasks}
    keys = result_keys(
        subject, suite, limit=limit, batch_size=batch_size, device=device, dtype=dtype, seed=seed,
        num_fewshot=num_fewshot, chat_template=chat_template, auroc=auroc, backend=backend,
    )  # fmt: skip
    kept = store if store is not None and subject.key is not None else None
    found = {task: one for task in suite.tasks if kept is not None and (one := kept.get(keys[task])) is not None}
    missing = [task for task in suite.tasks if task not in found]
    for task in found:
        told(task, sizes[task], sizes[task])
    if missing:
        model, tokenizer = subject.open()
        with _told_when_stopped(subject.name, kept), quiet(False), kept_mode(model), torch_threads(threads):
            if backend == "hf":
                loaded, settings = _load(model, tokenizer, subject.peft, device, dtype, batch_size)
            else:
                loaded, settings = _load_folder(backend, Path(model), subject.peft, device, dtype, batch_size)
            if not chat_template:
                settings["chat_template_sha256"] = None
            settings |= {"limit": limit, "seed": seed, "num_fewshot": num_fewshot}
            settings |= {"answer_tokens": suite.answer_tokens}
            curved = auroc and backend == "hf"
            for task in missing:
                began = time.perf_counter()
                both = curved and _asks(suite, task)  # answers, then likelihoods: each half of the task
                telling = partial(_share, told, task, sizes[task], 0.0, 0.5 if both else 1.0)
                listening = _Listening(loaded, kept, keys[task], telling)
                raw = _run(listening, suite.tasks[task], task, settings, limit, seed, num_fewshot)
                telling = partial(_share, told, task, sizes[task], 0.5, 1.0)
                likely = _likelihoods(loaded, raw["samples"][task], settings, telling) if both else {}
                source = dict(suite.sources[task]) if task in suite.sources else None
                scores = replace(_task_scores(task, raw), source=source, likelihoods=likely)
                found[task] = Scores(subject.name, {task: scores}, settings, round(time.perf_counter() - began, 3))
                if kept is not None:
                    kept.keep(keys[task], subject.name, found[task])
    tasks = {task: found[task].tasks[task] for task in suite.tasks}
    seconds = time.perf_counter() - start if missing else sum(one.seconds for one in found.values())
    whole = Scores(subject.name, tasks, next(iter(found.values())).settings, round(seconds, 3))
    return whole if keep_answers else whole.without_answers()


def result_keys(subject: Subject, suite: Suite, **given: Any) -> dict[str, str]:
    """Under which key a store has the scores of a model, by task; `given` are arguments of `score`."""
    defaults = {"dtype": "auto", "batch_size": None, "num_fewshot": None, "chat_template": True, "seed": 0}
    defaults["auroc"] = True
    given = {name: value for name, value in given.items() if (name, value) != ("backend", "hf")}
    machine = Path("/dev/nvidiactl").exists()  # what `auto` stands for
    known = [defaults | given, machine, suite.answer_tokens, suite.fingerprint, MATCHER_VERSION, _versions()]
    return {task: key_of(subject.key, task, known) for task in suite.tasks}


@contextlib.contextmanager
def _told_when_stopped(name: str, store: Store | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        kept = "" if store is None else "; what is scored is kept, the same command goes on from there"
        raise WriteError(f"stopped while scoring {name}{kept}") from None


def _share(told: Tell, task: str, size: int, begin: float, end: float, done: int, total: int) -> None:
    """Tells in prompts how far a task is in requests of one of its parts: a choice of three asks for three."""
    told(task, int(size * (begin + (end - begin) * done / total)) if total else int(size * end), size)


def _versions() -> dict[str, str]:
    return {package: metadata.version(package) for package in PACKAGES}


class _Listening:
    """Stands before lm-eval's model: says how far it is, and answers what is kept without asking it again."""

    def __init__(self, loaded: Any, store: Store | None, key: str, tell: Callable[[int, int], None]) -> None:
        self._known: dict[str, Any] = {} if store is None else store.answers(key)
        self._store, self._key, self._tell = store, key, tell
        kinds = ("generate_until", "loglikelihood")
        self._asked = {kind: getattr(type(loaded), kind).__get__(loaded) for kind in kinds}
        self._done = self._total = 0
        self.model = loaded
        loaded.generate_until = lambda requests, **o: self._answer("generate_until", requests, o)
        loaded.loglikelihood = lambda requests, **o: self._answer("loglikelihood", requests, o)
        loaded.set_cache_hook(self)

    def _answer(self, kind: str, requests: list[Any], options: dict[str, Any]) -> list[Any]:
        sampled = kind == "generate_until" and any(one.args[1].get("do_sample") for one in requests)
        names = [key_of(kind, one.args[0], one.args[1] if kind == "loglikelihood" else None) for one in requests]
        left = [one for one, name in zip(requests, names, strict=True) if sampled or name not in self._known]
        self._done, self._total = len(requests) - len(left), len(requests)
        self._tell(self._done, self._total)
        self._keeping = self._store is not None and not sampled
        fresh = iter(self._asked[kind](left, **options) if left else ())
        return [
            next(fresh) if sampled or name not in self._known else _as_given(self._known[name])
            for name in names
        ]  # fmt: skip

    def add_partial(self, kind: str, request: tuple[Any, Any], answer: Any) -> None:
        """Is lm-eval's cache hook: called with every answer as soon as it is there."""
        self._done = min(self._done + 1, self._total)
        self._tell(self._done, self._total)
        if self._keeping and self._store is not None:
            name = key_of(kind, request[0], request[1] if kind == "loglikelihood" else None)
            self._store.keep_answer(self._key, name, answer)


def _as_given(answer: Any) -> Any:
    return tuple(answer) if isinstance(answer, list) else answer


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
            what = f"{type(error).__name__}: {first_line(error)}"
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
        "versions": _versions(),
    }
    return wrapped, settings


def _load_folder(
    backend: str, folder: Path, peft: Path | str | None, device: str, dtype: str, batch_size: int | None
) -> tuple[Any, dict[str, Any]]:
    """Return lm-eval's model of this name for a folder and the settings it runs under."""
    from lm_eval.api.registry import get_model
    from transformers import AutoTokenizer

    if peft is not None:
        raise CheckError(f"evaluate.backend {backend}: adapters are applied with hf alone; expected a full model")
    given: dict[str, Any] = {"dtype": dtype, "batch_size": batch_size or "auto"}
    if backend not in BACKENDS:  # those find their device and their batches themselves
        device, dtype = choose(device, dtype)
        given = {"device": device, "dtype": dtype, "batch_size": batch_size or (32 if device == "cpu" else 64)}
    try:
        template = getattr(AutoTokenizer.from_pretrained(folder), "chat_template", None)
        wrapped = get_model(backend)(pretrained=str(folder.resolve()), **given)
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise CheckError(f"model {folder.name}: lm-eval's {backend} could not load it ({what})") from error
    settings = {
        **given,
        "device": str(getattr(wrapped, "device", backend)),
        "backend": backend,
        "threads": None,
        "chat_template_sha256": None if template is None else _sha256(json.dumps(template)),
        "refusal_matcher": MATCHER_VERSION,
        "versions": _versions(),
    }
    return wrapped, settings


def _run(
    listening: _Listening, task: Any, name: str, settings: Mapping[str, Any], limit: int | None, seed: int,
    shots: int | None,
) -> Any:  # fmt: skip
    import lm_eval
    from lm_eval.tasks import TaskManager

    try:
        with alone():
            return lm_eval.simple_evaluate(
                model=listening.model,
                tasks=[task],
                task_manager=TaskManager(include_defaults=False),  # without one lm-eval reads its whole index
                limit=limit,
                num_fewshot=shots,
                log_samples=True,
                apply_chat_template=settings["chat_template_sha256"] is not None,
                bootstrap_iters=1000,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except Exception as error:
        raise CheckError(f"evaluation of {name} failed: {type(error).__name__}: {first_line(error)}") from error


def _asks(suite: Suite, task: str) -> bool:
    """Whether a task asks for what may be refused."""
    return "refusal" in suite.better[task]


def _likelihoods(
    loaded: Any, samples: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], tell: Callable[[int, int], None]
) -> dict[str, float]:
    """How likely a refusal is, by prompt id, from the prompts that lm-eval made."""
    contexts = [str(row["arguments"][0][0]) for row in samples]
    bare = settings["chat_template_sha256"] is None
    values = refusal_likelihoods(
        loaded.model, loaded.tokenizer, contexts, special_tokens=bare, tell=lambda done: tell(done, len(contexts))
    )
    return {_prompt_id(row): value for row, value in zip(samples, values, strict=True)}


def _task_scores(task: str, raw: Mapping[str, Any]) -> TaskScores:
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
    first = {_prompt_id(row): row for row in samples if row.get("filter", "none") == "none"}
    metrics |= class_metrics(first)
    answers = {}
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
    return hashlib.sha256(text.encode()).hexdigest()
