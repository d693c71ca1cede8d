"""The model card: metadata that the hub reads, hostile names, what it may claim.

Guards `report.markdown`, `report.metadata`, `report.licences`.
"""

from __future__ import annotations

import re
from typing import ClassVar

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from safemerge_recipes.report.card import render_card
from tests.fixtures.plans import (
    HOSTILE,
    PROVENANCE,
    RECIPE,
    SCORES,
    hostile,
    hostile_origin,
    hostile_scores,
    make_plan,
    paired,
)


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


class TestSources:
    LOCAL: ClassVar = {
        "aligned": {"label": "chat", "kind": "model", "revision": None},
        "finetuned": {"label": "my-lora", "kind": "adapter", "revision": None, "base_model": "meta/chat-7b"},
    }

    def card(self, **origin):
        given = {"sources": self.LOCAL, **origin}
        return ModelCard(render_card(make_plan(2), scores=None, provenance=given))

    def test_a_local_adapter_names_the_hub_model_it_was_trained_on(self):
        data = self.card().data
        assert (data.base_model, data.get("base_model_relation")) == (["meta/chat-7b"], "merge")

    def test_the_task_is_stated_where_it_is_known(self):
        assert self.card(pipeline_tag="text-generation").data.pipeline_tag == "text-generation"
        assert self.card().data.pipeline_tag is None
        assert self.card(pipeline_tag="x\ny: z").data.pipeline_tag is None

    def test_an_adapter_is_one_of_its_aligned_model(self):
        plan = make_plan(2)
        plan["recipe"] = {**RECIPE, "output": {"format": "adapter"}}
        card = ModelCard(render_card(plan, scores=None, provenance=PROVENANCE))
        assert (card.data.library_name, card.data.base_model, card.data.get("base_model_relation")) == (
            "peft",
            ["meta-llama/Llama-2-7b-chat-hf"],
            "adapter",
        )
        assert 'AutoPeftModelForCausalLM.from_pretrained(".")' in card.text

    def test_equal_bytes_are_promised_only_where_anybody_can_have_the_sources(self):
        assert "give the same bytes again" not in self.card().text
        assert "Whoever has the same files" in self.card().text
        assert "--output again --source aligned=PLACE --source finetuned=PLACE" in self.card().text
        pinned = {role: source for role, source in PROVENANCE["sources"].items() if source["revision"]}
        assert "give the same bytes again" in self.card(sources=pinned).text

    def test_licences_that_differ_are_told(self):
        sources = {
            "aligned": {"label": "o/a", "revision": "1", "license": "mit"},
            "safety": {"label": "o/b", "revision": "1", "license": "llama3"},
        }
        card = self.card(sources=sources)
        assert "aligned mit, safety llama3" in card.text
        assert card.data.license is None


def test_tests_are_one_table_and_the_verdict_stands_on_top():
    scores = {**SCORES, "comparisons": [paired(0.387), paired(0.01, "gsm8k", "exact_match", detected=False)]}
    text = ModelCard(render_card(make_plan(2), scores=scores, provenance=PROVENANCE)).text
    lines = text.strip().splitlines()
    assert lines[2] == "**Refusal +38.7 points, no change detected in gsm8k.**"
    rows = [line for line in lines if line.startswith("| merged against finetuned |")]
    assert [row.split(" | ")[-1] for row in rows] == ["higher: better |", "no difference detected |"]


def test_there_is_no_html_and_the_recipe_is_in_the_body():
    text = ModelCard(render_card(make_plan(2), scores=SCORES, provenance=PROVENANCE)).text
    assert not re.search(r"<[a-z]+[^>]*>", text)
    assert f"```yaml\n{PROVENANCE['recipe'].strip()}\n```" in text


@pytest.mark.parametrize("recipe", ["a: |\n  ```\n  ~~~~\n", "`" * 9, "\n\n", "a\r\nb\x1b"])
def test_no_recipe_ends_its_block(recipe):
    text = render_card(make_plan(2), scores=None, provenance={**PROVENANCE, "recipe": recipe})
    blocks = [t for t in MarkdownIt("gfm-like", {"linkify": False}).parse(text.split("\n---\n", 1)[1])
              if t.type == "fence"]  # fmt: skip
    assert [block.info for block in blocks] == ["python", "sh", "yaml"]
