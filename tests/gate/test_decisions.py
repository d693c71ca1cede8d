"""Decisions at their boundaries, on real plans: strictness, ranks, controls, groups, degenerate tensors.

Guards `planning.plan`, `planning.decisions`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures import reference
from tests.fixtures.gated_family import ROLES, Family


@pytest.fixture
def plan(llama: Family, call: Callable[..., Any], recipe: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """`plan(gate, **sources)`: the gated lines of a plan by tensor name."""

    def run(gate: dict[str, Any], **sources: Any) -> dict[str, Any]:
        roles = {role: llama / role for role in ROLES}
        done = call("plan", recipe(sources={**roles, **sources}, gate=gate), "--json")
        assert done.code == 0, done.err
        return {line["name"]: line for line in done.json["tensors"] if line["metric"] is not None}

    return run


def _merged(lines: dict[str, Any]) -> set[str]:
    return {name for name, line in lines.items() if line["action"] == "merge"}


def test_tau_is_strict_and_at_most_is_not(plan: Any) -> None:
    rho = {name: line["rho"] for name, line in plan({"never": True}).items()}
    middle = sorted(rho.values())[6]
    assert _merged(plan({"tau": middle})) == {name for name, value in rho.items() if value < middle}
    assert _merged(plan({"at_most": middle})) == {name for name, value in rho.items() if value <= middle}
    above = {"direction": "above"}
    assert _merged(plan({"tau": middle, **above})) == {name for name, value in rho.items() if value > middle}
    assert _merged(plan({"at_most": middle, **above})) == {name for name, value in rho.items() if value >= middle}


def test_ranks_and_controls(plan: Any) -> None:
    lines = plan({"lowest": 5})
    order = sorted(lines, key=lambda name: (lines[name]["rho"], name))
    assert _merged(lines) == set(order[:5])
    assert _merged(plan({"fraction": 0.3})) == set(order[:5])  # 4.2 of 14, rounded up
    assert _merged(plan({"complement": {"lowest": 5}})) == set(order[5:])
    per_type = _merged(plan({"fraction": 0.5, "per": "module"}))
    assert len(per_type) == 7
    for name in per_type:  # of the two layers' same module, the lower one
        twin = name.replace(".0.", ".9.").replace(".1.", ".0.").replace(".9.", ".1.")
        assert lines[name]["rho"] < lines[twin]["rho"]
    draws = [_merged(plan({"random": {"count": 6, "seed": seed}})) for seed in (0, 0, 1)]
    assert [len(draw) for draw in draws] == [6, 6, 6]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("granularity", ["module", "block"])
def test_groups_have_the_metric_of_their_concatenated_deltas(llama: Family, plan: Any, granularity: str) -> None:
    base, aligned, tuned = (llama.dense(role) for role in ("base", "aligned", "finetuned"))
    lines = plan({"tau": 0.5, "granularity": granularity})
    depth = {"module": 4, "block": 3}[granularity]
    groups: dict[str, list[str]] = {}
    for name in lines:
        groups.setdefault(".".join(name.split(".")[:depth]), []).append(name)
    assert len(groups) == {"module": 4, "block": 2}[granularity]
    for names in groups.values():
        v = torch.block_diag(*(aligned[name] - base[name] for name in names))
        delta = torch.block_diag(*(tuned[name] - aligned[name] for name in names))
        rho = reference.rho(v * 1.0, delta)
        assert {lines[name]["action"] for name in names} == {"merge" if rho < 0.5 else "keep"}
        assert all(lines[name]["value"] == pytest.approx(rho, rel=1e-4) for name in names)


def _aligned_but_for_one(family: Family, folder: Path) -> Path:
    """The aligned model with one matrix of the base."""
    shutil.copytree(family / "aligned", folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            save_file(tensors | {name: family.tensors("base")[name]}, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("degenerate", "action"), [("keep", "keep"), ("merge", "merge")])
def test_degenerate_tensors_follow_the_stated_choice(
    llama: Family, plan: Any, tmp_path: Path, degenerate: str, action: str
) -> None:
    nearly = _aligned_but_for_one(llama, tmp_path / "nearly")  # V = 0 everywhere would be an error
    lines = plan({"tau": 0.5, "degenerate": degenerate}, base=nearly)
    zero = [line for line in lines.values() if line["rho"] is None]
    assert len(zero) == len(lines) - 1
    assert {line["action"] for line in zero} == {action}
    assert all("V is zero" in line["reason"] for line in zero)
