"""The recipe's own checks: selectors, bounds, what methods use and need, and how rules resolve.

Guards `recipe.source`, `recipe.gate`, `recipe.rules`, `recipe.output`, `recipe.evaluation`, `recipe.fields`,
`recipe.merge_keys`, `recipe.meanings`.
"""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from safemerge_recipes.recipe import builtins
from safemerge_recipes.recipe.merge_change import any_change, common_change
from safemerge_recipes.recipe.model import (
    Gate,
    Merge,
    Output,
    Recipe,
    Source,
    method_parameters,
)

ALL = {
    "base": "o/base",
    "aligned": "o/chat",
    "finetuned": {"adapter": "o/ft"},
    "safety": {"adapter": "./safe"},
}


def recipe(**parts):
    return Recipe.model_validate({"sources": ALL, "gate": {"tau": 0.35}, **parts})


def problems(call, *args, **kwargs) -> dict[str, str]:
    with pytest.raises(ValidationError) as caught:
        call(*args, **kwargs)
    return {".".join(map(str, e["loc"])): e["msg"].removeprefix("Value error, ") for e in caught.value.errors()}


def test_the_smallest_recipe_has_the_papers_defaults():
    made = recipe()
    assert (made.merge.method, made.merge.alpha, made.gate.metric) == ("linear", 0.8, "rho")
    assert made.gate.selector == ("tau", 0.35)
    assert made.output.max_shard_size == 5 * 10**9
    assert [policy.rule for policy in made.policies()] == [None]


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        recipe().gate.tau = 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("o/m", ("o/m", None)),
        ("o/m@abc", ("o/m", "abc")),
        ("gpt2@refs/pr/1", ("gpt2", "refs/pr/1")),
        ("./m@abc", ("./m@abc", None)),
        ("/data/m@abc+x", ("/data/m@abc+x", None)),
        ("~/m@abc", ("~/m@abc", None)),
        ("a/b/c@d", ("a/b/c@d", None)),
    ],
)
def test_text_is_split_into_id_and_revision_unless_it_is_a_path(text, expected):
    source = Source.model_validate(text)
    assert (source.location, source.revision) == expected
    assert str(source) == text


def test_a_folder_that_exists_keeps_its_at_sign(tmp_path):
    (tmp_path / "m@abc").mkdir()
    source = Source.model_validate("m@abc", context={"directory": tmp_path})
    assert (source.location, source.revision) == ("./m@abc", None)
    assert Source.model_validate("n@abc", context={"directory": tmp_path}).revision == "abc"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"model": "a", "adapter": "b"}, "found model and adapter"),
        ({"revision": "x"}, "found none"),
        ({"model": "a", "on": "base"}, "what is not an adapter"),
        ({"model": "a@x", "revision": "y"}, "two revisions"),
    ],
)
def test_a_source_names_one_thing(value, message):
    assert message in problems(Source.model_validate, value)[""]


def test_adapters_may_not_apply_to_themselves():
    found = problems(recipe, sources=ALL | {"aligned": {"adapter": "x"}})
    assert found == {"sources.aligned.on": "an adapter for `aligned` cannot apply to `aligned` itself"}
    found = problems(recipe, sources=ALL | {"aligned": {"adapter": "x", "on": "base"}, "base": {"adapter": "y"}})
    assert "adapters on each other" in found["sources.aligned"]
    assert recipe(sources=ALL | {"aligned": {"adapter": "x", "on": "base"}})


def test_exactly_one_selector():
    assert problems(Gate.model_validate, {"tau": 0.2, "lowest": 3})[""] == (
        "found 2 selectors, tau and lowest; expected exactly one"
    )
    assert problems(Gate.model_validate, {})[""] == (
        "found no selector; expected exactly one of tau, at_most, lowest, fraction, random, complement, "
        "names, names_file, always, never, plugin"
    )
    assert "expected exactly one" in problems(Gate.model_validate, {"complement": {}})["complement"]
    nested = {"complement": {"complement": {"tau": 1}}}
    assert "Extra inputs" in problems(Gate.model_validate, nested)["complement.complement"]


