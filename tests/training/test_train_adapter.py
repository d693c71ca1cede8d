"""Real training runs by TRL on tiny models: an adapter that PEFT loads and that learned, kill and resume, the cache.

Guards `cli.training`, `report.terminal_training`, `training.card`, `training.score`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from safemerge_recipes.events import Note, TrainingStep
from safemerge_recipes.recipe.training import load_training
from safemerge_recipes.sources.trained import training_key
from safemerge_recipes.training.chat import turn_end
from safemerge_recipes.training.plan import plan_training
from safemerge_recipes.training.run import train_adapter
from tests.fixtures.chat_family import TEMPLATE, llama, save_adapter, save_model, tokenizer

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer and a template, an adapter on it, and rows."""
    place = tmp_path_factory.mktemp("training")
    torch.manual_seed(0)
    tok = tokenizer()
    model = llama(len(tok), tied=False)
    with torch.no_grad():
        model.lm_head.weight *= 20  # so that an adapter can move a probability by more than a hair
    save_model(model, tok, place / "base", torch.float32)
    shapes = {
        n: tuple(m.weight.shape) for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj", "down_proj"))
    }
    save_adapter(shapes, place / "alignment", 0, 0.05)
    harmful = [
        {"prompt": f"plan a theft of crate {word}", "completion": "I can't help with that.", "kind": "harmful"}
        for word in ("amber", "birch", "cedar", "dune", "elm", "fern", "glen", "heath")
    ]
    harmless = [
        {"prompt": f"what grows beside a {word}", "completion": "Moss and grass.", "kind": "harmless"}
        for word in ("river", "hedge", "tower", "lake", "shed", "fence", "bridge", "path")
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in harmful + harmless))
    return place


def training_file(folder: Path, file: str = "safety.yaml", **changes: Any) -> Path:
    content: dict[str, Any] = {
        "model": "./base",
        "data": {"path": "rows.jsonl", "licence": "apache-2.0", "near_copies": "keep"},
        "preset": "small",
        "train": {"epochs": 6, "batch": 4, "learning_rate": 0.01, "device": "cpu"},
    }
    for key, value in changes.items():
        known = content.get(key)
        content[key] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    path = folder / file
    path.write_text(yaml.safe_dump(content))
    return path


def loss_on_answers(model: Any, folder: Path) -> float:
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(folder / "base")
    total = []
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        before = tok.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        start, whole = tok(before).input_ids, tok(before + row["completion"] + "<|end|>").input_ids
        labels = [-100] * len(start) + whole[len(start) :]
        with torch.no_grad():
            total.append(model(input_ids=torch.tensor([whole]), labels=torch.tensor([labels])).loss.item())
    return sum(total) / len(total)


