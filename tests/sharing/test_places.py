"""Recipes run from where they lie: an output's folder, with other sources, shown as they stand alone.

Guards `sharing.places`.
"""

from __future__ import annotations

import pytest
import yaml

from safemerge_recipes.recipe.loading import parse_recipe
from tests.fixtures.plain_family import ADAPTERS, make_family, recipe_text
from tests.fixtures.program import digests, run


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    make_family(root)
    (root / "recipe.yaml").write_text(recipe_text(ADAPTERS, "{metric: rho, fraction: 0.5}", "{alpha: 0.7}"))
    code, _, err = run("run", root / "recipe.yaml", "--output", root / "out")
    assert code == 0, err
    return root


def weights(folder):
    return {name: digest for name, digest in digests(folder).items() if name.endswith(".safetensors")}


def test_an_output_is_repeated_by_its_folder(family, tmp_path):
    code, _, err = run("run", family / "out", "--output", tmp_path / "again")
    assert code == 0, err
    assert weights(tmp_path / "again") == weights(family / "out")
    assert weights(family / "out")


def test_a_moved_output_is_repeated_with_other_places_for_its_sources(family, tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    for name in ("safemerge_recipe.yaml", "README.md"):
        (tmp_path / "far" / name).write_bytes((family / "out" / name).read_bytes())
    code, _, err = run("run", tmp_path / "far", "--output", tmp_path / "again")
    assert code == 3
    assert "sources.base" in err
    monkeypatch.chdir(family)
    places = {"base": "base", "aligned": "./aligned", "finetuned": "finetuned-adapter", "safety": "safety-adapter"}
    stand_ins = [word for role, place in places.items() for word in ("--source", f"{role}={place}")]
    code, _, err = run("run", tmp_path / "far", "--output", tmp_path / "again", *stand_ins)
    assert code == 0, err
    assert weights(tmp_path / "again") == weights(family / "out")


@pytest.mark.parametrize("text", ["finetuned", "finetuned=", "judge=./x", "=./x"])
def test_a_stand_in_that_is_none_is_told(family, text):
    code, _, err = run("plan", family / "recipe.yaml", "--source", text)
    assert code == 2
    assert "expected ROLE=PLACE, with a role of base, aligned, finetuned, safety" in err


def test_a_recipe_is_shown_as_it_stands_alone(family, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: {family / 'recipe.yaml'}\nparameters: {{a: 0.25}}\nmerge:\n  alpha: ${{a}}\n")
    code, out, err = run("validate", own, "--show", "--set", "gate.tau=0.3", "--source", "safety=org/safe")
    assert code == 0, err
    shown = yaml.safe_load(out)
    assert shown.keys().isdisjoint({"extends", "parameters"})
    assert shown["merge"]["alpha"] == 0.25
    recipe = parse_recipe(out).recipe
    assert (recipe.gate.tau, recipe.gate.fraction) == (0.3, None)
    assert recipe.sources.safety.adapter == "org/safe"
    assert recipe.sources.base.location == str(family / "base")


def test_a_folder_without_a_recipe_is_told(family):
    code, _, err = run("run", family / "base")
    assert code == 2
    assert "found a folder with a model" in err
