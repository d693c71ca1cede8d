"""Macro-F1 and margin against scikit-learn and by hand, from lm-eval's own samples.

Guards `evaluation.choices`.
"""

from __future__ import annotations

import random

import pytest

from safemerge_recipes.evaluation.choices import class_metrics, macro_f1

NAMES = ("yes", "no", "maybe")


def sample(values: list[float], target: str | int, names: tuple[str, ...] = NAMES) -> dict[str, object]:
    return {
        "arguments": [("Is it so?", f" {name}") for name in names],
        "resps": [[(value, False)] for value in values],
        "target": target,
    }


def test_macro_f1_is_that_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    draw = random.Random(0)
    for answers in (3, 3, 2, 1):
        right = [draw.randrange(3) for _ in range(40)]
        said = [draw.randrange(answers) for _ in range(40)]
        assert macro_f1(said, right) == pytest.approx(sklearn.f1_score(right, said, average="macro", zero_division=0))


def test_one_answer_to_everything_has_its_floor_in_macro_f1_and_margin():
    targets = NAMES * 30
    same = class_metrics({str(i): sample([0.0, -1.0, -2.0], one) for i, one in enumerate(targets)})
    assert same["macro_f1"].value == pytest.approx(0.5 / 3), "accuracy would be a third"
    assert same["margin"].value == pytest.approx((1 - 1 - 2) / 3)
    assert same["margin"].outcomes["1"] == -1
    able = class_metrics({str(i): sample([5.0 * (n == one) for n in NAMES], one) for i, one in enumerate(targets)})
    assert (able["macro_f1"].value, able["margin"].value) == (1.0, 5.0)
    assert able["macro_f1"].stderr == 0
    assert 0 < same["macro_f1"].stderr < 0.05


def test_targets_are_places_or_answers_and_other_tasks_have_none_of_it():
    assert class_metrics({"a": sample([0, 1, 0], 1)})["macro_f1"].value == 1
    assert class_metrics({"a": sample([0, 1, 0], "perhaps")}) == {}
    # Each row its own choices, as in hellaswag: no classes.
    rows = {"a": sample([0, 1], 0, ("he runs", "he eats")), "b": sample([0, 1], 0, ("it rains", "it snows"))}
    assert class_metrics(rows) == {}
    assert class_metrics({"a": {"arguments": [("Q", {"until": []})], "resps": [["free text"]], "target": "4"}}) == {}
    assert class_metrics({}) == {}
