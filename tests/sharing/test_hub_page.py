"""docs/hub.md as a user follows it: every command line of the page, word for word, against a hub on 127.0.0.1."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from tests.fixtures.hub_server import TOKEN
from tests.fixtures.hub_world import RHO, weights

PAGE = Path(__file__).parents[2] / "docs" / "hub.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.M | re.S)


def told(language: str) -> list[str]:
    """The blocks of the page in a language."""
    return [text for name, text in BLOCK.findall(PAGE.read_text()) if name == language]


@pytest.fixture
def page(world):
    """The repositories that the page names, a recipe of its sources here, and the program run as a shell would."""
    hub, family = world.hub, world.folder
    hub.add("meta-llama/Llama-2-7b-hf", family / "base")
    hub.add("meta-llama/Llama-2-7b-chat-hf", family / "aligned")
    tuned = {f"gsm8k/{path.name}": path.read_bytes() for path in (family / "finetuned-adapter").iterdir()}
    hub.add("my-org/adapters", tuned, "v2")
    hub.repositories["my-org/adapters"].refs["main"] = hub.repositories["my-org/adapters"].refs["v2"]
    hub.add("my-org/safety-lora", family / "safety-adapter")
    sources = next(block for block in told("yaml") if block.startswith("sources:"))
    recipe = f"{sources}gate: {RHO}\nmerge: {{alpha: 0.7}}\noutput: {{path: out}}\n"
    hub.add("my-org/recipes", {"llama/gsm8k.yaml": recipe.encode()})
    (world.home / "recipe.yaml").write_text(recipe)
    shutil.copytree(family / "safety-adapter", world.home / "my-safety-lora")

    def run(line: str) -> str:
        words = shlex.split(line, comments=True)
        before = f"os.chdir({str(world.home)!r})\n"
        if "|" in words:
            assert words[0] == "cat"
            before += f"os.dup2(os.open({words[1]!r}, os.O_RDONLY), 0)\nimport sys\nsys.stdin = open(0)\n"
            words = words[words.index("|") + 1 :]
        program, *rest = words
        code, out, err = world(*(["run"] if program == "safemerge-run" else []), *rest, token=TOKEN, before=before)
        assert code == 0, f"{line}: {err}"
        return out + err

    return run


@pytest.mark.slow
def test_every_line_of_the_page_runs(world, page):
    run, recipes, locks, publish, stand_in = page, *(
        [line for line in block.splitlines() if line.strip()] for block in told("sh")
        if not block.startswith("safemerge-run my-org/llama-2-7b-safe --source")
    )  # fmt: skip
    own = next(line for block in told("sh") for line in block.splitlines() if "--source safety=./" in line)
    out = world.home / "out"
    for line in locks:
        shutil.rmtree(out, ignore_errors=True)
        run(line)
    assert (world.home / "recipe.lock.yaml").exists()
    expected = weights(out)
    assert expected
    for line in (*publish, *stand_in):
        assert ("--upload" in line) != ("Nothing was sent" in run(line))
    hub = world.hub.repositories["my-org/llama-2-7b-safe"]
    assert set(hub.tree("refs/pr/1")) == set(hub.tree("main"))
    assert "unchanged, " in run(publish[0])
    hub.refs["v1"] = hub.refs["main"]
    shutil.rmtree(world.home / "hf")
    for line in (*recipes, own):
        made = world.home / re.search(r"--output (\w+)", line)[1]
        shutil.rmtree(made, ignore_errors=True)
        run(line)
        assert weights(made) == expected, line
    above = next(block for block in told("yaml") if block.startswith("extends:"))
    (world.home / "own.yaml").write_text(above)
    run("safemerge plan own.yaml")
    assert yaml.safe_load(above)["merge"] == {"alpha": 0.9}
