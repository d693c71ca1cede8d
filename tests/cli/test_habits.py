"""What people expect of any program: -h, -o, --version, `-`, completion, pipes that close, streams that are closed.

Guards `cli.options`, `cli.streams`, `cli.run`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.gated_family import ROLES, Family

MAIN = [sys.executable, "-m", "safemerge_recipes"]
RUN = [sys.executable, "-c", "from safemerge_recipes.cli.app import run_main; run_main()"]


def started(command: list[str], *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False, **{"cwd": Path.cwd(), **options}
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def path(llama: Family, recipe: Any) -> Path:
    return recipe(sources={role: llama / role for role in ROLES}, gate={"tau": 0.5})


@pytest.mark.parametrize("command", [MAIN, RUN], ids=["safemerge", "safemerge-run"])
def test_both_programs_know_h_and_version(command: list[str]) -> None:
    assert started(command, "-h").stdout == started(command, "--help").stdout != ""
    told = started(command, "--version")
    assert (told.returncode, told.stdout.split(" ")[0]) == (0, "0.1.0")


def test_every_verb_knows_h(call: Any) -> None:
    from typer.main import get_command

    from safemerge_recipes.cli.app import app

    verbs = list(get_command(app).commands)  # type: ignore[attr-defined]
    assert set(verbs) >= {"run", "plan", "validate", "schema", "sweep", "probe", "evaluate", "compare", "report"}
    for verb in verbs:
        shown = call(verb, "-h")
        assert (shown.code, shown.out) == (0, call(verb, "--help").out), verb


def test_o_is_output(call: Any, path: Path, tmp_path: Path) -> None:
    assert call("run", path, "-o", tmp_path / "here").code == 0
    assert (tmp_path / "here" / "model.safetensors").exists()


def test_a_recipe_may_come_from_standard_input(path: Path, tmp_path: Path) -> None:
    done = started(MAIN, "validate", "-", input=path.read_text())
    assert done.stdout == "standard input: a sound recipe (4 sources, 0 rules)\n"
    merged = started(RUN, "-", "--json", "-o", tmp_path / "here", input=path.read_text())
    assert json.loads(merged.stdout)["summary"]["gated"] == 14
    wrong = started(MAIN, "validate", "-", input=path.read_text().replace("tau", "tua"))
    assert wrong.returncode == 2
    assert "standard input:" in wrong.stderr
    latin = subprocess.run([*MAIN, "validate", "-"], input=b"\xff", capture_output=True, check=False)
    assert (latin.returncode, latin.stderr.count(b"\n")) == (2, 1)


def test_shells_complete_verbs_and_options() -> None:
    words = {"COMP_WORDS": "safemerge va", "COMP_CWORD": "1", "_SAFEMERGE_COMPLETE": "complete_bash"}
    code = "from safemerge_recipes.cli.app import main; main()"
    done = started([sys.executable, "-c", code], env={**os.environ, **words})
    assert done.stdout.split() == ["validate"]


def test_a_reader_that_leaves_is_no_error() -> None:
    first = subprocess.Popen([*MAIN, "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert first.stdout is not None
    first.stdout.close()  # nobody reads, as after `| head`
    assert first.wait(60) == 0
    assert first.stderr is not None
    assert first.stderr.read() == ""


def closed(number: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A run whose standard stream of that number is closed from the start, as under cron."""
    shell = ["bash", "-c", f'exec "$@" {number}>&-', "bash", *MAIN, *map(str, arguments)]
    return subprocess.run(shell, capture_output=True, text=True, check=False)


def test_a_closed_stream_keeps_nothing_from_being_written(path: Path, call: Any, tmp_path: Path) -> None:
    for number in (1, 2):
        done = closed(number, "run", path, "-o", tmp_path / f"out{number}")
        assert done.returncode == 0, done.stderr
        assert call("verify", tmp_path / f"out{number}").code == 0
    done = closed(1, "run", path, "-o", tmp_path / "json", "--json")
    assert (done.returncode, done.stderr.count("\n")) == (5, 1)
    assert "standard output" in done.stderr
    assert not (tmp_path / "json").exists()


def test_without_a_home_there_is_no_cache_and_no_error(
    path: Path, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.delenv("SAFEMERGE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert call("run", path, "-o", tmp_path / "here").code == 0


def test_what_is_no_recipe_is_told_what_it_is(call: Any, llama: Family, path: Path, tmp_path: Path) -> None:
    for place, hint in (
        (llama / "aligned", "with a model, which a recipe names as in `sources: {finetuned: FOLDER}`"),
        (llama / "safety-lora", "with a PEFT adapter, which a recipe names as in"),
        (tmp_path, f"{tmp_path}: found a folder; expected a recipe file"),
    ):
        done = call("run", place)
        assert done.code == 2
        assert hint in done.err
    other = tmp_path / "merge.yaml"
    other.write_text("models: [{model: a}, {model: b}]\nmerge_method: linear\ndtype: bfloat16\n")
    done = call("run", other)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "a configuration of mergekit; expected a recipe" in done.err
