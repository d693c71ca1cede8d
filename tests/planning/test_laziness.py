"""Planning reads headers and the gate's tensors, nothing else; a kept tensor is never computed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import read_header
from tests.fixtures.gated_family import ROLES, Family

OPENED: list[Counter[str]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if OPENED and event == "open" and isinstance(arguments[0], str):
        OPENED[-1][arguments[0]] += 1


@contextmanager
def _opened() -> Iterator[Counter[str]]:
    """Counts how often this process opens each file, by whatever means."""
    if not hasattr(sys, "_safemerge_hook"):
        sys.addaudithook(_hook)  # cannot be removed again, so one is shared
        sys._safemerge_hook = True  # type: ignore[attr-defined]
    OPENED.append(Counter())
    try:
        yield OPENED[-1]
    finally:
        OPENED.pop()


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(path, first byte, last byte + 1) of everything a Reader reads or copies."""
    found: list[tuple[str, int, int]] = []
    read, copy = Reader.read_bytes, Reader.copy_bytes

    def read_bytes(self: Reader, path: str, offset: int, view: memoryview) -> None:
        found.append((path, offset, offset + len(view)))
        read(self, path, offset, view)

    def copy_bytes(self: Reader, path: str, offset: int, count: int, target: int, at: int) -> Iterator[int]:
        found.append((path, offset, offset + count))
        return copy(self, path, offset, count, target, at)

    monkeypatch.setattr(Reader, "read_bytes", read_bytes)
    monkeypatch.setattr(Reader, "copy_bytes", copy_bytes)
    return found


def _touched(found: list[tuple[str, int, int]], family: Family) -> set[tuple[str, str]]:
    """(role, tensor name) of every tensor that the ranges touch."""
    touched = set()
    for role in family.path.iterdir():
        for file in role.glob("*.safetensors"):
            for name, ref in read_header(file).items():
                if any(path == str(file) and a < ref.offset + ref.nbytes and b > ref.offset for path, a, b in found):
                    touched.add((role.name, name))
    return touched


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_planning_reads_the_gated_tensors_of_three_roles(
    families: Any, call: Callable[..., Any], recipe: Callable[..., Path], ranges: Any, name: str
) -> None:
    family = families[name]
    scope = "*.layers.1.{self_attn.q_proj,mlp.down_proj}.weight"
    path = recipe(sources={role: family / role for role in ROLES}, gate={"tau": 0.5, "scope": scope})
    with _opened() as opened:
        assert call("plan", path, "--json", "--workers", 2).code == 0
    gated = {f"model.layers.1.{module}.weight" for module in ("self_attn.q_proj", "mlp.down_proj")}
    assert _touched(ranges, family) == {(role, t) for role in ("base", "aligned", "finetuned") for t in gated}
    for file in (family / "safety").glob("*.safetensors"):
        assert opened[str(file)] == 1  # its header, with the few spots by which it is known again
    for file in (family / "base").glob("*.safetensors"):
        assert opened[str(file)] in (1, 2)  # that, and tensors where it holds any
    ranges.clear()
    assert call("plan", path, "--json", "--set", "gate.tau=0.9", "--set", "merge.method=ties").code == 0
    assert ranges == []  # measured once


def test_planning_an_adapter_reads_its_factors_and_no_model_twice(
    llama: Family, call: Callable[..., Any], recipe: Callable[..., Path], ranges: Any
) -> None:
    path = recipe(
        sources={
            "base": llama / "base",
            "aligned": llama / "aligned",
            "finetuned": {"adapter": str(llama / "finetuned-lora")},
            "safety": {"adapter": str(llama / "safety-lora")},
        },
        gate={"tau": 0.5},
    )
    assert call("plan", path, "--json").code == 0
    names = set(llama.factors("finetuned-lora"))
    touched = _touched(ranges, llama)
    assert {(role, name) for role, name in touched if "lora" not in role} == {
        (role, name) for role in ("base", "aligned") for name in names
    }
    assert {role for role, _ in touched} == {"base", "aligned", "finetuned-lora"}


def test_planning_an_adapter_does_not_wait_for_torch(llama: Family, recipe: Callable[..., Path]) -> None:
    adapters = {role: {"adapter": str(llama / f"{role}-lora")} for role in ("finetuned", "safety")}
    models = {role: llama / role for role in ("base", "aligned")}
    code = (
        "import sys\nfrom safemerge_recipes.cli.app import main\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n        main(['plan', path, '--json'])\n    except SystemExit as end:\n        assert not end.code\n"
        "    print('torch is', 'there' if 'torch' in sys.modules else 'away')"
    )
    gates = ({"tau": 0.5}, {"tau": 0.5, "precision": "exact", "granularity": "block"},
             {"metric": "residual", "at_most": 0.5})  # fmt: skip
    paths = [recipe(f"{number}.yaml", sources={**models, **adapters}, gate=gate) for number, gate in enumerate(gates)]
    command = [sys.executable, "-c", code, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *plans, rest = re.split(r"torch is (?:there|away)\n", done.stdout)
    assert re.findall(r"torch is (\w+)\n", done.stdout) == ["away", "away", "there"]
    assert rest == ""
    assert all(json.loads(plan)["summary"]["gated"] > 0 for plan in plans)


@pytest.mark.parametrize(
    "selector", [{"always": True}, {"never": True}, {"random": {"count": 3}}, {"names": ["*q_proj*"]}]
)
def test_without_a_base_planning_reads_nothing(
    llama: Family, call: Callable[..., Any], recipe: Callable[..., Path], ranges: Any, selector: dict[str, Any]
) -> None:
    sources = {role: llama / role for role in ROLES if role != "base"}
    done = call("plan", recipe(sources=sources, gate=selector), "--json")
    assert done.code == 0, done.err
    assert ranges == []
    merged = {"always": 14, "never": 0, "random": 3, "names": 2}[next(iter(selector))]
    assert done.json["summary"]["merged"] == merged
    assert all(line["rho"] is None for line in done.json["tensors"])


def test_writing_reads_each_operand_once_and_the_aligned_model_not_at_all(
    llama: Family, merge: Callable[..., Any], ranges: Any
) -> None:
    output, plan = merge(llama, gate={"names": ["*.mlp.*"]}, merge={"method": "linear"}, sources={"base": None})
    touched = _touched(ranges, llama)
    merged = {line["name"] for line in plan["tensors"] if line["action"] == "merge"}
    assert len(merged) == 6
    assert {name for role, name in touched if role == "safety"} == merged
    assert {role for role, _ in touched} == {"finetuned", "safety"}  # alpha·Wf + (1 - alpha)·Ws has no Wa
    written = read_header(output / "model.safetensors")
    expected = sum(ref.nbytes * (2 if name in merged else 1) for name, ref in written.items())
    assert plan["summary"]["bytes_read"] == expected == sum(b - a for _, a, b in ranges)
