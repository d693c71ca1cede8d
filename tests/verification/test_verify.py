"""`safemerge verify` accepts what a run wrote and nothing else.

Guards `cli.verify`, `verification.files`, `verification.inventory` and `verification.problems`.
"""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest
import xxhash

from safemerge_recipes.engine.manifest import manifest_record, replace_files, write_manifest
from safemerge_recipes.storage.safetensors import read_header
from tests.fixtures.program import run
from tests.fixtures.sharded_family import make_family


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    recipe = make_family(root)
    os.environ["SAFEMERGE_CACHE"] = str(root / "cache")
    code, _, err = run("run", recipe)
    assert code == 0, err
    return root


@pytest.fixture
def copy(written, tmp_path):
    """A family with its output, to be damaged."""
    shutil.copytree(written, tmp_path / "family")
    return tmp_path / "family" / "out"


def flip(path, at, bit=0):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))


def test_a_fresh_output_is_sound_deep_too(written):
    assert run("verify", written / "out")[0] == 0
    code, out, _ = run("verify", written / "out", "--deep", "--json")
    assert code == 0
    assert json.loads(out)["recomputed"] == json.loads(out)["tensors"] == 21


def test_a_sample_is_the_same_for_the_same_seed_and_deep(written, monkeypatch):
    from safemerge_recipes.verification import recompute

    drawn = []
    real = recompute.produce

    def produce(task, *rest, **options):
        drawn.append(task.slot.name)
        return real(task, *rest, **options)

    monkeypatch.setattr(recompute, "produce", produce)
    for seed in (1, 1, 2):
        assert run("verify", written / "out", "--sample", "5", "--seed", seed, "--workers", "1")[0] == 0
    assert len(drawn) == 15
    assert drawn[:5] == drawn[5:10] != drawn[10:]


def test_every_flipped_bit_is_found_and_its_tensor_named(copy):
    dice = random.Random(7)
    for file in sorted(copy.glob("*.safetensors")):
        refs = read_header(file)
        for name in dice.sample(sorted(refs), 4):
            at, bit = refs[name].offset + dice.randrange(refs[name].nbytes), dice.randrange(8)
            flip(file, at, bit)
            code, _, err = run("verify", copy)
            assert code == 6
            assert f"{file.name}: {name}: its bytes changed" in err
            assert err.count("bytes changed") == 1
            flip(file, at, bit)
        at = 8 + file.read_bytes().index(b'"dtype"')
        flip(file, at)
        code, _, err = run("verify", copy)
        assert code == 6
        assert file.name in err
        flip(file, at)
    assert run("verify", copy)[0] == 0


@pytest.mark.parametrize(
    "name",
    ["README.md", "config.json", "tokenizer.json", "safemerge_plan.json", "safemerge_recipe.yaml",
     "safemerge_report.html", "model.safetensors.index.json"],
)  # fmt: skip
def test_a_changed_side_file_is_found(copy, name):
    flip(copy / name, 3)
    code, _, err = run("verify", copy)
    assert code == 6
    assert name in err


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "config.json", "safemerge_plan.json"])
def test_a_missing_file_is_found(copy, name):
    (copy / name).unlink()
    code, _, err = run("verify", copy)
    assert code == 6
    assert name in err


def test_what_was_added_is_found(copy):
    (copy / "modeling_evil.py").write_text("import os")
    (copy / ".gitattributes").write_text("as every hub folder has")
    code, _, err = run("verify", copy)
    assert code == 6
    assert "modeling_evil.py: is not in the manifest" in err
    assert ".gitattributes" not in err


def test_truncated_and_linked_files_are_found(copy, tmp_path):
    file = copy / "model-00001-of-00003.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    assert f"{file.name}: has {len(data) - 1} bytes" in run("verify", copy)[2]
    (tmp_path / "elsewhere").write_bytes(data)
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    code, _, err = run("verify", copy)
    assert code == 6
    assert "leads out of its folder" in err


