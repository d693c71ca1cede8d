"""The selector through the gate that asks it."""

from __future__ import annotations

import pytest
from safemerge_example_selector import BAND

from safemerge_recipes.plugins import Candidate, Gate, RecipeError, check, decide, unsettled


def gate(**options):
    return Gate.model_validate({"plugin": {"name": "band", "options": options}})


def test_chooses_what_lies_between_the_bounds():
    candidates = [Candidate("a", 0.1), Candidate("b", 0.2), Candidate("c", 0.4), Candidate("d", 0.5)]
    decisions = decide(gate(**{"from": 0.2, "to": 0.4}), candidates, {"band": BAND})
    assert [decisions[name].merge for name in "abcd"] == [False, True, True, False]
    assert decisions["b"].reason == "rho 0.2 in [0.2, 0.4]"


def test_only_intervals_that_hold_a_bound_are_open():
    candidates = [Candidate("a", 0.19, 0.02), Candidate("b", 0.3, 0.02), Candidate("c", 0.4)]
    assert unsettled(gate(**{"from": 0.2, "to": 0.4}), candidates, {"band": BAND}) == {"a"}


@pytest.mark.parametrize("options", [{}, {"from": 0.5, "to": 0.1}, {"from": "low", "to": 1}])
def test_bounds_that_mean_nothing_are_refused_before_measuring(options):
    with pytest.raises(RecipeError, match="expected from ≤ to"):
        check(gate(**options), ["a"], {"band": BAND})
