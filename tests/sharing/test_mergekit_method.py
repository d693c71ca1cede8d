"""`merge_method: safemerge` in mergekit's files, run by `safemerge mergekit-yaml`: the tensors of a recipe.

Guards `sharing.mergekit.method`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.gated_family import Family, make_family, read_weights

pytest.importorskip("mergekit")

ROLES = ("finetuned", "safety", "base")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("pair"), "llama", torch.bfloat16, architectures=["LlamaForCausalLM"])


def config(family: Family, parameters: str, roles: tuple[str, ...] = ROLES, named: bool = True) -> str:
    models = "".join(
        f"  - model: {family / role}\n" + (f"    parameters: {{role: {role}}}\n" if named else "") for role in roles
    )
    return f"models:\n{models}merge_method: safemerge\nbase_model: {family / 'aligned'}\nparameters: {parameters}\n"


@pytest.mark.parametrize(
    ("parameters", "gate", "merge", "roles"),
    [
        ("{tau: 0.55, alpha: 0.7}", {"tau": 0.55}, {"method": "linear", "alpha": 0.7}, ROLES),
        ("{tau: 0.5}", {"tau": 0.5}, {}, ("base", "safety", "finetuned")),
        ("{always: true, alpha: 0.5}", {"always": True}, {"method": "linear", "alpha": 0.5}, ROLES[:2]),
        ("{tau: 0.55, gamma: 0.5}", {"tau": 0.55}, {"method": "add_safety_vector", "gamma": 0.5}, ROLES[::2]),
    ],
)
def test_the_method_gives_a_recipes_tensors(
    parameters: str, gate: dict[str, Any], merge: dict[str, Any], roles: tuple[str, ...], family: Family,
    call: Callable[..., Any], recipe: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "merge.yml").write_text(config(family, parameters, roles))
    done = call("mergekit-yaml", tmp_path / "merge.yml", tmp_path / "theirs", "--no-write-model-card", "--quiet")
    assert done.code == 0, done.err
    path = recipe(sources={role: family / role for role in ("aligned", *roles)}, gate=gate, merge=merge)
    done = call("run", path, "-o", tmp_path / "ours", "--json")
    assert 0 < done.json["summary"]["merged"] <= 14
    assert "always" in gate or done.json["summary"]["merged"] < 14  # the gate has something to decide
    ours, theirs = read_weights(tmp_path / "ours"), read_weights(tmp_path / "theirs")
    assert set(ours) == set(theirs)
    for name, found in theirs.items():
        assert torch.equal(found, ours[name]), name


def test_roles_follow_the_order_where_none_is_said(family: Family, call: Callable[..., Any], tmp_path: Path) -> None:
    for number, named in enumerate((True, False)):
        (tmp_path / "merge.yml").write_text(config(family, "{tau: 0.55}", named=named))
        assert call("mergekit-yaml", tmp_path / "merge.yml", tmp_path / f"out{number}", "--quiet").code == 0
    first, second = (read_weights(tmp_path / f"out{number}") for number in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "options", "code", "told"),
    [
        (("role: safety", "role: saftey"), (), 2, "expected each of finetuned, safety, base once"),
        (("role: base", "role: safety"), (), 2, "expected each of finetuned, safety, base once"),
        (("merge_method: safemerge", "merge_method: saftmerge"), (), 4, "Unimplemented merge method"),
        (("x", "x"), ("--trust-remote-code",), 2, "expected no code of a model repository"),
        (("x", "x"), ("--no-such-option",), 2, "No such option"),
        (("models:", "modles:"), (), 4, "Exactly one of"),
    ],
)
def test_what_is_wrong_is_one_message(
    change: tuple[str, str], options: tuple[str, ...], code: int, told: str, family: Family, call: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "merge.yml").write_text(config(family, "{tau: 0.5}").replace(*change))
    done = call("mergekit-yaml", tmp_path / "merge.yml", tmp_path / "out", *options, "--quiet")
    assert done.code == code, done.err
    assert told in done.err
    assert "Traceback" not in done.err


def test_a_file_that_is_a_pipe_is_not_waited_for(call: Callable[..., Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "merge.yaml")
    done = call("mergekit-yaml", tmp_path / "merge.yaml", tmp_path / "out")
    assert (done.code, "merge.yaml: is a pipe; expected a regular file" in done.err) == (3, True), done.err
