"""Sources and recipes on the hub, asked of a real server by the real client: what is fetched, and every refusal.

Guards `sources.hub`, `sources.refusals`, `sources.locate`, `sharing.places` and `api.opening`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.fixtures.hub_server import TOKEN
from tests.fixtures.hub_world import ALWAYS, RHO, SOURCES, weights
from tests.fixtures.plain_family import recipe_text

WEIGHTS = r"GET /(lfs/|.*resolve/.*safetensors)"


class TestFetching:
    @pytest.mark.slow
    def test_the_same_as_from_folders_at_one_commit_and_nothing_twice(self, world):
        code, _, err = world("run", world.recipe(), "--output", world.home / "out")
        assert code == 0, err
        local = SOURCES.replace("ann/", f"{world.folder}/")
        assert world("run", world.recipe(sources=local), "--output", world.home / "local")[0] == 0
        assert weights(world.home / "out") == weights(world.home / "local")
        stored = yaml.safe_load((world.home / "out" / "safemerge_recipe.yaml").read_text())
        for role in ("base", "aligned"):
            commit = world.hub.repositories[f"ann/{role}"].refs["main"]
            assert stored["sources"][role] == f"ann/{role}@{commit}"
            assert len(world.hub.asked(f"GET /api/models/ann/{role}/revision/main$")) == 1
        whole = [one for one in world.hub.asked("GET /lfs/") if not one[2]]
        assert len(whole) == 4
        assert {one[3] for one in world.hub.asked("GET /lfs/")} == {"localhost"}
        world.hub.forget()
        assert world("run", world.home / "recipe.yaml", "--output", world.home / "out", "--force")[0] == 0
        assert not world.hub.asked(WEIGHTS)

    @pytest.mark.slow
    def test_only_the_files_that_are_needed(self, world):
        files = {p.name: p.read_bytes() for p in (world.folder / "aligned").iterdir()}
        extra = {
            "pytorch_model.bin": b"pickle", "model.gguf": b"gguf", "onnx/model.onnx": b"o", "runs/events.txt": b"e",
            "consolidated.safetensors": files["model.safetensors"], "original/model.safetensors": b"x",
            "additional_chat_templates/tool.jinja": b"{{ x }}", "training_args.bin": b"p", "logo.png": b"p",
        }  # fmt: skip
        world.hub.add("ann/aligned", {**files, **extra})
        code, _, err = world("run", world.recipe(), "--output", world.home / "out")
        assert code == 0, err
        fetched = {one[1].partition("/resolve/")[2].partition("/")[2] for one in world.hub.asked("HEAD /ann/aligned/")}
        assert fetched == {*files, "additional_chat_templates/tool.jinja"}
        assert (world.home / "out" / "additional_chat_templates" / "tool.jinja").is_file()

    @pytest.mark.slow
    def test_shards_are_those_of_the_index(self, world):
        from safetensors.torch import load_file, save_file

        tensors = load_file(world.folder / "base" / "model.safetensors")
        names = sorted(tensors)
        shards = world.home / "sharded"
        shutil.copytree(world.folder / "base", shards)
        (shards / "model.safetensors").unlink()
        parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
        for file, own in parts.items():
            save_file({name: tensors[name] for name in own}, shards / file)
        save_file({}, shards / "model-extra.safetensors")
        placed = {name: file for file, own in parts.items() for name in own}
        (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
        world.hub.add("ann/base", shards)
        code, _, err = world("run", world.recipe(), "--output", world.home / "out")
        assert code == 0, err
        assert len(world.hub.asked("HEAD .*resolve/.*/model-0000.-of-00002.safetensors")) == 2
        assert not world.hub.asked("model-extra")
        placed[names[0]] = "model-00003-of-00003.safetensors"
        (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
        world.hub.add("ann/base", shards)
        code, _, err = world("plan", world.recipe())
        assert (code, "which the hub does not have" in err) == (3, True)

    @pytest.mark.slow
    def test_an_adapter_in_shards(self, world):
        from safetensors.torch import load_file, save_file

        shards = world.home / "sharded"
        shutil.copytree(world.folder / "safety-adapter", shards)
        tensors = load_file(shards / "adapter_model.safetensors")
        (shards / "adapter_model.safetensors").unlink()
        placed = {name: f"adapter_model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(sorted(tensors))}
        for file in set(placed.values()):
            save_file({name: tensors[name] for name in placed if placed[name] == file}, shards / file)
        (shards / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
        assert world("run", world.recipe(), "--output", world.home / "whole")[0] == 0
        world.hub.add("ann/shards", shards)
        own = SOURCES.replace("ann/safety-adapter", "ann/shards")
        code, _, err = world("run", world.recipe(sources=own), "--output", world.home / "out")
        assert code == 0, err
        assert weights(world.home / "out") == weights(world.home / "whole")

    @pytest.mark.slow
    def test_two_roles_of_one_branch_have_one_commit(self, world):
        same = SOURCES.replace("finetuned: {adapter: ann/finetuned-adapter}", "finetuned: ann/aligned")
        world("plan", world.recipe(ALWAYS, same))
        assert len(world.hub.asked("GET /api/models/ann/aligned/revision/main$")) == 1

    @pytest.mark.slow
    def test_offline_the_cache_answers_and_nobody_is_asked(self, world):
        recipe = world.recipe()
        assert world("run", recipe, "--output", world.home / "out")[0] == 0
        world.hub.forget()
        code, _, err = world("run", recipe, "--output", world.home / "again", offline=True)
        assert code == 0, err
        assert not world.hub.requests
        assert weights(world.home / "again") == weights(world.home / "out")
        shutil.rmtree(world.home / "hf")
        code, _, err = world("plan", recipe, offline=True)
        assert (code, "HF_HUB_OFFLINE forbids to ask" in err) == (3, True)

    @pytest.mark.slow
    def test_with_the_hub_down_the_cache_answers(self, world):
        recipe = world.recipe()
        assert world("run", recipe, "--output", world.home / "out")[0] == 0
        world.hub.fail(".", 503)
        code, _, err = world("run", recipe, "--output", world.home / "again")
        assert code == 0, err
        assert weights(world.home / "again") == weights(world.home / "out")

    def test_a_token_opens_what_is_private_and_is_told_to_nobody_else(self, world):
        world.hub.repositories["ann/base"].private = True
        recipe = world.recipe()
        code, out, err = world("run", recipe, "--output", world.home / "out", token=TOKEN)
        assert code == 0, err
        assert "with a token" in world.hub.asked("HEAD /ann/base/")[0][3]
        assert {one[3] for one in world.hub.asked("GET /lfs/")} == {"localhost"}
        assert TOKEN not in out + err
        assert not [p for p in (world.home / "out").iterdir() if TOKEN.encode() in p.read_bytes()]


class TestPlanningFromHeaders:
    @pytest.mark.slow
    def test_without_a_measured_gate_no_weights_are_fetched(self, world):
        big = {p.name: p.read_bytes() for p in (world.folder / "base").iterdir()}
        world.hub.add("ann/base", big)
        code, out, err = world("plan", world.recipe(ALWAYS), "--json")
        assert code == 0, err
        plan = json.loads(out)
        assert plan["summary"]["merged"] == 14
        assert plan["summary"]["bytes_to_fetch"] == 2 * len(big["model.safetensors"])
        assert {line["rho"] for line in plan["tensors"]} == {None}
        asked = world.hub.asked(r"GET /ann/(base|aligned)/resolve/.*/model.safetensors")
        assert [one[2] for one in asked] == ["bytes=0-131071"] * 2
        assert "sources.base: ann/base at" in err
        assert "A run fetches 91.1 kB of weights from the hub." in err
        world.hub.forget()
        assert world("plan", world.recipe("{names: ['*.q_proj.*']}"))[0] == 0
        assert not world.hub.asked(WEIGHTS)
        assert not list((world.home / "hf").rglob("*/model.safetensors"))

    @pytest.mark.slow
    def test_a_header_longer_than_the_first_part_is_asked_for_in_two(self, world, tmp_path):
        from safetensors.torch import load_file, save_file

        tensors = load_file(world.folder / "base" / "model.safetensors")
        more = {"base": "x" * 300_000}
        (tmp_path / "long").mkdir()
        save_file(tensors, tmp_path / "long" / "model.safetensors", metadata=more)
        (tmp_path / "long" / "config.json").write_bytes((world.folder / "base" / "config.json").read_bytes())
        world.hub.add("ann/base", tmp_path / "long")
        code, _, err = world("plan", world.recipe(ALWAYS))
        assert code == 0, err
        ranges = [one[2] for one in world.hub.asked("GET /ann/base/resolve/.*/model.safetensors")]
        assert ranges[0] == "bytes=0-131071"
        assert ranges[1].startswith("bytes=131072-30")

    def test_a_gate_of_adapters_is_measured_without_the_models(self, world):
        """Base and fine-tuned are adapters on the aligned model: V and Δf are products of their factors alone."""
        own = (
            "{base: {adapter: ann/safety-adapter, on: aligned}, aligned: ann/aligned, "
            "finetuned: {adapter: ann/finetuned-adapter}, safety: {adapter: ann/safety-adapter}}"
        )
        code, out, err = world("plan", world.recipe(RHO, own), "--json")
        assert code == 0, err
        plan = json.loads(out)
        assert all(line["rho"] is not None for line in plan["tensors"] if line["metric"])
        assert plan["summary"]["bytes_to_fetch"] == (world.folder / "aligned" / "model.safetensors").stat().st_size
        assert [one[2] for one in world.hub.asked("GET /ann/aligned/resolve/.*/model.safetensors")] != [""]

    def test_an_imported_mergekit_file_takes_names_from_headers(self, world):
        (world.home / "merge.yml").write_text(
            "models: [{model: ann/aligned}, {model: ann/base}]\nmerge_method: slerp\nbase_model: ann/aligned\n"
            "parameters: {t: [{filter: mlp, value: [0, 1]}, {value: 0.5}]}\n"
        )
        code, told, err = world("import", world.home / "merge.yml")
        assert code == 0, err
        assert "- tensors:" in told
        assert [one[2] for one in world.hub.asked("GET /lfs/")] == ["bytes=0-131071"]
        world.hub.forget()
        assert world("import", world.home / "merge.yml")[1] == told
        assert not world.hub.asked(WEIGHTS)

    def test_a_measured_gate_fetches_what_it_reads_and_no_more(self, world):
        world.hub.add("ann/safe", world.folder / "safety")
        own = SOURCES.replace("safety: {adapter: ann/safety-adapter}", "safety: ann/safe")
        code, out, err = world("plan", world.recipe(RHO, own), "--json")
        assert code == 0, err
        assert (
            json.loads(out)["summary"]["bytes_to_fetch"] == (world.folder / "safety/model.safetensors").stat().st_size
        )
        assert not world.hub.asked("HEAD /ann/safe/resolve/.*/model.safetensors")
        assert len(world.hub.asked("HEAD /ann/base/resolve/.*/model.safetensors")) == 1

    def test_what_does_not_fit_is_told_before_anything_is_fetched(self, world):
        config = json.loads((world.folder / "base" / "config.json").read_text())
        files = {p.name: p.read_bytes() for p in (world.folder / "base").iterdir()}
        world.hub.add("ann/base", {**files, "config.json": json.dumps(config | {"model_type": "qwen2"}).encode()})
        code, _, err = world("run", world.recipe(), "--output", world.home / "out")
        assert (code, "expected models of one architecture" in err) == (3, True)
        assert all(one[2] for one in world.hub.asked("GET /ann/(base|aligned)/resolve/.*/model.safetensors"))

    @pytest.mark.slow
    def test_a_plan_from_headers_is_carried_out(self, world):
        """From Python: what was planned from headers is fetched, measured and planned again when it is run."""
        code = (
            "import safemerge_recipes as sm, sys\n"
            "from safemerge_recipes.events import BytesDone, PhaseStarted\n"
            "told = []\n"
            f"plan = sm.plan({str(world.recipe(ALWAYS))!r})\n"
            "assert plan.family.away\n"
            f"result = sm.run(plan, {str(world.home / 'out')!r}, on_event=told.append)\n"
            "at = [n for n, e in enumerate(told) if isinstance(e, PhaseStarted) and e.name == 'fetch']\n"
            "assert [told[n + 1] for n in at] == [BytesDone(told[n].nbytes) for n in at]\n"
            "assert len(at) == 2\n"
            "assert not result.plan.family.away\n"
            "sys.exit(0)\n"
        )
        done = world("plugins", before=code)
        assert done[0] == 0, done[2]
        assert world("verify", world.home / "out", "--deep")[0] == 0


GATED = "gated (403): accept its terms at"
REFUSALS = [
    (401, "", "the hub knows no such repository, or it is private (401); check the id, and log in"),
    (403, "GatedRepo", GATED),
    pytest.param(403, "", "the hub does not allow it (403)", marks=pytest.mark.slow),
    pytest.param(404, "RepoNotFound", "no such repository, or it is private (404)", marks=pytest.mark.slow),
    pytest.param(404, "RevisionNotFound", "has no revision", marks=pytest.mark.slow),
    pytest.param(429, "", "the hub asks to slow down (429)", marks=pytest.mark.slow),
    (500, "", "the hub answers with an error of its own (500)"),
]


class TestRefusals:
    @pytest.mark.parametrize(("status", "error", "told"), REFUSALS)
    @pytest.mark.parametrize(
        "where",
        [
            pytest.param("api/models/{}", marks=pytest.mark.slow),
            pytest.param("{}/resolve/.*config.json", marks=pytest.mark.slow),
            "{}/resolve/.*model.safetensors",
        ],
    )
    def test_one_message_and_nothing_written(self, world, status, error, told, where):
        world.hub.fail(where.format("ann/base"), status, error=error)
        code, _, err = world("run", world.recipe(), "--output", world.home / "out")
        assert code == 3
        assert "sources.base: ann/base: " in err
        assert told in err
        assert err.count("safemerge: ") == 1
        assert "Traceback" not in err
        assert not (world.home / "out").exists()
        assert not (world.home / "out.part").exists()

    def test_a_hub_that_is_not_there(self, world):
        elsewhere = "os.environ['HF_ENDPOINT'] = 'http://127.0.0.1:9'"
        code, _, err = world("plan", world.recipe(), before=elsewhere)
        assert (code, "the hub cannot be reached (http://127.0.0.1:9)" in err) == (3, True)

    @pytest.mark.slow
    def test_a_file_that_is_cut_off_and_then_comes(self, world):
        assert world("plan", world.recipe(ALWAYS))[0] == 0  # headers
        world.hub.fail("GET /lfs/", cut=True, times=2)
        pieces = "from huggingface_hub import constants\nconstants.DOWNLOAD_CHUNK_SIZE = 1000\n"
        assert world("run", world.recipe(), "--output", world.home / "out", before=pieces)[0] == 0
        asked = [one[2] for one in world.hub.asked("GET /lfs/")]
        assert asked.count("") == 4
        rest = [int(found[1]) for one in asked if (found := re.fullmatch(r"bytes=(\d+)-", one))]
        assert len(rest) == 2  # two of them were cut off in the middle, and went on behind the last whole piece
        assert all(at >= 1000 and at % 1000 == 0 for at in rest)

    @pytest.mark.slow
    def test_a_file_that_is_always_cut_off(self, world):
        recipe = world.recipe()
        assert world("plan", world.recipe(ALWAYS))[0] == 0
        world.recipe()
        world.hub.fail("GET /lfs/", content=lambda data: b"", cut=True)
        code, _, err = world("run", recipe, "--output", world.home / "out")
        assert (code, "broke off" in err and "the same command goes on" in err) == (3, True)
        assert not (world.home / "out").exists()
        assert not list((world.home / "hf").rglob("*.incomplete"))
        world.hub.forget()
        code, _, err = world("run", recipe, "--output", world.home / "out")
        assert code == 0, err
        assert not world.hub.asked("finetuned-adapter/resolve/.*model.safetensors")

    @pytest.mark.slow
    def test_other_bytes_than_the_hub_says(self, world):
        """As long as they should be, with a bit that is another: nobody reads them, the next run fetches them anew."""
        recipe = world.recipe()
        stored = world.folder / "base" / "model.safetensors"
        named = hashlib.sha256(stored.read_bytes()).hexdigest()
        assert world("plan", world.recipe(ALWAYS))[0] == 0
        world.recipe()
        world.hub.fail(f"GET /lfs/{named}", content=lambda data: data[:-1] + bytes([data[-1] ^ 1]))
        code, _, err = world("run", recipe, "--output", world.home / "out")
        assert code == 3
        assert f"model.safetensors arrived with other bytes than the hub says (sha256 {named})" in err
        assert not (world.home / "out").exists()
        assert not list((world.home / "hf").rglob(f"blobs/{named}"))
        world.hub.forget()
        assert world("run", recipe, "--output", world.home / "out")[0] == 0

    @pytest.mark.parametrize("name", ["pytorch_model.bin", pytest.param("model-q4.gguf", marks=pytest.mark.slow)])
    def test_weights_of_another_kind(self, world, name):
        config = (world.folder / "base" / "config.json").read_bytes()
        world.hub.repositories.pop("ann/base")
        world.hub.add("ann/base", {"config.json": config, name: b"0" * 100})
        code, _, err = world("plan", world.recipe())
        assert (code, f"sources.base: ann/base: holds {name}" in err) == (3, True)


class TestRecipes:
    RECIPE = recipe_text(SOURCES, "{fraction: '${part}'}", "{alpha: 0.7}", "parameters: {part: 0.5}\n").encode()

    @pytest.mark.parametrize(
        "place",
        [
            "hf://bea/recipes/b.yaml@{commit}",
            pytest.param("hf://bea/recipes/a/base.yaml", marks=pytest.mark.slow),
            pytest.param("hf://bea/recipes@main/b.yaml", marks=pytest.mark.slow),
        ],
    )
    @pytest.mark.slow
    def test_a_recipe_is_run_from_its_address(self, world, place):
        commit = world.hub.add("bea/recipes", {"a/base.yaml": self.RECIPE, "b.yaml": b"extends: ./a/base.yaml\n"})
        code, out, err = world("run", place.format(commit=commit), "--output", world.home / "out")
        assert code == 0, err
        assert f"Recipe: bea/recipes@{commit[:12]}/" in out
        assert f"sources.base: ann/base at {world.hub.repositories['ann/base'].refs['main'][:12]}" in out
        assert world("run", world.recipe(), "--output", world.home / "local")[0] == 0
        assert weights(world.home / "out") == weights(world.home / "local")
        world.hub.forget()
        code, _, err = world("plan", place.format(commit=commit), offline=True)
        assert code == 0, err
        assert not world.hub.requests

    @pytest.mark.slow
    def test_a_folder_beside_a_recipe_is_that_of_its_repository(self, world):
        own = SOURCES.replace("ann/safety-adapter", "./safety").replace("ann/finetuned-adapter", "../tuned")
        files = {"recipes/a.yaml": recipe_text(own, RHO, "{alpha: 0.7}").encode()}
        for place, name in (("recipes/safety", "safety-adapter"), ("tuned", "finetuned-adapter")):
            files |= {f"{place}/{path.name}": path.read_bytes() for path in (world.folder / name).iterdir()}
        world.hub.add("bea/recipes", files)
        code, _, err = world("plan", "hf://bea/recipes/recipes/a.yaml")
        assert (code, "sources.finetuned" in err, "sources.safety" in err) == (2, True, False)
        more = ("--source", "finetuned=ann/finetuned-adapter")
        code, _, err = world("run", "hf://bea/recipes/recipes/a.yaml", *more, "--output", world.home / "out")
        assert code == 0, err
        stored = yaml.safe_load((world.home / "out" / "safemerge_recipe.yaml").read_text())["sources"]["safety"]
        commit = world.hub.repositories["bea/recipes"].refs["main"]
        assert stored == {"adapter": "bea/recipes", "revision": commit, "subfolder": "recipes/safety"}
        assert world("run", world.recipe(), "--output", world.home / "local")[0] == 0
        assert weights(world.home / "out") == weights(world.home / "local")

    def test_a_recipe_here_extends_one_of_the_hub(self, world):
        world.hub.add("bea/recipes", {"base.yaml": self.RECIPE})
        own = world.home / "own.yaml"
        own.write_text("extends: hf://bea/recipes/base.yaml\nparameters: {part: 0.25}\n")
        code, out, err = world("plan", own, "--json")
        assert (code, json.loads(out)["summary"]["merged"]) == (0, 4), err
        own.write_text("extends: bea/recipes\n")
        assert "has no safemerge_recipe.yaml; expected a recipe there, such as hf://" in world("validate", own)[2]

    @pytest.mark.parametrize(
        ("file", "text", "told"),
        [
            ("a.yaml", "extends: ./a.yaml\n", "leads back to itself"),
            pytest.param("a.yaml", "extends: ./b.yaml\n", "leads back to itself", marks=pytest.mark.slow),
            ("a.yaml", "extends: ../../x.yaml\n", "which lies outside it"),
            pytest.param("a.yaml", "extends: /etc/passwd\n", "which lies outside it", marks=pytest.mark.slow),
            ("a.yaml", "extends: hf://bea/none/x.yaml\n", "hf://bea/none: the hub knows no such repository"),
            ("a.yaml", "extends: ./c.yaml\n", "has no c.yaml"),
            pytest.param("a.yaml", "extends: hf:x\n", "no address on the hub", marks=pytest.mark.slow),
            pytest.param("a.yaml", "sources: [\n", "a.yaml:2", marks=pytest.mark.slow),
            pytest.param("a.yaml", "x: " + "y" * 2_000_000, "is larger than", marks=pytest.mark.slow),
            ("a.yaml", recipe_text(SOURCES.replace("ann/base", "/etc"), RHO, "{}"), "--source base=PLACE"),
            ("a.yaml", recipe_text(SOURCES, RHO, "{}", "evaluate: {tasks: [a], task_path: t}"), "may name none"),
        ],
    )
    def test_what_a_recipe_from_elsewhere_may_not_do(self, world, file, text, told):
        world.hub.add("bea/recipes", {file: text.encode(), "b.yaml": b"extends: ./a.yaml\n"})
        code, _, err = world("run", f"hf://bea/recipes/{file}", "--output", world.home / "out")
        assert code == 2
        assert told in err
        assert not (world.home / "out").exists()

    @pytest.mark.parametrize(("status", "told"), [(401, "no such repository"), (429, "slow down"), (500, "of its own")])
    def test_a_recipe_that_the_hub_does_not_give(self, world, status, told):
        world.hub.fail("bea/recipes", status)
        code, _, err = world("validate", "hf://bea/recipes/a.yaml")
        assert (code, told in err) == (2, True)

    def test_it_has_no_output_and_no_lock_of_its_own_here(self, world):
        world.hub.add("bea/recipes", {"a.yaml": recipe_text(SOURCES, RHO, "{}", "output: {path: /y/x}").encode()})
        assert "output.path: missing; expected it there, or --output DIR" in world("run", "hf://bea/recipes/a.yaml")[2]
        code, _, err = world("lock", "hf://bea/recipes/a.yaml")
        assert (code, "copy it into a file first" in err) == (2, True)


class TestLocks:
    @pytest.mark.slow
    def test_every_file_is_locked_and_the_commit_stays(self, world):
        recipe = world.recipe()
        code, out, err = world("lock", recipe)
        assert code == 0, err
        lock = yaml.safe_load(Path(out.strip()).read_text())
        aligned = lock["sources"]["aligned"]
        assert aligned["revision"] == world.hub.repositories["ann/aligned"].refs["main"]
        assert set(aligned["files"]) == {"config.json", "model.safetensors", "tokenizer.json"}
        for name, stamp in aligned["files"].items():
            content = (world.folder / "aligned" / name).read_bytes()
            assert stamp == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert world("run", recipe, "--output", world.home / "first")[0] == 0
        world.hub.add("ann/aligned", world.folder / "finetuned")  # the branch moves on
        assert world("run", recipe, "--output", world.home / "second")[0] == 0
        assert weights(world.home / "first") == weights(world.home / "second")
        shutil.rmtree(world.home / "hf")
        assert world("plan", recipe)[0] == 0  # from an empty cache at the locked commit, headers compared with the lock
        code, _, err = world("run", recipe, "--output", world.home / "third", "--update-lock")
        assert code == 0, err
        assert weights(world.home / "third") != weights(world.home / "first")

    @pytest.mark.slow
    def test_a_lock_of_other_files_is_refused_before_they_are_fetched(self, world):
        recipe = world.recipe(ALWAYS)
        path = Path(world("lock", recipe)[1].strip())
        lock = yaml.safe_load(path.read_text())
        lock["sources"]["base"]["files"]["model.safetensors"]["sha256"] = "0" * 64
        path.write_text(yaml.safe_dump(lock))
        shutil.rmtree(world.home / "hf")
        world.hub.forget()
        code, _, err = world("plan", recipe)
        assert (code, "sources.base: model.safetensors has changed: as many bytes, but others" in err) == (3, True)
        assert not world.hub.asked("HEAD /ann/base/resolve/.*/model.safetensors")
        code, _, err = world("run", recipe, "--output", world.home / "out")
        assert code == 3
        assert not (world.home / "out").exists()
        recipe.write_text(recipe.read_text().replace("ann/base", "ann/aligned"))
        code, _, err = world("plan", recipe)
        assert (code, "the lock of another recipe" in err) == (2, True)

    @pytest.mark.slow
    def test_a_recipe_on_the_hub_brings_its_lock(self, world):
        path = Path(world("lock", world.recipe())[1].strip())
        files = {"recipe.yaml": world.recipe().read_bytes(), "recipe.lock.yaml": path.read_bytes()}
        world.hub.add("bea/recipes", files)
        assert world("run", world.recipe(), "--output", world.home / "local")[0] == 0
        world.hub.add("ann/aligned", world.folder / "finetuned")
        code, _, err = world("run", "hf://bea/recipes/recipe.yaml", "--output", world.home / "out")
        assert code == 0, err
        assert weights(world.home / "out") == weights(world.home / "local")
