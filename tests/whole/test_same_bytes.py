"""The same recipe gives the same bytes on any number of workers and cores; and numbers that do not fit are told."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures.program import digests, run, spawn_cold, warm
from tests.fixtures.sharded_family import make_family, make_model, tensor_shapes, write_recipe


@pytest.fixture(scope="module")
def start():
    return warm()


@pytest.fixture
def family(tmp_path):
    return make_family(tmp_path)


METHODS = {
    "linear": {"method": "linear", "alpha": 0.8},
    "slerp": {"method": "slerp", "alpha": 0.8},
    "ties": {"method": "ties", "alpha": 0.8, "density": 0.5},
    "dare_linear": {"method": "dare_linear", "alpha": 0.8, "density": 0.5, "seed": 3},
    "add_safety_vector": {"method": "add_safety_vector"},
}


@pytest.mark.parametrize("method", METHODS)
def test_workers_memory_and_shards_change_no_byte(family, method):
    root = family.parent
    write_recipe(root, merge=METHODS[method])
    found = []
    for number, options in enumerate(
        [("--workers", 1), ("--workers", 2), ("--workers", 7), ("--max-memory", "80MB"), ("--max-memory", "4GB")]
    ):
        os.environ["SAFEMERGE_CACHE"] = str(root / f"cache{number}")  # measured anew each time
        code, _, err = run("run", family, "--output", root / f"out{number}", *options)
        assert code == 0, err
        found.append(digests(root / f"out{number}"))
    assert all(one == found[0] for one in found)
    code, _, err = run("run", family, "--output", root / "small", "--set", "output.max_shard_size=12KB")
    assert code == 0, err
    assert len(list((root / "small").glob("*.safetensors"))) > 3
    assert {n: t.tolist() for n, t in tensors(root / "small").items()} == {
        n: t.tolist() for n, t in tensors(root / "out0").items()
    }


def tensors(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def test_one_core_and_two_and_threads_of_libraries_change_no_byte(start, family, monkeypatch):
    root = family.parent
    cores = sorted(os.sched_getaffinity(0))
    for number, count in enumerate((1, 2)):
        monkeypatch.setenv("SAFEMERGE_CACHE", str(root / f"cache{number}"))
        text = f"import os; os.sched_setaffinity(0, {cores[:count]})"
        code, _, err = start("run", family, "--output", root / f"out{number}", before=text)
        assert code == 0, err
    env = {"OMP_NUM_THREADS": "4", "SAFEMERGE_CACHE": str(root / "cache2")}
    _, err = spawn_cold("run", family, "--output", root / "out2", env=env).communicate(timeout=60)
    assert digests(root / "out0") == digests(root / "out1") == digests(root / "out2"), err


def test_a_tiny_merge_has_the_bytes_it_always_had(tmp_path):
    """Values are small integers over powers of two, so no rounding depends on the machine."""
    values = {
        name: torch.arange(shape.numel()).reshape(shape) for name, shape in
        ((n, torch.Size(s)) for n, s in tensor_shapes().items())
    }  # fmt: skip
    parts = {"base": (7, 3), "aligned": (5, 1), "finetuned": (11, 2), "safety": (13, 5)}
    for role, (modulus, shift) in parts.items():
        made = {name: ((x + shift) % modulus / 64).to(torch.bfloat16) for name, x in values.items()}
        make_model(tmp_path / role, made, shards=2)
    recipe = write_recipe(tmp_path, merge={"method": "linear", "alpha": 0.75}, gate={"always": True})
    code, _, err = run("run", recipe)
    assert code == 0, err
    merged = tensors(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    f, s = (load_all(tmp_path / role)[name].double() for role in ("finetuned", "safety"))
    assert torch.equal(merged[name], (0.75 * f + 0.25 * s).to(torch.bfloat16))
    whole = hashlib.sha256()
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        whole.update(file.read_bytes())
    assert whole.hexdigest() == GOLDEN


GOLDEN = "edaf11e282da9a71c09bab3dbe5a101bac76615dc1990c29b5586c1610493c8e"


def load_all(folder):
    return tensors(folder)


def test_stored_recipes_repeat_the_bytes(family):
    root = family.parent
    assert run("run", family)[0] == 0
    code, _, err = run("run", root / "out" / "safemerge_recipe.yaml", "--output", root / "again")
    assert code == 0, err
    assert digests(root / "again") == digests(root / "out")


# Numbers that do not fit


def with_tensor(root, role, name, change):
    index = json.loads((root / role / "model.safetensors.index.json").read_text())
    file = root / role / index["weight_map"][name]
    stored = load_file(file)
    stored[name] = change(stored[name])
    save_file(stored, file)


UP = "model.layers.1.mlp.up_proj.weight"


def test_overflow_of_the_output_dtype_is_counted_and_refused_unless_allowed(tmp_path):
    recipe = make_family(tmp_path, torch.float32)

    def large(t):
        t[0, :5] = 1e6
        return t

    for role in ("finetuned", "safety"):
        with_tensor(tmp_path, role, UP, large)
    write_recipe(tmp_path, gate={"always": True}, output={"path": "out", "dtype": "float16"})
    code, _, err = run("run", recipe)
    assert code == 3
    assert f"{UP}: 5 merged values do not fit F16" in err
    assert "allow_overflow" in err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()
    code, _, err = run("run", recipe, "--set", "output.allow_overflow=true")
    assert code == 0, err
    assert int(tensors(tmp_path / "out")[UP].isinf().sum()) == 5
    assert run("verify", tmp_path / "out", "--deep")[0] == 0


@pytest.mark.parametrize("which", ["finetuned", "base"])
@pytest.mark.parametrize("decision", ["keep", "merge", "error"])
def test_an_all_zero_v_or_delta_follows_the_stated_decision(family, which, decision):
    root = family.parent
    aligned = tensors(root / "aligned")[UP]
    with_tensor(root, which, UP, lambda t: aligned.clone())
    write_recipe(root, gate={"tau": 0.6, "degenerate": decision, "scope": ["*.up_proj.weight"]})
    code, out, err = run("run", family, "--json", "--dry-run")
    if decision == "error":
        assert code == 4
        assert UP in err
        return
    assert code == 0, err
    line = next(line for line in json.loads(out)["tensors"] if line["name"] == UP)
    assert line["action"] == decision
    assert "0" in line["reason"] or "zero" in line["reason"]
    assert run("run", family)[0] == 0
    merged, f, s = (tensors(root / role)[UP] for role in ("out", "finetuned", "safety"))
    expected = (0.8 * f.float() + 0.2 * s.float()).to(f.dtype) if decision == "merge" else f
    assert torch.allclose(merged.float(), expected.float(), atol=1e-3)
    assert torch.equal(merged, f) == (decision == "keep")


def test_copied_tensors_that_are_not_finite_are_noticed_though_nobody_computes_with_them(family):
    root = family.parent
    with_tensor(root, "finetuned", "lm_head.weight", lambda t: t.index_fill(0, torch.tensor([2]), float("nan")))
    code, _, err = run("run", family)
    assert code == 3
    assert "lm_head.weight: 32 of 2048 values are NaN or infinite" in err
    assert not (root / "out.part").exists()
    shutil.rmtree(root / "finetuned")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_counting_what_is_not_finite_agrees_with_torch(dtype):
    from safemerge_recipes.storage.finite import non_finite

    name = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        raw = torch.randint(0, 256, (64 * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        values = raw.view(dtype)
        assert non_finite(memoryview(raw.numpy()), name) == int((~values.isfinite()).sum())
    for value in (float("inf"), float("-inf"), float("nan"), torch.finfo(dtype).max, torch.finfo(dtype).min, -0.0):
        values = torch.zeros(16, dtype=dtype)
        values[7] = value
        data = memoryview(values.view(torch.uint8).numpy())
        assert non_finite(data, name) == int((~values.isfinite()).sum())
    assert non_finite(memoryview(b""), name) == 0
    assert non_finite(memoryview(bytes(range(256))), "U8") == 0
