"""The terminal's summary of a plan and of a run: what it shows, hostile names, narrow and plain terminals.

Guards `report.console`.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from safemerge_recipes.report.card import render_card
from safemerge_recipes.report.page import render_report
from safemerge_recipes.report.terminal import print_plan, print_result
from safemerge_recipes.report.terminal_scores import print_scores
from tests.fixtures.plans import HOSTILE, KINDS, RECIPE, SCORES, hostile, make_plan, paired


def printed(call: Any, *args: Any, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    call(*args, Console(file=stream, width=width))
    stream.flush()
    return raw.getvalue().decode(encoding)


class TestTerminal:
    def test_counts_figures_and_scores_are_shown(self):
        plan = make_plan()
        result = {
            "output": "out/x",
            "bytes_written": 13_476_839_424,
            "seconds": 105.0,
            "peak_memory": 9e8,
            "scores": SCORES,
        }
        text = printed(print_result, plan, result)
        summary = plan["summary"]
        assert f"{summary['merged']} of 224 gated tensors were merged, where ρ < 0.35" in " ".join(text.split())
        for kind in KINDS:
            members = [t for t in plan["tensors"] if t["name"].endswith(f"{kind}.weight")]
            row = next(row for row in text.splitlines() if row.startswith(kind)).split()
            assert row[1:3] == [str(sum(t["action"] == "merge" for t in members)), "32"]
        for expected in (
            "out/x",
            "13.5 GB",
            "2 min",
            "900 MB",
            "93.0 %",
            "n = 1319",
            "gsm8k: exact_match (strict-match)",
        ):
            assert expected in text

    def test_projected_cost_is_shown_with_a_plan(self):
        assert "Projected: read 40.4 GB, write 13.5 GB, peak memory 1.31 GB." in printed(print_plan, make_plan())

    @pytest.mark.parametrize("width", [60, 80, 200])
    @pytest.mark.parametrize("plan", [make_plan(), make_plan(1), make_plan(130), make_plan(8, experts=8)])
    def test_no_line_is_wider_than_the_terminal(self, plan, width):
        text = printed(print_result, plan, {"scores": SCORES, "output": "o" * 300}, width=width)
        assert max(map(len, text.splitlines())) <= min(width, 100)
        assert "\x1b" not in text  # not a terminal: no colour

    def test_ascii_output_holds_no_other_character_and_needs_none(self):
        plan = make_plan(8, warnings=["naïve ‮ name"])
        text = printed(print_result, plan, {"scores": SCORES, "output": "out/ü"}, encoding="ascii")
        assert text.isascii()
        assert "rho < 0.35" in text
        assert "out/\\xfc" in text

    @pytest.mark.parametrize("text", HOSTILE)
    def test_outside_text_is_printed_literally(self, text):
        plan = hostile(text)
        output = printed(
            print_result, plan, {"output": text, "scores": {"models": {text: {text: {text: {"value": 1}}}}}}
        )
        assert "\x1b" not in output
        assert "‮" not in output
        if text == "[bold red]x[/]":
            assert output.count("[bold red]x[/]") >= 4

    def test_a_description_of_several_lines_is_one_paragraph_everywhere(self):
        plan = make_plan(2, recipe={**RECIPE, "description": "One\nand  two."})
        for content in (
            printed(print_plan, plan),
            render_report(plan, scores=None, provenance=None),
            render_card(plan, scores=None, provenance=None),
        ):
            assert "One and two." in content

    def test_no_measurement_gives_counts_alone(self):
        text = printed(print_plan, make_plan(4, measured=False))
        assert "28 of 28 gated tensors merge" in text
        assert "●" not in text
        assert "ρ by block" not in text

    def test_the_axis_puts_each_mark_where_its_value_is(self):
        plan = make_plan(2)
        for tensor in plan["tensors"]:
            if tensor["metric"]:
                tensor |= {"rho": 0.5, "rho_null": 1.0, "value": 0.5}
        plan["recipe"] = {**RECIPE, "gate": {"metric": "rho", "tau": 0.25}}
        row = next(row for row in printed(print_plan, plan).splitlines() if row.startswith("self_attn.q_proj"))
        axis = row[-24:]
        assert [axis.index(mark) for mark in "┊●×"] == [round(x * 23) for x in (0.25, 0.5, 1.0)]

    def test_at_60_columns_names_are_whole_and_the_axis_gives_way(self):
        for spread in (False, True):
            plan = make_plan(8)
            for tensor in plan["tensors"]:
                if tensor["metric"] and spread:
                    tensor["rho_z"] = -12.34
            text = printed(print_plan, plan, width=60)
            rows = text.splitlines()
            assert all(any(row.startswith(f"{kind} ") for row in rows) for kind in KINDS)
            assert ("−12.3" in text) is spread
            assert max(map(len, rows)) <= 60

    def test_tests_are_told_after_the_scores_and_the_headline_before(self):
        scores = {**SCORES, "comparisons": [paired(0.387), paired(-0.01, "gsm8k", "exact_match", detected=False)]}
        for width in (60, 80):
            text = printed(print_scores, scores, width=width)
            assert text.startswith("Refusal +38.7 points, no change detected in gsm8k.\n")
            row = next(row for row in text.splitlines() if "+38.7  " in row)
            assert "p   0.003  higher: better" in row
            assert "no difference detected" in text
            assert "compliance" not in text
            assert max(map(len, text.splitlines())) <= width
