"""A Ray cluster that loses a node, a worker or its driver in the middle of a run: the same bytes, later.

Apart from `test_ray`, whose cluster this process stays connected to. Guards `engine.executors.ray_cluster`.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from pathlib import Path

import pytest

import safemerge_recipes as sm
from safemerge_recipes.events import Event, FileSealed, PhaseStarted, TensorDone
from tests.fixtures import s3_server as s3
from tests.fixtures import sharded_family
from tests.fixtures.program import digests, finish, run, spawn
from tests.fixtures.ray_cluster import cluster
from tests.fixtures.sharded_family import make_family, write_recipe

psutil = pytest.importorskip("psutil")  # Ray brings it
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
    """What a local run makes of it."""
    if (recipe.parent / "expected").exists():
        return digests(recipe.parent / "expected")
    assert run("run", recipe, "--output", recipe.parent / "expected")[0] == 0
    found: dict[str, str] = digests(recipe.parent / "expected")
    assert len(list((recipe.parent / "expected").glob("*.safetensors"))) >= 10
    return found


@pytest.mark.slow
@pytest.mark.parametrize("what", ["node", "worker"])
def test_a_lost_node_or_worker_costs_time_and_no_byte(large: Path, what: str) -> None:
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


def _slowed(process: psutil.Process, over: threading.Event) -> None:
    """Lets the workers below a node's process run a tenth of the time."""
    while not over.is_set():
        workers = [one for one in process.children(recursive=True) if one.cmdline()[:1] == ["ray::write"]]
        for stop in (True, False):
            for one in workers:
                with contextlib.suppress(psutil.Error):
                    one.suspend() if stop else one.resume()
            over.wait(0.45 if stop else 0.05)


@pytest.mark.slow
def test_a_slow_node_costs_time_and_no_byte(large: Path) -> None:
    expected, over, written = _expected(large), threading.Event(), []
    with cluster(nodes=2) as made:
        slow = next(iter(made.worker_nodes))
        raylet = psutil.Process(slow.all_processes["raylet"][0].process.pid)
        hinder = threading.Thread(target=_slowed, args=(raylet, over))

        def look(event: Event) -> None:
            if isinstance(event, PhaseStarted) and event.name == "write":
                hinder.start()
            if isinstance(event, FileSealed):
                written.append(event.name)

        try:
            result = sm.run(large, large.parent / "out", executor="ray", on_event=look)
        finally:
            over.set()
            hinder.join()
    assert digests(result.output) == expected
    assert len(written) == len(set(written)) >= 10  # each once: none was given up and made again


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


@pytest.mark.slow
def test_into_a_bucket_with_a_node_killed_in_between(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `safemerge-run recipe.yaml --executor ray --output s3://bucket/out` promises."""
    pytest.importorskip("s3fs")
    expected, struck = _expected(large), []
    out = f"s3://{s3.BUCKET}/out"
    with s3.server(monkeypatch), cluster(nodes=2, connect=False) as made:
        child = spawn("run", large, "--output", out, "--executor", "ray", "--ray-address", made.address, "--json")
        while not [name for name in s3.names("out") if "receipts" in name]:
            assert child.poll() is None, child.communicate()[1]
            time.sleep(0.05)
        assert len([name for name in s3.names("out") if "receipts" in name]) < 10  # much is left to do
        struck.append(next(iter(made.worker_nodes)))
        made.remove_node(struck[0], allow_graceful=False)
        printed, err = child.communicate(timeout=300)
        assert child.returncode == 0, err
        assert len(printed.splitlines()) == 1, printed  # what Ray tells does not get between
        assert json.loads(printed)["output"] == out
        assert digests(s3.download("out", large.parent / "copy")) == expected
    assert struck


@pytest.mark.slow
def test_a_driver_that_is_interrupted_says_how_to_go_on(large: Path) -> None:
    out = large.parent / "out"
    with cluster(nodes=2, connect=False) as made:
        asked = ("run", large, "--output", out, "--executor", "ray", "--ray-address", made.address)
        child = spawn(*asked)
        journal = Path(f"{out}.part") / "safemerge_journal.jsonl"
        while not (journal.exists() and len(journal.read_bytes().splitlines()) > 2):
            assert child.poll() is None, child.communicate()[1]
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=120)
        assert child.returncode == 5, err
        assert "the same command goes on from there" in err
        assert len(err.strip().splitlines()) == 1
        code, printed, err = finish(spawn(*asked, "--json"), 300)
        assert code == 0, err
        assert json.loads(printed)["resumed"] > 0
    assert digests(out) == _expected(large)


@pytest.mark.slow
def test_inside_a_job_of_the_cluster(large: Path) -> None:
    """A job has the cluster in its environment, and needs no address; `auto` means the same."""
    with cluster(nodes=2, connect=False) as made:
        for number, more in enumerate(((), ("--ray-address", "auto"))):
            out = large.parent / f"out{number}"
            child = spawn("run", large, "--output", out, "--executor", "ray", *more, env={"RAY_ADDRESS": made.address})
            code, _, err = finish(child, 300)
            assert code == 0, err
            assert digests(out) == _expected(large)
