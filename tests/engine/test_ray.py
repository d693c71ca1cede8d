"""A recipe on a Ray cluster of several nodes: the same output as here, and every trouble is one message.

Guards `engine.executors`, `engine.executors.ray`, `engine.executors.ray_cluster`, `engine.executors.ray_tasks`,
`engine.whole_file` and `gate.measurer`.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import safemerge_recipes as sm
from safemerge_recipes.engine.executors import ray as executor
from safemerge_recipes.events import Event, PhaseStarted, TensorDone
from tests.fixtures import sharded_family
from tests.fixtures.program import digests, run, spawn
from tests.fixtures.ray_cluster import cluster
from tests.fixtures.sharded_family import make_family, write_recipe


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


def test_a_whole_run_gives_the_output_of_a_local_one(two_nodes: Any, recipe: Path) -> None:
    root = recipe.parent
    _fresh(root, "here")
    assert run("run", recipe, "--output", root / "here-out")[0] == 0
    _fresh(root, "there")
    code, printed, err = run("run", recipe, "--output", root / "there-out", "--executor", "ray", "--json")
    assert code == 0, err
    assert json.loads(printed)["resumed"] == 0
    assert digests(root / "there-out") == digests(root / "here-out")
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


def test_a_cluster_that_cannot_be_reached(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = recipe.parent / "out"
    child = spawn("run", recipe, "--output", out, "--executor", "ray", "--ray-address", "ray://127.0.0.1:9")
    _, err = child.communicate(timeout=120)
    assert child.returncode == 4, err
    assert "cannot be reached" in err
    assert "Traceback" not in err
    assert not out.exists()


# Losses, on a family large enough that something is under way


LARGE = {"self_attn.q_proj": (1024, 2048), "self_attn.k_proj": (512, 2048), "mlp.gate_proj": (2048, 1024),
         "mlp.up_proj": (2048, 1024), "mlp.down_proj": (1024, 2048)}  # fmt: skip


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A family whose merge takes some seconds, into ten files."""
    monkeypatch.setattr(sharded_family, "SHAPES", LARGE)
    path: Path = make_family(tmp_path)
    write_recipe(tmp_path, merge={"method": "ties", "density": 0.5}, output={"path": "out", "max_shard_size": "5MB"})
    return path


def _expected(recipe: Path) -> dict[str, str]:
    assert run("run", recipe, "--output", recipe.parent / "expected")[0] == 0
    found: dict[str, str] = digests(recipe.parent / "expected")
    assert len(list((recipe.parent / "expected").glob("*.safetensors"))) >= 10
    return found


@pytest.mark.slow
@pytest.mark.parametrize("what", ["node", "worker"])
def test_a_lost_node_or_worker_costs_time_and_no_byte(large: Path, what: str) -> None:
    import psutil

    expected, struck = _expected(large), []
    with cluster(nodes=2) as made:

        def kill_worker() -> None:
            until = time.monotonic() + 60
            while not struck and time.monotonic() < until:
                for process in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if not struck and process.cmdline()[:1] == ["ray::write"]:
                            process.kill()
                            struck.append(process)

        def strike(event: Event) -> None:
            if isinstance(event, PhaseStarted) and event.name == "write" and what == "worker":
                threading.Thread(target=kill_worker).start()
            if isinstance(event, TensorDone) and what == "node" and not struck:
                struck.append(next(iter(made.worker_nodes)))
                made.remove_node(struck[0], allow_graceful=False)

        result = sm.run(large, large.parent / "out", executor="ray", on_event=strike)
    assert struck
    assert digests(result.output) == expected


@pytest.mark.slow
def test_a_killed_driver_is_followed_by_a_local_run(large: Path) -> None:
    expected, out = _expected(large), large.parent / "out"
    with cluster(nodes=2, connect=False) as made:
        child = spawn("run", large, "--output", out, "--executor", "ray", "--ray-address", made.address)
        journal = Path(f"{out}.part") / "safemerge_journal.jsonl"
        while not (journal.exists() and len(journal.read_bytes().splitlines()) > 2):
            assert child.poll() is None, child.communicate()[1]
            time.sleep(0.01)
        child.kill()
        child.communicate()
        code, printed, err = run("run", large, "--output", out, "--json")
    assert code == 0, err
    assert json.loads(printed)["resumed"] > 0
    assert digests(out) == expected
