"""Recipe text to recipe and back: exact messages, YAML's traps, overrides, bounds, and the round trip.

Guards `recipe.messages`, `recipe.overrides`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safemerge_recipes.errors import RecipeError
from safemerge_recipes.recipe import builtins
from safemerge_recipes.recipe.loading import load_recipe, parse_recipe, read_names
from safemerge_recipes.recipe.merge import method_parameters
from safemerge_recipes.recipe.model import Recipe, json_schema
from safemerge_recipes.recipe.reference import reference, schema_text
from safemerge_recipes.recipe.writing import dump_recipe
from safemerge_recipes.recipe.yaml_text import read_yaml, write_yaml

DOCS = Path(__file__).parents[2] / "docs"

GOOD = """\
name: demo
sources:
  base: o/base
  aligned: o/chat@abc
  finetuned: {adapter: o/ft}
  safety: {adapter: ./safe, on: aligned}
gate:
  metric: rho
  tau: 0.35
merge:
  method: linear
  alpha: 0.8
rules:
  - tensors: "*.mlp.*"
    gate: {tau: 0.5}
output:
  path: out/demo
"""


def message(text=GOOD, *overrides, **options) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", overrides, **options)
    return str(caught.value)


def changed(old, new):
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def test_the_example_loads():
    loaded = parse_recipe(GOOD, "some/folder/r.yaml")
    assert loaded.recipe.sources.aligned.revision == "abc"
    assert loaded.directory == Path.cwd() / "some/folder"
    assert loaded.resolve("./safe") == Path.cwd() / "some/folder/safe"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "  tau: 0.35",
            "  treshold: 0.3\n  tau: 0.35",
            'r.yaml:9 gate.treshold: unknown key; did you mean "tau"?',
        ),
        (
            "{tau: 0.5}",
            "{zork: 0.5}",
            "r.yaml:15 rules.0.gate.zork: unknown key; expected one of tau, "
            "at_most, lowest, fraction, random, names, names_file, always, never, plugin, per, complement, metric, "
            "direction, granularity, scope, degenerate, precision, rank",
        ),
        ("metric: rho", "metrc: rho", 'r.yaml:8 gate.metrc: unknown key; did you mean "metric"?'),
        ("output:", "ouput:", 'r.yaml:16 ouput: unknown key; did you mean "output"?'),
        (
            "adapter: o/ft",
            "adaptor: o/ft",
            'r.yaml:5 sources.finetuned.adaptor: unknown key; did you mean "adapter"?',
        ),
        (
            "gate: {tau: 0.5}",
            "gates: {tau: 0.5}",
            'r.yaml:15 rules.0.gates: unknown key; did you mean "gate"?',
        ),
        ("{tau: 0.5}", "{tua: 0.5}", 'r.yaml:15 rules.0.gate.tua: unknown key; did you mean "tau"?'),
        (
            "  tau: 0.35",
            "  tau: 0.35\n  alpha: 1",
            'r.yaml:10 gate.alpha: unknown key; did you mean "merge.alpha"?',
        ),
        (
            "tau: 0.35",
            "tau: 1.2",
            "r.yaml:9 gate.tau: found 1.2; expected a threshold from 0 to 1 for the metric rho",
        ),
        ("tau: 0.35", "tau: .nan", "r.yaml:9 gate.tau: found nan; expected a finite number"),
        ("tau: 0.35", "tau: '0.35'", 'r.yaml:9 gate.tau: found "0.35"; expected a number'),
        (
            "tau: 0.35",
            "tau: 0.35\n  lowest: 2",
            "r.yaml:7 gate: found 2 selectors, tau and lowest; expected exactly one",
        ),
        ("alpha: 0.8", "alpha: 1.5", "r.yaml:12 merge.alpha: found 1.5; expected at most 1.0"),
        (
            "alpha: 0.8",
            "alpha: 0.8\n  alpha: 0.9",
            "r.yaml:13 merge.alpha: key given twice, on lines 12 and 13; expected once",
        ),
        (
            "method: linear",
            "method: drop",
            "r.yaml:12 merge.alpha: alpha is not used by method drop; it uses no other key",
        ),
        (
            "path: out/demo",
            "path: out/demo\n  format: adaptor",
            'r.yaml:18 output.format: found "adaptor"; expected full or adapter; did you mean "adapter"?',
        ),
        (
            "path: out/demo",
            "path: out/demo\n  allow_overflow: no",
            'r.yaml:18 output.allow_overflow: found "no"; expected true or false; write false',
        ),
        (
            "o/chat@abc",
            "{model: o/chat, revision: 123456}",
            "r.yaml:4 sources.aligned.revision: found 123456; expected text; put it in quotes",
        ),
        (
            "  aligned: o/chat@abc\n",
            "",
            "r.yaml:2 sources.aligned: missing; expected: The aligned model: deltas are taken "
            "from it and adapters apply to it.",
        ),
        ("  base: o/base\n", "", "r.yaml:2 sources.base: missing; expected it because metric rho needs it"),
        (
            '"*.mlp.*"',
            '"*.{mlp"',
            'r.yaml:14 rules.0.tensors: pattern "*.{mlp", character 3: this "{" is never closed',
        ),
        ("name: demo", "1: demo", "r.yaml:1: found 1 as a key; expected text"),
        ("name: demo", "? [a]\n: demo", "r.yaml:1: found a list or mapping as a key; expected text"),
        (
            "name: demo",
            "name: !!python/object/apply:os.system [echo]",
            "r.yaml:1: found the tag !!python/object/apply:os.system; expected plain YAML, without tags",
        ),
        (
            "name: demo",
            "name: !secret x",
            "r.yaml:1: found the tag !secret; expected plain YAML, without tags",
        ),
        (
            "name: demo",
            'name: "a\\u0007b"',
            "r.yaml:1 name: found the control character '\\x07'; expected printable text",
        ),
        ("name: demo", "name: a\x07b", "r.yaml:1: found the character U+0007; expected printable text"),
    ],
)
def test_each_problem_has_its_exact_message(old, new, expected):
    assert message(changed(old, new)) == expected


def test_all_problems_come_at_once_in_the_order_of_lines():
    text = changed("metric: rho", "metrc: rho").replace("alpha: 0.8", "alpha: 7").replace("name: demo", "name: ''")
    assert message(text).splitlines() == [
        'r.yaml:1 name: found ""; expected text that is not empty',
        'r.yaml:8 gate.metrc: unknown key; did you mean "metric"?',
        "r.yaml:12 merge.alpha: found 7; expected at most 1.0",
    ]


def test_yaml_1_1_surprises_are_gone():
    value = read_yaml(
        "a: no\nyes: on\non: 1e-4\nd: 2020-01-01\ne: 1_000\nf: 0o17\ng: ~\nh: True\ni: 010\nj: 1:30\n"
    ).value
    assert value == {
        "a": "no",
        "yes": "on",
        "on": 1e-4,
        "d": "2020-01-01",
        "e": "1_000",
        "f": 15,
        "g": None,
        "h": True,
        "i": 10,
        "j": "1:30",
    }
    assert parse_recipe(changed("tau: 0.35", "tau: 1e-4")).recipe.gate.tau == 1e-4


def test_unquoted_stars_get_a_hint():
    assert message(changed('"*.mlp.*"', "*.mlp.*")).endswith("text that starts with * or & needs quotes")
    assert message(changed('"*.mlp.*"', "*mlp")).endswith("text that starts with * needs quotes")


def test_bombs_are_refused():
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
    for level in range(1, 10):
        bomb += f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 9)}]\n"
    assert "aliases expand to more than 10000 values" in message(bomb + GOOD)
    assert "holds itself" in message("name: &a [*a]\n")
    assert "nested deeper than 50 levels" in message("name: " + "[" * 5000)
    assert "more than 10000 values" in message("name: [" + "x," * 20_000 + "]")
    assert "larger than 1000000 bytes" in message("#" * 1_000_001)
    assert parse_recipe("# anchors that stay small are fine\n" + changed("base: o/base", "base: &b o/base"))


def test_files_that_are_no_recipes(tmp_path):
    def failure(path):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        return str(caught.value).replace(str(tmp_path), "TMP")

    files = {
        "empty.yaml": b"",
        "comment.yaml": b"# nothing\n",
        "list.yaml": b"\n- a\n",
        "text.yaml": b"hello",
        "latin.yaml": b"n: \xe9",
        "broken.yaml": b"a: [",
        "two.yaml": b"a: 1\n---\nb: 2\n",
        "big.yaml": b"#" * 1_000_001,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert failure(tmp_path) == "TMP: found a folder; expected a recipe file"
    assert failure(tmp_path / "nowhere") == "TMP/nowhere: there is no such file; expected a recipe file"
    assert failure(tmp_path / "lst.yaml") == 'TMP/lst.yaml: there is no such file; did you mean "TMP/list.yaml"?'
    empty = "the file is empty; expected a recipe with sources and gate"
    assert failure(tmp_path / "empty.yaml") == f"TMP/empty.yaml: {empty}"
    assert failure(tmp_path / "comment.yaml") == f"TMP/comment.yaml: {empty}"
    wanted = "expected a mapping with sources and gate"
    assert failure(tmp_path / "list.yaml") == f"TMP/list.yaml:2: found a list; {wanted}"
    assert failure(tmp_path / "text.yaml") == f'TMP/text.yaml:1: found "hello"; {wanted}'
    assert failure(tmp_path / "latin.yaml") == "TMP/latin.yaml: not UTF-8 at byte 3; expected a YAML text file"
    assert failure(tmp_path / "broken.yaml").startswith("TMP/broken.yaml:1: not YAML:")
    assert failure(tmp_path / "two.yaml").startswith("TMP/two.yaml:2: not YAML:")
    assert failure(tmp_path / "big.yaml").startswith("TMP/big.yaml: found 1000001 bytes;")
    (tmp_path / "bom.yaml").write_text(GOOD, encoding="utf-8-sig")
    assert load_recipe(tmp_path / "bom.yaml").recipe.name == "demo"


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200) | st.text("{}[]:-*&!|>%@`'\"\n \t,?#a\\0", max_size=60))
def test_no_text_ends_in_anything_but_a_recipe_error(text):
    with pytest.raises(RecipeError):
        parse_recipe(text)


def test_words_for_values_of_several_kinds():
    text = changed("{tau: 0.5}", "{random: {count: x}}")
    expected = "expected a whole number or a mapping"
    assert message(text) == f'r.yaml:15 rules.0.gate.random.count: found "x"; {expected}'
    text = changed("base: o/base", "base: [o/base]")
    assert message(text) == "r.yaml:3 sources.base: found a list; expected a path or hub id, or a mapping"
    assert (
        message(changed('"*.mlp.*"', "[1]")) == "r.yaml:14 rules.0.tensors.0: found 1; expected text; put it in quotes"
    )


@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        ("{method: ties, normalize: 3}", "merge.normalize: found 3; expected true or false"),
        ("{method: ties, normalize: spectral}", 'merge.normalize: found "spectral"; expected true or false'),
        (
            "{method: project, normalize: true}",
            "merge.normalize: found true; expected frobenius, spectral, size or rank:k for method project",
        ),
        (
            "{method: slerp, space: factors}",
            "merge.space: found factors for method slerp; expected it only for linear and dare_linear",
        ),
        ("{method: mask}", "merge.mask: missing; expected a mapping with `path` for method mask"),
        ("{method: 5}", "merge.method: found 5; expected text; put it in quotes"),
        ("{densty: 1}", 'merge.densty: unknown key; did you mean "density"?'),
        ("{linear: {}, alpha: 0.7}", "merge.linear: unknown key; expected one of method, weights, alpha, normalize, "
         "space, density, lambda, rescale, seed, lambda_finetuned, lambda_safety, gamma, dare, rank, mask, options"),
        ("3", "merge: found 3; expected a mapping"),
    ],
)  # fmt: skip
def test_a_merge_is_told_what_its_method_takes(merge, expected):
    assert message(changed("merge:\n  method: linear\n  alpha: 0.8", f"merge: {merge}")) == f"r.yaml:10 {expected}"


def test_a_methods_name_is_found_whatever_its_case():
    text = changed("method: linear", "method: TIES")
    known = {"methods": list(builtins.METHODS), "metrics": []}
    assert message(text, **known) == 'r.yaml:11 merge.method: found "TIES", an unknown method; did you mean "ties"?'


def test_the_schema_tells_methods_apart():
    """What an editor is told: exactly the keys of each method; the same recipes as are loaded."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    check = jsonschema.Draft202012Validator(schema)

    def sound(merge, rule=None) -> bool:
        rules = [{"tensors": "*", "merge": rule}] if rule else []
        value = {"sources": dict.fromkeys(("base", "aligned", "finetuned", "safety"), "x"),
                 "gate": {"tau": 0.5}, "merge": merge, "rules": rules}  # fmt: skip
        told = check.is_valid(value)
        try:
            Recipe.model_validate(value)
        except ValueError:
            assert not told or rule, merge
            return False
        assert told, (merge, rule)
        return True

    for good in ({}, {"alpha": 0.5}, {"method": "ties", "density": 0.1, "lambda": 2}, {"method": "soup"},
                 {"method": "project", "normalize": "rank:3"}, {"method": "drop"}):  # fmt: skip
        assert sound(good)
    for bad in ({"density": 0.5}, {"method": "drop", "alpha": 0.5}, {"method": "ties", "gamma": 1}, {"method": "mask"},
                {"method": "project", "normalize": True}, {"method": "slerp", "space": "factors"}):  # fmt: skip
        assert not sound(bad)
    assert sound({}, {"alpha": 0.2})
    assert sound({}, {"method": "svd_k", "rank": 3})
    assert not sound({}, {"method": "svd_k", "alpha": 0.3})


