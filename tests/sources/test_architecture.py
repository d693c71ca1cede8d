"""Whether a folder loads as what it is: config against tensors, tensors against transformers' architecture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safemerge_recipes.errors import CheckError
from safemerge_recipes.events import ignore
from safemerge_recipes.sources.architecture import disagreements, loads, owned_class
from safemerge_recipes.sources.checkpoint import open_checkpoint
from safemerge_recipes.storage.workers import Resources
from safemerge_recipes.verification.verify import verify
from tests.fixtures import peft_families
from tests.fixtures.plain_family import make_family, run_recipe
from tests.fixtures.program import run


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peft_families.save_model("llama", tmp_path_factory.mktemp("families") / "llama")


@pytest.fixture
def changed(llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the model whose tensors or config were changed."""

    def make(change: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None, **config: Any) -> Path:
        shutil.copytree(llama, tmp_path / "model")
        path = tmp_path / "model"
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        found = json.loads((path / "config.json").read_text()) | config
        (path / "config.json").write_text(json.dumps(found))
        return path

    return make


def test_a_sound_model_loads(llama: Path) -> None:
    found = loads(open_checkpoint(llama))
    assert found.problems == ()
    assert any("names and shapes are those of transformers' LlamaForCausalLM" in line for line in found.checked)
    assert found.unchecked == ("tokenizer: there is none",)
    assert not list(disagreements(open_checkpoint(llama)))


@pytest.mark.parametrize(
    "said",
    [{"architectures": ["Trainer"]}, {"architectures": ["pipeline"]}, {"architectures": ["AutoModelForCausalLM"]},
     {"architectures": 5}, {"architectures": "LlamaForCausalLM"}, {"architectures": [["LlamaForCausalLM"]]},
     {"model_type": ["llama"]}, {"auto_map": {"AutoModel": "theirs.Model"}}],
    ids=str,
)  # fmt: skip
def test_a_config_names_a_model_of_transformers_or_nothing(said: dict[str, Any]) -> None:
    import transformers

    sound = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert owned_class(sound, transformers) is transformers.LlamaForCausalLM
    assert owned_class(sound | said, transformers) is None


UP = "model.layers.1.mlp.up_proj.weight"