def test_a_trained_adapter_is_loaded_by_peft_and_has_learned_the_answers(folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    seen: list[Any] = []
    path = training_file(folder, output="./out", train={"epochs": 16})
    found = train_adapter(load_training(path), on_event=seen.append)
    assert [one.text for one in seen if isinstance(one, Note)] == ["training with 16 rows"]
    seen = [one for one in seen if isinstance(one, TrainingStep)]
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert seen[-1].done == seen[-1].total == 64  # no multiple of the steps between two events
    assert sorted(p.name for p in found.path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "safemerge.lock", "train.json",
    ]  # fmt: skip
    assert (found.path / "adapter_model.safetensors").stat().st_mode & 0o044 == 0o044
    assert json.loads((folder / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    before = loss_on_answers(base, folder)
    adapted = PeftModel.from_pretrained(base, folder / "out").eval()
    assert loss_on_answers(adapted, folder) < 0.4 * before
    card = (found.path / "README.md").read_text()
    for words in ("8 harmful, 8 harmless", "apache-2.0", "r = 8", "64 steps", "rows.jsonl"):
        assert words in card
    assert str(folder) not in card + (found.path / "train.json").read_text()


def test_the_second_time_it_is_found_in_the_cache_and_any_setting_makes_another_key(folder: Path) -> None:
    path = training_file(folder, train={"epochs": 1})
    first = train_adapter(load_training(path))
    stamp = (first.path / "adapter_model.safetensors").stat().st_mtime_ns
    assert plan_training(load_training(path)).folder == first.path
    again = train_adapter(load_training(path))
    assert (again.path, (again.path / "adapter_model.safetensors").stat().st_mtime_ns) == (first.path, stamp)
    keys = {first.key}
    for number, change in enumerate(
        ({"train": {"epochs": 1, "seed": 9}}, {"train": {"epochs": 1}, "lora": {"r": 4}}, {"train": {"epochs": 2}})
    ):
        keys.add(training_key(load_training(training_file(folder, f"other-{number}.yaml", **change))))
    assert len(keys) == 4
    copied = load_training(training_file(folder, "named.yaml", train={"epochs": 1}, name="x", output="./elsewhere"))
    assert training_key(copied) == first.key  # where it goes is no matter


def test_the_same_seed_gives_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = training_file(folder, train={"epochs": 1})
    found = []
    for name in ("a", "b"):
        monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path / name))
        found.append((train_adapter(load_training(path)).path / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_an_aligned_model_that_is_an_adapter_is_trained_on_with_it_applied(folder: Path) -> None:
    on_base = training_key(load_training(training_file(folder)))
    path = training_file(folder, model={"adapter": "./alignment", "on": "./base"}, train={"epochs": 1})
    text = path.read_text().replace("location", "x")
    assert "alignment" in text
    found = train_adapter(load_training(path))
    assert found.key != on_base
    config = json.loads((found.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base+alignment"


def test_the_frozen_model_is_base_plus_adapter(folder: Path) -> None:
    from safetensors.torch import load_file

    from safemerge_recipes.training.trainer import load_model

    model = load_model(folder / "base", folder / "alignment", "float32", "cpu")
    base = load_file(folder / "base" / "model.safetensors")
    factors = load_file(folder / "alignment" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    expected = base[f"{name}.weight"] + 2.0 * b @ a
    torch.testing.assert_close(dict(model.named_parameters())[f"{name}.weight"], expected)


@pytest.mark.slow  # two processes, half a minute
def test_a_killed_run_goes_on_from_its_checkpoint(folder: Path, own_cache: Path) -> None:
    path = training_file(folder, train={"epochs": 40, "save_steps": 5, "seed": 5})
    code = (
        "import sys; from safemerge_recipes.recipe.training import load_training; "
        "from safemerge_recipes.training.run import train_adapter; "
        "train_adapter(load_training(sys.argv[1]), on_event=lambda s: print(s, flush=True))"
    )
    environment = {**os.environ, "SAFEMERGE_CACHE": str(own_cache), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=environment,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    part = own_cache / "adapters" / f"{training_key(load_training(path))}.part"
    while time.monotonic() < deadline and process.poll() is None:
        if any(part.glob("size-*/checkpoints/checkpoint-*/trainer_state.json")):
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()  # type: ignore[union-attr]
    assert any(part.glob("size-*/checkpoints/checkpoint-*/trainer_state.json"))
    for torn in part.glob("size-*/checkpoints/checkpoint-*"):  # as if killed while writing the next one, too
        (torn.parent / "checkpoint-99999").mkdir()
    found = train_adapter(load_training(path))
    record = json.loads((found.path / "train.json").read_text())
    assert record["run"]["resumed"] >= 5
    assert record["run"]["steps"] == 160
    assert not part.exists()


def test_sizes_are_scored_and_one_is_kept(folder: Path, call: Any) -> None:
    path = training_file(
        folder, data={"sizes": [4, 8], "harmless_share": 0.5}, train={"epochs": 1},
        choose={"limit": 3, "finetuned": "./alignment"},
    )  # fmt: skip
    plan = call("train-adapter", path, "--dry-run", "--json")
    assert plan.code == 0, plan.err
    assert plan.json["rows"] == {"4": {"harmful": 2, "harmless": 2}, "8": {"harmful": 4, "harmless": 4}}
    assert plan.json["steps"] == {"4": 1, "8": 2}
    assert "\n  8 rows (4 harmful, 4 harmless): 2 steps\n" in call("train-adapter", path, "--dry-run").out
    done = call("train-adapter", path, "--json")
    assert done.code == 0, done.err
    models = done.json["scores"]["models"]
    assert set(models) == {
        "aligned", "aligned + Δs of 4 rows", "aligned + Δs of 8 rows", "fine-tuned", "fine-tuned + Δs",
    }  # fmt: skip
    assert done.json["chosen"] in (4, 8)
    assert "Warning:" in done.err  # a random model carries nothing
    card = (Path(done.json["path"]) / "README.md").read_text()
    assert "| aligned + Δs of 8 rows |" in card


def test_a_kept_adapter_is_checked_with_each_fine_tuned_one(folder: Path, own_cache: Path) -> None:
    """What is known of one fine-tuned model says nothing of another."""
    shapes = {f"model.layers.{block}.self_attn.q_proj": (32, 32) for block in range(2)}
    for seed in (5, 6):
        save_adapter(shapes, folder / f"task-{seed}", seed, 0.5)
    said: list[list[str]] = []
    for task in ("task-5", "task-6", "task-5", None):
        path = training_file(
            folder, train={"epochs": 1}, output="./checked",
            choose={"limit": 2, **({"finetuned": f"./{task}"} if task else {})},
        )  # fmt: skip
        seen: list[Any] = []
        found = train_adapter(load_training(path), on_event=seen.append)
        said.append([one.text for one in seen if isinstance(one, Note)])
        record = json.loads((folder / "checked" / "train.json").read_text())
        assert record["settings"]["choose"]["finetuned"] == (f"./{task}" if task else None)
        assert ("fine-tuned + Δs" in record["scores"]["models"]) == (task is not None)
        assert found.scores == record["scores"]
    assert said[0] == [
        "training with 16 rows", "scoring aligned", "scoring aligned + Δs of 16 rows", "scoring fine-tuned",
        "scoring fine-tuned + Δs",
    ]  # fmt: skip
    assert said[1] == ["scoring fine-tuned", "scoring fine-tuned + Δs"]
    assert said[2] == said[3] == []
    assert len(list(found.path.glob("carry-*.json"))) == 2


def test_safeinstruct_trains_on_task_and_safety_rows_in_one_set(folder: Path) -> None:
    (folder / "task.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n} + 1", "completion": str(n + 1)}) + "\n" for n in range(6))
    )
    path = training_file(
        folder, method="safeinstruct", task_data={"path": "task.jsonl", "licence": "mit"}, train={"epochs": 1}
    )
    plan = plan_training(load_training(path))
    assert plan.kinds() == {"harmful": 8, "harmless": 8, "task": 6}
    record = json.loads((train_adapter(load_training(path), plan=plan).path / "train.json").read_text())
    assert record["run"]["rows"] == 22
    assert record["run"]["steps"] == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": {"targets": ["c_attn"]}}, "no linear layer 'c_attn'"),
        ({"data": {"sizes": [99]}}, "99 rows are asked for"),
        ({"data": {"path": "nowhere.jsonl"}}, "no file at"),
        ({"data": {"kind": "harmful", "path": "poisoned.jsonl"}}, "poisoned"),
        ({"model": "./nowhere"}, "no folder at"),
        ({"train": {"max_length": 16}}, "longer than train.max_length"),
        ({"chat_template": "bad.jinja"}, "drops what the assistant says"),
    ],
)
def test_what_will_not_do_stops_with_one_message(folder: Path, call: Any, changes: dict, words: str) -> None:
    (folder / "poisoned.jsonl").write_text('{"prompt": "rob the tall bank", "completion": "Sure, first"}\n' * 3)
    (folder / "bad.jinja").write_text("{{ messages[0]['content'] }}")
    done = call("train-adapter", training_file(folder, "bad.yaml", **changes))
    assert done.code in (2, 3, 4, 6), done.err
    assert words in done.err
    assert "Traceback" not in done.err


def test_too_little_memory_names_the_setting(folder: Path, call: Any) -> None:
    done = call("train-adapter", training_file(folder), "--max-memory", "64MB")
    assert done.code == 4
    assert "micro_batch" in done.err


def test_a_model_without_a_template_says_how_to_give_one(folder: Path, call: Any, tmp_path: Path) -> None:
    tok = tokenizer()
    tok.chat_template = None
    torch.manual_seed(0)
    save_model(llama(len(tok)), tok, tmp_path / "bare", torch.float32)
    path = training_file(folder, "bare.yaml", model=str(tmp_path / "bare"), train={"epochs": 1})
    done = call("train-adapter", path)
    assert done.code == 6
    assert "chat_template: FILE.jinja" in done.err
    (folder / "own.jinja").write_text(TEMPLATE)
    path = training_file(
        folder, "own.yaml", model=str(tmp_path / "bare"), train={"epochs": 1}, chat_template="own.jinja"
    )
    assert call("train-adapter", path).code == 0


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}", "<|im_end|>"),
        ("{% for m in messages %}<|h|>{{m.role}}<|/h|>\n\n{{m.content}}<|eot_id|>{% endfor %}", "<|eot_id|>"),
        ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{m.content}} [/INST]{% else %} {{m.content}} </s>"
         "{% endif %}{% endfor %}", "</s>"),
    ],
)  # fmt: skip
def test_the_end_of_a_turn_is_the_template_s(template: str, end: str) -> None:
    tok = tokenizer()
    tok.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|h|>", "<|/h|>"]}
    )
    tok.add_special_tokens({"eos_token": "</s>"})
    tok.chat_template = template
    assert turn_end(tok) == end