def test_a_forged_output_with_matching_hashes_is_found_by_computing_again(copy):
    file = copy / "model-00001-of-00003.safetensors"
    plan = json.loads((copy / "safemerge_plan.json").read_text())
    refs = read_header(file)
    for action in ("merge", "keep"):
        name = next(line["name"] for line in plan["tensors"] if line["name"] in refs and line["action"] == action)
        flip(file, refs[name].offset + 5)
        manifest = manifest_record(copy)
        damaged = file.read_bytes()[refs[name].offset : refs[name].offset + refs[name].nbytes]
        manifest["tensors"][name][1] = xxhash.xxh3_128_hexdigest(damaged)
        write_manifest(copy, manifest)
        replace_files(copy, {file.name: file.read_bytes()})
        assert run("verify", copy)[0] == 0
        code, _, err = run("verify", copy, "--deep")
        assert code == 6
        assert f"{file.name}: {name}: computed again" in err


def test_a_forged_decision_is_found_by_computing_again(copy):
    path = copy / "safemerge_plan.json"
    plan = json.loads(path.read_text())
    line = next(line for line in plan["tensors"] if line["action"] == "merge")
    line["action"], line["method"] = "keep", None
    path.write_text(json.dumps(plan))
    replace_files(copy, {path.name: path.read_bytes()})
    assert run("verify", copy)[0] == 0
    code, _, err = run("verify", copy, "--deep")
    assert code == 6
    assert line["name"] in err


def test_another_source_is_found_and_a_missing_one_said(copy):
    flip(copy.parent / "safety" / "model-00001-of-00003.safetensors", 5000)
    code, _, err = run("verify", copy, "--deep")
    assert code == 6
    assert "sources.safety" in err
    assert "sha256" in err
    shutil.rmtree(copy.parent / "safety")
    assert run("verify", copy)[0] == 0
    assert run("verify", copy, "--deep")[0] == 3


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"format": 2}', "[" * 100_000, '{"outputs": [{"file": "../../etc/passwd"}]}', "\udc80"],
)
def test_what_is_no_manifest_is_one_message(copy, text):
    (copy / "safemerge_manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    code, _, err = run("verify", copy)
    assert code == 6
    assert err.startswith("safemerge: ")
    assert "a bug" not in err


def test_a_folder_that_is_none_is_one_message(tmp_path):
    code, _, err = run("verify", tmp_path / "nothing")
    assert code == 6
    assert "nothing" in err


def test_verifying_writes_nothing(written):
    from tests.fixtures.program import snapshot

    before = snapshot(written / "out")
    assert run("verify", written / "out", "--deep")[0] == 0
    assert snapshot(written / "out") == before


def test_an_adapter_output_is_verified_deep_and_its_damage_found(tmp_path):
    import torch

    from tests.fixtures.sharded_family import LORA, make_adapter, write_recipe

    make_family(tmp_path)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    for number, role in enumerate(("lora", "safe-lora")):
        torch.manual_seed(number)
        factors = {f"{module}.lora_A.weight": torch.randn(4, 32), f"{module}.lora_B.weight": torch.randn(32, 4)}
        make_adapter(tmp_path / role, LORA | {"layers_to_transform": [0]}, factors)
    sources = {"base": "base", "aligned": "aligned", "finetuned": "lora", "safety": "safe-lora"}
    recipe = write_recipe(tmp_path, sources=sources, gate={"always": True}, output={"path": "out", "format": "adapter"})
    code, _, err = run("run", recipe)
    assert code == 0, err
    code, _, err = run("verify", tmp_path / "out", "--deep")
    assert code == 0, err
    file = tmp_path / "out" / "adapter_model.safetensors"
    flip(file, file.stat().st_size - 10)
    code, _, err = run("verify", tmp_path / "out")
    assert code == 6
    assert file.name in err
    replace_files(tmp_path / "out", {file.name: file.read_bytes()})
    assert run("verify", tmp_path / "out")[0] == 0
    code, _, err = run("verify", tmp_path / "out", "--deep")
    assert code == 6
    assert "other bytes" in err
