"""Scores a model on lm-eval tasks: the shipped ones, or any that lm-eval knows.

A model is a folder on disk or an already loaded transformers model. Tasks are scored one after the other: each result
is kept as soon as it is there, each answer of the one in work, too. Needs the `eval` extra, which is imported only
when a function here is called. Knows nothing of merging.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import CheckError, WriteError
from safemerge_recipes.evaluation.likelihood import refusal_likelihoods
from safemerge_recipes.evaluation.listening import Listening
from safemerge_recipes.evaluation.lm_results import prompt_id, task_scores
from safemerge_recipes.evaluation.models import choose, versions, wrap, wrap_by
from safemerge_recipes.evaluation.quiet import alone, first_line, kept_mode, quiet, torch_threads
from safemerge_recipes.evaluation.refusal import MATCHER_VERSION
from safemerge_recipes.evaluation.scores import Metric, Scores, TaskScores
from safemerge_recipes.evaluation.store import Store, key_of
from safemerge_recipes.evaluation.suite import (
    ANSWER_TOKENS,
    Suite,
    check_backend,
    expand,
    load_suite,
)

__all__ = ["Metric", "Scores", "Subject", "TaskScores", "evaluate", "expand", "result_keys", "score"]


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
                loaded, settings = wrap(model, tokenizer, subject.peft, device, dtype, batch_size)
            else:
                loaded, settings = wrap_by(backend, Path(model), subject.peft, device, dtype, batch_size)
            if not chat_template:
                settings["chat_template_sha256"] = None
            settings |= {"limit": limit, "seed": seed, "num_fewshot": num_fewshot}
            settings |= {"answer_tokens": suite.answer_tokens}
            curved = auroc and backend == "hf"
            for task in missing:
                began = time.perf_counter()
                both = curved and _asks(suite, task)  # answers, then likelihoods: each half of the task
                telling = partial(_share, told, task, sizes[task], 0.0, 0.5 if both else 1.0)
                listening = Listening(loaded, kept, keys[task], telling)
                raw = _run(listening, suite.tasks[task], task, settings, limit, seed, num_fewshot)
                telling = partial(_share, told, task, sizes[task], 0.5, 1.0)
                likely = _likelihoods(loaded, raw["samples"][task], settings, telling) if both else {}
                source = dict(suite.sources[task]) if task in suite.sources else None
                scores = replace(task_scores(task, raw), source=source, likelihoods=likely)
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
    machine = choose(str(given.get("device", "auto")), str(given.get("dtype", "auto")))  # what `auto` stands for
    known = [defaults | given, machine, suite.answer_tokens, suite.fingerprint, MATCHER_VERSION, versions()]
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


def _run(
    listening: Listening, task: Any, name: str, settings: Mapping[str, Any], limit: int | None, seed: int,
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
    return {prompt_id(row): value for row, value in zip(samples, values, strict=True)}
