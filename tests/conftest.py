"""Fixtures: gated families made once a session, a recipe writer, and the command line called in process."""

from __future__ import annotations

import contextlib
import io
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.fixtures.gated_family import ROLES, Family, add_adapters, make_family, write_adapter

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a shell's background no child would hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Iterator[int]]:
    """A folder for the caches of all tests, and their numbers: pytest looks through its own for the next name."""
    return tmp_path_factory.mktemp("caches"), count()


@pytest.fixture(autouse=True)
def own_cache(caches: tuple[Path, Iterator[int]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing a test does reaches the user's caches or a hub."""
    folder = caches[0] / str(next(caches[1]))
    folder.mkdir()
    monkeypatch.setenv("SAFEMERGE_CACHE", str(folder))
    monkeypatch.setenv("HF_HOME", str(folder / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Llama in bfloat16, one file, with adapters."""
    import torch

    family = make_family(tmp_path_factory.mktemp("llama"), "llama", torch.bfloat16)
    add_adapters(family)
    return family


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Qwen2 (attention biases, tied embeddings) in float32, three shards with an index, with adapters."""
    import torch

    family = make_family(tmp_path_factory.mktemp("qwen"), "qwen2", torch.float32, shards=3)
    add_adapters(family)
    return family


@pytest.fixture
def families(llama: Family, qwen: Family) -> dict[str, Family]:
    return {"llama": llama, "qwen": qwen}


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON value."""
        return json.loads(self.out)


@pytest.fixture(scope="session")
def call() -> Callable[..., Outcome]:
    """`call(*arguments)`: the program `safemerge` in this process."""

    def run(*arguments: object) -> Outcome:
        from safemerge_recipes.cli.app import main

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        code = stopped.value.code
        assert isinstance(code, int) or code is None
        return Outcome(code or 0, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """`recipe(sources=…, gate=…, …)`: a recipe file in the test's own folder."""

    def write(name: str = "recipe.yaml", **content: Any) -> Path:
        content.setdefault("output", {"path": "out"})
        content["sources"] = {
            role: str(source) if isinstance(source, Path) else source
            for role, source in content["sources"].items()
            if source is not None
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@pytest.fixture
def merge(call: Callable[..., Outcome], recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """`merge(family, gate=…, merge=…)`: runs a recipe over full checkpoints, returns (output folder, plan)."""
    numbers = iter(range(1000))

    def run(
        family: Family, *options: str, sources: dict[str, Any] | None = None, **content: Any
    ) -> tuple[Path, dict[str, Any]]:
        output = tmp_path / f"out-{next(numbers)}"
        roles = {role: family / role for role in ROLES}
        content.setdefault("gate", {"always": True})
        path = recipe(sources={**roles, **(sources or {})}, **content)
        done = call("run", path, "--output", output, "--json", "--workers", 2, *options)
        assert done.code == 0, done.err
        return output, json.loads((output / "safemerge_plan.json").read_text())

    return run


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """One layer whose matrices take several blocks, and sides long enough for sketches."""
    sizes = {"hidden_size": 320, "intermediate_size": 900, "num_hidden_layers": 1, "num_attention_heads": 10}
    family = make_family(tmp_path_factory.mktemp("wide"), "llama", torch.bfloat16, **sizes)
    from peft import LoraConfig

    for seed, role in enumerate(("finetuned", "safety")):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["gate_proj", "down_proj", "q_proj"])
        write_adapter(family / f"{role}-lora", family / "aligned", seed, config)
    return family
