"""The tasks of an evaluation, found and loaded before anything costs: names, data, what each is good for.

What can be wrong with an evaluation is known from here on: extras that are missing, names nobody knows, benchmarks
that are not on this machine, data that the hub does not give. Needs the `eval` extra; imports no torch.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import CheckError
from safemerge_recipes.evaluation import benchmarks
from safemerge_recipes.evaluation.quiet import first_line, quiet
from safemerge_recipes.evaluation.tasks import FOLDER, PUBLISHED_TASKS, TAGS, TASKS, TUNING_TASKS, benchmark_of
from safemerge_recipes.sources.checkpoint import MAX_JSON_BYTES
from safemerge_recipes.storage.files import content_of

ANSWER_TOKENS = 128
"""Tokens an answer to a request may have: long enough to see a refusal that turns into help."""
_RULES = "share of answers that rules read as refusals; the benchmark's own grader is a judge (evaluate.judge)"
METRICS = dict.fromkeys(PUBLISHED_TASKS, _RULES) | {"safemerge_pubmedqa": "accuracy of the likeliest answer"}
"""What tasks under a benchmark's name report, which need not be what the benchmark does."""
PACKAGES = ("lm_eval", "transformers", "tokenizers", "torch", "peft")
"""What the `eval` extra brings; their versions are part of every score."""


@dataclass(frozen=True, slots=True)
class Suite:
    """Loaded tasks.

    Attributes:
        tasks: lm-eval's own objects by name, in the order in which they are scored; groups are their members.
        better: task -> metric -> whether higher is better.
        sources: task -> title, licence, origin and number of rows of a published benchmark.
        answer_tokens: tokens that an answer to a request may have.
        fingerprint: changes when a task's definition or prompts may have.
    """

    tasks: Mapping[str, Any]
    better: Mapping[str, Mapping[str, bool]]
    sources: Mapping[str, Mapping[str, Any]]
    answer_tokens: int
    fingerprint: str

    def only(self, names: Sequence[str]) -> Suite:
        """The suite of some of its tasks, in their order."""
        return Suite(
            {name: self.tasks[name] for name in names}, self.better, self.sources, self.answer_tokens, self.fingerprint
        )

    def size(self, task: str, limit: int | None) -> int:
        """Prompts of a task that will be answered."""
        found = len(self.tasks[task].eval_docs)
        return found if limit is None else min(limit, found)


def expand(tasks: Sequence[str]) -> list[str]:
    """Replace tags by their tasks; drop repeats; keep the order."""
    if isinstance(tasks, str):
        tasks = [tasks]
    names = [name for task in tasks for name in TAGS.get(task, (task,))]
    if not names:
        raise CheckError(f"tasks: found none; expected at least one, such as {TASKS[0]}")
    return list(dict.fromkeys(names))


def check_extra() -> None:
    """Refuses to begin where the packages that score are not installed.

    Raises:
        CheckError: one is missing; says how to get them.
    """
    missing = [name for name in PACKAGES if not _installed(name)]
    if missing:
        raise CheckError(
            f"evaluation: {', '.join(missing)} cannot be imported; needed are lm-eval, transformers and peft. "
            "Try `pip install 'safemerge-recipes[eval]'`, or --no-evaluate."
        )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module that was put in its place
        return False


BACKENDS = {"vllm": "vllm", "vllm-vlm": "vllm", "sglang": "sglang"}
"""Backends with an engine of their own, and the package that each needs."""


def check_backend(name: str) -> None:
    """Refuses a backend that lm-eval does not know or that cannot run here.

    Raises:
        CheckError: it says which there are, or what to install.
    """
    if name == "hf":
        return
    from lm_eval.models import MODEL_MAPPING

    if name not in MODEL_MAPPING:
        close = difflib.get_close_matches(name, MODEL_MAPPING, n=3, cutoff=0.4) or ["hf", "vllm"]
        raise CheckError(f"evaluate.backend {name!r}: lm-eval has no such model; did you mean {' or '.join(close)}?")
    package = BACKENDS.get(name)
    if package is not None and not _installed(package):
        raise CheckError(
            f"evaluate.backend {name}: the package {package} is not installed; try `pip install {package}`, or "
            "`--set evaluate.backend=hf`"
        )


def load_suite(
    tasks: Sequence[str], *, task_path: Path | str | None = None, answer_tokens: int = ANSWER_TOKENS
) -> Suite:
    """Finds and loads tasks with their data; no model is needed.

    Args:
        tasks: Names of tasks, of lm-eval's groups, or the tags `safemerge` and `safemerge_tuning`.
        task_path: A folder with further lm-eval tasks.
        answer_tokens: Tokens that an answer to a harmful or harmless request may have; other tasks keep their own.

    Raises:
        CheckError: The extra is missing, a task is unknown, or its data is not here and cannot be fetched.
    """
    check_extra()
    names = expand(tasks)
    sources = _published(names)
    with quiet(False):
        manager = _task_manager(names, task_path)
        loaded: dict[str, Any] = {}
        for name in names:
            loaded |= _loaded(name, manager, answer_tokens)
    better = {name: dict(task.higher_is_better() or {}) for name, task in loaded.items()}
    return Suite(loaded, better, sources, answer_tokens, _fingerprint(task_path))


def _published(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What published benchmarks are, by task; says where to get their prompts before a model is loaded for nothing."""
    found = {name: benchmarks.load(benchmark_of(name)) for name in names if name in PUBLISHED_TASKS}
    return {
        task: {
            "title": one.title,
            "licence": one.licence,
            "origin": one.origin,
            "rows": len(one),
            "metric": METRICS[task],
        }
        for task, one in found.items()
    }


def _task_manager(names: Sequence[str], task_path: Path | str | None) -> Any:
    shipped = {*TASKS, *TUNING_TASKS, *PUBLISHED_TASKS}
    others = [name for name in names if name not in shipped]
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


def _loaded(name: str, manager: Any, answer_tokens: int) -> dict[str, Any]:
    """lm-eval's task of this name, or all tasks of the group of this name."""
    from lm_eval.tasks import get_task_dict

    try:
        found = _flat(get_task_dict([name], manager))
    except CheckError:
        raise
    except Exception as error:
        raise CheckError(
            f"task {name}: its data cannot be loaded ({type(error).__name__}: {first_line(error)}). Tasks that are "
            "not shipped load it from the hub: go online once, or leave the task out."
        ) from error
    for task in found.values():
        if "refusal" in (task.higher_is_better() or {}):
            task.set_config(key="generation_kwargs", value={"max_gen_toks": answer_tokens}, update=True)
    return found


def _flat(tasks: Mapping[Any, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, task in tasks.items():
        if isinstance(task, Mapping):
            found |= _flat(task)
        elif hasattr(task, "get_all_tasks"):
            found |= {one.task_name: one for one in task.get_all_tasks()}
        else:
            found[str(name)] = task
    return found


def _fingerprint(task_path: Path | str | None) -> str:
    digest = hashlib.sha256()
    for folder in (FOLDER, *([] if task_path is None else [Path(task_path)])):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".yaml", ".py", ".jsonl") and path.is_file():
                digest.update(path.name.encode() + b"\0" + content_of(path, MAX_JSON_BYTES, "any"))
    return digest.hexdigest()[:16]
