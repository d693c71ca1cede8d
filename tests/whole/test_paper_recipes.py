"""Every recipe of `recipes/paper`: sound, its header honest, its training file too; run on tiny models of its kind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safemerge_recipes.recipe.loading import load_recipe
from safemerge_recipes.recipe.training import load_training
from tests.fixtures.chat_family import save_adapter, save_model, tokenizer

ROOT = Path(__file__).parents[2] / "recipes" / "paper"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/*.yaml"))
TRAINING = [name for name in FILES if "/safe" in name]
RECIPES = [name for name in FILES if name not in TRAINING]
MODELS = sorted({name.partition("/")[0] for name in FILES})


def test_the_four_models_have_both_tasks_and_every_baseline() -> None:
    assert len(MODELS) == 4
    beside = ("", "_full_merge", "_resta", "_safe_lora")
    for model in MODELS:
        expected = {f"{model}/{task}{end}.yaml" for task in ("gsm8k", "pubmedqa") for end in beside}
        expected |= {f"{model}/{name}.yaml" for name in ("safety", "safeinstruct_gsm8k", "safeinstruct_pubmedqa")}
        assert {name for name in FILES if name.startswith(f"{model}/")} == expected


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_sound_and_evaluates_as_the_paper_does(name: str) -> None:
    recipe = load_recipe(ROOT / name).recipe
    assert recipe.evaluate is not None
    assert {"safemerge_directharm4", "safemerge_hexphi"} <= set(recipe.evaluate.tasks)
    assert recipe.evaluate.judge is not None
    assert recipe.evaluate.judge.model == "meta-llama/Llama-Guard-3-8B"
    assert (recipe.sources.safety is None) == name.endswith(("_resta.yaml", "_safe_lora.yaml"))
    if re.fullmatch(r"[^_]+", Path(name).stem):
        assert (recipe.gate.tau, recipe.merge.alpha, recipe.merge.method) == (0.35, 0.8, "linear")


@pytest.mark.parametrize("name", FILES)
def test_a_header_says_what_is_known_and_what_is_a_guess(name: str) -> None:
    head = "".join(line for line in (ROOT / name).read_text().splitlines(True) if line.startswith("#"))
    assert "Known" in head
    assert "Guess" in head or name.endswith("_full_merge.yaml")
    assert "0.7" not in head


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_file_is_sound(name: str) -> None:
    training = load_training(ROOT / name).training
    assert (training.lora.r, training.lora.alpha, training.lora.targets) == (8, 8, ("q_proj", "v_proj"))
    aligned = load_recipe(ROOT / Path(name).parent / "gsm8k.yaml").recipe.sources.aligned
    assert training.model.sources(ROOT)[0].where == aligned.where


def tiny(kind: str, size: int) -> Any:
    """A random model of a family's architecture."""
    import transformers

    shape = {
        "vocab_size": size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": 3, "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "qwen":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape))
    if "3.1" in kind:
        shape["rope_theta"] = 500000.0
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))


@pytest.fixture
def stage(tmp_path: Path) -> Callable[[str], Path]:
    """`stage(model)`: a model's folder with tiny models in the place of the hub's, an adapter and rows."""

    def make(model: str) -> Path:
        folder = tmp_path / model
        shutil.copytree(ROOT / model, folder)
        tok = tokenizer()
        for seed, role in enumerate(("base", "aligned")):
            torch.manual_seed(seed)
            net = tiny("qwen" if model.startswith("qwen") else model, len(tok))
            save_model(net, tok, folder / role, torch.float32)
        shapes = {
            n: tuple(m.weight.shape) for n, m in net.named_modules() if n.endswith(("q_proj", "v_proj", "down_proj"))
        }
        for task in ("gsm8k", "pubmedqa"):
            save_adapter(shapes, folder / f"{task}-lora", 5, 0.05)
        words = ["amber", "birch", "cedar", "dune", "elm", "fern", "glen", "heath"]
        rows = [{"instruction": f"rob {word}", "input": "", "output": "I can't help with that."} for word in words]
        (folder / "safety_only_data_Instructions.json").write_text(json.dumps(rows))
        for path in folder.glob("*.yaml"):
            recipe = load_recipe(ROOT / model / "gsm8k.yaml").recipe.sources
            assert recipe.base is not None
            text = path.read_text().replace("[100, 500, 1000]", "[2, 4]")
            text = text.replace("choose: {finetuned: ./gsm8k-lora}", "choose: {finetuned: ./gsm8k-lora, limit: 2}")
            for role, source in (("aligned", recipe.aligned), ("base", recipe.base)):
                text = re.sub(rf"(: ){re.escape(source.where)}$", rf"\1./{role}", text, flags=re.M)
            path.write_text(text)
        return folder

    return make


@pytest.mark.slow  # half a minute for the four
@pytest.mark.parametrize("model", MODELS)
def test_training_file_and_merge_run_on_a_tiny_model_of_the_same_kind(
    model: str, stage: Callable[[str], Path], call: Any
) -> None:
    pytest.importorskip("trl")
    folder = stage(model)
    trained = call("train-adapter", folder / "safety.yaml", "--json")
    assert trained.code == 0, trained.err
    assert trained.json["chosen"] in (2, 4)
    for name in ("gsm8k", "pubmedqa_full_merge", "gsm8k_resta", "pubmedqa_safe_lora"):
        output = folder / f"out-{name}"
        done = call("run", folder / f"{name}.yaml", "--output", output, "--no-evaluate", "--allow-empty")
        assert done.code == 0, done.err
        plan = json.loads((output / "safemerge_plan.json").read_text())
        gated = [line for line in plan["tensors"] if line.get("metric") or line["action"] == "merge"]
        assert gated
        if name == "pubmedqa_full_merge":
            assert plan["summary"]["merged"] == 6
        assert call("verify", output).code == 0