# Overrides


def test_overrides_change_any_key():
    loaded = parse_recipe(
        GOOD,
        "r.yaml",
        [
            "gate.tau=0.6",
            "rules.0.gate.lowest=4",
            "sources.base.revision=main",
            "evaluate.tasks=[gsm8k]",
            "evaluate.limit=3",
            "name=a=b",
            "output.max_shard_size=1GiB",
        ],
    )
    made = loaded.recipe
    assert made.gate.tau == 0.6
    assert made.policies()[0].gate.selector == ("lowest", 4)
    assert str(made.sources.base) == "o/base@main"
    assert (made.evaluate.tasks, made.evaluate.limit, made.name) == (("gsm8k",), 3, "a=b")
    assert made.output.max_shard_size == 2**30


def test_an_overriding_selector_or_method_takes_the_place_of_the_files():
    made = parse_recipe(GOOD, "r.yaml", ["gate.random.count=3", "gate.random.seed=1", "merge.method=drop"]).recipe
    assert (made.gate.selectors(), made.gate.random.count, made.gate.random.seed) == (["random"], 3, 1)
    assert made.merge.method == "drop"
    # But what was asked for by hand is not dropped in silence.
    assert "alpha is not used" in message(GOOD, "merge.alpha=0.1", "merge.method=drop")
    assert "2 selectors" in message(GOOD, "gate.lowest=3", "gate.fraction=0.5")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("gate.tua=0.5", '--set gate.tua=0.5: unknown key; did you mean "tau"?'),
        ("gate={tua: 1}", '--set gate={tua: 1}: gate.tua: unknown key; did you mean "tau"?'),
        ("gate.tau=2", "--set gate.tau=2: found 2; expected a threshold from 0 to 1 for the metric rho"),
        ("gate.tau", "--set gate.tau: not an override; expected KEY=VALUE, such as gate.tau=0.6"),
        ("=1", "--set =1: not an override; expected KEY=VALUE, such as gate.tau=0.6"),
        ("rules.3.gate.tau=1", "--set rules.3.gate.tau=1: there is no rules.3 that could hold it"),
        ("rules.1={}", "--set rules.1={}: rules is a list of 1; expected a position from 0"),
        ("gate.tau.x=1", "--set gate.tau.x=1: gate.tau is 0.35; expected a mapping"),
        (
            "gate.tau=!!int 3",
            "--set gate.tau=!!int 3: found the tag !!int; expected plain YAML, without tags",
        ),
    ],
)
def test_a_bad_override_is_named(override, expected):
    assert message(GOOD, override) == expected


