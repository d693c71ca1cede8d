"""Short invented study reports with a yes, no or maybe question: PubMedQA's form, none of its text.

The report gives numbers and the authors' reading; the answer follows from them: yes (a clear effect), no
(none in a large study), maybe (too few people to say). Nothing here is medical knowledge: treatments and
numbers are made up. A seed fixes a study on every Python version, and the hash of its question admits it to
one of training, tuning and test only. Standard library only.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

FIRST_SEED = {"training": 0, "tuning": 2_000_000, "test": 3_000_000}
COUNT = {"tuning": 90, "test": 150}
ANSWERS = ("yes", "no", "maybe")

_TREATMENTS = (
    "a daily walk of thirty minutes", "a low-salt diet", "group singing", "a weekly phone call from a nurse",
    "morning light", "a new inhaler", "balance training", "a zinc tablet", "breathing exercises",
    "shorter waiting times", "a reminder by text message", "an extra glass of water at meals",
    "a smaller dose of the usual drug", "early physiotherapy", "an ointment with honey", "a warm blanket",
)  # fmt: skip
_GROUPS = (
    "adults with asthma", "older people after a fall", "patients after knee surgery", "night-shift nurses",
    "people with type 2 diabetes", "children with eczema", "adults with migraine", "patients on dialysis",
    "people with chronic back pain", "new mothers", "students before examinations", "patients with gout",
)  # fmt: skip
_EVENTS = (
    "a second visit to the clinic", "a bad night's sleep", "a fall at home", "a wound infection",
    "a missed appointment", "an attack of pain", "a return to hospital", "a day off work",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Study:
    """One question: the report, the question about it, its answer (yes, no or maybe) and the reason for it."""

    context: str
    question: str
    answer: str
    reason: str


def make(seed: int) -> Study:
    """Return the study of this seed."""
    uniform = random.Random(seed).random

    def pick(low: int, high: int) -> int:
        return low + int((high - low + 1) * uniform())

    treatment = _TREATMENTS[pick(0, len(_TREATMENTS) - 1)]
    group = _GROUPS[pick(0, len(_GROUPS) - 1)]
    event = _EVENTS[pick(0, len(_EVENTS) - 1)]
    answer = ANSWERS[seed % 3]
    size = pick(9, 14) if answer == "maybe" else pick(200, 400)
    control = pick(4, 6) if answer == "maybe" else size * pick(40, 60) // 100
    treated = {
        "yes": control * pick(30, 55) // 100,
        "no": control + pick(-3, 3),
        "maybe": control - pick(1, 2),
    }[answer]
    reading = {
        "yes": "The difference was statistically significant (p < 0.001).",
        "no": "The groups did not differ (p = 0.8), although the study was large enough to show it.",
        "maybe": "The difference was not significant (p = 0.4); the study was too small to exclude one.",
    }[answer]
    context = (
        f"To learn whether {treatment} helps {group}, {2 * size} of them were assigned at random to receive "
        f"it or to usual care. After {pick(2, 12)} months, {treated} of {size} who received it and "
        f"{control} of {size} in usual care had had {event}. {reading}"
    )
    counts = f"{treated} of {size} against {control} of {size} had {event}"
    reason = {
        "yes": f"With {treatment}, {counts}, a difference too large for chance.",
        "no": f"With {treatment}, {counts}, which is no difference in a study large enough to show one.",
        "maybe": f"With {treatment}, {counts}, too few people to say.",
    }[answer]
    return Study(context, f"Does {treatment} lower the risk of {event} in {group}?", answer, reason)


def split_of(question: str) -> str:
    """Return the only split a question may appear in: tuning and test get a quarter of all questions each."""
    return {0: "tuning", 1: "test"}.get(hashlib.sha256(question.encode()).digest()[0] % 4, "training")


def stream(split: str) -> Iterator[tuple[int, Study]]:
    """Yield (seed, study) of a split in seed order, each question once, the three answers in turn.

    There are 1536 questions, so that a split runs out: do not ask for more than 300 (training: 600).
    """
    seen: set[str] = set()
    turn, seed = 0, FIRST_SEED[split]
    while True:
        study = make(seed)
        fits = study.answer == ANSWERS[turn % 3] and split_of(study.question) == split
        if fits and study.question not in seen:
            seen.add(study.question)
            turn += 1
            yield seed, study
        seed += 1


def studies(split: str, count: int | None = None) -> list[tuple[int, Study]]:
    """Return the first `count` studies of a split with their seeds; by default all that the task uses."""
    return list(islice(stream(split), COUNT[split] if count is None else count))
