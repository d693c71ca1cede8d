"""What runs in other people's pipelines: the action's scripts as bash, the pre-commit hook, the container file.

The linters are those of `make lint`; where one is not installed, its test says so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fixtures.plain_family import make_family

ROOT = Path(__file__).parents[2]
ACTION = ROOT / ".github" / "action"
SCRIPTS = sorted(ACTION.glob("*.sh"))
BIN = Path(sys.executable).parent
RECIPE = """\
sources: {base: ../base, aligned: ../aligned, finetuned: {adapter: ../finetuned-adapter}}
gate: {fraction: 0.5}
merge: {method: add_safety_vector, gamma: 0.5}
"""


def bash(script: str, folder: Path, **environment: Any) -> subprocess.CompletedProcess[str]:
    """One of the action's scripts, with the programs of this environment."""
    path = f"{folder / 'bin'}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, **{name: str(value) for name, value in environment.items()}}
    command = ["bash", str(ACTION / script)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def program(folder: Path, name: str) -> Path:
    """A stand-in for a program of GitHub's machines; returns the file that its words go to, one a line."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" >> {folder}/{name}.words\n')
    path.chmod(0o755)
    return folder / f"{name}.words"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny family, and beside it a folder of recipes."""
    make_family(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "one.yaml").write_text(RECIPE)
    return tmp_path


def test_a_pull_request_gets_the_plans(folder: Path) -> None:
    (folder / "recipes" / "two.yaml").write_text(RECIPE.replace("gamma", "gama"))
    (folder / "recipes" / "three.yaml").write_text(RECIPE.replace("../base", "../bass"))
    comment = folder / "plans.md"
    done = bash("check.sh", folder, RECIPES="recipes/*.yaml\n", COMMENT_FILE=comment, OPTIONS="--max-memory=1GB\n")
    text = comment.read_text()
    assert done.returncode == 3, done.stderr  # the worst of 0, 2 and 3
    assert "### `recipes/one.yaml` is sound\n" in text
    assert "7 of 14 gated tensors" in text
    assert "### `recipes/two.yaml` is wrong\n" in text
    assert 'unknown key; did you mean "gamma"?' in text
    assert "### `recipes/three.yaml` is sound, and has no plan here\n" in text
    assert "::error file=recipes/two.yaml::safemerge: recipes/two.yaml:3 merge.gama" in done.stdout
    words = program(folder, "gh")
    assert bash("comment.sh", folder, COMMENT_FILE=comment, PULL_REQUEST=7).returncode == 0
    assert words.read_text().split() == [
        "pr", "comment", "7", "--body-file", f"{comment}.short", "--edit-last", "--create-if-none",
    ]  # fmt: skip
    assert (folder / "plans.md.short").read_text() == text


def test_a_release_merges_and_verifies(folder: Path) -> None:
    told, summary = folder / "outputs", folder / "summary.md"
    done = bash(
        "merge.sh", folder, RECIPES="recipes/one.yaml", OUTPUT="out", GITHUB_OUTPUT=told, GITHUB_STEP_SUMMARY=summary
    )
    assert done.returncode == 0, done.stderr
    assert told.read_text() == "folders<<SAFEMERGE\nout/one\nSAFEMERGE\n"
    assert (folder / "out" / "one" / "model.safetensors").exists()
    card = (folder / "out" / "one" / "README.md").read_text()
    assert summary.read_text().strip() == card.split("---\n", 2)[2].strip()
    assert "sound" in done.stderr
    again = bash("merge.sh", folder, RECIPES="recipes/one.yaml", OUTPUT="out", GITHUB_OUTPUT=told)
    assert again.returncode == 4  # a finished output is not replaced


def test_a_pattern_that_names_nothing_is_an_error(folder: Path) -> None:
    for script in ("check.sh", "merge.sh"):
        done = bash(script, folder, RECIPES="nothing/*.yaml", COMMENT_FILE=folder / "c", OUTPUT="out")
        assert (done.returncode, "::error::nothing/*.yaml names no recipe" in done.stdout) == (2, True)


@pytest.mark.parametrize(
    ("mode", "event", "package", "wanted"),
    [("auto", "pull_request", "", "/action"), ("auto", "release", "", "/action[eval]"), ("merge", "push", "x", "x")],
)
def test_it_installs_its_own_version(mode: str, event: str, package: str, wanted: str, tmp_path: Path) -> None:
    words, version = program(tmp_path, "python"), program(tmp_path, "safemerge")
    given = {"MODE": mode, "EVENT": event, "PACKAGE": package, "GITHUB_ACTION_PATH": "/action"}
    assert bash("install.sh", tmp_path, **given).returncode == 0
    assert words.read_text().split() == ["-m", "pip", "install", "--disable-pip-version-check", wanted]
    assert version.read_text().split() == ["--version"]


def test_the_action_runs_these_scripts_and_puts_no_input_into_them() -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    steps = action["runs"]["steps"]
    run = [step["run"] for step in steps if "run" in step]
    assert {name for line in run for name in re.findall(r"action/(\w+\.sh)", line)} == {
        script.name for script in SCRIPTS
    } - {"common.sh"}
    assert not [line for line in run if "${{" in line]  # what a stranger writes stays in the environment
    asked = set(re.findall(r"inputs\.([\w-]+)", (ROOT / "action.yml").read_text()))
    assert asked == set(action["inputs"])
    for script in SCRIPTS:
        needs = set(re.findall(r"\$\{((?!GITHUB_)[A-Z_]+)\}", script.read_text()))
        given = {name for step in steps if script.name in step.get("run", "") for name in step["env"]}
        assert script.name == "common.sh" or needs <= given, script.name


def linter(name: str, *arguments: Any) -> None:
    """Runs one of the linters of `make lint`."""
    found = next((p for p in (BIN / name, shutil.which(name)) if p and Path(p).exists()), None)
    if found is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run([str(found), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_scripts_are_clean() -> None:
    assert len(SCRIPTS) == 5
    linter("shellcheck", *SCRIPTS)
    for script in SCRIPTS:
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_the_container_file_is_clean_and_copies_what_is_there() -> None:
    linter("hadolint", ROOT / "Containerfile")
    lines = (ROOT / "Containerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied
    assert all((ROOT / word).exists() for word in copied)
    allowed = [line[1:] for line in (ROOT / ".containerignore").read_text().splitlines() if line.startswith("!")]
    assert set(copied) == set(allowed)


def test_the_hook_checks_recipes(folder: Path) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    pattern = re.compile(hook["files"])
    for name in ("recipe.yaml", "out/safemerge_recipe.yaml", "recipes/defenses/resta.yml", "recipe-qwen.yaml"):
        assert pattern.search(name), name
    for name in ("mkdocs.yml", ".github/workflows/ci.yml", "notes/recipe.md"):
        assert not pattern.search(name), name
    (folder / "recipes" / "two.yaml").write_text(RECIPE.replace("gamma", "gama"))
    command, *words = hook["entry"].split()
    files = ["recipes/one.yaml", "recipes/two.yaml"]
    for given, code in ((files[:1], 0), (files, 2)):
        done = subprocess.run([str(BIN / command), *words, *given], cwd=folder, capture_output=True, text=True)
        assert done.returncode == code
        assert "recipes/one.yaml: a sound recipe" in done.stdout
    linter("pre-commit", "validate-manifest", ROOT / ".pre-commit-hooks.yaml")


# Installed for real


def emptied(folder: Path) -> Path:
    """The programs of a new environment, in which everything but this package is that of the running one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3.*/site-packages")
    paths = [path for path in sys.path if path.endswith("site-packages") and Path(path) != site]
    (site / "shared.pth").write_text("\n".join(path for path in paths if not Path(path).is_relative_to(BIN.parent)))
    if not (site / "shared.pth").read_text():
        (site / "shared.pth").write_text("\n".join(paths))
    return folder / "bin"


def expanded(text: str, known: dict[str, str]) -> str:
    """GitHub's expressions in a text, each a name or a question that is true."""
    return re.sub(r"\$\{\{\s*([\w.-]+)\s*\}\}", lambda found: known[found[1]], text)


def asked(question: str, known: dict[str, str]) -> bool:
    """Whether a step is run."""
    text = re.sub(r"\b(?:inputs|github)\.[\w.-]+", lambda found: repr(known.get(found[0], "")), question)
    text = text.replace("always()", "True").replace("&&", " and ").replace("||", " or ")
    return bool(eval(text, {"__builtins__": {}}))  # the action's own words


@pytest.mark.slow
@pytest.mark.parametrize("event", ["pull_request", "release"])
def test_the_action_as_a_runner_runs_it(folder: Path, event: str) -> None:
    """Its steps one by one, with conditions, expressions and environment; it installs itself from a clone."""
    action_path, temporary = folder / "action", folder / "temp"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", action_path], check=True)
    temporary.mkdir()
    action = yaml.safe_load((action_path / "action.yml").read_text())
    known = {f"inputs.{name}": one.get("default", "") for name, one in action["inputs"].items()}
    known |= {"inputs.recipes": "recipes/*.yaml", "inputs.token": "t", "inputs.package": str(action_path)}
    known |= {"github.event_name": event, "github.repository": "ann/models", "runner.temp": str(temporary)}
    known |= {"github.event.pull_request.number": "7"}
    words, bin_ = program(folder, "gh"), emptied(folder / "venv")
    files = {name: folder / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GITHUB_ENV")}
    path = f"{folder / 'bin'}{os.pathsep}{bin_}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, **{name: str(file) for name, file in files.items()}, "PATH": path, "CI": "true"}
    env |= {"GITHUB_ACTIONS": "true", "GITHUB_ACTION_PATH": str(action_path), "GITHUB_WORKSPACE": str(folder)}
    env |= {"PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}
    ran = []
    for number, step in enumerate(action["runs"]["steps"]):
        if "run" not in step or not asked(step.get("if", "True"), known):
            continue
        script = temporary / f"{number}.sh"
        script.write_text(step["run"])
        own = {name: expanded(value, known) for name, value in step.get("env", {}).items()}
        command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(script)]
        done = subprocess.run(command, cwd=folder, env=env | own, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{step['name']}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        ran.append(step["name"])
    assert list((folder / "venv").glob("lib/python3.*/site-packages/safemerge_recipes/__init__.py"))
    if event == "release":
        assert ran == ["Install", "Merge and evaluate"]
        assert "out/one" in files["GITHUB_OUTPUT"].read_text()
        assert (folder / "out" / "one" / "model.safetensors").exists()
    else:
        assert ran == ["Install", "Check the recipes", "Comment on the pull request"]
        assert "7" in words.read_text().split()
        assert "7 of 14 gated tensors" in (temporary / "safemerge-plans.md").read_text()
    assert files["GITHUB_STEP_SUMMARY"].read_text()


@pytest.mark.slow
def test_what_the_container_file_copies_makes_the_program(folder: Path) -> None:
    """Its COPY and last pip install in a new environment; apt, torch and useradd are left out, as is podman."""
    source, bin_ = folder / "src", emptied(folder / "venv")
    lines = (ROOT / "Containerfile").read_text().splitlines()
    for line in (line for line in lines if line.startswith("COPY ")):
        *names, target = line.split()[1:]
        place = folder / target.lstrip("/")
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, place)
    (install,) = [line for line in lines if line.startswith("RUN pip install") and "/src" in line]
    assert install == 'RUN pip install --no-cache-dir "/src${EXTRAS}" && rm -rf /src'
    env = {**os.environ, "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}
    pip = [str(bin_ / "python"), "-m", "pip", "install", "-q", "--no-cache-dir", f"{source}[eval]"]
    done = subprocess.run(pip, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    command = [str(bin_ / "safemerge"), "run", "recipes/one.yaml", "--output", "out"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    listed = subprocess.run([str(bin_ / "safemerge"), "recipes"], cwd=folder, capture_output=True, text=True)
    assert "defenses/resta" in listed.stdout