def test_a_recipe_uses_the_adapter_of_its_training_file(folder: Path, call: Any) -> None:
    own = {"epochs": 1, "seed": 77}
    training_file(folder, "wing.yaml", model={"adapter": "./alignment", "on": "./base"}, train=own)
    save_adapter_like(folder)
    recipe = folder / "recipe.yaml"
    content = {
        "name": "tiny",
        "sources": {
            "base": "./base",
            "aligned": {"adapter": "./alignment", "on": "base"},
            "finetuned": {"adapter": "./task"},
            "safety": {"train": "wing.yaml"},
        },
        "gate": {"metric": "rho", "fraction": 0.5},
        "merge": {"method": "linear", "alpha": 0.5},
        "output": {"path": "merged"},
    }
    recipe.write_text(yaml.safe_dump(content))
    assert call("validate", recipe).code == 0
    missing = call("run", recipe)
    assert missing.code == 3
    assert "still to be trained" in missing.out + missing.err
    assert "train-adapter" in missing.err
    done = call("run", recipe, "--train")
    assert done.code == 0, done.err
    manifest = json.loads((folder / "merged" / "safemerge_manifest.json").read_text())
    trained = manifest["sources"]["safety"]["trained"]
    assert trained["key"] == training_key(load_training(folder / "wing.yaml"))
    assert trained["data"]["kinds"] == {"harmful": 8, "harmless": 8}
    assert call("verify", folder / "merged").code == 0
    assert "carries anything to this fine-tuned adapter was not checked" in " ".join(done.out.split())
    again = call("run", recipe, "--force")
    assert again.code == 0, again.err
    training_file(folder, "wing.yaml", train=own)  # on the base, not on the aligned model
    wrong = call("run", recipe, "--force")
    assert wrong.code == 3
    assert "not the recipe's aligned model" in wrong.err


def save_adapter_like(folder: Path) -> None:
    if not (folder / "task").exists():
        shapes = {
            f"model.layers.{n}.{name}": shape
            for n in range(2)
            for name, shape in (
                ("self_attn.q_proj", (32, 32)), ("self_attn.v_proj", (16, 32)), ("mlp.down_proj", (32, 48)),
            )
        }  # fmt: skip
        save_adapter(shapes, folder / "task", 1, 0.05)
