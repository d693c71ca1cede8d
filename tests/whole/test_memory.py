"""A run's own memory stays within what its plan projects: measured in a child process, on a model of 0.3 billion.

"Own" is anonymous memory (RssAnon of /proc/self/status) above the idle footprint after torch and the package
are imported. SAFEMERGE_BENCH_DATA names a folder that keeps the model between sessions.

Guards `gate.memory`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc"),
]

CHILD = """
import json, sys, threading, time
import numpy, torch
import safemerge_recipes.pipeline.writing, safemerge_recipes.pipeline.preparing
import safemerge_recipes.gate.measurer, safemerge_recipes.methods.threshold
import safemerge_recipes.cli.app as cli
import xxhash, rich.progress

torch.set_num_threads(1)
(torch.ones(64, 64) @ torch.ones(64, 64)).sort()

def own():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

idle, peak, done = own(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, own())
thread = threading.Thread(target=watch)
thread.start()
try:
    cli.main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
done.set()
thread.join()
print(json.dumps({"code": code or 0, "own": peak - idle}))
"""


def _family(size: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from benchmarks.timing.families import make_family

    kept = os.environ.get("SAFEMERGE_BENCH_DATA")
    folder = Path(kept) if kept else tmp_path_factory.mktemp(size)
    yield make_family(size, folder)
    if not kept:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from _family("llama-0.3b", tmp_path_factory)


@pytest.fixture(scope="module")
def wide_block(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One block of a 70 B model: 1.7 GB a role, 470 MB its largest matrix."""
    yield from _family("block-70b", tmp_path_factory)


def _run(path: Path, output: Path, *options: str) -> tuple[int, dict[str, Any]]:
    arguments = ["run", str(path), "--output", str(output), *options]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["code"] == 0, done.stderr
    plan = json.loads((output / "safemerge_plan.json").read_text())
    shutil.rmtree(output)
    return result["own"], plan


CASES: dict[str, dict[str, Any]] = {
    "linear": {"merge": {"method": "linear"}, "gate": {"always": True}},
    "slerp": {"merge": {"method": "slerp"}, "gate": {"always": True}},
    "ties": {"merge": {"method": "ties"}, "gate": {"always": True}},
    "dare_ties": {"merge": {"method": "dare_ties"}, "gate": {"always": True}},
    "gate": {"merge": {"method": "linear"}, "gate": {"tau": 0.5}},
    "exact gate": {"merge": {"method": "linear"}, "gate": {"tau": 0.5, "precision": "exact", "scope": "*layers.3.*"}},
    "project": {"merge": {"method": "project"}, "gate": {"always": True, "scope": "*.k_proj.*"}},
    "adapters": {"merge": {"method": "linear"}, "gate": {"tau": 0.5}},
    "adapters ties": {"merge": {"method": "ties"}, "gate": {"tau": 0.5}},
}


@pytest.mark.parametrize(("workers", "limit"), [(1, "150MB"), (2, "500MB"), (4, "1GB")])
@pytest.mark.parametrize("case", CASES)
def test_measured_memory_is_within_the_projected(
    large: Path, recipe: Callable[..., Path], tmp_path: Path, case: str, workers: int, limit: str
) -> None:
    own = _within(large, recipe, tmp_path / "out", case, workers, limit)
    assert own > 1e6


WIDE = {
    "project down": {"merge": {"method": "project"}, "gate": {"always": True, "scope": "*.down_proj.*"}},
    "svd_k": {"merge": {"method": "svd_k", "rank": 8}, "gate": {"always": True, "scope": "*.[kq]_proj.*"}},
}
"""Of full-rank updates; what takes most of the products is tried alone."""


@pytest.mark.parametrize("case", sorted({*CASES, *WIDE} - {"exact gate"}))
def test_matrices_larger_than_the_limit(
    wide_block: Path, recipe: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    _within(wide_block, recipe, tmp_path / "out", case, 2, "256MB")


def _within(family: Path, recipe: Callable[..., Path], output: Path, case: str, workers: int, limit: str) -> int:
    """Runs a case and returns its own memory in bytes, which must be within the projected and the allowed."""
    from safemerge_recipes.recipe.model import parse_size

    content = dict({**CASES, **WIDE}[case])
    roles = ["aligned", "finetuned", "safety"]
    if "always" not in content["gate"] or content["merge"]["method"] in ("project", "svd_k"):
        roles = ["base", *roles]
    sources: dict[str, Any] = {role: family / role for role in roles}
    if "adapters" in case:
        sources |= {role: {"adapter": str(family / f"{role}-adapter")} for role in ("finetuned", "safety")}
    path = recipe(sources=sources, **content)
    own, plan = _run(path, output, "--workers", str(workers), "--max-memory", limit)
    projected, allowed = plan["summary"]["peak_memory"], parse_size(limit)
    seen = f"own {own / 1e6:.0f} MB, projected {projected / 1e6:.0f}, allowed {limit}"
    print(f"{family.name}, {case}, {workers} workers: {seen}")
    assert isinstance(allowed, int)
    assert plan["summary"]["merged"] > 0
    assert own <= projected <= allowed
    return own
