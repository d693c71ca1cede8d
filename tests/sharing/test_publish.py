"""Outputs on their way to the hub and back: what is sent, what never is, and the same bytes from an empty cache.

Guards `sharing.parcel`, `sharing.leaks`, `sharing.publish`, `api.publishing` and `cli.publish`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.fixtures.hub_server import TOKEN, environment
from tests.fixtures.hub_world import ALWAYS, SOURCES, weights
from tests.fixtures.program import digests, run, spawn

ADAPTER = "output: {format: adapter}\n"


KEPT: dict[tuple[Path, str], Path] = {}
"""Finished outputs by hub and recipe, which a test gets a copy of."""


def merged(world, **content) -> Path:
    """A finished output, made once for all tests that ask for the same."""
    out, key = world.home / "out", (world.folder, str(content))
    if key not in KEPT:
        code, _, err = world("run", world.recipe(**content), "--output", out)
        assert code == 0, err
        KEPT[key] = Path(shutil.copytree(out, world.folder.with_name(f"kept-{len(KEPT)}")))
    elif not out.exists():
        shutil.copytree(KEPT[key], out)
    return out


def published(world, folder: Path, *options: object) -> str:
    """What `publish --upload` prints."""
    code, out, err = world("publish", folder, "--repo", "ann/merged", "--upload", *options, token=TOKEN)
    assert code == 0, err
    return out


def fetched(world, ref: str, folder: Path) -> Path:
    """What a stranger gets of a revision."""
    for name, content in world.hub.repositories["ann/merged"].tree(ref).items():
        if name != ".gitattributes":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return folder


class TestThereAndBack:
    @pytest.mark.slow
    def test_from_its_id_on_an_empty_cache_with_the_same_bytes(self, world, tmp_path):
        out = merged(world)
        world.hub.forget()
        code, told, err = world("publish", out, "--repo", "ann/merged")
        assert code == 0, err
        assert {one[0] for one in world.hub.requests} == {"GET"}
        assert "There: ann/merged is not there yet, or not for everybody to see" in told
        assert "Nothing was sent; --upload sends it." in told
        assert "Licences: base apache-2.0, aligned apache-2.0, finetuned not stated, safety not stated" in told
        assert "The sources do not all state the same licence" in told
        sizes = {path.name: path.stat().st_size for path in out.iterdir()}
        assert all(f"  {name} " in told for name in sizes)
        before = digests(out, without=())
        assert "run it as ann/merged@main" in published(world, out, "--branch", "main")
        assert digests(out, without=()) == before

        world.home = tmp_path / "stranger"
        world.home.mkdir()
        code, told, err = world("run", "ann/merged", "--output", world.home / "again")
        assert code == 0, err
        commit = world.hub.repositories["ann/merged"].refs["main"]
        assert f"Recipe: ann/merged@{commit[:12]}/safemerge_recipe.yaml" in told
        assert digests(world.home / "again") == digests(out)
        assert world("verify", world.home / "again", "--deep")[0] == 0
        assert run("verify", fetched(world, "main", tmp_path / "copy"))[0] == 0

    @pytest.mark.slow
    def test_what_it_was_made_from_is_locked(self, world, tmp_path):
        published(world, merged(world), "--branch", "main")
        shutil.copytree(world.folder / "safety-adapter", tmp_path / "other")
        content = bytearray((tmp_path / "other" / "adapter_model.safetensors").read_bytes())
        content[-1] ^= 1
        (tmp_path / "other" / "adapter_model.safetensors").write_bytes(content)
        stand_in = f"safety={tmp_path / 'other'}"
        code, _, err = world("run", "ann/merged", "--source", stand_in, "--output", world.home / "again")
        assert code == 3
        assert "sources.safety: adapter_model.safetensors has changed" in err
        assert not (world.home / "again").exists()

    @pytest.mark.slow
    def test_a_pull_request_is_one_commit_and_nothing_is_sent_twice(self, world):
        out = merged(world)
        told = published(world, out)
        repository = world.hub.repositories["ann/merged"]
        assert list(repository.tree("main")) == [".gitattributes"]
        assert set(repository.tree("refs/pr/1")) == {".gitattributes", *(path.name for path in out.iterdir())}
        assert len(world.hub.asked("POST .*/commit/")) == 1
        assert f"{world.hub.url}/ann/merged/discussions/1 (run it as ann/merged@refs/pr/1)" in told
        world.hub.forget()
        assert "nothing was left to send" in published(world, out)
        assert len(repository.pull_requests) == 1
        assert not world.hub.asked("PUT |POST .*/commit/")
        code, _, err = world("run", "ann/merged@refs/pr/1", "--output", world.home / "again")
        assert code == 0, err
        assert weights(world.home / "again") == weights(out)

    @pytest.mark.slow
    def test_killed_in_an_upload_the_same_command_goes_on(self, world):
        """SIGKILL before the commit: nobody sees a half, and the weights that went out are not sent again."""
        out = merged(world)
        arguments = ("publish", out, "--repo", "ann/merged", "--branch", "main", "--upload")
        process = None

        def kill(content: bytes) -> bytes:
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)
            return content

        world.hub.fail("POST .*/commit/", content=kill, times=1, status=503)
        process = spawn(*arguments, env=environment(world.hub, world.home, TOKEN))
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        repository = world.hub.repositories["ann/merged"]
        assert list(repository.tree()) == [".gitattributes"]
        assert len(world.hub.asked("PUT /lfs-upload/")) == 1
        world.hub.forget()
        code, _, err = world(*arguments, token=TOKEN)
        assert code == 0, err
        assert not world.hub.asked("PUT ")
        assert set(repository.tree()) == {".gitattributes", *(path.name for path in out.iterdir())}

    @pytest.mark.slow
    def test_weights_of_an_earlier_model_are_removed(self, world):
        old = {"model-00002-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}", "notes.md": b"mine"}
        world.hub.add("ann/merged", old)
        out = merged(world)
        arguments = ("publish", out, "--repo", "ann/merged", "--branch", "main")
        gone = "model-00002-of-00002.safetensors, model.safetensors.index.json"
        assert f"compared with main of ann/merged; would be removed: {gone}\n" in world(*arguments)[1]
        told = published(world, out, "--branch", "main")
        assert f"Removed there: {gone}" in told
        tree = world.hub.repositories["ann/merged"].tree()
        assert "notes.md" in tree
        assert not {"model-00002-of-00002.safetensors", "model.safetensors.index.json"} & set(tree)


class TestWhatIsThere:
    def test_each_file_is_new_changed_or_unchanged(self, world):
        out = merged(world)
        files = {path.name: path.read_bytes() for path in out.iterdir()}
        files |= {"config.json": b"{}", "model.safetensors": files["model.safetensors"][::-1]}
        del files["README.md"]
        world.hub.add("ann/merged", files)
        code, printed, err = world("publish", out, "--repo", "ann/merged", "--json")
        assert code == 0, err
        found = json.loads(printed)
        states = {one["file"]: one["there"] for one in found["files"]}
        assert (states.pop("config.json"), states.pop("model.safetensors")) == ("changed", "changed")
        assert states.pop("README.md") == "new"
        assert set(states.values()) == {"unchanged"}
        assert found["there"] == f"{len(states)} unchanged, 2 changed, 1 new, compared with main of ann/merged"

    @pytest.mark.slow
    def test_a_branch_to_be_made_begins_as_main_and_a_hub_that_is_down_is_told(self, world):
        out = merged(world)
        world.hub.add("ann/merged", {path.name: path.read_bytes() for path in out.iterdir()})
        arguments = ("publish", out, "--repo", "ann/merged", "--branch", "next")
        assert " unchanged, 0 changed, 0 new, compared with main of ann/merged" in world(*arguments)[1]
        world.hub.fail("/tree/", 500)
        code, told, _ = world(*arguments)
        assert (code, "what is there already is not known (ann/merged: the hub answers" in told) == (0, True)
        code, told, _ = world(*arguments, offline=True)
        assert (code, "HF_HUB_OFFLINE forbids" in told) == (0, True)


@pytest.fixture
def local(world) -> str:
    """Sources of which one is a folder of this machine."""
    shutil.copytree(world.folder / "safety-adapter", world.home / "private-place" / "safety-lora")
    return SOURCES.replace("{adapter: ann/safety-adapter}", "{adapter: ./private-place/safety-lora}")


class TestWhatNeverLeaves:
    @pytest.mark.slow
    def test_a_folder_is_named_by_its_last_name_and_that_is_told(self, world, local, tmp_path):
        out = merged(world, sources=local)
        assert "private-place" in (out / "safemerge_recipe.yaml").read_text()
        told = published(world, out, "--branch", "main")
        assert "sources.safety is a folder of this machine, so others cannot run the recipe" in told
        copy = fetched(world, "main", tmp_path / "copy")
        for path in copy.iterdir():
            assert b"private-place" not in path.read_bytes(), path.name
            assert str(world.home).encode() not in path.read_bytes(), path.name
        assert run("verify", copy)[0] == 0
        code, _, err = world("run", "ann/merged", "--output", world.home / "again")
        assert (code, "say --source safety=PLACE for one that is here" in err) == (2, True)
        stand_in = f"safety={world.home / 'private-place' / 'safety-lora'}"
        code, _, err = world("run", "ann/merged", "--source", stand_in, "--output", world.home / "again")
        assert code == 0, err
        assert weights(world.home / "again") == weights(out)

    @pytest.mark.slow
    def test_what_a_folder_is_on_the_hub_is_compared_and_named(self, world, local, tmp_path):
        out = merged(world, sources=local)
        code, _, err = world("publish", out, "--repo", "ann/merged", "--source", "safety=ann/finetuned-adapter")
        assert (code, "has another adapter_model.safetensors than was merged" in err) == (3, True)
        published(world, out, "--branch", "main", "--source", "safety=ann/safety-adapter")
        commit = world.hub.repositories["ann/safety-adapter"].refs["main"]
        copy = fetched(world, "main", tmp_path / "copy")
        assert run("verify", copy)[0] == 0
        recipe = yaml.safe_load((copy / "safemerge_recipe.yaml").read_text())
        assert recipe["sources"]["safety"] == {"adapter": "ann/safety-adapter", "revision": commit}
        assert "ann/safety-adapter" in (copy / "README.md").read_text()
        code, _, err = world("run", "ann/merged", "--output", world.home / "again")
        assert code == 0, err
        assert weights(world.home / "again") == weights(out)
        assert world("verify", copy, "--deep")[0] == 0

    @pytest.mark.slow
    def test_one_of_the_others_is_named_too(self, world, tmp_path):
        (world.home / "out.yaml").write_text(
            "sources: {aligned: ann/aligned, finetuned: {adapter: ann/finetuned-adapter}, "
            f"others: {{mine: {{adapter: {world.folder / 'safety-adapter'}}}}}}}\ngate: {ALWAYS}\n"
            "merge: {method: task_arithmetic, weights: {finetuned: 0.6, mine: 0.4}}\n"
        )
        code, _, err = world("run", world.home / "out.yaml", "--output", world.home / "out")
        assert code == 0, err
        published(world, world.home / "out", "--branch", "main", "--source", "mine=ann/safety-adapter")
        copy = fetched(world, "main", tmp_path / "copy")
        commit = world.hub.repositories["ann/safety-adapter"].refs["main"]
        recipe = yaml.safe_load((copy / "safemerge_recipe.yaml").read_text())
        assert recipe["sources"]["others"]["mine"] == {"adapter": "ann/safety-adapter", "revision": commit}
        assert run("verify", copy)[0] == 0

    @pytest.mark.slow
    @pytest.mark.parametrize("text", ["nobody=ann/x", "safety=./x", "safety"])
    def test_a_stand_in_that_is_none_is_told(self, world, local, text):
        out = merged(world, sources=local)
        code, _, err = world("publish", out, "--repo", "ann/merged", "--source", text)
        assert (code, "expected ROLE=org/name[@revision]" in err) == (2, True)

    def test_an_adapter_on_a_folder_of_this_machine(self, world, tmp_path):
        here = SOURCES.replace("aligned: ann/aligned", f"aligned: {world.folder / 'aligned'}")
        out = merged(world, sources=here, rest=ADAPTER)
        assert str(world.folder) in (out / "adapter_config.json").read_text()
        code, _, err = world("publish", out, "--repo", "ann/merged")
        assert (code, "say --source aligned=org/name, what that model is on the hub" in err) == (4, True)
        published(world, out, "--branch", "main", "--source", "aligned=ann/aligned")
        copy = fetched(world, "main", tmp_path / "copy")
        config = json.loads((copy / "adapter_config.json").read_text())
        commit = world.hub.repositories["ann/aligned"].refs["main"]
        assert (config["base_model_name_or_path"], config["revision"]) == ("ann/aligned", commit)
        assert run("verify", copy)[0] == 0
        assert not [path for path in copy.iterdir() if str(world.folder).encode() in path.read_bytes()]

    @pytest.mark.slow
    def test_an_adapter_on_the_hub_goes_as_it_is(self, world, tmp_path):
        out = merged(world, rest=ADAPTER)
        published(world, out, "--branch", "main")
        copy = fetched(world, "main", tmp_path / "copy")
        assert (copy / "adapter_config.json").read_bytes() == (out / "adapter_config.json").read_bytes()
        world.home = tmp_path / "stranger"
        world.home.mkdir()
        code, _, err = world("run", "ann/merged", "--output", world.home / "again")
        assert code == 0, err
        assert digests(world.home / "again") == digests(out)

    @pytest.mark.parametrize(
        ("description", "told"),
        [
            ("made with hf_abcdefghijklmnopqrstuvwxyz", "holds an access token"),
            pytest.param("see {home}/notes", "holds a path of", marks=pytest.mark.slow),
        ],
    )
    def test_text_that_gives_something_away_stops_it(self, world, description, told):
        rest = f"description: '{description.format(home=world.home)}'\n"
        out = merged(world, gate=ALWAYS, rest=rest)
        world.hub.forget()
        code, _, err = world("publish", out, "--repo", "ann/merged", "--upload", token=TOKEN)
        assert code == 4
        assert told in err
        assert "hf_abcdef" not in err
        assert not world.hub.requests

    @pytest.mark.slow
    def test_the_path_a_config_was_loaded_from(self, world, tmp_path):
        aligned = tmp_path / "aligned"
        shutil.copytree(world.folder / "aligned", aligned)
        config = json.loads((aligned / "config.json").read_text()) | {"_name_or_path": str(aligned)}
        (aligned / "config.json").write_text(json.dumps(config, indent=2))
        out = merged(world, sources=SOURCES.replace("aligned: ann/aligned", f"aligned: {aligned}"))
        published(world, out, "--branch", "main")
        copy = fetched(world, "main", tmp_path / "copy")
        assert json.loads((copy / "config.json").read_text()) == config | {"_name_or_path": ""}
        assert run("verify", copy)[0] == 0

    @pytest.mark.slow
    def test_answers_stay_here_unless_asked_for(self, world, tmp_path):
        from safemerge_recipes.engine.manifest import replace_files

        out = merged(world)
        replace_files(out, {"safemerge_answers.jsonl": '{"answer": "no"}\n'})
        assert "safemerge_answers.jsonl is left out" in published(world, out, "--branch", "main")
        copy = fetched(world, "main", tmp_path / "copy")
        assert not (copy / "safemerge_answers.jsonl").exists()
        assert run("verify", copy)[0] == 0
        published(world, out, "--branch", "main", "--answers")
        assert "safemerge_answers.jsonl" in world.hub.repositories["ann/merged"].tree()


class TestRefusals:
    @pytest.mark.parametrize(
        ("fault", "status", "code", "told"),
        [
            ("", 0, 4, "needs a token: log in with `hf auth login` or set HF_TOKEN"),
            pytest.param("GET /api/whoami-v2", 401, 4, "401", marks=pytest.mark.slow),
            pytest.param("POST /api/repos/create", 403, 4, "use a token that may write there", marks=pytest.mark.slow),
            pytest.param("POST .*/preupload/", 403, 4, "use a token that may write there", marks=pytest.mark.slow),
            pytest.param("POST .*/lfs/objects/batch", 500, 5, "the same command goes on", marks=pytest.mark.slow),
            pytest.param("PUT /lfs-upload/", 429, 5, "the same command goes on", marks=pytest.mark.slow),
            pytest.param("POST .*/commit/", 500, 5, "the same command goes on", marks=pytest.mark.slow),
        ],
    )
    def test_one_message_and_nothing_half_sent(self, world, fault, status, code, told):
        out = merged(world)
        if fault:
            world.hub.fail(fault, status)
        arguments = ("publish", out, "--repo", "ann/merged", "--branch", "main", "--upload")
        found, _, err = world(*arguments, token=TOKEN if fault else "")
        assert found == code, err
        assert told in err
        assert err.count("safemerge: ") == 1
        tree = world.hub.repositories["ann/merged"].tree() if "ann/merged" in world.hub.repositories else {}
        assert set(tree) <= {".gitattributes"}

    @pytest.mark.slow
    def test_what_is_not_sound_or_no_output(self, world):
        out = merged(world)
        content = bytearray((out / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (out / "model.safetensors").write_bytes(content)
        code, _, err = world("publish", out, "--repo", "ann/merged", "--upload", token=TOKEN)
        assert (code, "its bytes changed" in err) == (6, True)
        assert world("publish", world.folder / "base", "--repo", "ann/merged")[0] == 6
        code, _, err = world("publish", out, "--repo", "merged")
        assert (code, "--repo merged: expected org/name" in err) == (2, True)
        assert "ann/merged" not in world.hub.repositories


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="keys are made by openssl")
def test_what_is_sent_is_signed(world, tmp_path):
    pytest.importorskip("model_signing")
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private]
    subprocess.run(make, check=True, capture_output=True)
    subprocess.run(["openssl", "ec", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    out = merged(world)
    published(world, out, "--branch", "main", "--private-key", private)
    assert not (out / "model.sig").exists()
    copy = fetched(world, "main", tmp_path / "copy")
    code, _, err = run("verify", copy, "--public-key", public)
    assert code == 0, err
    (copy / "config.json").open("a").write(" ")
    assert run("verify", copy, "--public-key", public)[0] == 6
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