# Writing


def test_anchored_recipes_load_anywhere(tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "n.txt").write_text("a.*")
    text = changed("o/base", "local").replace("metric: rho\n  tau: 0.35", "names_file: n.txt")
    loaded = parse_recipe(text, tmp_path / "r.yaml")
    anchored = loaded.anchored()
    assert str(anchored.sources.base) == str(tmp_path / "local")
    assert anchored.sources.safety.adapter == str(tmp_path / "safe")
    assert str(anchored.sources.aligned) == "o/chat@abc"
    assert anchored.sources.finetuned.adapter == "o/ft"
    assert anchored.gate.selector == ("names", ("a.*",))
    assert anchored.output.path == str(tmp_path / "out/demo")
    assert parse_recipe(dump_recipe(anchored), "/elsewhere/r.yaml").anchored() == anchored


def test_names_files(tmp_path):
    (tmp_path / "n.txt").write_text("# all of these\na.*\n\nb  # why\n")
    assert read_names(tmp_path / "n.txt") == ("a.*", "b")
    (tmp_path / "n.txt").write_text("# none\n")
    with pytest.raises(RecipeError, match="found no names"):
        read_names(tmp_path / "n.txt")


def test_a_loaded_recipe_says_its_names_itself(tmp_path):
    (tmp_path / "n.txt").write_text("a.*\nb\n")
    (tmp_path / "m.txt").write_text("c\n")
    text = changed("metric: rho\n  tau: 0.35", "complement: {names_file: n.txt}")
    text = text.replace("rules:\n", "rules:\n  - {tensors: x, gate: {names_file: m.txt}}\n")
    recipe = parse_recipe(text, tmp_path / "r.yaml").recipe
    assert recipe.gate.complement.selector == ("names", ("a.*", "b"))
    assert recipe.rules[0].gate.selector == ("names", ("c",))
    assert "names_file" not in dump_recipe(recipe)
    (tmp_path / "n.txt").unlink()
    (tmp_path / "m.txt").write_text("#")
    with pytest.raises(RecipeError) as error:
        parse_recipe(text, tmp_path / "r.yaml")
    first, second = str(error.value).splitlines()
    assert re.fullmatch(r".*r.yaml:\d+ gate.complement.names_file: .*n.txt: there is no such file; .*", first)
    assert re.fullmatch(r".*r.yaml:\d+ rules.0.gate.names_file: .*m.txt: found no names; expected one a line", second)


