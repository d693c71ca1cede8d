"""What pip gets: one wheel for every Python 3 that holds all a run needs, also where nothing can be compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from scikit_build_core import build; print(build.build_wheel(sys.argv[1]))"
pytest.importorskip("scikit_build_core")


def build(folder: Path, **environment: str) -> tuple[Path, set[str]]:
    """A wheel of the sources and the names of its files."""
    command = [sys.executable, "-c", BUILD, str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel, set(ZipFile(wheel).namelist())


def sources() -> set[str]:
    """The package's files that git knows."""
    listed = subprocess.run(["git", "ls-files", "safemerge_recipes"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def test_one_wheel_fits_every_python_and_holds_the_whole_package(tmp_path: Path) -> None:
    wheel, names = build(tmp_path)
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert sources() <= names
    recipes = {path.name for path in (ROOT / "recipes" / "defenses").glob("*.yaml")}
    assert {f"safemerge_recipes/recipes/defenses/{name}" for name in recipes} <= names
    assert "safemerge_recipes/recipe/safemerge-recipe.schema.json" in names
    assert not {name for name in names if name.split("/")[0] not in ("safemerge_recipes", wheel_info(names))}
    assert {name for name in names if name.endswith(".so")} >= {"safemerge_recipes/weights/_merge.so"}


def wheel_info(names: set[str]) -> str:
    """The folder of the wheel's metadata."""
    return next(name for name in names if name.endswith("/METADATA")).split("/")[0]


def test_without_a_compiler_it_is_installed_all_the_same_and_says_so(tmp_path: Path) -> None:
    no_tools = tmp_path / "bin"
    no_tools.mkdir()
    for name in ("cc", "gcc", "clang"):
        (no_tools / name).write_text("#!/bin/sh\nexit 1\n")
        (no_tools / name).chmod(0o755)
    path = f"{no_tools}{os.pathsep}{os.environ['PATH']}"
    wheel, names = build(tmp_path, PATH=path, CC=str(no_tools / "cc"))
    assert not {name for name in names if name.endswith(".so")}
    ZipFile(wheel).extractall(tmp_path / "installed")
    code = "from safemerge_recipes.cli.app import main; main(sys.argv[1:])"
    paths = [str(tmp_path / "installed"), *sys.path]  # -S: no hook of an editable installation goes first
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    for words, told in (
        (["--version"], "kernels not compiled"),
        (["recipes", "show", "resta"], "method: add_safety_vector"),
        (["validate", "safemerge:defenses/resta"], "a sound recipe"),
    ):
        command = [sys.executable, "-S", "-c", f"import sys; {code}", *words]
        said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert told in said.stdout, said.stderr
