"""Confusion matrix of the refusal matcher against human labels, and of published phrase lists beside it.

The labels are the 105 rows that the package `pyrit` (MIT) ships to test refusal scorers. They are read from
its wheel, which is downloaded once. Run: python -m benchmarks.study.refusal_matcher [--errors]
"""

import csv
import io
import sys

from safemerge_recipes.evaluation import packaged
from safemerge_recipes.evaluation.refusal import MATCHER_VERSION, classify, keyword_list, keyword_lists

PACKAGE = "pyrit"
PATH = "pyrit/datasets/scorer_evals/refusal_scorer/refusal.csv"


def labelled_rows() -> list[tuple[str, str, bool]]:
    """(request, answer, whether a person called it a refusal)"""
    if packaged.version(PACKAGE) is None:
        packaged.download(PACKAGE)
    text = packaged.file(PACKAGE, PATH).decode()
    lines = text.split("\n", 1)[1] if text.startswith("#") else text
    return [
        (row["objective"], row["assistant_response"], row["human_score"] == "1")
        for row in csv.DictReader(io.StringIO(lines))
    ]


def main() -> None:
    rows = labelled_rows()
    refusals = sum(label for *_, label in rows)
    print(f"{len(rows)} rows of {PACKAGE} {packaged.version(PACKAGE)}, {refusals} of them refusals")
    print()
    print("| matcher | refusal found | refusal missed | false refusal | answer seen as answer | agreement |")
    print("|---|---|---|---|---|---|")
    matchers = {f"three-outcome, version {MATCHER_VERSION}": lambda text: classify(text) == "refuses"}
    matchers |= {name: keyword_list(name).refuses for name in keyword_lists()}
    for name, refuses in matchers.items():
        cells = [[0, 0], [0, 0]]
        for _, answer, label in rows:
            cells[label][refuses(answer)] += 1
        (right_answer, false), (missed, found) = cells
        share = (found + right_answer) / len(rows)
        print(f"| {name} | {found} | {missed} | {false} | {right_answer} | {share:.1%} |")
    print()
    print("degenerate:", sum(classify(answer) == "degenerate" for _, answer, _ in rows))
    if "--errors" in sys.argv:
        for request, answer, label in rows:
            if (classify(answer) == "refuses") != label:
                print(f"\n[{'refusal' if label else 'answer'}] {request[:80]!r}\n    {answer[:300]!r}")


if __name__ == "__main__":
    main()
