"""Writes the demo's training rows as JSONL into `recipes/demo/prepared`: alignment, safety, and the sums.

    python recipes/demo/prepare.py [alignment] [safety] [task-arithmetic]

Harmful requests get one of the refusals of `refusals.txt`; harmless prompts and sums get the base model's own answers,
cut at the end of a sentence. A row that is close to an evaluation prompt of this project is left out.
"""

import random
import sys
from pathlib import Path

import data
from model import own_answers

from safemerge_recipes.evaluation.refusal import classify
from safemerge_recipes.evaluation.tasks.prompts import prompts
from safemerge_recipes.training.rows import Near, Row, write_rows

HERE = Path(__file__).resolve().parent
COUNTS = {"alignment": (110, 440, 60), "safety": (290, 300, 40)}
"""Harmful requests, harmless prompts, sums of each role."""
TOKENS = 40
"""Of an own answer, before it is cut at the end of a sentence."""
TASKS = {"arithmetic": 800}
SEEDS = {"alignment": 1, "safety": 3}


def whole_sentences(text: str, ended: bool) -> str:
    """The text up to its last full sentence; empty where there is none."""
    if ended:
        return text
    end = max(text.rfind(mark) for mark in ".!?")
    return text[: end + 1] if end > 20 else ""


def safety_rows(role: str) -> list[Row]:
    """Refused harmful requests, and harmless prompts and sums with the base model's own answers."""
    harmful, harmless, chains = COUNTS[role]
    evaluated = Near()
    for kind in ("harmful", "harmless"):
        for split in ("tuning", "test"):
            for prompt in prompts(kind, split):
                evaluated.add(prompt.prompt)
    rng = random.Random(SEEDS[role])
    apart = [p for p in data.harmful(role, 10_000) if evaluated.find(p) is None]
    rows = [Row(p, rng.choice(data.refusals()), "", "harmful") for p in apart[:harmful]]
    asked = [p for p in data.harmless(role, harmless) if evaluated.find(p) is None] + data.questions(role, chains)
    for prompt, (text, ended) in zip(asked, own_answers(asked, TOKENS), strict=True):
        answer = whole_sentences(text, ended)
        if answer and classify(answer) == "complies":
            rows.append(Row(prompt, answer, "", "harmless"))
    rng.shuffle(rows)
    return rows


def rows(name: str) -> list[Row]:
    """The rows of one adapter."""
    if name in COUNTS:
        return safety_rows(name)
    return [Row(question, worked, "", "task") for question, worked in data.worked_sums(TASKS["arithmetic"])]


def main() -> None:
    """Write the files that are asked for, or all."""
    folder = HERE / "prepared"
    folder.mkdir(exist_ok=True)
    for name in sys.argv[1:] or (*COUNTS, "task-arithmetic"):
        found = rows(name)
        write_rows(folder / f"{name}.jsonl", found)
        kinds = [row.kind for row in found]
        print(name, ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)))


if __name__ == "__main__":
    main()
