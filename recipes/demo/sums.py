"""Chains of sums with worked answers: the demo's harmless task.

A problem is a chain of 3 to 5 numbers between 1 and 99 joined by + and -, whose running total never
becomes negative. It is fixed by its seed. Knows nothing of models; needs only the standard library.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

# First seed of each split. The ranges are far apart, and a text belongs to exactly one split (`split_of`).
FIRST_SEED = {
    "train": 0,
    "tuning": 10_000_000,
    "test": 20_000_000,
    "alignment": 30_000_000,
    "safety": 40_000_000,
}
_BUCKETS = ("tuning", "test", "alignment", "safety")


@dataclass(frozen=True, slots=True)
class Sum:
    """One problem: the user's message, the worked answer and its result."""

    question: str
    worked: str
    result: int


def make(seed: int) -> Sum:
    """Return the problem of this seed."""
    rng = random.Random(seed)
    total = rng.randint(1, 99)
    question, steps = f"What is {total}", []
    for _ in range(rng.randint(2, 4)):
        term = rng.randint(1, 99)
        minus = term <= total and rng.random() < 0.5
        result = total - term if minus else total + term
        question += f" {'-' if minus else '+'} {term}"
        steps.append(f"{total} {'minus' if minus else 'plus'} {term} is {result}.")
        total = result
    return Sum(question + "?", " ".join([*steps, f"The answer is {total}."]), total)


def split_of(question: str) -> str:
    """Return the one split this text may appear in: 6 of 10 texts are for training."""
    bucket = hashlib.sha256(question.encode()).digest()[0] % 10
    return _BUCKETS[bucket] if bucket < len(_BUCKETS) else "train"


def stream(split: str) -> Iterator[Sum]:
    """Yield the problems of a split in seed order, each text once."""
    seen: set[str] = set()
    seed = FIRST_SEED[split]
    while True:
        problem = make(seed)
        if problem.question not in seen and split_of(problem.question) == split:
            seen.add(problem.question)
            yield problem
        seed += 1


def take(split: str, count: int) -> list[Sum]:
    """Return the first `count` problems of a split."""
    return list(islice(stream(split), count))


def read_result(answer: str) -> int | None:
    """Return the last integer after "The answer is", else the last integer, else None."""
    _, _, tail = answer.rpartition("The answer is")
    numbers = re.findall(r"-?\d+", tail.replace(",", "")) or re.findall(r"-?\d+", answer.replace(",", ""))
    return int(numbers[-1]) if numbers else None