@pytest.mark.parametrize(
    "gate",
    [
        {"tau": 1.2},
        {"tau": -0.1},
        {"tau": math.nan},
        {"tau": math.inf},
        {"at_most": 1.01},
        {"tau": "0.3"},
        {"tau": True},
        {"tau": -1, "metric": "rho_ratio"},
        {"tau": -1.1, "metric": "cosine"},
        {"complement": {"tau": 2}},
        {"lowest": 0},
        {"lowest": 1.0},
        {"fraction": 0},
        {"fraction": 1.1},
        {"random": {"count": -1}},
        {"random": {"count": 1, "seed": -1}},
        {"always": False},
        {"never": False},
        {"names": []},
        {"names": ["a{"]},
        {"tau": 0.1, "per": "module"},
        {"lowest": 1, "per": "block"},
        {"tau": 0.1, "rank": 4},
        {"tau": 0.1, "metric": ""},
    ],
)
def test_gates_out_of_bounds_are_refused(gate):
    assert problems(Gate.model_validate, gate)


@pytest.mark.parametrize(
    "gate",
    [
        {"tau": 1},
        {"tau": 0},
        {"tau": 1.2, "metric": "rho_ratio"},
        {"tau": -0.5, "metric": "cosine"},
        {"tau": -7, "metric": "my_plugin"},
        {"lowest": 1, "per": "module"},
        {"fraction": 1, "per": "module"},
        {"random": {"count": 0, "per": "module"}},
        {"complement": {"lowest": 2, "per": "module"}},
        {"tau": 0.1, "metric": "residual", "rank": 4},
        {"names": "*.mlp.*"},
        {"tau": 0.1, "at_most": None},
    ],
)
def test_gates_within_bounds_are_taken(gate):
    assert Gate.model_validate(gate)


@pytest.mark.parametrize("method", builtins.METHODS)
def test_a_method_takes_what_it_uses_and_nothing_else(method):
    examples = {
        "weights": {"finetuned": 0.5},
        "alpha": 0.5,
        "density": 0.3,
        "lambda": 2,
        "rescale": "l1",
        "seed": 3,
        "lambda_finetuned": -1,
        "lambda_safety": 2,
        "gamma": 0.5,
        "dare": {"on": "delta"},
        "rank": 3,
        "mask": {"path": "m.safetensors"},
        "space": "weights",
        "options": {"a": 1},
        "normalize": "spectral" if method in ("project", "project_rows") else False,
    }
    assert set(examples) == set(any_change().key_names()) - {"method"}
    known = method_parameters(method)
    short = [key for key in known if key not in ("weights", "fill")]
    used = {key: examples[key] for key in short}
    made = Merge.model_validate({"method": method, **used})
    assert list(made.parameters()) == short
    if "weights" in known:
        long = [key for key in known if key not in ("alpha", "lambda_finetuned", "lambda_safety")]
        made = Merge.model_validate({"method": method, **{key: examples[key] for key in long}})
        assert list(made.parameters()) == long
    for key in examples.keys() - set(known):
        found = problems(Merge.model_validate, {"method": method, **used, key: examples[key]})
        assert found[key].startswith(f"{key} is not used by method {method}; it uses")


def test_merge_messages():
    assert problems(Merge.model_validate, {"method": "drop", "alpha": 0.8}) == {
        "alpha": "alpha is not used by method drop; it uses no other key"
    }
    assert problems(Merge.model_validate, {"density": 0.5}) == {
        "density": "density is not used by method linear; it uses: weights, alpha, normalize, space"
    }
    assert "normalize" in problems(Merge.model_validate, {"method": "ties", "normalize": "spectral"})
    assert "normalize" in problems(Merge.model_validate, {"method": "project", "normalize": True})
    found = problems(Merge.model_validate, {"method": "project_rows", "mask": {"path": "m"}, "normalize": True})
    assert found == {"normalize": "found true; expected frobenius, spectral, size or rank:k for method project_rows"}
    assert "mask" in problems(Merge.model_validate, {"method": "mask"})
    assert "space" in problems(Merge.model_validate, {"method": "slerp", "space": "factors"})
    assert "method" in problems(Merge.model_validate, {"method": "mergkit:slerp"})


