"""Report, card and terminal together: odd plans, large plans, light imports, the same words everywhere."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from huggingface_hub import ModelCard

from safemerge_recipes.report.card import render_card
from safemerge_recipes.report.page import render_report
from safemerge_recipes.report.terminal import print_plan, print_result
from tests.fixtures.plans import BARE, PROVENANCE, SCORES, make_plan
from tests.report.test_page import Page
from tests.report.test_terminal import printed


@pytest.mark.parametrize("plan", BARE, ids=str)
def test_missing_and_odd_parts_are_left_out_not_fatal(plan):
    for scores in (
        None,
        {},
        {"models": None},
        {"models": {"merged": {"t": {"m": {"value": float("nan")}, "k": 0.5}}}},
    ):
        for origin in (None, {}, {"sources": {"base": None}, "versions": None, "timings": {"x": "y"}}):
            Page(render_report(plan, scores=scores, provenance=origin))
            ModelCard(render_card(plan, scores=scores, provenance=origin))
        printed(print_plan, plan)
        printed(print_result, plan, {"scores": scores})


def test_reports_need_no_torch():
    code = (
        "import sys, json; from safemerge_recipes.report.page import render_report; "
        "from safemerge_recipes.report.card import render_card; import safemerge_recipes.report.terminal; "
        "plan = json.loads(sys.stdin.read()); render_report(plan, scores=None, provenance=None); "
        "render_card(plan, scores=None, provenance=None); print('torch' in sys.modules)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(make_plan(2)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "False"


@pytest.mark.parametrize(("experts", "tensors"), [(66, 12_000), pytest.param(248, 45_000, marks=pytest.mark.slow)])
def test_many_thousand_tensors_take_seconds_and_megabytes(experts, tensors):
    plan = make_plan(60, experts=experts)
    assert len(plan["tensors"]) > tensors
    started = time.process_time()
    content = render_report(plan, scores=SCORES, provenance=PROVENANCE)
    card = render_card(plan, scores=SCORES, provenance=PROVENANCE)
    text = printed(print_plan, plan)
    assert time.process_time() - started < 20
    assert len(content.encode()) < 5_000_000
    assert len(card.encode()) < 50_000
    assert len(text.splitlines()) < 60
    page = Page(content)
    assert page.tags["tr"] < 1700
    assert "safemerge_plan.json holds them all" in " ".join(page.words)


def test_report_and_card_say_what_was_tested():
    test = {
        "model": "merged",
        "reference": "finetuned",
        "task": "a",
        "metric": "b",
        "verdict": "no difference detected",
    }
    scores = {**SCORES, "comparisons": [test, "junk"], "cautions": ["other templates"]}
    told = {"merged against finetuned", "a: b", "no difference detected", "Mind: other templates"}
    assert told <= set(Page(render_report(make_plan(), scores=scores, provenance=PROVENANCE)).words)
    card = render_card(make_plan(), scores=scores, provenance=PROVENANCE)
    assert "| merged against finetuned | a, b | – | – | no difference detected |" in card
    assert "> Mind: other templates" in card
    many = {**scores, "comparisons": [test] * 100}
    for content in (render_report, render_card):
        assert "40 further tests" in content(make_plan(), scores=many, provenance=PROVENANCE)


def test_everybody_is_told_where_rho_sits_on_chance():
    plan = make_plan(4)
    for tensor in plan["tensors"]:
        if tensor["metric"]:
            tensor["rho"] = tensor["value"] = tensor["rho_null"] * 1.03
    told = "Every ρ lies within 10 % of ρ₀"
    for content in (
        " ".join(printed(print_plan, plan).split()),
        render_report(plan, scores=None, provenance=None),
        render_card(plan, scores=None, provenance=None),
    ):
        assert told in content
    assert told not in render_report(make_plan(4), scores=None, provenance=None)
