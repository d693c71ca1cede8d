"""The words of a benchmark: contestants, cases, and the place where they run. Runs nothing."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.peers.floor import weight_files

PYTHON = [sys.executable]
ENGINE = [*PYTHON, "-m", "safemerge_recipes.cli.app"]
HOLES = [*PYTHON, "-m", "benchmarks.timing.holes"]
"""The engine where sources are headers and holes."""
HELP = [*ENGINE, "--help"]
TORCH = [*PYTHON, "-c", "import torch"]
MERGEKIT = str(Path(sys.executable).with_name("mergekit-yaml"))

Check = Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Contestant:
    """One command of a case; `before` runs untimed ahead of each timed run: same cache, same output."""

    name: str
    command: list[str]
    output: Path | None = None
    before: list[str] | None = None
    warm: list[str] | None = None
    peer: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """Contestants to be run in turn, the files they read, and the comparison of what they made."""

    name: str
    title: str
    contestants: list[Contestant]
    inputs: list[Path] = field(default_factory=list)
    check: Check | None = None


@dataclass(frozen=True, slots=True)
class Bench:
    """Where everything lies and how the engine is started."""

    family: Path
    data: Path
    work: Path
    env: dict[str, str]
    root: Path
    workers: int = 2
    max_memory: str = "2GB"
    mergekit_args: tuple[str, ...] = ()
    device: str = "cpu"

    def role(self, name: str) -> Path:
        """Return the folder of a role of the family."""
        return self.family / name

    def log(self, case: str, contestant: str) -> Path:
        """Return the file that keeps a contestant's standard output."""
        return self.work / f"{case}.{re.sub('[^0-9A-Za-z]+', '-', contestant)}.log"

    def recipe(self, name: str, roles: dict[str, Any], gate: dict, merge: dict | None = None) -> Path:
        """Write a recipe and return its path. A role is given by the name of its folder."""
        path = self.work / f"{name}.yaml"
        content = {
            "name": name,
            "sources": roles,
            "gate": gate,
            "merge": merge or {"method": "linear", "alpha": 0.8},
            "output": {"path": str(self.work / name / "recipe-output")},
        }
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    def sources(self, **roles: str) -> dict[str, Any]:
        """Return the sources of a recipe; a name ending in -adapter becomes an adapter source."""

        def source(folder: str) -> Any:
            path = str(self.role(folder))
            return {"adapter": path} if folder.endswith("-adapter") else path

        return {role: source(folder) for role, folder in roles.items()}

    def ours(self, recipe: Path, output: Path | None, *more: str, max_memory: str | None = None) -> list[str]:
        """Return the command line of the engine; without an output it is a dry run."""
        where = ["--output", str(output), "--force"] if output else ["--dry-run"]
        limits = [
            "--workers",
            str(self.workers),
            "--max-memory",
            max_memory or self.max_memory,
            "--device",
            self.device,
        ]
        return [*ENGINE, "run", str(recipe), *where, *limits, "--json", *more]

    def known(self, roles: list[str], recipe: Path, output: Path) -> Contestant:
        """Return the engine where the inputs were hashed before, as in every later run and with the hub's files."""
        hashed = [*PYTHON, "-m", "benchmarks.timing.hashed", *(str(file) for file in self.files(*roles))]
        return Contestant("ours, inputs known", self.ours(recipe, output), output, before=hashed)

    def floor(self, roles: list[str], output: Path | None, like: str = "aligned", promises: bool = False) -> Contestant:
        """Return the floor for these inputs and one output of the size of a model."""
        command = [*PYTHON, "-m", "benchmarks.peers.floor", "--threads", str(self.workers)]
        command += ["--inputs", *(str(self.role(role)) for role in roles)]
        if output:
            command += ["--output", str(output / "floor.bin"), "--like", str(self.role(like))]
        if promises:
            return Contestant("floor, hashed and on disk", [*command, "--promises"], output)
        return Contestant("floor", command, output)

    def files(self, *roles: str) -> list[Path]:
        """Return the weight files of the roles."""
        return [file for role in roles for file in weight_files(self.role(role))]
