"""What others see of an output: it loads as its card says, names its sources and licences, and tells no local path.

Guards `sources.provenance`.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.fixtures.chat_family import RECIPE, make_family
from tests.fixtures.program import run

pytestmark = pytest.mark.filterwarnings("ignore")


def front_matter(folder: Path, text: str) -> None:
    (folder / "README.md").write_text(f"---\n{text}\n---\n\n# Made for a test\n")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The family's folder with `full` and `adapter` outputs, and what the runs printed."""
    root = tmp_path_factory.mktemp("family")
    recipe = make_family(root)
    recipe.write_text(RECIPE[: RECIPE.index("evaluate:")])
    for name in ("base", "alignment", "task"):
        front_matter(root / name, "license: other\nlicense_name: acme-1")
    front_matter(root / "safety", "license: mit")
    config = root / "task" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "acme/chat-7b"}))
    told = {}
    for name in ("full", "adapter"):
        code, out, err = run("run", recipe, "--output", root / name, "--set", f"output.format={name}")
        assert code == 0, err
        told[name] = out
    return root, told


def test_no_local_path_is_in_what_people_read(outputs):
    root, _ = outputs
    for name in ("full", "adapter"):
        for file in ("README.md", "safemerge_report.html", "safemerge_manifest.json"):
            assert str(root.parent) not in (root / name / file).read_text()


def test_the_card_names_licences_bases_and_task(outputs):
    root, told = outputs
    card = ModelCard.load(root / "full" / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-generation", "transformers")
    assert card.data.base_model == ["acme/chat-7b"]
    assert card.data.license is None
    assert "base acme-1, aligned acme-1, finetuned acme-1, safety mit" in card.text
    assert "do not all state the same licence" in " ".join(told["full"].split())
    assert "safety: {adapter: ./safety}" in card.text or "adapter: ./safety" in card.text


def test_an_adapters_own_size_is_told(outputs):
    root, told = outputs
    written = sum((root / "adapter" / f).stat().st_size for f in ("adapter_model.safetensors", "adapter_config.json"))
    plan = json.loads((root / "adapter" / "safemerge_plan.json").read_text())
    assert plan["summary"]["bytes_written"] == written
    assert re.search(rf"^ +{written / 1000:.3g} kB", told["adapter"], re.MULTILINE)


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_the_lines_of_the_card_run(outputs, name, monkeypatch):
    root, _ = outputs
    code = re.search(r"```python\n(.*?)```", ModelCard.load(root / name / "README.md").text, re.DOTALL)[1]
    code += (
        "\nassert len(tokenizer) == 400 and model.generate(**tokenizer('hi', return_tensors='pt'), max_new_tokens=2)"
    )
    monkeypatch.chdir(root / name)
    exec(code + " is not None", {})


def test_an_adapter_of_local_models_loads_from_anywhere_and_equals_the_full_model(outputs, tmp_path, monkeypatch):
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    root, _ = outputs
    monkeypatch.chdir(tmp_path)
    adapted = AutoPeftModelForCausalLM.from_pretrained(root / "adapter", dtype=torch.float32)
    full = AutoModelForCausalLM.from_pretrained(root / "full", dtype=torch.float32)
    ids = torch.arange(12)[None]
    assert torch.allclose(adapted(ids).logits, full(ids).logits, atol=0.05)
    again = AutoPeftModelForCausalLM.from_pretrained(os.path.relpath(root / "adapter"))
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in adapted.parameters())


def test_a_report_written_anew_keeps_what_was_known_of_the_sources(outputs):
    root, _ = outputs
    before = (root / "full" / "README.md").read_text()
    (root / "safety").rename(root / "elsewhere")
    try:
        assert run("report", root / "full")[0] == 0
    finally:
        (root / "elsewhere").rename(root / "safety")
    after = (root / "full" / "README.md").read_text()
    assert ModelCard(after).data.to_dict() == ModelCard(before).data.to_dict()
    assert "adapter: ./safety" in after
    assert run("verify", root / "full")[0] == 0
