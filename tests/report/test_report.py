"""Terminal summary, HTML report and model card: what they show, hostile names, size, and missing parts.

Guards `report.charts`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import random
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from rich.console import Console

from safemerge_recipes.report.card import render_card
from safemerge_recipes.report.overview import read_plan, sentence
from safemerge_recipes.report.page import render_report
from safemerge_recipes.report.terminal import print_plan, print_result

KINDS = {
    "self_attn.q_proj": ((4096, 4096), 0.707, 0.44),
    "self_attn.k_proj": ((4096, 4096), 0.707, 0.46),
    "self_attn.v_proj": ((4096, 4096), 0.69, 0.30),
    "self_attn.o_proj": ((4096, 4096), 0.70, 0.33),
    "mlp.gate_proj": ((11008, 4096), 0.52, 0.27),
    "mlp.up_proj": ((11008, 4096), 0.52, 0.24),
    "mlp.down_proj": ((4096, 11008), 0.85, 0.48),
}
RECIPE: dict[str, Any] = {
    "name": "llama-2-7b-gsm8k-safe",
    "description": "GSM8K fine-tune of Llama-2-7B-Chat with its safety restored.",
    "sources": {
        "base": "meta-llama/Llama-2-7b-hf",
        "aligned": "meta-llama/Llama-2-7b-chat-hf",
        "finetuned": {"adapter": "my-org/llama2-gsm8k-lora"},
        "safety": {"adapter": "./safety-lora"},
    },
    "gate": {"metric": "rho", "tau": 0.35},
    "merge": {"method": "linear", "alpha": 0.8},
}


def make_plan(blocks: int = 32, *, tau: float = 0.35, measured: bool = True, experts: int = 0, **changes: Any) -> dict:
    """A plan as the engine writes it, with values of a realistic size; decided by `rho < tau`."""
    draw = random.Random(1)

    def line(name: str, shape: tuple[int, ...], null: float | None, middle: float) -> dict[str, Any]:
        if null is None:
            reason = "not a matrix of a linear layer in a numbered block"
            return {
                "name": name,
                "shape": list(shape),
                "dtype": "BF16",
                "action": "keep",
                "reason": reason,
                "metric": None,
                "value": None,
                "rho": None,
                "rho_null": None,
                "norm_v": None,
                "norm_delta": None,
                "method": None,
                "alpha": None,
                "source": "finetuned",
            }
        rho = min(0.99, max(0.01, middle + draw.gauss(0, 0.06)))
        merged = rho < tau if measured else True
        sign = "<" if merged else "≥"
        return {
            "name": name,
            "shape": list(shape),
            "dtype": "BF16",
            "action": "merge" if merged else "keep",
            "reason": f"rho {rho:.4g} {sign} tau {tau:g}" if measured else "always",
            "metric": "rho",
            "value": rho if measured else None,
            "rho": rho if measured else None,
            "rho_null": min(1.0, null + draw.gauss(0, 0.02)) if measured else None,
            "rho_interval": 0.0,
            "norm_v": math.exp(draw.gauss(2.3, 0.3)) if measured else None,
            "norm_delta": math.exp(draw.gauss(-0.5, 0.3)) if measured else None,
            "method": "linear" if merged else None,
            "alpha": 0.8 if merged else None,
            **({} if merged else {"source": "finetuned"}),
        }

    tensors = [line("model.embed_tokens.weight", (32000, 4096), None, 0)]
    for block in range(blocks):
        wave = 0.14 * math.sin(block / blocks * math.pi * 1.4 + 0.3)
        for kind, (shape, null, middle) in KINDS.items():
            if experts and kind.startswith("mlp"):
                part = kind.removeprefix("mlp.")
                names = [f"model.layers.{block}.mlp.experts.{i}.{part}.weight" for i in range(experts)]
            else:
                names = [f"model.layers.{block}.{kind}.weight"]
            tensors += [line(name, shape, null, middle + wave) for name in names]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors.append(line(f"model.layers.{block}.{norm}.weight", (4096,), None, 0))
    tensors += [line("model.norm.weight", (4096,), None, 0), line("lm_head.weight", (32000, 4096), None, 0)]
    merged = sum(t["action"] == "merge" for t in tensors)
    gated = sum(t["metric"] is not None for t in tensors)
    summary = {
        "tensors": len(tensors),
        "gated": gated,
        "merged": merged,
        "kept": gated - merged,
        "bytes_read": 40_432_123_904,
        "bytes_written": 13_476_839_424,
        "peak_memory": 1_310_720_000,
    }
    return {"recipe": RECIPE, "summary": summary, "tensors": tensors, "warnings": [], **changes}


def entry(value: float, n: int = 200, **more: Any) -> dict[str, Any]:
    half = 1.96 * math.sqrt(value * (1 - value) / n)
    return {"value": value, "low": max(0, value - half), "high": min(1, value + half), "n": n, **more}


SCORES = {
    "models": {
        "merged": {
            "safemerge_refusal": {"refusal_rate,none": entry(0.93)},
            "safemerge_overrefusal": {"refusal_rate,none": entry(0.07)},
            "gsm8k": {"exact_match,strict-match": entry(0.268, 1319)},
        },
        "aligned": {
            "safemerge_refusal": {"refusal_rate,none": entry(0.965)},
            "safemerge_overrefusal": {"refusal_rate,none": entry(0.09)},
            "gsm8k": {"exact_match,strict-match": entry(0.215, 1319)},
        },
        "finetuned": {
            "safemerge_refusal": {"refusal_rate,none": entry(0.71)},
            "safemerge_overrefusal": {"refusal_rate,none": entry(0.05)},
            "gsm8k": {"exact_match,strict-match": entry(0.274, 1319)},
        },
    }
}
PROVENANCE = {
    "sources": {
        "base": {
            "label": "meta-llama/Llama-2-7b-hf",
            "kind": "model",
            "revision": "01c7f73d771dfac7d292323805ebc428287df4f9",
            "license": "llama2",
        },
        "aligned": {
            "label": "meta-llama/Llama-2-7b-chat-hf",
            "kind": "model",
            "revision": "f5db02db724555f92da89c216ac04704f23d4590",
            "license": "llama2",
        },
        "finetuned": {
            "label": "my-org/llama2-gsm8k-lora",
            "kind": "adapter",
            "revision": "0d5dbdbf3a4b6c8f3c4eb08ea5d3ff7f5f2f6c11",
            "license": "llama2",
        },
        "safety": {"label": "./safety-lora", "kind": "adapter", "revision": None, "license": "llama2"},
    },
    "versions": {"safemerge-recipes": "0.1.0", "torch": "2.13.0", "safetensors": "0.8.0", "python": "3.11.7"},
    "recipe": "name: llama-2-7b-gsm8k-safe\ngate:\n  metric: rho\n  tau: 0.35\nmerge:\n  alpha: 0.8\n",
    "created": "2026-01-02T03:04:05+00:00",
    "timings": {"measure": 41.2, "write": 63.8},
}


HOSTILE = [
    "<script>alert(1)</script>",
    "</title><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' autofocus onfocus=x '",
    "[bold red]x[/]",
    "[x](javascript:alert(1))",
    "![i](http://x/y.png)",
    "https://example.org www.example.org a@b.cc",
    "a | b | c",
    "`code` **bold** _em_ ~~s~~",
    "# head",
    "- item",
    "1. item",
    "---",
    "+++",
    "===",
    "    indented",
    "> quote",
    "a\n---\nlicense: mit\n---\n",
    "\x1b[31mred\x07",
    "\u202eevil\u2066",
    "\ud800",
    "&lt;b&gt; &amp;",
    "</code><b>",
    "\\",
    "$x^2$",
    "x" * 5000,
    "",
    "]]>",
    "<!--",
    "{{ x }}",
    "%s{0}",
    "0.²",
    "1.2.3.weight",
    "a.999999999999999999999999.b.weight",
]


def hostile(text: str) -> dict[str, Any]:
    """A plan with the text wherever text comes from outside."""
    plan = make_plan(2)
    for tensor in plan["tensors"]:
        if tensor["name"].startswith("model.layers.1."):
            tensor |= {"name": f"model.layers.1.{text}.weight", "reason": text, "dtype": text}
        if tensor["name"].startswith("model.norm"):
            tensor |= {"name": text, "source": text}
        if tensor["method"]:
            tensor["method"] = text
    plan["recipe"] = {**RECIPE, "name": text, "description": text, "gate": {"metric": text, "tau": 0.35}}
    plan["warnings"] = [text]
    return plan


def hostile_scores(text: str) -> dict[str, Any]:
    test = dict.fromkeys(("model", "reference", "task", "metric", "verdict"), text)
    models = {text: {text: {text: entry(0.5)}}, "merged": {text: {text: entry(0.5)}}}
    return {"models": models, "comparisons": [test], "cautions": [text]}


def hostile_origin(text: str) -> dict[str, Any]:
    return {
        "sources": {text: {"label": text, "kind": text, "revision": text, "license": text}},
        "versions": {text: text},
        "recipe": text,
        "created": text,
        "timings": {text: 1.0},
    }


BARE: list[dict[str, Any]] = [
    {},
    {"recipe": None, "summary": None, "tensors": None, "warnings": None},
    {
        "tensors": [
            {},
            {"name": None},
            {"name": "a", "shape": None, "action": "merge", "rho": float("nan"), "rho_null": 0.0},
            "x",
        ]
    },
    {
        "recipe": {"gate": {"tau": "x"}, "rules": [None, {"tensors": ["{"], "gate": {"tau": 1}}]},
        "tensors": [{"name": "a.1.b.weight"}],
    },
    {
        "recipe": {"gate": {"complement": {"lowest": 3}}},
        "tensors": [{"name": "a.1.b.weight", "metric": "rho", "rho": 0.0, "norm_v": 0.0}],
    },
]


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
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', content)[1].replace("&#x27;", "'")
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


def test_45_000_tensors_take_seconds_and_megabytes():
    plan = make_plan(60, experts=248)
    assert len(plan["tensors"]) > 45_000
    started = time.perf_counter()
    content = render_report(plan, scores=SCORES, provenance=PROVENANCE)
    card = render_card(plan, scores=SCORES, provenance=PROVENANCE)
    text = printed(print_plan, plan)
    assert time.perf_counter() - started < 20
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
    told = ["merged against finetuned, a, b: no difference detected", "Mind: other templates"]
    assert set(told) <= set(Page(render_report(make_plan(), scores=scores, provenance=PROVENANCE)).words)
    card = render_card(make_plan(), scores=scores, provenance=PROVENANCE)
    assert all(f"\n- {line}\n" in card for line in told)
    many = {**scores, "comparisons": [test] * 100}
    assert "41 more" in Page(render_report(make_plan(), scores=many, provenance=PROVENANCE)).words


def test_many_long_hostile_names_stay_within_the_size():
    plan = make_plan(1)
    line = next(t for t in plan["tensors"] if t["metric"])
    plan["tensors"] = [
        {**line, "name": f"layers.{i % 400}.k{i}." + '"<&‮' * 2000, "reason": "<" * 9000} for i in range(4000)
    ]
    content = render_report(plan, scores=None, provenance=None)
    assert len(content.encode()) < 6_000_000
    Page(content)


class TestCard:
    def test_metadata_is_read_back_by_the_hub_library(self):
        data = ModelCard(render_card(make_plan(), scores=SCORES, provenance=PROVENANCE)).data
        assert data.base_model == [
            "meta-llama/Llama-2-7b-hf",
            "meta-llama/Llama-2-7b-chat-hf",
            "my-org/llama2-gsm8k-lora",
        ]
        assert (data.base_model_relation, data.library_name, data.license) == (
            "merge",
            "transformers",
            "llama2",
        )
        assert data.tags == ["merge", "safemerge"]
        assert {(r.dataset_type, r.metric_type, r.metric_value) for r in data.eval_results} == {
            ("safemerge_refusal", "refusal_rate", 0.93),
            ("safemerge_overrefusal", "refusal_rate", 0.07),
            ("gsm8k", "exact_match", 0.268),
        }

    def test_folders_are_not_claimed_as_hub_models(self):
        sources = {"base": {"label": "models/base", "kind": "model", "revision": None}}
        data = ModelCard(render_card(make_plan(2), scores=None, provenance={"sources": sources})).data
        assert data.base_model is None
        assert data.to_dict().get("base_model_relation") is None

    @pytest.mark.parametrize(
        ("licenses", "expected"),
        [
            (("mit", "mit"), ("mit", None)),
            (("mit", "apache-2.0"), (None, None)),
            (("mit", None), (None, None)),
            (("acme-1", "acme-1"), ("other", "acme-1")),
            (("x: y\nz", "x: y\nz"), (None, None)),
        ],
    )
    def test_license_is_stated_only_where_all_agree(self, licenses, expected):
        sources = {
            role: {"label": "o/m", "revision": "a", "license": each}
            for role, each in zip(("a", "b"), licenses, strict=True)
        }
        data = ModelCard(render_card(make_plan(2), scores=None, provenance={"sources": sources})).data
        assert (data.license, data.license_name) == expected

    @pytest.mark.parametrize("text", [text for text in HOSTILE if text])  # without text, parts are left out
    def test_hostile_text_adds_no_markup(self, text):
        def shape(word: str) -> tuple[list[str], set[str]]:
            card = render_card(hostile(word), scores=hostile_scores(word), provenance=hostile_origin(word))
            body = card.split("\n---\n", 1)[1]
            reader = MarkdownIt("gfm-like", {"linkify": False, "html": True})
            tokens = [token for block in reader.parse(body) for token in (block, *(block.children or ()))]
            links = {str(token.attrGet("href")) for token in tokens if token.type == "link_open"}
            kinds = [
                t.type if t.type != "html_inline" else t.content
                for t in tokens
                if t.type not in ("text", "text_special")
            ]
            return kinds, links

        kinds, links = shape(text)
        assert links == shape("plain")[1]
        assert kinds == shape("plain")[0]
