"""Controls: recipes that differ from their model in the choice of tensors and in nothing else."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from safemerge_recipes.cli.app import app
from safemerge_recipes.cli.program import guarded
from safemerge_recipes.recipe.loading import load_recipe
from safemerge_recipes.tensor_names import module_type
from tests.fixtures.plain_family import GATED, make_family

RECIPE = """
name: tiny
sources: {base: ../base, aligned: ../aligned, finetuned: {adapter: ../finetuned-adapter}, safety: ../safety}
gate: {lowest: 5, scope: '*proj*'}
merge: {alpha: 0.7}
rules:
  - {tensors: '*layers.1.mlp*', gate: {fraction: 0.5, per: module}}
  - {tensors: '*layers.0.mlp*', merge: {method: slerp}}
  - {tensors: '*layers.1.self_attn.o_proj*', gate: {always: true}}
  - {tensors: '*embed*', keep: aligned}
output: {path: ../out/tiny}
"""


@pytest.fixture
def folder(tmp_path):
    make_family(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny.yaml").write_text(RECIPE.replace("lowest: 5", "lowest: 3"))
    return tmp_path


def call(*arguments: str) -> int:
    return guarded(lambda: app(list(arguments), standalone_mode=False))


def planned(capsys, recipe) -> dict:
    capsys.readouterr()
    assert call("plan", str(recipe), "--json") == 0
    return json.loads(capsys.readouterr().out)


def merged(plan: dict) -> set[str]:
    return {line["name"] for line in plan["tensors"] if line["action"] == "merge"}


def by_rule(names: set[str]) -> Counter:
    """How many tensors of each part of the recipe."""

    def part(name: str) -> str:
        if "layers.1.self_attn.o_proj" in name:
            return "always"
        return "first" if "layers.1.mlp" in name else "second" if "layers.0.mlp" in name else "rest"

    return Counter(map(part, names))  # fmt: skip


def test_the_family_of_controls(folder, capsys):
    assert call("controls", str(folder / "recipes" / "tiny.yaml"), "--seeds", "2") == 0
    written = [line for line in capsys.readouterr().out.splitlines() if line]
    names = sorted(path.rpartition("/")[2] for path in written)
    assert names == sorted(
        f"tiny-{kind}.yaml"
        for kind in ("random-0", "random-1", "random-by-type-0", "random-by-type-1", "complement", "all", "none")
    )
    plans = {path.rpartition("tiny-")[2].removesuffix(".yaml"): planned(capsys, path) for path in written}
    model = planned(capsys, folder / "recipes" / "tiny.yaml")
    chosen, always = merged(model), "model.layers.1.self_attn.o_proj.weight"
    assert always in chosen
    assert by_rule(chosen) == {"rest": 3, "first": 3, "second": 3, "always": 1}
    for seed in range(2):
        assert by_rule(merged(plans[f"random-{seed}"])) == by_rule(chosen)
        typed = merged(plans[f"random-by-type-{seed}"])
        assert Counter(map(module_type, typed)) == Counter(map(module_type, chosen))
        assert by_rule(typed) == by_rule(chosen)
    assert merged(plans["random-0"]) != merged(plans["random-1"])
    assert merged(plans["complement"]) == set(GATED) - chosen | {always}
    assert merged(plans["all"]) == set(GATED)
    assert merged(plans["none"]) == {always}
    for plan in plans.values():  # what is merged is merged alike
        for line in plan["tensors"]:
            if line["action"] == "merge":
                assert line["method"] == ("slerp" if "layers.0.mlp" in line["name"] else "linear")
                assert line["alpha"] == 0.7


def test_they_may_lie_anywhere(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert call("controls", "recipes/tiny.yaml", "--output", "elsewhere/deep", "--seeds", "1") == 0
    loaded = load_recipe(folder / "elsewhere" / "deep" / "tiny-complement.yaml")
    assert loaded.local(loaded.recipe.sources.aligned) == folder / "aligned"
    assert loaded.resolve(loaded.recipe.output.path) == folder / "out" / "tiny-complement"
    assert loaded.recipe.name == "tiny-complement"


def test_the_complement_of_a_complement(folder, capsys):
    recipe = folder / "recipes" / "flipped.yaml"
    sources = RECIPE.split("gate")[0]
    recipe.write_text(f"{sources}gate: {{complement: {{lowest: 5}}}}\n")
    assert call("controls", str(recipe), "--seeds", "1") == 0
    paths = capsys.readouterr().out.split()
    flipped = merged(planned(capsys, recipe))
    assert len(flipped) == 9
    assert merged(planned(capsys, next(p for p in paths if p.endswith("-complement.yaml")))) == set(GATED) - flipped
