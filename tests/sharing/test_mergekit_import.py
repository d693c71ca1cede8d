"""Imported mergekit files give mergekit's own tensors: example files in their forms, and what is refused.

The files are written anew with the methods and the forms of parameters that mergekit's repository shows under
`examples/` and in its README; small models stand in for those they name.

Guards `api.sharing`, `cli.recipes`, `sharing.templates`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safemerge_recipes.sharing.mergekit.importing import import_mergekit
from safemerge_recipes.sharing.mergekit.methods import NATIVE
from safemerge_recipes.sharing.mergekit.reading import read_text
from safemerge_recipes.sharing.mergekit.settings import evaluate, patterns
from tests.fixtures.gated_family import Family, make_family, read_weights

pytest.importorskip("mergekit")

Tensors = dict[str, torch.Tensor]

EXAMPLES = {
    "bio-merge": """
        models:
          - {model: finetuned, parameters: {density: 0.5, weight: 0.5}}
          - {model: safety, parameters: {density: 0.5, weight: 0.5}}
        merge_method: ties
        base_model: base
        parameters: {normalize: false, int8_mask: true}
        dtype: float32
    """,
    "gradient-slerp": """
        slices:
          - sources:
              - {model: aligned, layer_range: [0, 5]}
              - {model: finetuned, layer_range: [0, 5]}
        merge_method: slerp
        base_model: aligned
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - {value: 0.5}
        dtype: float32
    """,
    "mega, its second merge": """
        models:
          - {model: finetuned, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
          - model: safety
            parameters:
              density: 0.33
              weight:
                - {filter: mlp, value: 0.5}
                - {value: 0}
        merge_method: ties
        base_model: aligned
        parameters: {normalize: true, int8_mask: true}
        dtype: float32
    """,
    "vlm-linear": """
        models:
          - {model: finetuned, parameters: {weight: 1.0}}
          - {model: safety, parameters: {weight: 1.0}}
        merge_method: linear
        dtype: float32
    """,
    "vlm-ties": """
        models:
          - {model: finetuned, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
          - {model: aligned, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
        merge_method: ties
        base_model: aligned
        parameters: {normalize: true, int8_mask: true}
        dtype: float32
    """,
    "linear": """
        models:
          - {model: aligned, parameters: {weight: 1.0}}
          - {model: finetuned, parameters: {weight: 0.3}}
          - {model: safety, parameters: {weight: 0.5}}
        merge_method: linear
        dtype: float32
    """,
    "ties, of three by gradients": """
        models:
          - {model: finetuned, parameters: {density: [0.8, 0.3, 0.1], weight: [1.0, 0.8, 0.5]}}
          - {model: safety, parameters: {density: [0.1, 0.4, 0.1], weight: [0.2, 0.8, 0.1]}}
          - {model: base, parameters: {density: [0.1, 0.2, 0.6], weight: [0.5, 0.8, 1.0]}}
        merge_method: ties
        base_model: aligned
        dtype: float32
    """,
    "arcee_fusion": """
        models: [{model: aligned}, {model: finetuned}]
        merge_method: arcee_fusion
        base_model: aligned
        dtype: float32
    """,
    "R1-Distill-Qwen-Math-7B, task-arithmetic": """
        models:
          - {model: finetuned, parameters: {weight: 0.5}}
          - {model: safety, parameters: {weight: 0.5}}
        merge_method: task_arithmetic
        parameters: {lambda: 1.0}
        base_model: base
        dtype: float32
        chat_template: "auto"
    """,
    "R1-Distill-Qwen-Math-7B, ties": """
        models:
          - {model: finetuned, parameters: {weight: 0.5, density: 0.2}}
          - {model: safety, parameters: {weight: 0.5, density: 0.2}}
        merge_method: ties
        parameters: {lambda: 1.0}
        base_model: base
        dtype: float32
        chat_template: "auto"
    """,
}
"""Forms of files under `examples/` and `recipes/` of mergekit's repository, by name."""

FORMS = {
    "linear of one's own weights": """
        models:
          - {model: finetuned, parameters: {weight: 0.7}}
          - {model: safety, parameters: {weight: 0.5}}
        merge_method: linear
        parameters: {normalize: false}
    """,
    "linear by filter and gradient": """
        models:
          - {model: finetuned, parameters: {weight: [{filter: mlp, value: [0.2, 0.9]}, {value: 0.6}]}}
          - {model: safety, parameters: {weight: 0.4}}
        merge_method: linear
    """,
    "task_arithmetic": """
        models:
          - {model: finetuned, parameters: {weight: 0.8}}
          - {model: safety, parameters: {weight: [{filter: q_proj, value: -0.3}, {value: 0.4}]}}
        merge_method: task_arithmetic
        base_model: aligned
        parameters: {lambda: 0.9}
    """,
    "task_arithmetic of one": """
        models: [{model: finetuned, parameters: {weight: 0.5}}]
        merge_method: task_arithmetic
        base_model: aligned
    """,
    "ties, rescaled": """
        models:
          - {model: finetuned, parameters: {density: 0.4, weight: 0.6}}
          - {model: safety, parameters: {density: 0.4, weight: 0.3}}
        merge_method: ties
        base_model: aligned
        parameters: {rescale: true, lambda: 1.1}
    """,
    "ties in one line": """
        models: [{model: finetuned}, {model: safety}]
        merge_method: ties
        base_model: aligned
        parameters: {density: 0.6, weight: 0.7}
    """,
    "dare_linear of all": """
        models: [{model: finetuned, parameters: {weight: 0.3}}, {model: safety, parameters: {weight: 0.3}}]
        merge_method: dare_linear
        base_model: aligned
    """,
    "dare_ties of all": """
        models: [{model: finetuned, parameters: {weight: 0.3}}, {model: safety, parameters: {weight: 0.3}}]
        merge_method: dare_ties
        base_model: aligned
        parameters: {density: 1.0}
    """,
    "ties of three": """
        models: [{model: finetuned}, {model: safety}, {model: base, parameters: {weight: 0.2}}]
        merge_method: ties
        base_model: aligned
        parameters: {density: 0.4, weight: 0.7, normalize: false, lambda: 0.9}
    """,
    "task_arithmetic of three": """
        models: [{model: finetuned}, {model: safety}, {model: base, parameters: {weight: -0.2}}]
        merge_method: task_arithmetic
        base_model: aligned
        parameters: {weight: [0.7, 0.2]}
    """,
    "linear of three, not divided": """
        models: [{model: finetuned}, {model: safety}, {model: base}]
        merge_method: linear
        parameters: {weight: 0.5, normalize: false}
    """,
    "model_stock": """
        models: [{model: finetuned}, {model: safety}, {model: base}]
        merge_method: model_stock
        base_model: aligned
    """,
    "passthrough": "{slices: [{sources: [{model: finetuned, layer_range: [0, 5]}]}], merge_method: passthrough}",
    "passthrough, scaled": """
        models:
          - {model: finetuned, parameters: {scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.5}]}}
        merge_method: passthrough
    """,
    "slices one after the other": """
        slices:
          - sources: [{model: aligned, layer_range: [0, 2]}, {model: finetuned, layer_range: [0, 2]}]
            parameters: {t: 0.2}
          - sources: [{model: aligned, layer_range: [2, 5]}, {model: finetuned, layer_range: [2, 5]}]
            parameters: {t: [0.5, 0.9]}
        merge_method: slerp
        base_model: aligned
    """,
    "nuslerp": """
        models: [{model: finetuned, parameters: {weight: 0.7}}, {model: safety, parameters: {weight: 0.3}}]
        merge_method: nuslerp
    """,
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Five blocks in float32, with norms, embeddings and head that differ between models."""
    return make_family(
        tmp_path_factory.mktemp("five"), "llama", torch.float32, num_hidden_layers=5, architectures=["LlamaForCausalLM"]
    )


def mergekit(text: str, out: Path) -> Tensors:
    """The tensors that mergekit writes for a file."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), options=options)
    return read_weights(out)


def written(text: str, family: Family) -> str:
    """A file with the family's folders for the names of models."""
    import textwrap

    return re.sub(r"\b(model|base_model): (\w+)", lambda m: f"{m[1]}: {family / m[2]}", textwrap.dedent(text))


def both(text: str, family: Family, call: Callable[..., Any], folder: Path) -> tuple[Tensors, Tensors]:
    """What mergekit writes, and what the imported recipe does."""
    path = folder / "merge.yml"
    path.write_text(written(text, family))
    done = call("import", path, "-o", folder / "recipe.yaml")
    assert done.code == 0, done.err
    assert call("validate", folder / "recipe.yaml").code == 0
    done = call("run", folder / "recipe.yaml", "-o", folder / "ours")
    assert done.code == 0, done.err
    return mergekit(path.read_text(), folder / "theirs"), read_weights(folder / "ours")


@pytest.mark.parametrize("name", [*EXAMPLES, *FORMS])
def test_an_imported_file_gives_mergekits_tensors(
    name: str, family: Family, call: Callable[..., Any], tmp_path: Path
) -> None:
    theirs, ours = both((EXAMPLES | FORMS)[name], family, call, tmp_path)
    assert set(ours) == set(theirs)
    for tensor, wanted in theirs.items():
        assert ours[tensor].dtype == wanted.dtype
        assert torch.allclose(ours[tensor], wanted, rtol=1e-6, atol=3e-8), (
            f"{tensor} {(ours[tensor] - wanted).abs().max()}"
        )


def test_biases_and_tied_embeddings_come_too(call: Callable[..., Any], tmp_path: Path) -> None:
    qwen = make_family(tmp_path / "qwen", "qwen2", torch.float32, shards=3, architectures=["Qwen2ForCausalLM"])
    theirs, ours = both(EXAMPLES["bio-merge"], qwen, call, tmp_path)
    assert any(name.endswith("bias") for name in ours)
    assert set(ours) == set(theirs)
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=3e-8) for name in theirs)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_mergekits_where_the_same_elements_are_dropped(
    method: str, family: Family, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit draws from one generator in the order of its schedule; it gets our draws instead, tensor by tensor."""
    from mergekit.merge_methods import generalized_task_arithmetic, merge_tensors

    from safemerge_recipes.storage.arena import Arena
    from safemerge_recipes.weights.draw import Draw

    text = f"""
        models: [{{model: finetuned, parameters: {{weight: 0.6}}}}, {{model: safety, parameters: {{weight: 0.4}}}}]
        merge_method: {method}
        base_model: aligned
        parameters: {{density: 0.5}}
    """
    (tmp_path / "merge.yml").write_text(written(text, family))
    assert call("import", tmp_path / "merge.yml", "-o", tmp_path / "recipe.yaml").code == 0
    assert "other" in (tmp_path / "recipe.yaml").read_text().splitlines()[3]  # than mergekit would draw
    assert call("run", tmp_path / "recipe.yaml", "-o", tmp_path / "ours").code == 0
    ours = read_weights(tmp_path / "ours")
    models = [family.tensors(role) for role in ("aligned", "finetuned", "safety")]
    kept: list[torch.Tensor] = []

    def dropped(delta: torch.Tensor, **_: Any) -> torch.Tensor:
        from mergekit.sparsify import RescaleNorm, rescaled_masked_tensor

        return rescaled_masked_tensor(delta, kept.pop(0).view_as(delta).to(delta.dtype), RescaleNorm.l1)

    monkeypatch.setattr(generalized_task_arithmetic, "sparsify", dropped)
    for name, found in ours.items():
        kept[:] = [mask.clone() for mask in Draw(0.5, 0).keep(name, 0, found.numel(), Arena())]
        parameters = {"weight": {"f": 0.6, "s": 0.4}, "density": {"f": 0.5, "s": 0.5}}
        wanted = merge_tensors(
            [tensors[name] for tensors in models], method, parameters=parameters, ids=("b", "f", "s"), base_index=0
        )
        assert not kept
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-7), name


def test_half_precision_is_the_same_to_mergekits_own_rounding(
    family: Family, call: Callable[..., Any], tmp_path: Path
) -> None:
    """With `dtype: bfloat16` mergekit takes differences of rounded weights; ours are rounded once, at the end."""
    theirs, ours = both(EXAMPLES["bio-merge"].replace("float32", "bfloat16"), family, call, tmp_path)
    for name, wanted in theirs.items():
        assert ours[name].dtype == wanted.dtype == torch.bfloat16
        size = max(float(family.dense(role)[name].abs().max()) for role in ("base", "finetuned", "safety"))
        off = (ours[name].float() - wanted.float()).abs()
        assert float(off.median()) <= size * 2**-8, name


def test_adapters_on_the_base_become_adapters(llama: Family, call: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    path.write_text(
        f"models: [{{model: {llama / 'aligned'}+{llama / 'finetuned-lora'}, parameters: {{weight: 0.5}}}}]\n"
        f"merge_method: task_arithmetic\nbase_model: {llama / 'aligned'}\n"
    )
    done = call("import", path)
    assert f"adapter: {llama / 'finetuned-lora'}" in done.out
    (tmp_path / "recipe.yaml").write_text(done.out)
    assert call("run", tmp_path / "recipe.yaml", "-o", tmp_path / "out").code == 0
    written, aligned = read_weights(tmp_path / "out"), llama.dense("aligned")
    for name, update in llama.update("finetuned-lora").items():
        assert (written[name].double() - aligned[name] - 0.5 * update).abs().max() < 2**-8 * aligned[name].abs().max()
    path.write_text(path.read_text().replace(f"base_model: {llama / 'aligned'}", f"base_model: {llama / 'base'}"))
    done = call("import", path)
    assert done.code == 2
    assert "models.0.model: an adapter on" in done.err


REFUSED = {
    "slices out of their place": (
        "slices:\n  - sources: [{model: a, layer_range: [0, 2]}]\n  - sources: [{model: b, layer_range: [1, 4]}]\n"
        "merge_method: passthrough\n",
        ":3 slices.1.sources.0.layer_range: found [1, 4]; expected blocks from 2 on",
    ),
    "blocks left out": (
        "slices:\n  - sources: [{model: finetuned, layer_range: [0, 3]}]\nmerge_method: passthrough\n",
        ":2 slices.0.sources.0.layer_range: ends at 3, the model has 5 blocks",
    ),
    "experts": ("base_model: a\ngate_mode: hidden\nexperts:\n  - {source_model: b}\n", ":3 experts: a mixture of"),
    "modules": ("merge_method: linear\nmodules:\n  text: {models: []}\n", ":2 modules: merges parts of a model"),
    "a gate that is no gate": ("models: []\n", "found no merge_method"),
    "two merges": ("models: [{model: a}]\nmerge_method: linear\n---\nmodels: []\n", ":3: a second merge begins here"),
    "a vocabulary of both": (
        "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\nmerge_method: linear\n"
        "tokenizer: {source: union}\n",
        ":3 tokenizer.source: joins vocabularies",
    ),
    "an old key of a filter": (
        "models: [{model: a}, {model: b}]\nmerge_method: slerp\nbase_model: a\nparameters:\n  t:\n"
        "    - {pattern: mlp, value: 1}\n",
        ":6 parameters.t.0.pattern: not read by mergekit; expected filter",
    ),
    "no weight": ("models: [{model: a}, {model: b}]\nmerge_method: linear\n", ":1 models.0.model: weight is missing"),
    "no base": ("models: [{model: a}, {model: b}]\nmerge_method: ties\n", ":2 merge_method: ties needs base_model"),
    "no such method": ("models: [{model: a}]\nmerge_method: ranked_ties\n", ":2 merge_method: found 'ranked_ties'"),
    "a type": ("models: [{model: a}]\nmerge_method: passthrough\ndtype: int4\n", ":3 dtype: found"),
    "a model nobody has": (
        "models: [{model: a/b}, {model: c/d}]\nmerge_method: slerp\nbase_model: a/b\nparameters:\n  t: [0, 1]\n",
        ":4 parameters: differs between tensors, whose names are not known here",
    ),
    "a number that is none": (
        "models: [{model: a}, {model: b}]\nmerge_method: slerp\nbase_model: a\nparameters: {t: half}\n",
        ":4 parameters: found a value of another kind",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_named_with_its_line(
    name: str, family: Family, call: Callable[..., Any], tmp_path: Path
) -> None:
    text, told = REFUSED[name]
    path = tmp_path / "merge.yml"
    path.write_text(text.replace("model: finetuned", f"model: {family / 'finetuned'}"))
    done = call("import", path, "-o", tmp_path / "recipe.yaml")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert f"{path}{told}" in done.err or told in done.err
    assert not (tmp_path / "recipe.yaml").exists()


def test_names_may_come_from_a_model_alike(family: Family, call: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    path.write_text(REFUSED["a model nobody has"][0] + "tokenizer_source: base\nname: mine\n")
    done = call("import", path, "--like", family / "base")
    assert done.code == 0, done.err
    assert "# Not taken over: line 6, tokenizer_source: it is that of `finetuned`.\n" in done.out
    assert "# Not taken over: line 7, name: of no effect on the weights.\n" in done.out
    assert done.out.count("- tensors:") == 4  # five blocks, five values, one of them the recipe's own


def test_a_recipe_is_not_overwritten_and_paths_start_at_it(
    family: Family, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(family.path)
    path = tmp_path / "merge.yml"
    path.write_text("models: [{model: ./finetuned}]\nmerge_method: passthrough\n")
    recipe = family.path / "recipes-here" / "one.yaml"
    assert call("import", path, "-o", recipe).code == 0
    assert "aligned: ../finetuned" in recipe.read_text()
    assert call("plan", recipe).code == 0
    done = call("import", path, "-o", recipe)
    assert (done.code, "is there already" in done.err) == (2, True)


@pytest.mark.parametrize("at", [0, 0.1, 0.25, 0.5, 0.77, 1])
def test_settings_are_read_as_mergekit_reads_them(at: float) -> None:
    from mergekit.config import ConditionalParameter, evaluate_setting

    forms: list[Any] = [
        0.3, [0, 1], [0.2, 0.4, 0.1, 0.9], [True, False, True], [{"filter": "mlp", "value": [1, 0]}, {"value": 0.5}],
        [{"filter": "attn", "value": 0.1}], {"filter": "*", "value": 2},
    ]  # fmt: skip
    for form in forms:
        theirs = form
        if isinstance(form, dict):
            theirs = ConditionalParameter(**form)
        elif isinstance(form, list) and isinstance(form[0], dict):
            theirs = [ConditionalParameter(**one) for one in form]
        for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
            wanted = evaluate_setting(name, theirs, at, validate=lambda value: value)
            assert evaluate(form, name, at) == wanted


def test_patterns_match_what_they_stand_for_and_nothing_else() -> None:
    from safemerge_recipes.recipe.patterns import compile_patterns

    names = [f"model.layers.{i}.{kind}.weight" for i in range(6) for kind in ("self_attn.q", "mlp.up", "norm")]
    names += ["model.embed.weight", "lm_head.weight"]
    for wanted in (
        [n for n in names if "mlp" in n],
        [n for n in names if "layers.1." in n or "layers.2." in n or "layers.5." in n],
        [n for n in names if "mlp" in n and "layers.3" not in n] + ["lm_head.weight"],
        names,
        ["model.embed.weight"],
    ):
        found = patterns(wanted, names, ["mlp", "attn"])
        assert list(compile_patterns(found).select(names)) == [n for n in names if n in wanted]
        assert len(found) <= 4


def test_every_native_method_has_an_example() -> None:
    methods = {read_text(text, "x").method for text in (EXAMPLES | FORMS).values()}
    assert set(NATIVE) <= methods


def test_the_python_api_gives_the_text(tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    path.write_text("models: [{model: org/one}]\nmerge_method: passthrough\ndtype: bfloat16\n")
    assert "dtype: bfloat16" in import_mergekit(path, tmp_path)
