"""Scores and tests for display: the headline claims what was tested, numbers have one style."""

from __future__ import annotations

import pytest

from safemerge_recipes.report.scores import headline, read_tests
from safemerge_recipes.text import figure, fixed, percent, points, signed
from tests.fixtures.plans import SCORES, paired


@pytest.mark.parametrize(
    ("tests", "expected"),
    [
        ([paired(0.387), paired(-0.013, "safemerge_arithmetic", detected=False)],
         "Refusal +38.7 points, no change detected in arithmetic"),
        ([paired(-0.2)], "Refusal −20.0 points (worse)"),
        ([paired(0.1, "safemerge_overrefusal", higher_is_better=False)], "Over-refusal +10.0 points (worse)"),
        ([paired(0.3), paired(0.2, metric="degenerate", higher_is_better=False)], "Refusal +30.0 points"),
        ([paired(0.3), paired(0.2, metric="separation"), paired(0.1, metric="auroc")],
         "Refusal +30.0 points, separation of harmful from harmless +20.0 points"),
        ([paired(0.3), paired(0.01, "gsm8k", detected=False) | {"equivalent": True}],
         "Refusal +30.0 points, gsm8k unchanged within five points"),
        ([paired(0.3, detected=False), paired(0.0, "gsm8k", detected=False)], "No change detected in refusal or gsm8k"),
        ([paired(0.3) | {"reference": "aligned"}], "Refusal 93.0 %, over-refusal 7.0 %, gsm8k 26.8 %, "
         "not tested against the fine-tuned model"),
        ([], "Refusal 93.0 %, over-refusal 7.0 %, gsm8k 26.8 %, not tested against the fine-tuned model"),
        ([{"model": "merged", "reference": "finetuned"}], "Refusal 93.0 %, over-refusal 7.0 %, gsm8k 26.8 %, "
         "not tested against the fine-tuned model"),
    ],
)  # fmt: skip
def test_the_headline_says_what_the_tests_found(tests, expected):
    assert headline({**SCORES, "comparisons": tests}) == expected


@pytest.mark.parametrize("scores", [None, {}, {"models": None, "comparisons": "x"}, {"comparisons": [None, 3]}])
def test_without_scores_there_is_no_headline(scores):
    assert headline(scores) == ""


def test_a_difference_of_other_numbers_is_not_told_in_points():
    one = read_tests({"comparisons": [paired(-3.5) | {"value": 8.0, "reference_value": 11.5, "low": -5, "high": -2}]})[
        0
    ]
    assert (one.change, one.between) == ("−3.5", "−5 to −2")


def test_numbers_have_one_style():
    assert (percent(0.93), percent(0.0), percent(1.0), percent(0.5, None)) == ("93.0 %", "0.0 %", "100.0 %", "50 %")
    assert (points(-0.012), points(0.387), points(None)) == ("−1.2", "+38.7", "–")
    assert (fixed(-0.5, 1), figure(-1e-7), signed(-2.0), signed(0.0)) == ("−0.5", "−1e-07", "−2", "0")