def test_defaults_that_depend_on_the_method():
    assert Merge.model_validate({"method": "ties"}).normalize is True
    assert Merge.model_validate({"method": "project"}).normalize == "frobenius"
    assert Merge.model_validate({"method": "project", "normalize": "rank:8"}).normalize == "rank:8"
    assert Merge.model_validate({"method": "mergekit:della"}).options == {}


def test_plugin_names_are_checked_where_they_are_known():
    known = {"context": {"methods": ["soup"], "metrics": []}}
    assert Merge.model_validate({"method": "soup"}, **known)
    assert 'did you mean "linear"?' in problems(Merge.model_validate, {"method": "lineer"}, **known)["method"]
    assert Merge.model_validate({"method": "lineer"})
    listed = {"context": {"methods": [*builtins.METHODS, "Soup"], "metrics": []}}
    for written, meant in (("TIES", "ties"), ("Linear", "linear"), ("SOUP", "Soup")):
        found = problems(Merge.model_validate, {"method": written}, **listed)
        assert found["method"] == f'found "{written}", an unknown method; did you mean "{meant}"?'
    assert problems(Merge.model_validate, {"method": "xyz"}, **listed)["method"].count("task_arithmetic") == 1
    assert "unknown metric" in problems(Gate.model_validate, {"metric": "roh", "tau": 0.1}, **known)["metric"]


def test_rules_resolve_in_order_and_change_only_what_they_say():
    made = recipe(
        gate={"lowest": 5, "per": "module", "direction": "above"},
        merge={"method": "ties", "density": 0.3, "alpha": 0.6},
        rules=[
            {"tensors": "a.*", "keep": "aligned"},
            {"tensors": ["b"], "gate": {"tau": 0.5}, "merge": {"alpha": 0.7}},
            {"tensors": "c", "gate": {"lowest": 2}, "merge": {"method": "slerp"}},
            {"tensors": "d", "gate": {"degenerate": "merge"}, "merge": {"method": "project"}},
        ],
    )
    first, second, third, fourth, last = made.policies()
    assert (first.patterns, first.keep, first.rule) == (("a.*",), "aligned", 0)
    assert second.gate == Gate(tau=0.5, direction="above")
    assert second.merge == Merge.model_validate({"method": "ties", "density": 0.3, "alpha": 0.7})
    assert third.gate == Gate(lowest=2, direction="above")
    assert third.merge == Merge.model_validate({"method": "slerp", "alpha": 0.6})
    assert fourth.gate == Gate(lowest=5, per="module", direction="above", degenerate="merge")
    assert fourth.merge == Merge.model_validate({"method": "project"})
    assert last == (last.__class__)(("*",), None, made.gate, made.merge, None)


def test_a_rule_is_checked_as_resolved():
    rules = [
        {"tensors": "a", "keep": "finetuned"},
        {"tensors": "b", "gate": {"tau": 1.5}, "merge": {"method": "drop", "alpha": 0.1}},
        {"tensors": "c", "gate": {"metric": "rho_ratio", "tau": 1.5}},
    ]
    assert problems(recipe, rules=rules) == {
        "rules.1.gate.tau": "found 1.5; expected a threshold from 0 to 1 for the metric rho",
        "rules.1.merge.alpha": "alpha is not used by method drop; it uses no other key",
    }
    assert "changes nothing" in problems(recipe, rules=[{"tensors": "a"}])["rules.0"]
    both = {"tensors": "a", "keep": "safety", "gate": {"tau": 0.1}}
    assert "found keep and gate" in problems(recipe, rules=[both])["rules.0"]


