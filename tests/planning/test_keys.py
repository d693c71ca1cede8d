"""Which results another processor may take over: those it would round alike. Guards `storage.machine`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from safemerge_recipes.planning import graph
from safemerge_recipes.storage.machine import instruction_set
from tests.fixtures.plain_family import FULL, make_family, prepare_recipe, recipe_text


def _keys(root: Path, method: str) -> dict[str, str]:
    prepared = prepare_recipe(root, recipe_text(FULL, "{always: true}", f"{{method: {method}}}"))
    return {task.slot.name: task.key for task in prepared.graph.tasks if not isinstance(task.work, graph.Copy)}


def test_the_instruction_set_names_results_of_a_matrix_library_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_family(tmp_path, torch.bfloat16)
    here = {method: _keys(tmp_path, method) for method in ("project", "linear, alpha: 0.5")}
    monkeypatch.setattr(graph, "instruction_set", lambda: "riscv64 rvv")
    there = {method: _keys(tmp_path, method) for method in here}
    assert all(there["project"][name] != key for name, key in here["project"].items())
    assert there["linear, alpha: 0.5"] == here["linear, alpha: 0.5"]


def test_this_processor_has_a_name() -> None:
    import platform

    assert instruction_set().split()[0] == platform.machine()
    assert len(instruction_set().split()) == (2 if platform.machine() in ("x86_64", "aarch64") else 1)
