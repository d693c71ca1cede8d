"""A recipe on a Ray cluster of several nodes: the same output as here, and every trouble is one message.

Guards `engine.executors`, `engine.executors.ray`, `engine.executors.ray_cluster`, `engine.executors.ray_tasks`,
`engine.whole_file` and `gate.measurer`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safemerge_recipes.engine.executors import ray as executor
from safemerge_recipes.storage import digests as hashing
from tests.fixtures.program import digests, run, spawn
from tests.fixtures.ray_cluster import cluster
from tests.fixtures.sharded_family import make_family


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """A cluster that this process is connected to."""
    with cluster() as found:
        yield found


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A family in several shards."""
    path: Path = make_family(tmp_path)
    return path


def _fresh(root: Path, name: str) -> None:
    os.environ["SAFEMERGE_CACHE"] = str(root / name)  # measured anew


def _inputs(out: Path) -> dict[str, str]:
    record = json.loads((out / "safemerge_manifest.json").read_text())
    return {f"{one['source']}/{one['file']}": one["sha256"] for one in record["inputs"]}


def _not_here(*asked: Any, **how: Any) -> None:
    raise AssertionError("the driver hashes a source")


def test_a_whole_run_gives_the_output_of_a_local_one(
    two_nodes: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = recipe.parent
    _fresh(root, "here")
    assert run("run", recipe, "--output", root / "here-out")[0] == 0
    _fresh(root, "there")
    monkeypatch.setattr(hashing, "file_digest", _not_here)
    code, printed, err = run("run", recipe, "--output", root / "there-out", "--executor", "ray", "--json")
    assert code == 0, err
    assert json.loads(printed)["resumed"] == 0
    assert digests(root / "there-out") == digests(root / "here-out")
    assert _inputs(root / "there-out") == _inputs(root / "here-out")
    plans = [
        json.loads((root / out / "safemerge_plan.json").read_text())["tensors"] for out in ("here-out", "there-out")
    ]
    assert plans[0] == plans[1]
    assert any(line["rho"] is not None for line in plans[1])


def test_a_source_that_is_broken_is_told_as_locally(two_nodes: Any, recipe: Path, monkeypatch: Any) -> None:
    root = recipe.parent
    monkeypatch.setattr(executor, "fingerprint", lambda path: (1, "another"))
    code, _, err = run("run", recipe, "--output", root / "out", "--executor", "ray")
    assert code == 3
    assert "another file on" in err
    assert "Traceback" not in err


def test_workers_of_another_version_are_refused(two_nodes: Any, recipe: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(executor, "versions", lambda: ("9.9",))
    code, _, err = run("run", recipe, "--output", recipe.parent / "out", "--executor", "ray")
    assert code == 4
    assert "expected 9.9 as on the driver" in err
    assert not (recipe.parent / "out.part").exists()


def test_a_name_or_address_that_leads_nowhere(recipe: Path) -> None:
    out = recipe.parent / "out"
    code, _, err = run("run", recipe, "--output", out, "--executor", "dask")
    assert code == 2
    assert "expected local, ray" in err
    code, _, err = run("run", recipe, "--output", out, "--ray-address", "auto")
    assert code == 2
    assert "only with --executor ray" in err
    assert not out.exists()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:9", *(pytest.param(one, marks=pytest.mark.slow) for one in ("ray://127.0.0.1:9", "auto"))]
)
def test_a_cluster_that_cannot_be_reached(recipe: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    out = recipe.parent / "out"
    if address == "auto":
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    child = spawn("run", recipe, "--output", out, "--executor", "ray", "--ray-address", address)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 4, err
    assert "cannot be reached" in err
    assert "Traceback" not in err
    assert not out.exists()
