"""A pipe, a socket, a device, a folder, a link or a terabyte under any name that is read ends in one message, at once.

Guards `storage.files`, `sources.side_files` and `engine.folder`.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.fixtures.program import WarmProgram, run, warm
from tests.fixtures.sharded_family import MODEL_ROLES, make_adapter, make_family, tensor_shapes, write_recipe

LIMITS = """
import resource, signal
signal.alarm(20)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 512_000_000,) * 2)
"""
"""Ends the program after 20 s, and gives it 512 MB on top of what it begins with."""


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def _terabyte(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**12)


KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": _pipe,
    "socket": _socket,
    "folder": Path.mkdir,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "elsewhere": lambda path: path.symlink_to("/etc/passwd"),
    "loop": lambda path: path.symlink_to(path.name),
    "terabyte": _terabyte,
}
SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"

# name -> (file, verb, expected codes). 0 stands where a file may go unread, or is made anew.
READERS: dict[str, tuple[str, tuple[str, ...], set[int]]] = {
    f"{role} {file}": (f"{role}/{file}", ("run", "recipe.yaml"), {3})
    for role in MODEL_ROLES
    for file in ("config.json", INDEX, SHARD)
}
READERS |= {
    f"{role} tokenizer.json": (f"{role}/tokenizer.json", ("run", "recipe.yaml"), {3} if role == "finetuned" else {0, 3})
    for role in MODEL_ROLES
}
READERS |= {
    f"plan {role} {file}": (f"{role}/{file}", ("plan", "recipe.yaml"), {3})
    for role in MODEL_ROLES
    for file in ("config.json", INDEX, SHARD)
}
READERS |= {
    file: (f"finetuned/{file}", ("run", "recipe.yaml"), {3})
    for file in ("generation_config.json", "tokenizer_config.json", "notes.txt")
}
READERS |= {
    f"verify {file}": (f"done/{file}", ("verify", "done"), {6})
    for file in (
        "safemerge_manifest.json", "safemerge_plan.json", "safemerge_recipe.yaml", "safemerge_report.html",
        "config.json", "tokenizer.json", INDEX, SHARD,
    )
}  # fmt: skip
READERS |= {
    f"report {file}": (f"done/{file}", ("report", "done"), {6})
    for file in ("safemerge_manifest.json", "safemerge_plan.json", "safemerge_recipe.yaml")
}
READERS |= {
    f"report {file}": (f"done/{file}", ("report", "done"), {0, 6})
    for file in ("safemerge_scores.json", "safemerge_sweep.svg", "safemerge_probe.svg")
}
READERS |= {
    "adapter config": ("lora/adapter_config.json", ("run", "adapter.yaml"), {3}),
    "adapter weights": ("lora/adapter_model.safetensors", ("run", "adapter.yaml"), {3}),
    "mask": ("mask.safetensors", ("run", "mask.yaml"), {3}),
    "names": ("names.txt", ("run", "names.yaml"), {2, 3}),
    "recipe": ("recipe.yaml", ("run", "recipe.yaml"), {2}),
    "compared scores": ("done/safemerge_scores.json", ("compare", "done/safemerge_scores.json"), {6}),
    "journal": ("out.part/safemerge_journal.jsonl", ("run", "recipe.yaml"), {4}),
    "lock": ("out.part/safemerge.lock", ("run", "recipe.yaml"), {0, 4}),
    "weights being written": (f"out.part/{SHARD}.part", ("run", "recipe.yaml"), {4}),
}


@pytest.fixture(scope="module")
def program() -> WarmProgram:
    return warm()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family with every kind of file that is read, and a finished output of it."""
    root = tmp_path_factory.mktemp("template")
    names = "model.layers.*.mlp.*\n"
    lora = {}
    for block in range(2):
        module = f"base_model.model.model.layers.{block}.self_attn.q_proj"
        lora |= {f"{module}.lora_A.weight": torch.ones(4, 32), f"{module}.lora_B.weight": torch.ones(32, 4)}
    make_adapter(root / "lora", tensors=lora)
    save_file({n: torch.ones(s, dtype=torch.bool) for n, s in tensor_shapes().items()}, root / "mask.safetensors")
    (root / "names.txt").write_text(names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEMERGE_CACHE", str(root / "cache"))
        make_family(root)
        (root / "finetuned" / "notes.txt").write_text("notes")
        roles = {role: f"./{role}" for role in MODEL_ROLES}
        for recipe, parts in {
            "adapter.yaml": {"sources": roles | {"finetuned": "./lora"}},
            "mask.yaml": {"merge": {"method": "mask", "mask": {"path": "mask.safetensors"}}},
            "names.yaml": {"gate": {"names_file": "names.txt"}},
        }.items():
            write_recipe(root, **parts).rename(root / recipe)  # type: ignore[arg-type]
        recipe_path = write_recipe(root)
        code, _, err = run("run", recipe_path, "--output", root / "done")
        assert code == 0, err
    return root


def tried(program: WarmProgram, root: Path, verb: tuple[str, ...]) -> tuple[int, str]:
    """(exit code, message) of a verb whose paths are those below the root."""
    begun = time.perf_counter()
    code, _, err = program(verb[0], *(root / name for name in verb[1:]), before=LIMITS)
    assert time.perf_counter() - begun < 20
    return code, err


def _tries() -> list[Any]:
    """(reader, kinds): a pipe and an endless device by turns every day; all kinds in every place are slow."""
    some = [(reader, (("pipe", "endless")[number % 2],)) for number, reader in enumerate(READERS)]
    every = [pytest.param(reader, tuple(KINDS), marks=pytest.mark.slow) for reader in READERS]
    return [*some, *every]


@pytest.mark.parametrize(("reader", "kinds"), _tries())
def test_what_is_no_ordinary_file_ends_in_one_message(
    program: WarmProgram,
    template: Path,
    tmp_path: Path,
    reader: str,
    kinds: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, verb, codes = READERS[reader]
    wrong = []
    for kind in kinds:
        root = shutil.copytree(template, tmp_path / kind, copy_function=os.link)
        monkeypatch.setenv("SAFEMERGE_CACHE", str(root / "cache"))
        path = root / file
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        KINDS[kind](path)
        code, err = tried(program, root, verb)
        messages = sum(line.startswith("safemerge: ") for line in err.splitlines())
        sound = code in codes and (
            code == 0 or (messages == 1 and (path.name.removesuffix(".part") in err or path.parent.name in err))
        )
        if not sound or "Traceback" in err or "a bug" in err:
            wrong.append((kind, code, err[-600:]))
        if codes == {3}:
            assert not (root / "out").exists()
            assert not (root / "out.part").exists()
    assert not wrong, wrong


def test_as_many_as_promised() -> None:
    assert len(READERS) * len(KINDS) >= 300


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_entries_of_the_cache_are_no_entries(
    program: WarmProgram, template: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(template, tmp_path / "family")
    monkeypatch.setenv("SAFEMERGE_CACHE", str(root / "cache"))
    entries = list((root / "cache").rglob("*.json"))
    assert entries
    for path in entries:
        path.unlink()
        KINDS[kind](path)
    code, err = tried(program, root, ("run", "recipe.yaml"))
    assert code == 0, err


HOOK = """
import os, sys
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path, _, flags = arguments
        path = os.path.abspath(os.fsdecode(path))
        safe = os.O_NONBLOCK | os.O_EXCL | os.O_DIRECTORY
        if path.startswith(os.environ["SAFEMERGE_CACHE"].removesuffix("cache")) and not flags & safe:
            os.write(2, f"OPENED {path} {flags:o}\\n".encode())
sys.addaudithook(watch)
"""


@pytest.mark.parametrize(
    "verb",
    [
        ("run", "recipe.yaml"),
        ("run", "adapter.yaml"),
        ("run", "mask.yaml"),
        ("run", "names.yaml"),
        ("plan", "recipe.yaml"),
        ("validate", "recipe.yaml"),
        ("verify", "done"),
        ("verify", "done", "--deep"),
        ("report", "done"),
    ],
    ids=" ".join,
)
def test_every_open_of_a_whole_command_goes_the_one_way(
    program: WarmProgram, template: Path, tmp_path: Path, verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(template, tmp_path / "family")
    monkeypatch.setenv("SAFEMERGE_CACHE", str(root / "cache"))
    arguments = [name if name.startswith("--") else str(root / name) for name in verb[1:]]
    code, _, err = program(verb[0], *arguments, before=HOOK)
    assert "OPENED" not in err
    assert code == 0, err


def test_the_hook_sees_what_is_opened_otherwise(
    program: WarmProgram, template: Path, tmp_path: Path, monkeypatch
) -> None:
    root = shutil.copytree(template, tmp_path / "family")
    monkeypatch.setenv("SAFEMERGE_CACHE", str(root / "cache"))
    meddle = f"{HOOK}\nopen({json.dumps(str(root / 'names.txt'))}).close()\n"
    _, _, err = program("validate", root / "recipe.yaml", before=meddle)
    assert "OPENED" in err
