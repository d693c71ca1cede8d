"""The parts of the benchmark: families load in the usual tools, the dense gate is right, children seen."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import published_gate
from benchmarks.peers.floor import run_floor, weight_files
from benchmarks.timing.architectures import ROLES, SIZES
from benchmarks.timing.cases import CASES
from benchmarks.timing.families import ADAPTERS, ALIGNMENT, UPDATE, make_family
from benchmarks.timing.process import Usage, measure
from benchmarks.timing.rounds import summarise
from benchmarks.timing.run import without_paths


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family("tiny", tmp_path_factory.mktemp("data"))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.safetensors"))
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def array(folder: Path, name: str) -> np.ndarray:
    return published_gate.Folder(folder)[name].double().numpy()


def test_a_family_is_made_from_its_seed_alone(tiny: Path, tmp_path: Path) -> None:
    again, other = make_family("tiny", tmp_path / "again"), make_family("tiny", tmp_path / "other", seed=1)
    assert len(digests(tiny)) == len(ROLES) + len(ADAPTERS)
    assert digests(again) == digests(tiny)
    assert not set(digests(other).values()) & set(digests(tiny).values())


def test_a_family_that_is_there_is_left_alone(tiny: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in tiny.rglob("*") if file.is_file()}
    make_family("tiny", tiny.parent)
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_updates_have_the_stated_size(tiny: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    aligned = array(tiny / "aligned", name)
    for role, size in (("base", ALIGNMENT), ("finetuned", UPDATE), ("safety", UPDATE)):
        assert np.sqrt(np.mean((aligned - array(tiny / role, name)) ** 2)) == pytest.approx(size, rel=0.2)


@pytest.mark.parametrize("role", ROLES)
def test_models_load_in_transformers(tiny: Path, role: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(tiny / role, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    name = "model.layers.1.self_attn.k_proj.weight"
    assert np.array_equal(model.state_dict()[name].double().numpy(), array(tiny / role, name))
    tokens = AutoTokenizer.from_pretrained(tiny / role)("Grüße", return_tensors="pt")
    assert tokens.input_ids.shape == (1, len("Grüße".encode()))
    assert torch.isfinite(model(**tokens).logits).all()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_load_in_peft_and_change_every_linear_layer(tiny: Path, adapter: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny / ADAPTERS[adapter], dtype="float32")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = PeftModel.from_pretrained(model, tiny / adapter).merge_and_unload().state_dict()
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == set(SIZES["tiny"]().adapted_tensors())
    ours = published_gate.Adapter(tiny / adapter)
    assert set(ours.names()) == changed
    for name in changed:
        np.testing.assert_allclose(ours.delta(name), after[name] - before[name], atol=1e-7)


@pytest.mark.parametrize(
    ("size", "tensors", "parameters"),
    [("sparse-70b", 723, 70_553_706_496), ("headers-671b", 45_200, 671_026_419_200)],
)
def test_sparse_models_have_real_headers_and_cost_no_disk(
    tmp_path: Path, size: str, tensors: int, parameters: int
) -> None:
    from huggingface_hub import get_local_safetensors_metadata

    folder = make_family(size, tmp_path) / "aligned"
    parsed = get_local_safetensors_metadata(folder)
    assert len(parsed.weight_map) == pytest.approx(tensors, rel=0.01)
    assert parsed.parameter_count["BF16"] == pytest.approx(parameters, rel=1e-4)
    stats = [file.stat() for file in weight_files(folder)]
    assert sum(stat.st_size for stat in stats) > 2 * parameters
    assert sum(stat.st_blocks * 512 for stat in stats) < 20_000_000


def test_the_published_gate_agrees_with_float64(tiny: Path) -> None:
    rho = published_gate.gate(tiny / "base", tiny / "aligned", tiny / "finetuned-adapter")
    factors = tiny / "finetuned-adapter"
    assert set(rho) == set(SIZES["tiny"]().adapted_tensors())
    for name, value in rho.items():
        V = array(tiny / "aligned", name) - array(tiny / "base", name)
        module = "base_model.model." + name.removesuffix(".weight")
        delta = array(factors, f"{module}.lora_B.weight") @ array(factors, f"{module}.lora_A.weight")
        # ρ without forming C: <CΔ, Δ> = ‖VᵀΔ‖² / ‖V‖ and ‖CΔ‖ = ‖V(VᵀΔ)‖ / ‖V‖.
        inner = V.T @ delta
        exact = (inner**2).sum() / np.linalg.norm(V @ inner) / np.linalg.norm(delta)
        assert value == pytest.approx(exact, abs=2e-6)


def test_the_published_merge_mixes_only_what_is_selected(tiny: Path, tmp_path: Path) -> None:
    selected, kept = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    roles = tiny / "aligned", tiny / "finetuned-adapter", tiny / "safety-adapter"
    published_gate.merge(*roles, {selected}, 0.8, tmp_path)
    F, S = (published_gate.Adapter(role) for role in roles[1:])
    for name, delta in ((selected, 0.8 * F.delta(selected) + 0.2 * S.delta(selected)), (kept, F.delta(kept))):
        wanted = array(tiny / "aligned", name) + delta.double().numpy()
        np.testing.assert_allclose(array(tmp_path, name), wanted, rtol=2**-8)
    embedding = "model.embed_tokens.weight"
    assert np.array_equal(array(tmp_path, embedding), array(tiny / "aligned", embedding))


def traffic() -> tuple[int, int]:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"]), int(lines["wchar"])


def test_the_floor_reads_every_byte_and_writes_the_output_once(tmp_path: Path) -> None:
    sizes = [10_000_001, 4 << 20, 5]
    inputs = [tmp_path / f"{i}.bin" for i in range(3)]
    for path, size in zip(inputs, sizes, strict=True):
        path.write_bytes(os.urandom(size))
    before = traffic()
    run_floor(inputs, tmp_path / "out", 9_000_000, threads=2)
    read, written = (after - start for after, start in zip(traffic(), before, strict=True))
    assert (tmp_path / "out").stat().st_size == 9_000_000
    assert sum(sizes) <= read < sum(sizes) + 100_000  # reading /proc counts too
    assert 9_000_000 <= written < 9_100_000


def run_python(code: str, log: Path, timeout: float = 60.0) -> Usage:
    return measure([sys.executable, "-c", code], log, dict(os.environ), log.parent, timeout)


def test_memory_and_time_of_a_child_and_its_children_are_seen(tmp_path: Path) -> None:
    # Touch a byte of every page: untouched memory is not resident, and a copy would come and go unsampled.
    touch = "held = bytearray(100_000_000); held[::4096] = b'x' * len(held[::4096])"
    hold = f"import time; {touch}; time.sleep(0.5)"
    alone = run_python(hold, tmp_path / "alone")
    assert alone.code == 0
    assert alone.wall > 0.5
    assert 100e6 < alone.peak_own < 130e6
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}]); print('done')"
    nested = run_python(code, tmp_path / "nested")
    assert nested.peak_own > alone.peak_own
    assert (tmp_path / "nested").read_text() == "done\n"


def test_failure_and_overrun_of_a_child_are_told(tmp_path: Path) -> None:
    assert run_python("import sys; sys.exit('no')", tmp_path / "failing").code == 1
    assert (tmp_path / "failing.err").read_text() == "no\n"
    assert run_python("import time; time.sleep(60)", tmp_path / "endless", timeout=0.2).code < 0


def test_ratios_are_formed_within_a_round() -> None:
    def used(wall: float) -> dict[str, float]:
        return dict.fromkeys(("cpu", "peak_rss", "peak_own", "max_rss"), 1.0) | {"wall": wall}

    rounds = [{"a": used(1.0), "b": used(3.0)}, {"a": used(4.0), "b": used(8.0)}, {"a": used(2.0)}]
    found = summarise(["a", "b", "never ran"], rounds)
    assert found["b"]["ratio"] == {"median": 2.5, "min": 2.0, "max": 3.0}
    assert found["b"]["rounds"] == 2
    assert found["a"]["wall"] == 2.0
    assert "never ran" not in found


def test_records_name_no_folder_of_the_machine() -> None:
    record = {"command": ["/a/b/bin/python", "/a/b/data/x", "/a"]}
    assert without_paths(record, {"/a/b": "ROOT", "/a/b/data": "DATA"}) == {
        "command": ["ROOT/bin/python", "DATA/x", "/a"]
    }


def test_every_case_of_the_contract_is_there() -> None:
    assert {"linear", "slerp", "dare_linear", "ties", "adapters", "gate-adapters", "gate-full", "beside-copy"} < set(
        CASES
    )
    assert len(CASES) == 14
