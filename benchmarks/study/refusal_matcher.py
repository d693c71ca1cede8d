"""What the refusal matcher says of answers that people judged, by class, and published phrase lists beside it.

The answers are those that the package `pyrit` (MIT) ships to test its scorers, read from its wheel, which is downloaded
once. A hash of the answer puts each into one of two halves: rules are written on `seen`, figures come from `unseen`.
Run: python -m benchmarks.study.refusal_matcher [seen] [--errors]
"""

import csv
import hashlib
import io
import sys
from collections import Counter

from safemerge_recipes.evaluation import packaged
from safemerge_recipes.evaluation.refusal import MATCHER_VERSION, classify, keyword_list, keyword_lists

PACKAGE = "pyrit"
PREFIX = "pyrit/datasets/scorer_evals/"
CLASSES = ("refuses", "answers", "reaches the harmful aim", "misses it", "harmful", "mildly harmful", "harmless")


def half(answer: str) -> str:
    return "seen" if hashlib.sha256(answer.strip().encode()).digest()[0] % 2 == 0 else "unseen"


def said(path: str, row: dict[str, str]) -> str:
    """What people say of an answer."""
    label = (row.get("human_score") or row.get("human_score_1") or "0").lower()
    if path.startswith("refusal_scorer/"):
        return "refuses" if label in ("1", "true") else "answers"
    if path.startswith("objective/"):
        return "reaches the harmful aim" if label in ("1", "true") else "misses it"
    score = float(label)
    return "harmful" if score >= 0.5 else "mildly harmful" if score else "harmless"


def labelled() -> list[tuple[str, str, str]]:
    """(class, request, answer) of every answer; those that several people scored apart are left out."""
    if packaged.version(PACKAGE) is None:
        packaged.download(PACKAGE)
    found = []
    for name, data in packaged.files(PACKAGE, prefix=PREFIX, suffix=".csv").items():
        path = name.removeprefix(PREFIX)
        if "multi" in path or "mini" in path:
            continue
        text = data.decode()
        while text.startswith("#"):
            text = text.split("\n", 1)[1]
        rows = csv.DictReader(io.StringIO(text))
        found += [(said(path, row), row["objective"], row["assistant_response"]) for row in rows]
    return [row for row in found if row[2]]


def main() -> None:
    wanted = "seen" if "seen" in sys.argv else "unseen"
    rows = [row for row in labelled() if half(row[2]) == wanted]
    print(f"{len(rows)} answers of {PACKAGE} {packaged.version(PACKAGE)}, the {wanted} half; share called a refusal")
    print()
    counts = Counter(label for label, *_ in rows)
    print("| matcher | " + " | ".join(f"{label} ({counts[label]})" for label in CLASSES) + " |")
    print("|---" * (1 + len(CLASSES)) + "|")
    matchers = {f"three-outcome, version {MATCHER_VERSION}": lambda text: classify(text) == "refuses"}
    matchers |= {name: keyword_list(name).refuses for name in keyword_lists()}
    for name, refuses in matchers.items():
        called = Counter(label for label, _, answer in rows if refuses(answer))
        print(f"| {name} | " + " | ".join(f"{called[label]}" for label in CLASSES) + " |")
    print()
    print("degenerate:", sum(classify(answer) == "degenerate" for *_, answer in rows))
    if "--errors" in sys.argv:
        for label, request, answer in rows:
            outcome = classify(answer)
            if (outcome == "refuses") == (label in ("answers", "reaches the harmful aim", "harmful")):
                print(f"\n[{label}, {outcome}] {request[:80]!r}\n    {answer[:300]!r}")


if __name__ == "__main__":
    main()
