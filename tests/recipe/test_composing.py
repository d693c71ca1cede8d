"""Recipes that are put together: extended, filled in, with other sources, and what is refused.

Guards `recipe.composed`, `recipe.composed_schema`, `recipe.foreign`, `recipe.parameters`, `recipe.plain_values`.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safemerge_recipes.errors import RecipeError
from safemerge_recipes.recipe.composed import Place
from safemerge_recipes.recipe.composing import MAX_DEPTH, escaped
from safemerge_recipes.recipe.loading import load_recipe, parse_recipe
from safemerge_recipes.recipe.model import json_schema
from safemerge_recipes.recipe.writing import dump_recipe

BASE = """
sources: {base: ./base, aligned: org/chat, finetuned: {adapter: ./lora, on: base}, safety: {adapter: org/safe}}
gate: {metric: rho, tau: 0.35}
merge: {method: ties, density: 0.3}
rules: [{tensors: "*.mlp.*", merge: {alpha: 0.5}}]
output: {path: out/base}
"""


@pytest.fixture
def write(tmp_path):
    def one(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return one


class TestExtends:
    def test_mappings_join_and_everything_else_is_replaced(self, write, tmp_path):
        write("lib/base.yaml", BASE)
        path = write(
            "own.yaml", "extends: ./lib/base.yaml\ngate: {granularity: block}\nmerge: {alpha: 0.7}\nrules: []\n"
        )
        recipe = load_recipe(path).recipe
        assert (recipe.gate.tau, recipe.gate.granularity) == (0.35, "block")
        assert (recipe.merge.method, recipe.merge.density, recipe.merge.alpha) == ("ties", 0.3, 0.7)
        assert recipe.rules == ()
        assert recipe.sources.finetuned.adapter == str(tmp_path / "lib" / "lora")
        assert recipe.sources.base.location == str(tmp_path / "lib" / "base")
        assert recipe.sources.aligned.location == "org/chat"
        assert recipe.output.path == "out/base"

    @pytest.mark.parametrize(
        ("own", "check"),
        [
            ("gate: {fraction: 0.5}", lambda r: (r.gate.tau, r.gate.fraction) == (None, 0.5)),
            ("merge: {method: linear}", lambda r: (r.merge.method, r.merge.alpha) == ("linear", 0.8)),
            ("sources: {finetuned: other/lora}", lambda r: str(r.sources.finetuned) == "other/lora"),
            ("sources: {finetuned: other/lora}", lambda r: str(r.sources.safety) == "org/safe"),
        ],
    )
    def test_selectors_methods_and_sources_are_replaced_whole(self, write, own, check):
        write("base.yaml", BASE)
        assert check(load_recipe(write("own.yaml", f"extends: base.yaml\n{own}\n")).recipe)

    def test_overrides_win_over_all(self, write):
        write("base.yaml", BASE)
        path = write("own.yaml", "extends: base.yaml\n")
        assert load_recipe(path, ["gate.lowest=3"]).recipe.gate.lowest == 3

    def test_a_loop_is_told(self, write):
        write("a.yaml", "extends: ./b.yaml\n")
        write("b.yaml", "extends: ./a.yaml\n")
        with pytest.raises(RecipeError, match=r"leads back to itself: .*a\.yaml → .*b\.yaml"):
            load_recipe(write("a.yaml", "extends: ./b.yaml\n"))
        with pytest.raises(RecipeError, match="leads back to itself"):
            load_recipe(write("c.yaml", "extends: c.yaml\n"))

    def test_depth_is_bounded(self, write):
        write("0.yaml", BASE)
        for number in range(1, MAX_DEPTH + 1):
            write(f"{number}.yaml", f"extends: {number - 1}.yaml\n")
        load_recipe(write("0.yaml", BASE).with_name(f"{MAX_DEPTH - 1}.yaml"))
        with pytest.raises(RecipeError, match="one after another"):
            load_recipe(write("0.yaml", BASE).with_name(f"{MAX_DEPTH}.yaml"))

    def test_a_problem_is_told_where_it_stands(self, write):
        write("base.yaml", BASE.replace("tau: 0.35", "tua: 0.35"))
        with pytest.raises(RecipeError, match=r"base\.yaml:3 gate\.tua: unknown key; did you mean \"tau\""):
            load_recipe(write("own.yaml", "extends: base.yaml\nname: x\n"))

    @pytest.mark.parametrize(
        ("named", "told"),
        [("5", "found 5; expected a recipe"), ("./none.yaml", "there is no such file"), ("[a]", "found a list")],
    )
    def test_what_is_no_recipe_is_told(self, write, named, told):
        with pytest.raises(RecipeError, match=told):
            load_recipe(write("own.yaml", f"extends: {named}\n"))

    @pytest.mark.parametrize("parent", ["- a\n", "a: [\n", "", "a: 1\na: 2\n"])
    def test_a_broken_parent_is_named(self, write, parent):
        write("base.yaml", parent)
        with pytest.raises(RecipeError, match=r"base\.yaml"):
            load_recipe(write("own.yaml", "extends: base.yaml\n"))


PARAMETERS = BASE.replace("0.35", "'${tau}'").replace("out/base", "'out/${who}-${tau}'") + (
    "parameters: {tau: {default: 0.35, description: where to cut}, who: me}\n"
)


class TestParameters:
    def test_alone_they_are_the_value_and_in_text_its_text(self):
        recipe = parse_recipe(PARAMETERS).recipe
        assert (recipe.gate.tau, recipe.output.path) == (0.35, "out/me-0.35")

    @pytest.mark.parametrize("key", ["tau", "parameters.tau"])
    def test_the_command_line_sets_them(self, key):
        recipe = parse_recipe(PARAMETERS, overrides=[f"{key}=0.5", "gate.metric=cosine"]).recipe
        assert (recipe.gate.tau, recipe.output.path, recipe.gate.metric) == (0.5, "out/me-0.5", "cosine")

    def test_a_child_sets_its_parents(self, write):
        write("base.yaml", PARAMETERS)
        path = write("own.yaml", "extends: base.yaml\nparameters: {tau: 0.9}\n")
        assert load_recipe(path).recipe.gate.tau == 0.9

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            (BASE.replace("0.35", "'${tau}'"), "no such parameter"),
            (
                BASE.replace("0.35", "'${tau}'") + "parameters: {tau: {description: x}}\n",
                "no default; say --set tau=VALUE",
            ),
            (BASE + "parameters: {tau: {defualt: 1}}\n", "unknown key; expected default or description"),
            (BASE + "parameters: {tau: [1]}\n", "expected a number, a text or a truth value"),
            (BASE + "parameters: 3\n", "expected a mapping"),
            (BASE + "parameters: {'a b': 3}\n", "expected a name of letters"),
            (PARAMETERS.replace("0.35, desc", "high, desc"), 'found "high"; expected a number'),
        ],
    )
    def test_mistakes_are_told(self, text, told):
        with pytest.raises(RecipeError, match=told):
            parse_recipe(text)

    @settings(deadline=None)
    @given(st.text(st.sampled_from("${}ab "), max_size=12))
    def test_any_text_reads_back_as_itself(self, description):
        recipe = parse_recipe(BASE).recipe.model_copy(update={"description": description or "x"})
        assert parse_recipe(dump_recipe(recipe)).recipe.description == recipe.description
        assert escaped({"a": [description]})["a"][0].count("${") == description.count("${")


def test_an_editor_takes_a_parameter_for_any_value():
    """The schema allows `${name}` where a value of another kind or one of a few is expected, and no other text."""
    check = pytest.importorskip("jsonschema").Draft202012Validator(json_schema())
    value = {
        "parameters": {"x": 0.5},
        "sources": {"base": "a/b", "aligned": "a/b", "finetuned": "a/b", "safety": {"adapter": "a/b", "on": "${x}"}},
        "gate": {"tau": "${x}", "direction": "${x}", "metric": "rho"},
        "merge": {"method": "ties", "alpha": "${x}", "density": "${x}"},
        "rules": [{"tensors": "*", "gate": {"random": {"count": "${x}"}}, "merge": {"alpha": "${x}"}}],
        "output": {"format": "${x}", "rank": "${x}"},
        "evaluate": {"tasks": ["gsm8k"], "limit": "${x}"},
    }
    assert not list(check.iter_errors(value))
    for part, key in (("gate", "tau"), ("merge", "alpha"), ("output", "format"), ("evaluate", "limit")):
        for other in ("high", "${x", "${}", "a ${x}"):
            assert not check.is_valid({**value, part: {**value[part], key: other}}), (part, key, other)


def test_keys_for_anchors_are_free():
    text = "x-mine: &gate {metric: rho, tau: 0.2}\n" + BASE.replace("gate: {metric: rho, tau: 0.35}", "gate: *gate")
    assert parse_recipe(text).recipe.gate.tau == 0.2


class TestStandIns:
    def test_the_kind_and_what_an_adapter_lies_on_stay(self, write, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mine").mkdir()
        path = write("far/recipe.yaml", BASE)
        sources = load_recipe(path, stand_ins={"finetuned": "mine", "aligned": "org/other@v1"}).recipe.sources
        assert (sources.finetuned.adapter, sources.finetuned.on) == (str(tmp_path / "mine"), "base")
        assert (sources.aligned.location, sources.aligned.revision) == ("org/other", "v1")

    def test_a_revision_and_a_subfolder_go_with_the_source_they_belong_to(self):
        text = BASE.replace("aligned: org/chat", "aligned: {model: org/chat, revision: v2, subfolder: a}")
        source = parse_recipe(text, stand_ins={"aligned": "org/other"}).recipe.sources.aligned
        assert (source.model, source.revision, source.subfolder) == ("org/other", None, None)


class TestElsewhere:
    def place(self, text, parents=None, label="org/x"):
        return Place(label, text, None, lambda named: self.place((parents or {})[named], parents, f"org/x/{named}"))

    def read(self, text, parents=None, **options):
        return parse_recipe(text, "org/x", place=self.place(text, parents), **options)

    REMOTE = BASE.replace("./base", "org/base").replace("./lora", "org/lora")

    def test_sources_and_numbers_pass_and_its_output_is_ours(self):
        recipe = self.read(self.REMOTE).recipe
        assert (recipe.gate.tau, recipe.output.path) == (0.35, None)

    @pytest.mark.parametrize("where", ["./base", "/etc", "~/x", "../x", "a/b/c", "C:\\x", "base"])
    def test_a_folder_of_its_authors_is_refused_unless_stood_in_for(self, where):
        text = self.REMOTE.replace("base: org/base", f"base: '{where}'")
        with pytest.raises(RecipeError, match=r"--source base=PLACE"):
            self.read(text)
        assert self.read(text, stand_ins={"base": "org/y"}).recipe.sources.base.location == "org/y"

    @pytest.mark.parametrize(
        "more",
        [
            "evaluate: {tasks: [safemerge_refusal], task_path: tasks}",
            "rules: [{tensors: '*', gate: {names_file: /etc/passwd}}]",
            "rules: [{tensors: '*', merge: {method: mask, mask: {path: m.safetensors}}}]",
            "evaluate: {tasks: [a], judge: {kind: openai, model: a/b, url: 'http://10.0.0.1/v1'}}",
            "evaluate: {tasks: [a], judge: {kind: chat, model: a/b, prompt: ./ask.txt}}",
            "evaluate: {tasks: [a], judge: {kind: chat, model: ./judge}}",
        ],
    )
    def test_no_file_and_no_server_is_named(self, more):
        text = self.REMOTE.replace("rules:", "x-rules:") + more
        with pytest.raises(RecipeError, match="a recipe from elsewhere may name none"):
            self.read(text)

    def test_no_training_is_named(self):
        text = self.REMOTE.replace("safety: {adapter: org/safe}", "safety: {train: org/safety.yaml}")
        with pytest.raises(RecipeError, match="--source safety=PLACE"):
            self.read(text)

    def test_a_judge_by_name_passes(self):
        more = "evaluate: {tasks: [a], judge: {kind: chat, model: org/judge, prompt: harmbench}}"
        assert self.read(self.REMOTE + more).recipe.evaluate.judge.model == "org/judge"

    def test_a_parents_hub_id_leads_to_no_folder_of_this_machine(self, write, tmp_path):
        (tmp_path / "org" / "base").mkdir(parents=True)
        path = write("own.yaml", "extends: hf://org/x\n")
        with pytest.raises(RecipeError, match="a folder here has that name"):
            load_recipe(path, abroad=lambda named: self.place(self.REMOTE))
        (tmp_path / "org" / "base").rmdir()
        assert load_recipe(path, abroad=lambda named: self.place(self.REMOTE)).recipe.gate.tau == 0.35

    def test_a_parent_from_elsewhere_may_do_no_more(self):
        with pytest.raises(RecipeError, match="--source base=PLACE"):
            self.read("extends: up.yaml\n", {"up.yaml": BASE})
        assert self.read("extends: up.yaml\n", {"up.yaml": self.REMOTE}).recipe.gate.tau == 0.35
