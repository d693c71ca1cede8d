"""Every recipe that is shipped has the line for editors, and is sound as plain YAML 1.1 too, by the schema.

Guards `recipe.fields`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from safemerge_recipes.errors import RecipeError
from safemerge_recipes.recipe.loading import load_recipe, parse_recipe
from safemerge_recipes.recipe.model import json_schema
from safemerge_recipes.sharing.shipped import shipped
from safemerge_recipes.sharing.templates import EDITOR_LINE

jsonschema = pytest.importorskip("jsonschema")

ROOT = Path(__file__).parents[2]
RECIPES = [
    path
    for path in sorted((ROOT / "recipes").rglob("*.yaml"))
    if "out" not in path.relative_to(ROOT).parts and "\nsources:" in path.read_text(encoding="utf-8")
]


def test_there_are_recipes() -> None:
    assert len(RECIPES) > 50
    assert set(shipped().values()) <= set(RECIPES)
    assert len(shipped()) == len(list((ROOT / "recipes" / "defenses").glob("*.yaml"))) > 20


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_editors_and_plain_readers_take_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.splitlines()[0] == EDITOR_LINE
    value = yaml.safe_load(text)
    jsonschema.Draft202012Validator(json_schema()).validate(value)
    again = parse_recipe(json.dumps(value), path).recipe
    assert again == load_recipe(path).recipe


def test_the_schema_is_where_the_line_says() -> None:
    schema = json.loads((ROOT / "docs" / "safemerge-recipe.schema.json").read_text())
    assert schema["$id"].startswith("https://")
    assert EDITOR_LINE.endswith(f"$schema={schema['$id']}")
    assert schema["$id"].endswith("/docs/safemerge-recipe.schema.json")


SOURCES = "sources: {base: a/b, aligned: {adapter: ./x, %s}, finetuned: c/d}\ngate: {tau: 0.3}\n%s"
DARE = "merge: {method: add_safety_vector, dare: {%s: delta}}\n"


def test_onto_is_on() -> None:
    on = parse_recipe(SOURCES % ("on: base", DARE % "on")).recipe
    assert parse_recipe(SOURCES % ("onto: base", DARE % "onto")).recipe == on
    assert yaml.safe_load(SOURCES % ("onto: base", DARE % "onto"))["sources"]["aligned"] == {
        "adapter": "./x", "onto": "base",
    }  # fmt: skip
    for text in (SOURCES % ("on: base, onto: base", ""), SOURCES % ("on: base", DARE % "on: delta, onto")):
        with pytest.raises(RecipeError, match="found on and onto, which are the same"):
            parse_recipe(text)
    validator = jsonschema.Draft202012Validator(json_schema())
    assert not validator.is_valid(
        {"sources": {"aligned": "a", "finetuned": {"adapter": "b", "on": "base", "onto": "base"}}, "gate": {"tau": 1}}
    )


def test_what_is_written_reads_the_same_in_plain_yaml() -> None:
    from safemerge_recipes.recipe.writing import dump_recipe

    written = dump_recipe(parse_recipe(SOURCES % ("onto: base", DARE % "onto")).recipe)
    assert yaml.safe_load(written)["sources"]["aligned"]["on"] == "base"


def test_recipes_are_listed_shown_and_run(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.fixtures.plain_family import make_family

    make_family(tmp_path / "family")
    monkeypatch.chdir(tmp_path)
    listed = call("recipes")
    assert listed.code == 0
    assert [line.split()[0] for line in listed.out.splitlines()] == list(shipped())
    assert "arXiv 2402.11746" in next(line for line in listed.out.splitlines() if line.startswith("defenses/resta "))
    assert call("recipes", "list", "--json").json[0].keys() == {"name", "source"}
    text = (ROOT / "recipes" / "defenses" / "resta.yaml").read_text()
    assert call("recipes", "show", "defenses/resta").out == call("recipes", "show", "resta").out == text
    assert call("recipes", "show", "resta", "-o", "mine.yaml").code == 0
    assert (tmp_path / "mine.yaml").read_text() == text
    places = ("base=family/base", "aligned=family/aligned", "finetuned=family/finetuned-adapter")
    sources = [word for place in places for word in ("--source", place)]
    done = call("run", "safemerge:defenses/resta", *sources)
    assert done.code == 0, done.err
    assert call("verify", "out/resta").code == 0
    assert call("lock", "safemerge:resta", *sources).out == f"{'resta.lock.yaml'}\n"
    assert call("plan", "safemerge:resta", *sources).code == 0
    for wrong, told in (
        (("run", "safemerge:defenses/rest"), "did you mean 'defenses/resta'?"),
        (("recipes", "show", "nothing-like-it"), "`safemerge recipes` lists them"),
        (("recipes", "show"), "expected list, or show NAME"),
        (("plan", "safemerge:safemerge"), "sources.base: meta-llama"),
    ):
        done = call(*wrong)
        assert (done.code in (2, 3), told in done.err, done.err.count("\n")) == (True, True, 1), done.err
