"""What every τ would merge: counted from the plan, exact at the recipe's own τ, still where a rule decides."""

from __future__ import annotations

import pytest

from safemerge_recipes.recipe.loading import parse_recipe
from safemerge_recipes.report.overview import read_plan
from safemerge_recipes.report.thresholds import thresholds
from tests.fixtures.plans import RECIPE, make_plan


def plan_of(**gate):
    plan = make_plan(4)
    plan["recipe"] = {**RECIPE, "gate": {"metric": "rho", **gate}}
    return plan


def test_the_recipes_own_tau_gives_the_plans_decisions():
    view = read_plan(make_plan(8))
    choice = thresholds(view)
    assert choice.chosen == 0.35
    assert choice.total(0.35) == sum(line.merged for line in view.gated)
    for kind, lines in choice.rows:
        assert choice.count(lines, 0.35) == sum(line.merged for line in view.kinds()[kind])


@pytest.mark.parametrize(
    ("gate", "merges"),
    [
        ({"tau": 0.4}, lambda rho, tau: rho < tau),
        ({"at_most": 0.4}, lambda rho, tau: rho <= tau),
        ({"tau": 0.4, "direction": "above"}, lambda rho, tau: rho > tau),
        ({"at_most": 0.4, "direction": "above"}, lambda rho, tau: rho >= tau),
        ({"fraction": 0.5}, lambda rho, tau: rho < tau),
    ],
)
def test_the_comparison_is_that_of_the_gate(gate, merges):
    plan = plan_of(**gate)
    values = [t["rho"] for t in plan["tensors"] if t["metric"]]
    choice = thresholds(read_plan(plan))
    for tau in (*values[:10], *choice.columns):
        assert choice.total(tau) == sum(merges(value, tau) for value in values)


def test_tensors_that_a_rule_decides_or_that_have_no_value_stay_as_they_are():
    plan = plan_of(tau=0.35)
    plan["recipe"]["rules"] = [{"tensors": "*q_proj*", "gate": {"tau": 0.9}}]
    degenerate = next(t for t in plan["tensors"] if "up_proj" in t["name"])
    degenerate |= {"action": "merge", "value": None, "rho": None}
    view = read_plan(plan)
    choice = thresholds(view)
    fixed = [line for line in view.gated if not choice.follows(line)]
    assert {line.kind for line in fixed} == {"self_attn.q_proj", "mlp.up_proj"}
    for tau in (0.0, 1.0):
        assert all(choice.merges(line, tau) == line.merged for line in fixed)


def test_the_line_to_copy_sets_the_recipes_selector():
    text = "sources: {base: b, aligned: a, finetuned: f, safety: s}\ngate: {metric: rho, fraction: 0.5}\n"
    choice = thresholds(read_plan(plan_of(fraction=0.5)))
    override = choice.setting(0.42).removeprefix("--set ")
    gate = parse_recipe(text, "recipe.yaml", [override]).recipe.gate
    assert (gate.tau, gate.fraction) == (0.42, None)


@pytest.mark.parametrize("plan", [make_plan(2, measured=False), {}, {"tensors": [{"name": "a.1.b.weight"}]}])
def test_without_values_there_is_no_choice(plan):
    assert thresholds(read_plan(plan)) is None


def test_equal_values_give_no_choice():
    plan = make_plan(2)
    for tensor in plan["tensors"]:
        if tensor["metric"]:
            tensor["value"] = 0.5
    assert thresholds(read_plan(plan)) is None
