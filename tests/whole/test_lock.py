"""Locks: what a recipe read is what it reads, from folders and the hub's cache, or nothing is written.

Guards `pipeline.lock`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from safemerge_recipes.errors import SourceError
from safemerge_recipes.events import ignore
from safemerge_recipes.pipeline.opening import open_sources
from safemerge_recipes.recipe.loading import load_recipe
from tests.fixtures.plain_family import ADAPTERS, make_family, recipe_text
from tests.fixtures.program import finish, run, spawn


@pytest.fixture
def family(tmp_path):
    make_family(tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe_text(ADAPTERS, "{metric: rho, fraction: 0.5}", "{alpha: 0.7}"))
    code, out, err = run("lock", tmp_path / "recipe.yaml")
    assert code == 0, err
    assert Path(out.strip()) == tmp_path / "recipe.lock.yaml"
    return tmp_path


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_lock_names_every_file_with_its_size_and_hash(family):
    lock = yaml.safe_load((family / "recipe.lock.yaml").read_text())
    assert set(lock["sources"]) == {"base", "aligned", "finetuned", "safety"}
    files = lock["sources"]["finetuned"]["files"]
    assert set(files) == {"adapter_model.safetensors", "adapter_config.json"}
    for name, stamp in files.items():
        content = (family / "finetuned-adapter" / name).read_bytes()
        assert stamp == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert str(family) not in (family / "recipe.lock.yaml").read_text()
    assert run("run", family / "recipe.yaml", "--output", family / "out")[0] == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda root: flip(root / "safety-adapter" / "adapter_model.safetensors"), "safety: adapter_model.safetensors"),
        (lambda root: flip(root / "base" / "model.safetensors"), "base: model.safetensors has changed: as many bytes"),
        (lambda root: (root / "aligned" / "config.json").open("a").write(" "), "aligned: config.json has changed"),
    ],
)
def test_a_run_refuses_other_files_and_writes_nothing(family, change, told):
    change(family)
    for verb in (("run", "--output", family / "out"), ("plan",)):
        code, _, err = run(verb[0], family / "recipe.yaml", *verb[1:])
        assert code == 3
        assert f"sources.{told}" in err
        assert "--update-lock" in err
    assert not (family / "out").exists()
    assert not (family / "out.part").exists()
    code, _, err = run("run", family / "recipe.yaml", "--output", family / "out", "--update-lock")
    assert code == 0, err
    assert run("plan", family / "recipe.yaml")[0] == 0


def test_whoever_opens_the_sources_keeps_to_the_lock(family):
    """Sweeps, probes, controls and scoring come through here."""
    loaded = load_recipe(family / "recipe.yaml")
    assert open_sources(loaded, ignore).family.models
    flip(family / "finetuned-adapter" / "adapter_model.safetensors")
    with pytest.raises(SourceError, match=r"finetuned: adapter_model\.safetensors has changed"):
        open_sources(loaded, ignore)
    code, _, err = run("score", family / "recipe.yaml", "--by", "magnitude")
    assert (code, "finetuned: adapter_model.safetensors has changed" in err) == (3, True), err
    assert not (family / "magnitude.safetensors").exists()


def test_the_same_files_elsewhere_pass_and_others_do_not(family):
    shutil.copytree(family / "finetuned-adapter", family / "moved")
    assert run("plan", family / "recipe.yaml", "--source", f"finetuned={family / 'moved'}")[0] == 0
    code, _, err = run("plan", family / "recipe.yaml", "--source", f"finetuned={family / 'safety-adapter'}")
    assert code == 3
    assert "sources.finetuned: adapter_model.safetensors has changed" in err


def test_a_role_that_is_gone_is_told(family):
    text = (family / "recipe.yaml").read_text().replace(", safety: {adapter: safety-adapter}", "")
    (family / "recipe.yaml").write_text(text.replace("{alpha: 0.7}", "{method: add_safety_vector, gamma: 1.0}"))
    code, _, err = run("plan", family / "recipe.yaml")
    assert code == 2
    assert "the lock of another recipe" in err
    assert "sources.safety: the recipe names none" in err


@pytest.mark.parametrize("text", ["", "a: [", "format: 7\n", "format: 1\n", "format: 1\nsources: {base: 3}\n", "- 1\n"])
def test_what_is_no_lock_is_told(family, text):
    (family / "recipe.lock.yaml").write_text(text)
    code, _, err = run("plan", family / "recipe.yaml")
    assert code == 2
    assert "recipe.lock.yaml: not a lock of this program" in err
    assert len(err.strip().splitlines()) == 1


def test_what_is_no_file_is_no_missing_lock_and_somebody_elses_file_is_not_replaced(family):
    recipe, path = family / "recipe.yaml", family / "recipe.lock.yaml"
    path.unlink()
    for make in (os.mkfifo, os.mkdir, lambda at: os.symlink("/dev/zero", at), lambda at: os.symlink(path.name, at)):
        make(path)
        for verb in ("plan", "lock"):
            code, _, err = run(verb, recipe)
            assert (code, "recipe.lock.yaml: " in err) == (2, True), err
        path.rmdir() if path.is_dir() else path.unlink()
    path.write_text("thesis: precious\n")
    code, _, err = run("lock", recipe)
    assert (code, "is no lock of this program and not replaced" in err) == (2, True), err
    assert path.read_text() == "thesis: precious\n"
    path.unlink()
    assert [run("lock", recipe)[0] for _ in range(2)] == [0, 0]


def test_an_output_is_locked_already(family):
    assert run("run", family / "recipe.yaml", "--output", family / "out")[0] == 0
    flip(family / "finetuned-adapter" / "adapter_model.safetensors")
    code, _, err = run("run", family / "out", "--output", family / "again")
    assert code == 3
    assert "sources.finetuned: adapter_model.safetensors has changed" in err
    assert "copy the recipe elsewhere" in err
    assert not (family / "again").exists()


def test_a_hub_source_stays_at_its_locked_commit(family, own_cache):
    """The branch moves on in the hub's cache; the locked run still reads the first commit."""
    hub = own_cache / "hub" / "hub" / "models--org--chat"
    for number, folder in (("1", "aligned"), ("2", "finetuned")):
        shutil.copytree(family / folder, hub / "snapshots" / (number * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("1" * 40)
    recipe = family / "hub.yaml"
    recipe.write_text((family / "recipe.yaml").read_text().replace("aligned: aligned", "aligned: org/chat"))
    code, _, err = finish(spawn("lock", recipe))
    assert code == 0, err
    assert yaml.safe_load((family / "hub.lock.yaml").read_text())["sources"]["aligned"]["revision"] == "1" * 40
    (hub / "refs" / "main").write_text("2" * 40)
    code, out, err = finish(spawn("plan", recipe, "--json"))
    assert code == 0, err
    locked = json.loads(out)
    (family / "hub.lock.yaml").unlink()
    moved = json.loads(finish(spawn("plan", recipe, "--json"))[1])
    assert [t["rho"] for t in locked["tensors"]] != [t["rho"] for t in moved["tensors"]]
    assert finish(spawn("lock", recipe))[0] == 0
    recipe.write_text(recipe.read_text().replace("org/chat", "org/other"))
    code, _, err = finish(spawn("plan", recipe))
    assert (code, "the recipe names org/other, the lock org/chat" in err) == (2, True)
