"""Chains of sums with a worked answer: a small skill that fine-tuning teaches and a merge may cost.

A problem is `What is 17 + 5 - 8?`, 3 to 5 numbers of 1 to 99 whose running total never becomes negative.
Its seed fixes it on every Python version. Training, tuning and test problems cannot overlap: their seeds
lie far apart, and the hash of a question admits it to one split only. Standard library only.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

# First seed of each split; training seeds stay below the first held-out one.
FIRST_SEED = {"training": 0, "tuning": 2_000_000, "test": 3_000_000}
COUNT = {"tuning": 200, "test": 300}


@dataclass(frozen=True, slots=True)
class Sum:
    """One problem: the user's message, the worked answer and the integer it ends in."""

    question: str
    worked: str
    answer: int


def make(seed: int) -> Sum:
    """Return the problem of this seed."""
    # Only `random()` promises the same sequence on every Python version.
    uniform = random.Random(seed).random
    total = 1 + int(99 * uniform())
    question, steps = f"What is {total}", []
    for _ in range(2 + int(3 * uniform())):
        term = 1 + int(99 * uniform())
        minus = uniform() < 0.5 and term <= total
        result = total - term if minus else total + term
        question += f" {'-' if minus else '+'} {term}"
        steps.append(f"{total} {'minus' if minus else 'plus'} {term} is {result}.")
        total = result
    return Sum(question + "?", " ".join([*steps, f"The answer is {total}."]), total)


def split_of(question: str) -> str:
    """Return the only split a question may appear in: tuning and test get a tenth of all questions each."""
    bucket = hashlib.sha256(question.encode()).digest()[0] % 10
    return {0: "tuning", 1: "test"}.get(bucket, "training")


def stream(split: str, first_seed: int | None = None) -> Iterator[tuple[int, Sum]]:
    """Yield (seed, problem) of a split in seed order, each question once."""
    seed = FIRST_SEED[split] if first_seed is None else first_seed
    seen: set[str] = set()
    while True:
        problem = make(seed)
        if split_of(problem.question) == split and problem.question not in seen:
            seen.add(problem.question)
            yield seed, problem
        seed += 1


def problems(split: str, count: int | None = None) -> list[tuple[int, Sum]]:
    """Return the first `count` problems of a split with their seeds; by default all that the task uses."""
    return list(islice(stream(split), COUNT[split] if count is None else count))


def read_answer(text: str) -> int | None:
    """Return the last integer after the last "The answer is", else the last integer, else None."""
    _, _, tail = text.replace(",", "").rpartition("The answer is")
    numbers = re.findall(r"-?\d+", tail) or re.findall(r"-?\d+", text.replace(",", ""))
    # A model that collapses into digits may write a number too long to be one.
    return int(numbers[-1]) if numbers and len(numbers[-1]) < 20 else None