scalars = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
words = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12
) | st.sampled_from(
    [
        "no",
        "on",
        "true",
        "null",
        "~",
        "1e-4",
        "0o7",
        "0x1",
        "1_0",
        ".5",
        "2020-01-01",
        "=",
        "<<",
        "- a",
        "a: b",
        "#",
        "*a",
        "0",
    ]
)
plain = st.recursive(
    scalars | words, lambda p: st.lists(p, max_size=3) | st.dictionaries(words, p, max_size=3), max_leaves=6
)


@settings(max_examples=300, deadline=None)
@given(plain)
def test_plain_values_survive_yaml(value):
    again = read_yaml(write_yaml({"x": value})).value["x"]
    assert again == value
    assert json.dumps(again) == json.dumps(value)  # which tells 1 from 1.0 and True


unit = st.floats(0, 1, allow_nan=False)
seeds = st.integers(0, 2**63 - 1)
selectors = st.one_of(
    unit.map(lambda v: {"tau": v}),
    unit.map(lambda v: {"at_most": v}),
    st.integers(1, 99).map(lambda v: {"lowest": v, "per": "module"}),
    st.floats(0.01, 1).map(lambda v: {"fraction": v}),
    st.builds(lambda c, s: {"random": {"count": c, "seed": s}}, st.integers(0, 99), seeds),
    st.lists(st.sampled_from(["a.*", "b", "/c.*/"]), min_size=1, max_size=3).map(lambda v: {"names": v}),
    st.just({"always": True}),
)
gate_parts = st.fixed_dictionaries(
    {},
    optional={
        "direction": st.sampled_from(["below", "above"]),
        "granularity": st.sampled_from(["tensor", "module", "block"]),
        "scope": st.none() | st.just(["*.mlp.*"]),
        "degenerate": st.sampled_from(["keep", "merge", "error"]),
        "precision": st.sampled_from(["exact", "adaptive"]),
    },
)
whole_gates = st.builds(
    lambda selector, negate, parts: ({"complement": selector} if negate else selector) | parts,
    selectors,
    st.booleans(),
    gate_parts,
)
parameters = {
    "alpha": unit,
    "density": st.floats(0.01, 1),
    "lambda": st.floats(-9, 9),
    "rescale": st.sampled_from(["density", "l1"]),
    "seed": seeds,
    "lambda_finetuned": st.floats(-9, 9),
    "lambda_safety": st.floats(-9, 9),
    "gamma": st.floats(-9, 9),
    "dare": st.none() | st.builds(lambda s: {"on": "delta", "seed": s}, seeds),
    "rank": st.integers(1, 99),
    "mask": words.map(lambda path: {"path": path, "threshold": 0.5}),
    "space": st.sampled_from(["delta", "weights"]),
    "options": st.dictionaries(words, plain, max_size=3),
}


