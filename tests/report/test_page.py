"""The report page: what it shows, hostile names, size, and missing parts.

Guards `report.charts`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from html.parser import HTMLParser

import pytest

from safemerge_recipes.report.overview import read_plan
from safemerge_recipes.report.page import render_report
from safemerge_recipes.report.sentences import sentence
from tests.fixtures.plans import (
    HOSTILE,
    KINDS,
    PROVENANCE,
    RECIPE,
    SCORES,
    hostile,
    hostile_origin,
    hostile_scores,
    make_plan,
)


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    VOID = frozenset({"meta", "input", "circle", "line", "rect", "path", "br"})

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: dict[str, int] = {}
        self.attributes: set[str] = set()
        self.links: set[str] = set()
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes |= {name for name, _ in attrs}
        self.links |= {value for name, value in attrs if name in ("href", "src")}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)


class TestPage:
    def test_it_shows_every_decision_score_and_source(self):
        plan = make_plan(warnings=["mind the gap"])
        page = Page(render_report(plan, scores=SCORES, provenance=PROVENANCE))
        words = " ".join(page.words)
        for tensor in plan["tensors"]:
            assert tensor["name"] in page.words
        for expected in (
            f"{plan['summary']['merged']} of 224 gated tensors were merged, where ρ < 0.35",
            "mind the gap",
            "93.0 %",
            PROVENANCE["sources"]["base"]["revision"],
            "safemerge-run safemerge_recipe.yaml",
            PROVENANCE["recipe"],
        ):
            assert expected in words

    def test_every_cell_is_drawn_in_each_chart_with_its_decision(self):
        plan = make_plan()
        content = render_report(plan, scores=None, provenance=None)
        merged = plan["summary"]["merged"]
        panels, strips, norms = (
            content[content.index(f'id="{name}-title"') :].split("</section>")[0] for name in ("rho", "ratio", "norms")
        )
        for chart in (panels, strips, norms):
            assert len(re.findall(r"<circle[^>]*><title>", chart)) == 224
            assert len(re.findall(r'<circle[^>]*class="m"[^>]*><title>', chart)) == merged
        heat = content[content.index('id="heat-title"') :].split("</section>")[0]
        assert heat.count("<g><title>") == 224
        assert heat.count('class="hm"') == merged

    def test_dots_lie_on_the_scale_of_the_panel(self):
        plan = make_plan(4)
        content = render_report(plan, scores=None, provenance=None)
        panel = content[content.index("self_attn.q_proj: ρ by block") :].split("</svg>")[0]
        scale = [
            (float(y), float(v)) for y, v in re.findall(r'y="([\d.]+)" class="t" text-anchor="end">([\d.]+)<', panel)
        ]
        (y0, v0), (y1, v1) = scale[0], scale[-1]
        drawn = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', panel)]
        rhos = [t["rho"] for t in plan["tensors"] if t["name"].endswith("q_proj.weight")]
        expected = [(y0 - 3.5) + (rho - v0) / (v1 - v0) * (y1 - y0) for rho in rhos]
        assert drawn == pytest.approx(expected, abs=0.6)

    def test_thresholds_follow_the_rules(self):
        recipe = {
            **RECIPE,
            "rules": [
                {"tensors": ["*.mlp.*"], "gate": {"tau": 0.5}},
                {"tensors": "*q_proj*", "merge": {"alpha": 0.5}},
            ],
        }
        limits = {
            line.kind: line.threshold.value for line in read_plan(make_plan(2, recipe=recipe)).lines if line.threshold
        }
        assert limits == {kind: 0.5 if kind.startswith("mlp") else 0.35 for kind in KINDS}

    def test_the_sentence_tells_what_a_rule_selects(self):
        recipe = {**RECIPE, "rules": [{"tensors": "*up*", "gate": {"metric": "rho_ratio", "at_most": 1}}]}
        words = sentence(read_plan(make_plan(2, recipe=recipe)), False)
        assert "merge, where ρ < 0.35, or by rule where ρ/ρ₀ ≤ 1; the other" in words

    def test_a_ratio_threshold_lies_at_tau_times_null(self):
        plan = make_plan(2, recipe={**RECIPE, "gate": {"metric": "rho_ratio", "at_most": 0.5}})
        for tensor in plan["tensors"]:
            tensor["metric"] = tensor["metric"] and "rho_ratio"
        for line in read_plan(plan).gated:
            assert line.tau_rho == pytest.approx(0.5 * line.rho_null)
            assert line.tau_ratio == 0.5

    def test_it_loads_nothing_and_allows_only_its_own_script_and_style(self):
        content = render_report(make_plan(), scores=SCORES, provenance=PROVENANCE)
        page = Page(content)
        assert page.links <= {"https://arxiv.org/abs/2503.17239"}
        assert not page.attributes & {"src", "style", "onclick", "onload", "srcset"}
        assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|innerHTML|eval\(", content)
        policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', content)[1])
        assert "default-src 'none'" in policy
        for name in ("style", "script"):
            inside = re.search(f"<{name}>(.*?)</{name}>", content, re.DOTALL)[1]
            digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
            assert f"{name}-src 'sha256-{digest}'" in policy

    def test_the_same_input_gives_the_same_bytes(self):
        pages = [render_report(make_plan(), scores=SCORES, provenance=PROVENANCE) for _ in range(2)]
        assert pages[0] == pages[1]

    @pytest.mark.parametrize("text", HOSTILE)
    def test_hostile_text_adds_no_tag_and_no_attribute(self, text):
        tame = Page(render_report(hostile("plain"), scores=hostile_scores("plain"), provenance=hostile_origin("plain")))
        content = render_report(hostile(text), scores=hostile_scores(text), provenance=hostile_origin(text))
        page = Page(content)
        assert page.attributes <= tame.attributes
        assert set(page.tags) <= set(tame.tags)
        assert page.tags["script"] == page.tags["style"] == 1
        assert page.links <= tame.links | {"https://arxiv.org/abs/2503.17239"}
        content.encode("utf-8")

    def test_script_in_a_name_is_shown_as_text(self):
        name = "</script><script>alert(1)</script>"
        assert any(name in words for words in Page(render_report(hostile(name), scores=None, provenance=None)).words)


def test_many_long_hostile_names_stay_within_the_size():
    plan = make_plan(1)
    line = next(t for t in plan["tensors"] if t["metric"])
    plan["tensors"] = [
        {**line, "name": f"layers.{i % 400}.k{i}." + '"<&‮' * 2000, "reason": "<" * 9000} for i in range(4000)
    ]
    content = render_report(plan, scores=None, provenance=None)
    assert len(content.encode()) < 6_000_000
    Page(content)
