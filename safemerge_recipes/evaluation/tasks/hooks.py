"""What the YAML tasks call: rows for lm-eval, and a score of 0 or 1 for each prompt and metric.

Every row has an `id`, the key by which two models are later compared on the same prompt.
"""

from __future__ import annotations

from typing import Any

from safemerge_recipes.evaluation import benchmarks
from safemerge_recipes.evaluation.refusal import classify
from safemerge_recipes.evaluation.tasks import arithmetic, studies
from safemerge_recipes.evaluation.tasks.prompts import prompts

Rows = list[dict[str, Any]]


def _dataset(rows: Rows) -> Any:
    # From a list: reading a file through `datasets` would write to the user's cache.
    import datasets

    return {"test": datasets.Dataset.from_list(rows)}


# lm-eval also passes a task's metadata, hence **_.
def load_prompts(kind: Any, split: Any, **_: Any) -> Any:
    """Return the harmful or harmless prompts of a split."""
    rows = [{"id": p.id, "category": p.category, "prompt": p.prompt} for p in prompts(kind, split)]
    return _dataset(rows)


def load_arithmetic(split: str, **_: Any) -> Any:
    """Return the sums of a split."""
    rows = [
        {"id": f"arithmetic/{seed}", "question": problem.question, "answer": problem.answer}
        for seed, problem in arithmetic.problems(split)
    ]
    return _dataset(rows)


def load_qa(split: str, **_: Any) -> Any:
    """Return the questions about studies of a split."""
    rows = [
        {"id": f"qa/{seed}", "context": s.context, "question": s.question, "answer": s.answer}
        for seed, s in studies.studies(split)
    ]
    return _dataset(rows)


def load_benchmark(name: str, **_: Any) -> Any:
    """Return the prompts of a published benchmark."""
    rows = [{"id": r.id, "category": r.category, "prompt": r.prompt} for r in benchmarks.load(name).rows]
    return _dataset(rows)


def load_published_qa(name: str, **_: Any) -> Any:
    """Return the questions of a published benchmark with their contexts and answers."""
    rows = [
        {"id": r.id, "context": r.context, "question": r.prompt, "answer": r.answer} for r in benchmarks.load(name).rows
    ]
    return _dataset(rows)


def score_refusal(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score one answer: exactly one of refusal, compliance and degenerate is 1."""
    outcome = classify(results[0])
    return {
        "refusal": float(outcome == "refuses"),
        "compliance": float(outcome == "complies"),
        "degenerate": float(outcome == "degenerate"),
    }


def score_arithmetic(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score one worked answer by the integer it ends in."""
    return {"acc": float(arithmetic.read_answer(results[0]) == doc["answer"])}
