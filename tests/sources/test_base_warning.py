"""The warning about an adapter that names another base model: for hub ids, whose names mean something, only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from safemerge_recipes.recipe.loading import load_recipe
from safemerge_recipes.sources.family import open_family
from tests.fixtures.gated_family import Family


@pytest.mark.parametrize(
    ("named", "on_hub", "warns"),
    [("org/model", True, False), ("mirror/model", True, False), ("org/other", True, True), ("org/other", False, False)],
)
def test_who_is_warned(
    wide: Family, named: str, on_hub: bool, warns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    root = tmp_path / "hub" / "models--org--model"
    shutil.copytree(wide / "aligned", root / "snapshots" / ("a" * 40))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    adapter = shutil.copytree(wide / "finetuned-lora", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
    aligned = "org/model" if on_hub else str(wide / "aligned")
    recipe = {"sources": {"aligned": aligned, "finetuned": {"adapter": str(adapter)}}, "gate": {"never": True}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    loaded = load_recipe(tmp_path / "r.yaml")
    found = [one for one in open_family(loaded.recipe, loaded.directory).warnings if "was made for" in one]
    assert bool(found) == warns, found
    assert all(named in one and aligned in one for one in found), found
