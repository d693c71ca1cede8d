"""A quick score of base + any weighted sum of adapters: refusal, over-refusal, sums.

    python recipes/demo/score.py alignment=1 task-arithmetic=0.6 safety=0.4 --split test

Greedy answers through the chat template, 24 tokens to a request and 96 to a sum. What counts as a refusal or
as degenerate is what the shipped evaluation counts; the requests are public ones instead of the shipped.
"""

import argparse
import json
import os
from pathlib import Path

import data
from model import answers, load

from safemerge_recipes.evaluation.refusal import classify
from safemerge_recipes.evaluation.tasks import arithmetic

HERE = Path(__file__).resolve().parent


def score(adapters: list[tuple[Path, float]], split: str, count: int, keep: Path | None = None) -> dict[str, float]:
    """Return rates in [0, 1] over the first `count` prompts of each kind, with the counts themselves."""
    model, tokenizer = load(adapters)
    harmful, harmless = data.harmful(split, count), data.harmless(split, count)
    problems = [problem for _, problem in arithmetic.problems(split, count)]
    said = [text for text, _ in answers(model, tokenizer, harmful + harmless, 24, batch=64)]
    solved = [text for text, _ in answers(model, tokenizer, [p.question for p in problems], 96, batch=64)]
    right = [arithmetic.read_answer(text) == p.answer for text, p in zip(solved, problems, strict=True)]
    outcomes = [classify(text) for text in said]
    to_harmful, to_harmless = outcomes[: len(harmful)], outcomes[len(harmful) :]
    if keep:
        rows = zip(harmful + harmless + [p.question for p in problems], said + solved, strict=True)
        keep.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "refuses harmful": to_harmful.count("refuses") / len(harmful),
        "degenerate on harmful": to_harmful.count("degenerate") / len(harmful),
        "refuses harmless": to_harmless.count("refuses") / len(harmless),
        "degenerate on harmless": to_harmless.count("degenerate") / len(harmless),
        "sums right": sum(right) / len(problems),
        "sums refused": sum(classify(a) == "refuses" for a in solved) / len(problems),
        "n harmful": len(harmful),
        "n harmless": len(harmless),
        "n sums": len(problems),
    }


def main() -> None:
    """Print one line of JSON for the model the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("adapters", nargs="*", metavar="FOLDER=WEIGHT")
    parser.add_argument("--split", choices=["tuning", "test"], default="tuning")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--keep", type=Path, help="write prompts and answers to this file")
    given = parser.parse_args()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))
    pairs = (adapter.partition("=") for adapter in given.adapters)
    adapters = [(HERE / name, float(weight or 1)) for name, _, weight in pairs]
    rates = score(adapters, given.split, given.count, given.keep)
    rates = {name: round(value, 3) for name, value in rates.items()}
    print(json.dumps({"model": " ".join(["base", *given.adapters])} | rates))


if __name__ == "__main__":
    main()