@st.composite
def merges(draw):
    method = draw(st.sampled_from([*builtins.METHODS, "mergekit:della", "soup"]))
    keys = method_parameters(method)
    values = {
        key: draw(parameters[key]) for key in keys if key in parameters and (key == "mask" or draw(st.booleans()))
    }
    if "normalize" in keys and draw(st.booleans()):
        values["normalize"] = draw(st.sampled_from(["spectral", "rank:3"]) if "project" in method else st.booleans())
    return {"method": method, **values}


locations = st.sampled_from(["o/m", "o/m@v1", "./m@v1", "/a b/c", "no", "123", "~/x", "gpt2@refs/pr/1"])
sources = st.one_of(
    locations,
    st.builds(lambda w: {"adapter": w, "on": "base", "subfolder": "x"}, locations),
    st.builds(lambda w: {"model": w}, locations),
    st.builds(lambda w: {"location": w, "subfolder": "x"}, locations),
)
rules = st.one_of(
    st.just({"tensors": "a.{0..3}", "keep": "finetuned"}),
    st.builds(lambda g: {"tensors": ["b", "*"], "gate": g}, st.one_of(selectors, gate_parts.filter(bool))),
    st.builds(lambda m, g: {"tensors": ["c"], "merge": m, "gate": g}, merges(), whole_gates),
)
recipes = st.builds(
    lambda name, s, g, m, r, size: Recipe.model_validate(
        {
            "name": name,
            "sources": s,
            "gate": g,
            "merge": m,
            "rules": r,
            "output": {"max_shard_size": size},
            "evaluate": {"tasks": ["a"], "compare": ["base"]},
        }
    ),
    words,
    st.fixed_dictionaries({"base": locations, "aligned": sources, "finetuned": sources, "safety": sources}).filter(
        lambda s: not isinstance(s["aligned"], dict) or "adapter" not in s["aligned"] or isinstance(s["base"], str)
    ),
    whole_gates,
    merges(),
    st.lists(rules, max_size=3),
    st.sampled_from(["5GB", 77]),
)


@settings(max_examples=300, deadline=None)
@given(recipes)
def test_a_recipe_written_down_loads_back_equal(recipe):
    text = dump_recipe(recipe)
    again = parse_recipe(text).recipe
    assert again == recipe
    assert again.policies() == recipe.policies()
    assert dump_recipe(again) == text


# Schema, documents, imports


def test_the_schema_and_the_reference_are_up_to_date():
    hint = "run: python -m safemerge_recipes.recipe.reference"
    assert (DOCS / "safemerge-recipe.schema.json").read_text(encoding="utf-8") == schema_text(), hint
    assert (DOCS / "recipe.md").read_text(encoding="utf-8") == reference(), hint


def test_every_key_is_documented():
    schema = json_schema()
    assert schema["$schema"].endswith("2020-12/schema")
    models = {"Recipe": schema} | schema["$defs"]
    models["Source"] = models["Source"]["anyOf"][1]
    missing = [
        f"{model}.{key}"
        for model, part in models.items()
        for key, field in part.get("properties", {}).items()
        if not field.get("description")
    ]
    assert len(models) >= 12
    assert missing == []


def test_loading_imports_nothing_heavy():
    code = "import sys, safemerge_recipes.recipe.loading; print({'torch', 'numpy', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
