"""Gate and merge on another device: the same plan, the same decisions, the same results.

Where there is no GPU, `cpu:0` stands for one: every block then goes through the staging buffers and back, as it would
to a GPU, and the arithmetic is torch's on the CPU, so that the bytes must equal those of a machine without compiled
kernels. With a GPU the same runs are made there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safemerge_recipes.events import ignore
from safemerge_recipes.pipeline.opening import resolve
from safemerge_recipes.pipeline.preparing import prepare
from safemerge_recipes.pipeline.writing import carry_out
from safemerge_recipes.recipe.loading import load_recipe
from safemerge_recipes.storage.digests import Digests
from safemerge_recipes.storage.workers import Resources
from safemerge_recipes.weights import compiled
from tests.fixtures.gated_family import Family

GPU = pytest.param("cuda:0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
METHODS = ["linear", "slerp", "ties", "dare_linear", "dare_ties", "project", "add_safety_vector"]


def _merged(recipe: dict[str, Any], output: Path, device: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    path = output.parent / f"{output.name}.yaml"
    path.write_text(json.dumps(recipe))
    resolved = resolve(load_recipe(path))
    digests = Digests(resolved.identities)
    prepared = prepare(resolved, Resources(2, 500_000_000, device), ignore, use_cache=False)
    carry_out(prepared, output, digests, ignore)
    return json.loads((output / "safemerge_plan.json").read_text()), load_file(output / "model.safetensors")


@pytest.mark.skipif(compiled.LIBRARY is None, reason="no compiled kernels")
@pytest.mark.parametrize("device", ["cpu:0", GPU])
@pytest.mark.parametrize("method", ["ties", "project"])
def test_compiled_kernels_write_beside_a_gate_on_the_device(
    wide: Family, method: str, device: str, tmp_path: Path
) -> None:
    """What they can do has the bytes of a run without a device; what they cannot is the device's."""
    sources = {role: str(wide / role) for role in ("base", "aligned", "finetuned", "safety")}
    recipe = {"sources": sources, "gate": {"fraction": 0.5}, "merge": {"method": method}}
    runs = {}
    for where in ("cpu", device):
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(recipe))
        resolved = resolve(load_recipe(path))
        prepared = prepare(resolved, Resources(2, 500_000_000, where), ignore, use_cache=False)
        merged = [task for task in prepared.graph.tasks if task.work.copied is None]
        assert merged
        assert all(task.native is (method == "ties") for task in merged if task.work.matrices or method == "ties")
        output = tmp_path / where.replace(":", "-")
        carry_out(prepared, output, Digests(resolved.identities), ignore)
        runs[where] = (output / "model.safetensors").read_bytes()
    if method == "ties":
        assert runs[device] == runs["cpu"]


@pytest.mark.parametrize("device", ["cpu:0", GPU])
@pytest.mark.parametrize("sides", ["full", "adapters"])
@pytest.mark.parametrize("method", METHODS)
def test_another_device_decides_and_merges_alike(
    wide: Family, method: str, sides: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "LIBRARY", None)
    end = "-lora" if sides == "adapters" else ""
    sources: dict[str, Any] = {role: str(wide / role) for role in ("base", "aligned")}
    for role in ("finetuned", "safety"):
        sources[role] = {"adapter": str(wide / f"{role}{end}")} if end else str(wide / role)
    merge = {"method": method, **({} if method in ("project", "add_safety_vector") else {"alpha": 0.7})}
    recipe = {"sources": sources, "gate": {"fraction": 0.5}, "merge": merge}
    plan, weights = _merged(recipe, tmp_path / "cpu", "cpu")
    other, found = _merged(recipe, tmp_path / "other", device)

    def decisions(of: dict[str, Any]) -> list[tuple[str, str]]:
        return [(line["name"], line["action"]) for line in of["tensors"]]

    assert decisions(other) == decisions(plan)
    assert "merge" in {action for _, action in decisions(plan)}
    for name, expected in weights.items():
        if device == "cpu:0":
            assert torch.equal(found[name], expected), name
        else:  # one unit in the last place of bfloat16
            torch.testing.assert_close(found[name].float(), expected.float(), rtol=2**-7, atol=1e-8)
