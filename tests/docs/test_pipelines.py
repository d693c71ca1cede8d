"""The job files of docs/pipelines: sound by their schema, and what they start makes the output of one run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.fixtures.program import ROOT, digests, run
from tests.fixtures.sharded_family import make_family, write_recipe

PIPELINES = ROOT / "docs" / "pipelines"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small family's, with the program on the path and one core."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path / "cache"))
    make_family(tmp_path)
    path: Path = write_recipe(tmp_path, output={"path": "out", "max_shard_size": "20KB"})
    assert run("run", path, "--output", tmp_path / "expected")[0] == 0
    return path


def _start(command: list[str], **environment: str) -> None:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_job_of_kubernetes_is_sound_and_its_pods_do_a_part_each(recipe: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    job = yaml.safe_load((PIPELINES / "kubernetes.yaml").read_text())
    validate.validate(job, "1.30", strict=True)
    pods, container = job["spec"]["completions"], job["spec"]["template"]["spec"]["containers"][0]
    text = container["args"][0].replace("/recipe/recipe.yaml", str(recipe)).replace("6GB", "1GB")
    assert f"/{pods}" in text
    out = recipe.parent / "out"
    for index in (3, 0):
        _start(
            [*container["command"], text.replace(f"/{pods}", "/2")],
            JOB_COMPLETION_INDEX=str(index % 2),
            OUTPUT=str(out),
        )
    assert run("finalize", recipe)[0] == 0
    assert digests(out) == digests(recipe.parent / "expected")


def test_the_array_of_slurm_ends_with_a_task_of_its_own(recipe: Path) -> None:
    script = str(PIPELINES / "slurm.sh")
    for task in ("1", "2", "0"):
        _start(["bash", script, str(recipe)], SLURM_ARRAY_TASK_ID=task, PARTS="2", SLURM_CPUS_PER_TASK="1")
    assert digests(recipe.parent / "out") == digests(recipe.parent / "expected")