def test_names_and_shapes_that_the_architecture_does_not_have_are_told(changed: Callable[..., Path]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up.weight"] = tensors.pop(UP)
        tensors["model.norm.weight"] = torch.ones(17)

    problems = " ".join(loads(open_checkpoint(changed(change))).problems)
    assert f"lacks 1 tensors, first {UP}; it has model.layers.1.mlp.up.weight instead" in problems
    assert "model.norm.weight: is (17,); transformers' LlamaForCausalLM expects (16,)" in problems


def test_a_tokenizer_that_does_not_load_is_told(changed: Callable[..., Path]) -> None:
    folder = changed()
    (folder / "tokenizer.json").write_text("{}")
    assert any(
        line.startswith("tokenizer: transformers cannot load it") for line in loads(open_checkpoint(folder)).unchecked
    )


HALVES = [
    ({"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}, "no vocabulary lies beside it"),
    ({"merges.txt": {}}, "there is no vocab.json beside it"),
    ({"vocab.json": {"a": 0}, "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"}}, "no merges.txt"),
]
WHOLE = [
    {"tokenizer.json": {}, "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}},
    {"tokenizer_config.json": {"tokenizer_class": "ByT5Tokenizer"}},
    {"tokenizer_config.json": {"chat_template": "{{ messages }}"}},
    {"vocab.json": {"a": 0}, "tokenizer_config.json": {"tokenizer_class": "Wav2Vec2CTCTokenizer"}},
    {"tokenizer_config.json": {"tokenizer_class": "DebertaV2Tokenizer"}, "spm.model": {}},
]


@pytest.mark.parametrize(("files", "told"), [*HALVES, *((files, None) for files in WHOLE)])
def test_half_a_tokenizer_is_refused_before_a_run_and_by_verify(
    llama: Path, changed: Callable[..., Path], tmp_path: Path, files: dict[str, Any], told: str | None
) -> None:
    folder = changed()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    assert [told in line for line in disagreements(open_checkpoint(folder))] == ([True] if told else [])
    text = f"sources: {{aligned: {llama}, finetuned: {folder}}}\ngate: {{never: true}}\noutput: {{path: out}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    code, _, err = run("plan", tmp_path / "recipe.yaml")
    assert (code, (told or "") in err) == (3 if told else 0, True), err


VOCAB = {"model": {"vocab": {"a": 0, "b": 39}}}
PAD = {"added_tokens": [{"content": "<pad>", "id": 40}]}
DECODER = {"added_tokens_decoder": {"57": {"content": "<pad>"}}}


@pytest.mark.parametrize(
    ("aligned", "finetuned", "told"),
    [
        ({"tokenizer.json": VOCAB}, {"tokenizer.json": VOCAB}, None),
        ({"tokenizer.json": VOCAB}, {"tokenizer.json": VOCAB | PAD}, "'<pad>' is token 40, the last row is 39"),
        ({"tokenizer.json": VOCAB}, {"tokenizer.json": VOCAB, "tokenizer_config.json": DECODER}, "is token 57"),
        ({}, {"tokenizer.model": 0, "added_tokens.json": {"<pad>": 58}}, "is token 58"),
        ({}, {"vocab.json": {"a": 0, "b": 40, "c": 41}}, "2 tokens have no row in the embedding: 'c' is token 41"),
    ],
)
def test_tokens_that_the_embedding_has_no_row_for_are_refused_before_a_run_and_by_verify(
    llama: Path, tmp_path: Path, aligned: dict[str, Any], finetuned: dict[str, Any], told: str | None
) -> None:
    for role, files in (("aligned", aligned), ("finetuned", finetuned)):
        shutil.copytree(llama, tmp_path / role)
        for name, content in files.items():
            (tmp_path / role / name).write_text(json.dumps(content))
    assert [told in line for line in disagreements(open_checkpoint(tmp_path / "finetuned"))] == ([True] if told else [])
    recipe = tmp_path / "recipe.yaml"
    text = "sources: {aligned: aligned, finetuned: finetuned}\ngate: {never: true}\noutput: {path: out}\n"
    recipe.write_text(text)
    code, _, err = run("plan", recipe)
    assert (code, (told or "") in err) == (3 if told else 0, True), err
    if "vocabulary: aligned" in err:
        recipe.write_text(text + "vocabulary: aligned\n")
        code, out, err = run("plan", recipe)
        assert (code, "no row" in out) == (0, False), out + err


def test_a_token_without_a_row_that_the_aligned_model_has_too_is_told_and_no_more(llama: Path, tmp_path: Path) -> None:
    for role in ("aligned", "finetuned"):
        shutil.copytree(llama, tmp_path / role)
        (tmp_path / role / "tokenizer.json").write_text(json.dumps(VOCAB | PAD))
    text = "sources: {aligned: aligned, finetuned: finetuned}\ngate: {never: true}\n"
    run_recipe(tmp_path, text)
    warnings = json.loads((tmp_path / "out0" / "safemerge_plan.json").read_text())["warnings"]
    assert [line for line in warnings if "'<pad>' is token 40" in line and line.endswith(", as in the aligned model")]
    assert verify(tmp_path / "out0", Resources(1, 1 << 30, "cpu"), ignore)["tensors"]


@pytest.mark.parametrize(
    "config", [{"architectures": ["NobodysModel"]}, {"model_type": "nobodys"}, {"auto_map": {"AutoConfig": "x.Y"}}]
)
def test_an_architecture_that_transformers_does_not_know_is_not_checked(
    changed: Callable[..., Path], config: dict[str, Any]
) -> None:
    found = loads(open_checkpoint(changed(**config)))
    assert not found.problems
    assert not found.checked
    assert "transformers" in found.unchecked[0]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'; most weights are float32"),
        ({"tie_word_embeddings": True}, "lm_head.weight and model.embed_tokens.weight differ"),
        ({"vocab_size": 41}, "vocab_size is 41; the embedding has 40 rows"),
        ({"quantization_config": {"quant_method": "fp8"}}, "no weight is quantised"),
    ],
)
def test_a_config_that_its_tensors_do_not_bear_out_is_told(
    changed: Callable[..., Path], config: dict[str, Any], told: str
) -> None:
    assert [told in line for line in disagreements(open_checkpoint(changed(**config)))] == [True]


def test_verify_deep_says_what_transformers_makes_of_an_output(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family")
    text = "sources: {aligned: family/aligned, finetuned: family/finetuned}\ngate: {never: true}\n"
    run_recipe(tmp_path, text)
    resources = Resources(1, 1 << 30, "cpu")
    assert any("--deep" in line for line in verify(tmp_path / "out0", resources, ignore)["unchecked"])
    result = verify(tmp_path / "out0", resources, ignore, deep=True)
    assert any("LlamaForCausalLM" in line for line in result["checked"])
    config = family.root / "aligned" / "config.json"
    finetuned = family.root / "finetuned" / "config.json"
    for path in (config, finetuned):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 44}))
    run_recipe(tmp_path, text)
    with pytest.raises(CheckError, match=r"is \(40, 24\); transformers' LlamaForCausalLM expects \(44, 24\)"):
        verify(tmp_path / "out1", resources, ignore, deep=True)
