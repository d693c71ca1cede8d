"""`safemerge init`: from an adapter, a pair of models or a family to a recipe that is sound, and runs.

Guards `sharing.starting`.
"""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from safemerge_recipes.sharing.starting import FAMILIES
from safemerge_recipes.sharing.templates import EDITOR_LINE
from tests.fixtures.gated_family import Family


def sound(call: Callable[..., Any], text: str, folder: Path) -> dict[str, Any]:
    """The values of a recipe that passes `validate` and has the line for editors."""
    (folder / "first.yaml").write_text(text)
    done = call("validate", folder / "first.yaml")
    assert done.code == 0, done.err
    assert text.splitlines()[0] == EDITOR_LINE
    value = yaml.safe_load(text)
    assert isinstance(value, dict)
    return value


def test_an_adapter_tells_the_model_it_lies_on(llama: Family, call: Callable[..., Any], tmp_path: Path) -> None:
    done = call("init", llama / "finetuned-lora", "--base", llama / "base")
    value = sound(call, done.out, tmp_path)
    assert value["sources"]["aligned"] == str(llama / "aligned")  # PEFT wrote it
    assert value["sources"]["finetuned"] == {"adapter": str(llama / "finetuned-lora")}
    assert "LORA of rank 4 on down_proj, q_proj, v_proj" in done.out
    assert value["merge"] == {"method": "add_safety_vector", "gamma": 0.5}
    assert value["gate"] == {"metric": "rho", "fraction": 0.5}
    assert value["evaluate"]["tasks"] == ["safemerge_refusal", "safemerge_overrefusal"]
    planned = call("run", tmp_path / "first.yaml", "--no-evaluate", "-o", tmp_path / "out", "--json")
    assert planned.json["summary"]["merged"] == 3


def test_with_a_safety_adapter_it_is_the_papers_merge(llama: Family, call: Callable[..., Any], tmp_path: Path) -> None:
    adapter = ("init", llama / "finetuned-lora", "--safety", llama / "safety-lora")
    value = sound(call, call(*adapter, "--base", llama / "base").out, tmp_path)
    assert value["merge"] == {"method": "linear", "alpha": 0.8}
    assert value["sources"]["safety"] == {"adapter": str(llama / "safety-lora")}
    assert sound(call, call(*adapter).out, tmp_path)["gate"] == {"always": True}  # nothing to go by
    assert call("plan", tmp_path / "first.yaml").code == 0


def test_a_pair_of_models_is_aligned_and_finetuned(
    llama: Family, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llama.path)
    place = tmp_path / "recipes" / "mine.yaml"
    done = call("init", "aligned", "finetuned", "--base", "base", "--name", "mine", "-o", place)
    assert (done.code, done.out) == (0, f"{place}\n")
    value = yaml.safe_load(place.read_text())
    assert value["name"] == "mine-safe"
    seen = os.path.relpath(llama.path, place.parent)
    assert value["sources"] == {role: f"{seen}/{role}" for role in ("base", "aligned", "finetuned")}
    assert call("plan", place).code == 0
    assert call("init", "aligned", "finetuned", "--base", "base", "-o", place).code == 2  # nothing is overwritten


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_fills_in_its_models(family: str, call: Callable[..., Any], tmp_path: Path) -> None:
    value = sound(call, call("init", family).out, tmp_path)
    assert (value["sources"]["base"], value["sources"]["aligned"]) == FAMILIES[family]
    assert value["sources"]["finetuned"] == {"adapter": "./my-adapter"}


def adapter_on(llama: Family, folder: Path, trained_on: Any, **changes: Any) -> Path:
    """A copy of an adapter that says it was trained on another model."""
    shutil.copytree(llama / "finetuned-lora", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": trained_on, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_known_models_tell_what_they_were_aligned_from(llama: Family, call: Callable[..., Any], tmp_path: Path) -> None:
    base, aligned = FAMILIES["qwen-2.5-7b"]
    value = sound(call, call("init", adapter_on(llama, tmp_path / "one", aligned)).out, tmp_path)
    assert (value["sources"]["base"], value["sources"]["aligned"]) == (base, aligned)
    value = sound(call, call("init", adapter_on(llama, tmp_path / "two", base)).out, tmp_path)
    assert value["sources"]["finetuned"] == {"adapter": str(tmp_path / "two"), "onto": "base"}
    odd = adapter_on(llama, tmp_path / "an adapter: odd", aligned)
    assert sound(call, call("init", odd).out, tmp_path)["sources"]["finetuned"] == {"adapter": str(odd)}


def test_what_is_not_known_is_asked_for_in_one_message(llama: Family, call: Callable[..., Any], tmp_path: Path) -> None:
    for arguments, told in (
        ((), "init: found 0 places; expected an adapter"),
        (("a", "b", "c"), "init: found 3 places"),
        (
            ("no-such-thing-here",),
            "no such folder; expected that of an adapter or a model, a hub id, or one of llama-2",
        ),
        (("org/nothing",), "org/nothing: "),
        ((llama / "finetuned",), "say --aligned PLACE"),
        ((llama / "aligned", llama / "finetuned"), "say --base PLACE, or --safety PLACE"),
        ((adapter_on(llama, tmp_path / "none", None),), "say --aligned PLACE"),
        ((adapter_on(llama, tmp_path / "ia3", "x", peft_type="IA3"),), "IA3"),
        ((tmp_path,), "has no adapter_config.json and no config.json"),
    ):
        done = call("init", *arguments)
        assert (done.code, done.err.count("\n"), told in done.err) == (2, 1, True), done.err


def test_on_a_terminal_it_asks(llama: Family, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "safemerge_recipes", "init", "-o", str(tmp_path / "asked.yaml")]
    answers = [str(llama / "finetuned-lora"), "", str(llama / "base"), str(llama / "safety-lora"), "asked"]
    with subprocess.Popen(command, stdin=follower, stderr=follower, stdout=subprocess.PIPE, text=True) as running:
        os.close(follower)
        os.write(leader, "".join(f"{answer}\n" for answer in answers).encode())
        assert running.stdout is not None
        assert running.stdout.read().split() == [str(tmp_path / "asked.yaml")]
        assert running.wait(60) == 0
    os.close(leader)
    value = yaml.safe_load((tmp_path / "asked.yaml").read_text())
    assert value["name"] == "asked-safe"
    assert value["sources"]["safety"] == {"adapter": str(llama / "safety-lora")}
    assert value["sources"]["aligned"] == str(llama / "aligned")  # what the adapter said, taken by Enter