def test_the_common_keys_are_what_every_method_makes_of_them():
    few, all_ = common_change(), any_change()
    assert set(few.key_names()) < set(all_.key_names())
    samples = (None, True, 0, 1, -1, 0.5, 3.0, 1e9, "density", "l1", "factors", "delta", "x", [], {})
    for key in few.key_names():
        for value in samples:
            if key == "method":
                continue
            told = []
            for form in (few, all_):
                try:
                    told.append(form.model_validate({key: value}).given())
                except ValidationError as error:
                    told.append([(one["type"], one["msg"]) for one in error.errors()])
            assert told[0] == told[1], (key, value)


def without(*roles):
    return {role: source for role, source in ALL.items() if role not in roles}


@pytest.mark.parametrize("method", builtins.METHODS)
def test_a_method_asks_for_its_sources(method):
    masks = {"mask": {"path": "m", "fill": "zero"}, "project_rows": {"path": "m"}}
    merge = {"method": method} | ({"mask": masks[method]} if method in masks else {})
    needs = builtins.METHODS[method].needs
    made = recipe(sources=without(*({"base", "safety"} - set(needs))), gate={"always": True}, merge=merge)
    assert made.merge.method == method
    for role in needs:
        found = problems(recipe, sources=without(role), gate={"always": True}, merge=merge)
        assert found == {f"sources.{role}": f"missing; expected it because method {method} needs it"}


def test_the_metric_asks_for_base():
    assert "metric rho" in problems(recipe, sources=without("base"))["sources.base"]
    found = problems(recipe, sources=without("base"), gate={"complement": {"tau": 0.2}})
    assert "sources.base" in found
    for gate in (
        {"always": True},
        {"random": {"count": 1}},
        {"names": "a"},
        {"complement": {"names": ["a"]}},
    ):
        assert recipe(sources=without("base"), gate=gate)
    found = problems(
        recipe, sources=without("base"), gate={"always": True}, rules=[{"tensors": "a", "gate": {"tau": 0}}]
    )
    assert found == {"sources.base": "missing; expected it because metric rho needs it (rules.0)"}


def test_nothing_merged_needs_no_safety():
    assert recipe(sources=without("base", "safety"), gate={"never": True})
    rules = [{"tensors": "a", "keep": "safety"}]
    found = problems(recipe, sources=without("base", "safety"), gate={"never": True}, rules=rules)
    assert list(found) == ["sources.safety"]


def test_other_parts():
    for size, count in (("5GB", 5 * 10**9), ("2GiB", 2**31), ("1.5 mb", 1_500_000), (7, 7), ("12", 12)):
        assert Output.model_validate({"max_shard_size": size}).max_shard_size == count
    for size in ("5 gallons", "", "-1GB", "0", True, 1.5, "9" * 30):
        assert problems(Output.model_validate, {"max_shard_size": size})
    assert "only with format adapter" in problems(Output.model_validate, {"rank": 4})[""]
    found = problems(recipe, output={"format": "adapter"}, merge={"method": "ties"})
    assert list(found) == ["output.rank"]
    assert recipe(output={"format": "adapter", "rank": 8}, merge={"method": "ties"})
    assert problems(
        recipe,
        sources=without("safety"),
        merge={"method": "drop"},
        evaluate={"tasks": "x", "compare": ["safety"]},
    )
    assert problems(recipe, evaluate={"tasks": []})
    assert problems(recipe, evaluate={"tasks": ["a", "a"]})
    assert problems(recipe, name="two\nlines")
    assert problems(recipe, description="bell \x07")
    assert problems(recipe, merge={"method": "mergekit:x", "options": {"a": [{"b": math.nan}]}})


def test_keys_of_unknown_methods_are_those_of_plugins():
    assert method_parameters("mergekit:slerp") == method_parameters("soup") == (
        "weights", "alpha", "seed", "space", "options",
    )  # fmt: skip
