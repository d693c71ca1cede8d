"""What does not fit is refused: an exit code, one clear message, no traceback, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.fixtures.gated_family import ROLES, Family, make_family, write_adapter


@pytest.fixture
def copied(llama: Family, tmp_path: Path) -> Family:
    """A copy of the family that a test may damage."""
    shutil.copytree(llama.path, tmp_path / "models")
    return Family(tmp_path / "models", llama.dtype)


@pytest.fixture
def refused(call: Callable[..., Any], recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """`refused(code, family, …)`: runs the recipe, checks how it fails, returns the message."""

    def run(code: int, family: Family, *options: str, sources: dict[str, Any] | None = None, **content: Any) -> str:
        content.setdefault("gate", {"tau": 0.5})
        path = recipe(sources={**{role: family / role for role in ROLES}, **(sources or {})}, **content)
        before = _snapshot(tmp_path)
        done = call("run", path, *options)
        message: str = done.err
        assert done.code == code, done.err
        assert "Traceback" not in message
        assert "a bug in" not in message
        assert message.count("safemerge: ") == 1
        assert done.out == ""
        assert _snapshot(tmp_path) == before, "something was written"
        return message

    return run


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in folder.rglob("*"):
        if "cache" not in path.parts and path.is_file():
            found[str(path)] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found


def _change(family: Family, role: str, name: str, to: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = family / role / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = to(tensors[name].clone()).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# The recipe


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"gate": {"tau": 0.5, "tua": 1}}, ["recipe.yaml:8", "gate.tua", '"tau"']),
        ({"mrege": {"method": "linear"}}, ["mrege", "merge"]),
        ({"gate": {"tau": 1.5}}, ["gate.tau", "1.5", "from 0 to 1"]),
        ({"gate": {"tau": -0.1}}, ["gate.tau", "-0.1"]),
        ({"gate": {"tau": 0.5, "lowest": 3}}, ["2 selectors", "tau", "lowest"]),
        ({"gate": {"metric": "rho"}}, ["no selector"]),
        ({"merge": {"method": "linaer"}}, ["linaer", "linear"]),
        ({"merge": {"method": "linear", "alpha": 1.2}}, ["merge.alpha", "1.2"]),
        ({"merge": {"method": "linear", "density": 0.5}}, ["density", "not used"]),
        ({"rules": [{"tensors": "*.no_such.*", "keep": "aligned"}]}, ["rules.0", "no_such", "matches none"]),
        ({"gate": {"names": ["*.no_such.*"]}}, ["gate.names", "matches none"]),
        ({"output": {"path": "out", "max_shard_size": "5 parsecs"}}, ["max_shard_size", "parsecs"]),
        ({"evaluate": {"taks": ["x"]}}, ["taks", "tasks"]),
    ],
)
def test_wrong_recipes(llama: Family, refused: Any, content: dict[str, Any], words: list[str]) -> None:
    message = refused(2, llama, **content)
    assert all(word in message for word in words), message


def test_duplicate_keys_and_broken_yaml(llama: Family, call: Any, recipe: Any, tmp_path: Path) -> None:
    path = recipe(sources={role: llama / role for role in ROLES}, gate={"tau": 0.5})
    text = path.read_text()
    for addition, words in [("gate: {tau: 0.9}\n", ["gate", "twice"]), ("gate: [\n", ["recipe.yaml"])]:
        path.write_text(text + addition)
        done = call("run", path)
        assert done.code == 2
        assert all(word in done.err for word in words), done.err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["run"], "recipe"),
        (["frobnicate"], "frobnicate"),
        (["run", "{recipe}", "--set", "gate.tua=1"], "tua"),
        (["run", "{recipe}", "--set", "gate.tau"], "gate.tau"),
        (["run", "{recipe}", "--max-memory", "lots"], "lots"),
        (["run", "{recipe}", "--max-memory", "1MB"], "64MB"),
        (["run", "{recipe}", "--workers", "0"], "workers"),
        (["run", "{recipe}", "--executor", "abacus"], "abacus"),
    ],
)
def test_wrong_command_lines(llama: Family, call: Any, recipe: Any, arguments: list[str], word: str) -> None:
    path = recipe(sources={role: llama / role for role in ROLES}, gate={"tau": 0.5})
    done = call(*(str(path) if argument == "{recipe}" else argument for argument in arguments))
    assert done.code == 2
    assert word in done.err
    assert "Traceback" not in done.err


# The sources


@pytest.mark.parametrize("role", ROLES)
def test_missing_sources(llama: Family, refused: Any, role: str) -> None:
    for where in ("./no/such/folder", "no-such-org/no-such-model"):
        message = refused(3, llama, sources={role: where})
        assert f"sources.{role}" in message
        assert where.strip("./") in message


def test_a_role_that_is_needed_is_asked_for(llama: Family, call: Any, recipe: Any) -> None:
    for absent in ("base", "safety"):
        sources = {role: llama / role for role in ROLES if role != absent}
        done = call("run", recipe(sources=sources, gate={"tau": 0.5}))
        assert done.code == 2
        assert absent in done.err


def test_a_truncated_shard(copied: Family, refused: Any) -> None:
    file = copied / "safety" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    message = refused(3, copied)
    assert all(word in message for word in ("safety/model.safetensors", "truncated")), message


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 64, b"\x02" + bytes(7) + b"{}junk", b"\x02" + bytes(7) + b"[}"]
)
def test_what_is_not_safetensors(copied: Family, refused: Any, content: bytes) -> None:
    (copied / "finetuned" / "model.safetensors").write_bytes(content)
    assert "finetuned/model.safetensors" in refused(3, copied)


def test_an_index_that_names_a_missing_file(qwen: Family, refused: Any, tmp_path: Path) -> None:
    shutil.copytree(qwen / "base", tmp_path / "base")
    (tmp_path / "base" / "model-00002-of-00003.safetensors").unlink()
    message = refused(3, qwen, sources={"base": str(tmp_path / "base")})
    assert all(word in message for word in ("model-00002-of-00003.safetensors", "missing")), message


def test_an_index_that_points_outside(qwen: Family, refused: Any, tmp_path: Path) -> None:
    shutil.copytree(qwen / "base", tmp_path / "base")
    index = tmp_path / "base" / "model.safetensors.index.json"
    text = index.read_text().replace("model-00002-of-00003.safetensors", "../base/model-00002-of-00003.safetensors")
    index.write_text(text)
    assert "plain file name" in refused(3, qwen, sources={"base": str(tmp_path / "base")})


def test_models_of_another_architecture_or_vocabulary(
    llama: Family, qwen: Family, refused: Any, tmp_path: Path
) -> None:
    message = refused(3, llama, sources={"base": str(qwen / "base")})
    assert all(word in message for word in ("sources.base", "model_type", "qwen2", "llama")), message
    other = make_family(tmp_path / "other", "llama", torch.bfloat16, vocab_size=100)
    message = refused(3, llama, sources={"safety": str(other / "safety")})
    assert all(word in message for word in ("sources.safety", "vocab_size", "100", "96")), message


def test_models_that_lack_or_add_a_tensor(copied: Family, refused: Any) -> None:
    file = copied / "finetuned" / "model.safetensors"
    tensors = load_file(file)
    whole = dict(tensors)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert "lacks 1 tensors of the aligned model, first 'model.layers.1.mlp.up_proj.weight'" in refused(3, copied)
    save_file({**whole, "model.extra": torch.ones(2)}, file, metadata={"format": "pt"})
    assert "'model.extra'" in refused(3, copied)
    whole["model.norm.weight"] = torch.ones(31, dtype=torch.bfloat16)
    save_file(whole, file, metadata={"format": "pt"})
    assert all(word in refused(3, copied) for word in ("model.norm.weight", "(31,)", "(32,)"))


def test_pickles_are_never_loaded(copied: Family, refused: Any) -> None:
    (copied / "base" / "model.safetensors").rename(copied / "base" / "pytorch_model.bin")
    assert all(word in refused(3, copied) for word in ("pytorch_model.bin", "pickle", "never loaded"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("role", ["finetuned", "safety"])
@pytest.mark.parametrize("count", [1, 1700])
def test_values_that_are_not_finite(
    copied: Family, refused: Any, value: float, method: str, role: str, count: int
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"  # 56 x 32

    def spoil(x: torch.Tensor) -> torch.Tensor:
        x.view(-1)[:count] = value
        return x

    _change(copied, role, name, spoil)
    message = refused(3, copied, gate={"always": True}, merge={"method": method})
    assert all(word in message for word in (name, f"{role}/model.safetensors", "finite")), message


def test_values_that_are_not_finite_in_the_gate(copied: Family, refused: Any) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    _change(copied, "base", name, lambda x: x.index_fill_(0, torch.tensor([3]), float("nan")))
    message = refused(3, copied)
    assert all(word in message for word in (name, "base/model.safetensors", "32 of 512")), message


def test_values_that_do_not_fit_the_output_dtype(copied: Family, refused: Any) -> None:
    _change(copied, "safety", "model.layers.1.mlp.up_proj.weight", lambda x: x * 0 + 1e30)
    message = refused(3, copied, gate={"always": True}, output={"path": "out", "dtype": "float16"})
    assert all(word in message for word in ("up_proj", "do not fit F16", "allow_overflow")), message


# Adapters


def _adapter(copied: Family) -> dict[str, Any]:
    return {"finetuned": {"adapter": str(copied / "finetuned-lora")}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, ["use_dora"]),
        ({"init_lora_weights": "pissa"}, ["pissa", "path_initial_model_for_weight_conversion"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["pissa"]),
        ({"init_lora_weights": "olora"}, ["olora"]),
        ({"bias": "some"}, ["bias", "some"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save"]),
        ({"peft_type": "IA3"}, ["IA3", "LORA"]),
        ({"r": 5}, ["rank 5", "4 rows"]),
        ({"lora_alpha": None}, ["lora_alpha"]),
        ({"some_future_switch": "on"}, ["some_future_switch"]),
    ],
)
def test_adapters_that_mean_something_else(
    copied: Family, refused: Any, changes: dict[str, Any], words: list[str]
) -> None:
    _edit(copied / "finetuned-lora" / "adapter_config.json", **changes)
    message = refused(3, copied, sources=_adapter(copied))
    assert all(word in message for word in ("finetuned-lora", *words)), message


def test_real_pissa_and_olora_adapters_are_refused_by_name(llama: Family, refused: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    for word in ("pissa", "olora"):
        options = {"init_lora_weights": word}
        write_adapter(tmp_path / word, llama / "aligned", 0, LoraConfig(r=2, target_modules=["q_proj"], **options))
        message = refused(3, llama, sources={"safety": {"adapter": str(tmp_path / word)}})
        assert word in message


def test_adapters_of_another_model(llama: Family, refused: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    for kind, change in {"wider": {"hidden_size": 64}, "deeper": {"num_hidden_layers": 3}}.items():
        other = make_family(tmp_path / kind, "llama", torch.float32, **change)
        write_adapter(tmp_path / f"{kind}-lora", other / "aligned", 0, LoraConfig(r=2, target_modules=["q_proj"]))
        message = refused(3, llama, sources={"finetuned": {"adapter": str(tmp_path / f"{kind}-lora")}})
        assert "another model" in message
        assert "q_proj" in message


def test_adapter_files_that_are_unsound(copied: Family, refused: Any) -> None:
    file = copied / "finetuned-lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_B" in key)
    half = {k: v for k, v in tensors.items() if k != key}
    for damaged, words in [
        (half, ["lora_B"]),
        ({**tensors, key: tensors[key][:, :3].contiguous()}, ["lora_A", "lora_B", "(4,"]),
        ({**tensors, "base_model.model.lm_head.weight": torch.ones(2, 2)}, ["unexpected key", "lm_head"]),
        ({**tensors, key: tensors[key] * float("nan")}, ["finite"]),
    ]:
        save_file(damaged, file)
        message = refused(3, copied, sources=_adapter(copied))
        assert all(word in message for word in ("finetuned-lora", *words)), message


# The output


def test_outputs_in_the_way(llama: Family, refused: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    for options in ((), ("--force",)):
        assert "not empty and not an output of safemerge" in refused(4, llama, *options)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("a file")
    assert "is in the way" in refused(4, llama)


def test_plans_that_cannot_be_met(llama: Family, refused: Any) -> None:
    assert "99" in refused(4, llama, gate={"lowest": 99})
    message = refused(4, llama, sources={"finetuned": str(llama / "aligned")})
    assert "does not differ" in message
    message = refused(4, llama, sources={"base": str(llama / "aligned")}, gate={"tau": 0.5, "degenerate": "error"})
    assert "V is zero" in message


def test_sources_are_never_written(llama: Family, merge: Callable[..., Any], call: Any, recipe: Any) -> None:
    before = _snapshot(llama.path)
    merge(llama, gate={"tau": 0.5})
    path = recipe(sources={role: llama / role for role in ROLES}, gate={"tau": 0.5})
    done = call("run", path, "--output", llama / "aligned", "--force")
    assert done.code == 4
    assert _snapshot(llama.path) == before
    assert yaml.safe_load(path.read_text())["output"]["path"] == "out"
