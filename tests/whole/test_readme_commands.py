"""The README's three commands, from a fine-tuned adapter to a judged, repaired model, on a tiny Qwen2."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.chat_family import save_adapter, save_model, tokenizer

README = Path(__file__).parents[2] / "README.md"
SMALLER = {"gsm8k": "safemerge_arithmetic", "preset: paper": "preset: small", "./my-lora}  ": "./my-lora, limit: 2}  "}


def section() -> str:
    _, _, rest = README.read_text().partition("## Your own fine-tune, in three commands\n")
    return rest.partition("\n## ")[0]


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", section(), flags=re.S)


def test_the_readme_has_three_commands_and_two_sound_files(tmp_path: Path) -> None:
    from safemerge_recipes.recipe.loading import load_recipe
    from safemerge_recipes.recipe.training import load_training

    (commands,) = blocks("sh")
    assert len(commands.splitlines()) == 3
    training, recipe = blocks("yaml")
    (tmp_path / "safety.yaml").write_text(training)
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert load_training(tmp_path / "safety.yaml").training.preset == "paper"
    assert load_recipe(tmp_path / "recipe.yaml").recipe.sources.aligned.where == "Qwen/Qwen2-7B-Instruct"


@pytest.mark.slow  # trains, merges, scores and judges
def test_they_run_on_a_tiny_model_of_the_same_architecture(
    tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    pytest.importorskip("trl")
    pytest.importorskip("lm_eval")
    tok = tokenizer()
    config = Qwen2Config(
        vocab_size=len(tok), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, bos_token_id=0, eos_token_id=0, pad_token_id=3,
        tie_word_embeddings=False,
    )  # fmt: skip
    for seed, name in enumerate(("Qwen2-7B", "Qwen2-7B-Instruct", "Llama-Guard-3-8B")):
        torch.manual_seed(seed)
        net = Qwen2ForCausalLM(config)
        save_model(net, tok, tmp_path / name, torch.float32)
    shapes = {n: tuple(m.weight.shape) for n, m in net.named_modules() if n.endswith(("q_proj", "v_proj", "down_proj"))}
    save_adapter(shapes, tmp_path / "my-lora", 5, 0.05)
    for name, text in zip(("safety.yaml", "recipe.yaml"), blocks("yaml"), strict=True):
        text = re.sub(r"\bQwen/", "./", text)
        for whole, tiny in SMALLER.items():
            text = text.replace(whole, tiny)
        (tmp_path / name).write_text(text.replace("evaluate: {", "evaluate: {limit: 3, answer_tokens: 8, "))
    monkeypatch.chdir(tmp_path)
    (commands,) = blocks("sh")
    for command in commands.splitlines():
        program, *rest = shlex.split(command.replace("meta-llama/", "./"))
        verb = ["run"] if program == "safemerge-run" else []
        done = call(*verb, *rest)
        assert done.code == 0, f"{command}: {done.err}"
    output = tmp_path / "out" / "qwen2-7b-safe"
    scores = json.loads((output / "safemerge_scores.json").read_text())
    assert list(scores["models"]) == ["merged", "aligned", "finetuned"]
    assert {"unsafe", "unjudged"} & set(scores["models"]["merged"]["safemerge_refusal"])
    assert "separation" in scores["models"]["merged"]["safemerge_separation"]
    plan = json.loads((output / "safemerge_plan.json").read_text())
    assert plan["summary"]["merged"] == 3
    assert call("verify", output).code == 0
