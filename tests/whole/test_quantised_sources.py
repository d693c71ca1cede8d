"""Quantised sources in every role: exact to a float64 formula, copied with their scales, or refused by name.

Guards `engine.requantised`, `planning.stored`, `methods.on_codes`, `weights.quantised`, `weights.dequantise`,
`weights.packed`, `sources.quantised.find`, `sources.quantised.group`, `sources.quantised.scaled`,
`sources.quantised.mxfp4`, `sources.quantised.compressed`, `sources.quantised.fp4`,
`sources.quantised.small`.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from safemerge_recipes.errors import PlanError, SourceError
from safemerge_recipes.events import ignore
from safemerge_recipes.storage.workers import Resources
from safemerge_recipes.verification.verify import verify
from safemerge_recipes.weights import compiled
from tests.fixtures.plain_family import (
    CONFIG,
    GATED,
    HIDDEN,
    Family,
    Tensors,
    make_family,
    prepare_recipe,
    run_recipe,
    write_adapter,
)
from tests.fixtures.quantise import FORMATS, blocks, channels, int8, mxfp4, worth

BLOCK = {"quant_method": "fp8", "weight_block_size": [16, 16]}
UP = "model.layers.0.mlp.up_proj.weight"
LINEAR = "gate: {always: true}\nmerge: {method: linear, alpha: 0.75}\n"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


def quantised(tensors: Tensors, kind: str = "FP8 blocks") -> Tensors:
    """A model with its gated matrices quantised, and the others in bfloat16."""
    found: Tensors = {}
    form = FORMATS.get(kind, lambda name, weight: blocks(name, weight, (4, 8)))
    for name, tensor in tensors.items():
        found |= form(name, tensor) if name in GATED else {name: tensor.bfloat16()}
    return found


def save(folder: Path, tensors: Tensors, quantization: dict[str, Any] | None = BLOCK) -> None:
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = CONFIG | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def config_of(tmp_path: Path, number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / f"out{number}" / "config.json").read_text())
    return found


def close(written: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to one rounding to what was written."""
    step = {torch.bfloat16: 2**-8, torch.float32: 2**-22}[written.dtype]
    torch.testing.assert_close(written.double(), wanted.double(), rtol=step, atol=1e-7)


EVERY_DAY = ("FP8 blocks", "int8 packed", "NF4 twice", "GPTQ", "AWQ", "NVFP4", "NVFP4 of ModelOpt")
KINDS = [kind if kind in EVERY_DAY else pytest.param(kind, marks=pytest.mark.slow) for kind in FORMATS]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_role_may_be_quantised(
    tmp_path: Path, family: Family, kind: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(compiled, "LIBRARY", None)
    sources = {name: quantised(getattr(family, name), kind) for name in ("base", "aligned", "finetuned", "safety")}
    for name, tensors in sources.items():
        save(tmp_path / name, tensors)
    roles = ", ".join(f"{name}: {name}" for name in sources)
    rest = "gate: {tau: 0.9}\nmerge: {method: linear, alpha: 0.75}\noutput: {dtype: float32}\n"
    prepared, written = run_recipe(tmp_path, f"sources: {{{roles}}}\n{rest}")
    merged = 0
    for line in prepared.plan.tensors:
        base, aligned, tuned, safe = (worth(sources[role], line.weight) for role in sources)
        if line.gated:
            v, delta = aligned - base, tuned - aligned
            rho = float((v.T @ delta).square().sum() / (v @ (v.T @ delta)).norm() / delta.norm())
            assert line.moments.rho == pytest.approx(rho, rel=1e-4)
        if line.action == "merge":
            merged += 1
            close(written[line.name], 0.75 * tuned + 0.25 * safe)
        elif not line.of:
            close(written[line.name], tuned)
    assert merged > 0
    assert not any(
        part in name for name in written for part in ("scale", "SCB", "qzeros", "zero_point")
    )  # all, or what is loaded with them
    assert "quantization_config" not in config_of(tmp_path)


@pytest.mark.parametrize("role", ["base", "aligned", "finetuned", "safety"])
def test_one_role_alone_may_be_quantised(tmp_path: Path, family: Family, role: str) -> None:
    save(tmp_path / "other", quantised(getattr(family, role)))
    roles = {name: f"{family.root}/{name}" for name in ("base", "aligned", "finetuned", "safety")} | {role: "other"}
    sources = ", ".join(f"{name}: {place}" for name, place in roles.items())
    _, written = run_recipe(tmp_path, f"sources: {{{sources}}}\n{LINEAR}output: {{dtype: float32}}\n")
    models = {name: getattr(family, name) for name in roles} | {role: quantised(getattr(family, role))}
    assert written.keys() == family.aligned.keys()
    for name in GATED:
        close(written[name], 0.75 * worth(models["finetuned"], name) + 0.25 * worth(models["safety"], name))
    assert "quantization_config" not in config_of(tmp_path)


def test_kernels_give_the_same_bytes_as_tables_and_torch(
    tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("aligned", "finetuned", "safety"):
        save(tmp_path / name, quantised(getattr(family, name)))
    found = []
    for method in ("linear, alpha: 0.7", "ties, density: 0.4, alpha: 0.7"):
        for form in ("dequantize", "keep"):
            text = (
                "sources: {aligned: aligned, finetuned: finetuned, safety: safety}\ngate: {always: true}\n"
                f"merge: {{method: {method}}}\noutput: {{quantized: {form}}}\n"
            )
            for library in (compiled.load("_merge"), compiled.LIBRARY, None):
                monkeypatch.setattr(compiled, "LIBRARY", library)
                prepared, written = run_recipe(tmp_path, text)
                assert any(task.native for task in prepared.graph.tasks) == (library is not None)
                found.append({name: tensor.contiguous().view(torch.uint8) for name, tensor in written.items()})
            monkeypatch.undo()
            for other in found[-2:]:
                assert all(torch.equal(found[-3][name], tensor) for name, tensor in other.items())


# What is not computed is copied


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("scope", ["", ', scope: ["*"]'])
@pytest.mark.parametrize("kind", KINDS)
def test_what_nothing_changes_is_copied_with_its_scales(
    tmp_path: Path, family: Family, kind: str, scope: str, declared: bool
) -> None:
    aligned = quantised(family.aligned, kind)
    save(tmp_path / "aligned", aligned, BLOCK if declared else None)
    for name, factors in (("adapter", family.finetuned_factors), ("safety", family.safety_factors)):
        write_adapter(tmp_path / name, {k: v for k, v in factors.items() if "q_proj" in k}, 8)
    text = f"sources: {{aligned: aligned, finetuned: adapter, safety: safety}}\ngate: {{always: true{scope}}}\n"
    if kind == "FP8 blocks" and not declared:  # then blocks are of 128, and these scales do not fit them
        with pytest.raises(SourceError, match=r"its scales are \(2, 3\).*128 × 128"):
            prepare_recipe(tmp_path, f"{text}merge: {{method: linear, alpha: 0.75}}\n")
        return
    _, written = run_recipe(tmp_path, f"{text}merge: {{method: linear, alpha: 0.75}}\n")
    plain = {name for name in GATED if any(part in name for part in ("q_proj", "k_proj", "v_proj"))}
    whole = "GPTQ" in kind  # whose config cannot say that some are plain
    plain = set(GATED) if whole else plain
    parts = {part for name in plain for part in aligned if part.startswith(name.removesuffix("weight"))}
    assert written.keys() == (aligned.keys() - parts) | plain
    for name in written.keys() - plain:
        assert written[name].dtype == aligned[name].dtype
        before, after = (tensors[name].reshape(-1).view(torch.uint8) for tensors in (aligned, written))
        assert torch.equal(before, after), name
    for name in plain:
        wanted = worth(aligned, name)
        if "q_proj" in name:
            wanted = wanted + 0.75 * family.lora("finetuned", name) + 0.25 * family.lora("safety", name)
        close(written[name], wanted)
    config = config_of(tmp_path)
    assert ("quantization_config" in config) == (declared and not whole)
    if declared and not whole:
        skipped = config["quantization_config"]["modules_to_not_convert"]
        coded = {name for name in plain if name not in aligned or aligned[name].dtype != torch.bfloat16}
        assert set(skipped) == {"lm_head", *(name.removesuffix(".weight") for name in coded)}


@pytest.mark.parametrize("some", [True, False])
def test_modelopts_own_config_says_what_is_plain_or_is_left_out(tmp_path: Path, family: Family, some: bool) -> None:
    """ModelOpt keeps what is quantised in hf_quant_config.json, and config.json may say nothing."""
    save(tmp_path / "aligned", quantised(family.aligned, "FP8 one scale"), None)
    own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "aligned" / "hf_quant_config.json").write_text(json.dumps(own))
    factors = {k: v for k, v in family.finetuned_factors.items() if "o_proj" in k or not some}
    write_adapter(tmp_path / "adapter", factors, 8)
    run_recipe(tmp_path, "sources: {aligned: aligned, finetuned: adapter}\ngate: {never: true}\n")
    path = tmp_path / "out0" / "hf_quant_config.json"
    assert path.exists() == some
    if some:
        listed = json.loads(path.read_text())["quantization"]["exclude_modules"]
        assert listed == ["lm_head", *(f"model.layers.{i}.self_attn.o_proj" for i in (0, 1))]
    verify(tmp_path / "out0", Resources(2, 1 << 30, "cpu"), ignore, deep=True)


def test_a_kept_fine_tune_in_the_same_format_is_copied_with_its_own_scales(tmp_path: Path, family: Family) -> None:
    tuned = quantised(family.finetuned)
    save(tmp_path / "aligned", quantised(family.aligned))
    save(tmp_path / "finetuned", tuned)
    run_recipe(tmp_path, "sources: {aligned: aligned, finetuned: finetuned}\ngate: {never: true}\n")
    written = load_file(tmp_path / "out0" / "model.safetensors")
    assert written.keys() == tuned.keys()
    assert all(torch.equal(written[n].view(torch.uint8), tuned[n].view(torch.uint8)) for n in written)
    assert config_of(tmp_path)["quantization_config"] == BLOCK


# Quantised again


def test_merged_weights_are_quantised_again_with_fresh_scales(tmp_path: Path, family: Family) -> None:
    aligned = quantised(family.aligned)
    save(tmp_path / "aligned", aligned)
    text = f"sources: {{aligned: aligned, finetuned: {family.root}/finetuned, safety: {family.root}/safety}}\n{LINEAR}"
    _, written = run_recipe(tmp_path, f"{text}output: {{quantized: keep}}\n")
    assert {name: (t.dtype, t.shape) for name, t in written.items()} == {
        name: (t.dtype, t.shape) for name, t in aligned.items()
    }
    plan = json.loads((tmp_path / "out0" / "safemerge_plan.json").read_text())
    errors = {line["name"]: line.get("requantized_error") for line in plan["tensors"]}
    for name in GATED:
        wanted = 0.75 * family.finetuned[name].double() + 0.25 * family.safety[name].double()
        again = blocks(name, wanted.float())
        assert torch.equal(written[name].view(torch.uint8), again[name].view(torch.uint8))
        torch.testing.assert_close(written[f"{name}_scale_inv"], again[f"{name}_scale_inv"], rtol=1e-6, atol=0)
        lost = float((worth(written, name) - wanted).norm() / wanted.norm())
        assert errors[name] == pytest.approx(lost, rel=1e-3)
        assert 0.005 < lost < 0.05
    assert errors[f"{UP}_scale_inv"] is None
    assert config_of(tmp_path)["quantization_config"] == BLOCK
    result = verify(tmp_path / "out0", Resources(2, 1 << 30, "cpu"), ignore, deep=True)
    assert result["recomputed"] == len(written)


def test_values_that_were_quantised_give_the_same_codes_again(tmp_path: Path, family: Family) -> None:
    aligned = quantised(family.aligned)
    save(tmp_path / "aligned", aligned)
    values = {name: worth(aligned, name).float() for name in family.aligned}
    save(tmp_path / "values", values, None)
    _, written = run_recipe(
        tmp_path,
        "sources: {aligned: aligned, finetuned: values}\ngate: {never: true}\noutput: {quantized: keep}\n",
    )
    for name in GATED:
        assert torch.equal(written[name].view(torch.uint8), aligned[name].view(torch.uint8)), name
        torch.testing.assert_close(written[f"{name}_scale_inv"], aligned[f"{name}_scale_inv"], rtol=2e-7, atol=0)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e8m0fnu])
def test_scales_that_are_powers_of_two_stay_so(
    tmp_path: Path, family: Family, dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek-V3.1: `scale_fmt: ue8m0`, stored as float32 or as exponents alone; rounded up, so that nothing clips."""
    if not native:
        monkeypatch.setattr(compiled, "LIBRARY", None)

    def powers(name: str, weight: torch.Tensor) -> Tensors:
        scale = blocks(name, weight)[f"{name}_scale_inv"].log2().sub(1e-9).ceil().exp2()
        spread_out = worth({f"{name}_scale_inv": scale, name: torch.ones_like(weight)}, name)
        return {name: (weight / spread_out).float().to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.to(dtype)}

    monkeypatch.setitem(FORMATS, "powers", powers)  # type: ignore[arg-type]
    said = BLOCK | ({"scale_fmt": "ue8m0"} if dtype == torch.float32 else {})
    aligned = quantised(family.aligned, "powers")
    save(tmp_path / "aligned", aligned, said)
    for name in ("finetuned", "safety"):
        save(tmp_path / name, getattr(family, name), None)
    text = "sources: {aligned: aligned, finetuned: finetuned, safety: safety}\n" + LINEAR
    _, written = run_recipe(tmp_path, f"{text}output: {{quantized: keep}}\n")
    plan = json.loads((tmp_path / "out0" / "safemerge_plan.json").read_text())
    errors = {line["name"]: line.get("requantized_error") for line in plan["tensors"]}
    for name in GATED:
        scale = written[f"{name}_scale_inv"]
        assert scale.dtype == dtype
        assert torch.equal(scale.double().log2() % 1, torch.zeros(scale.shape, dtype=torch.float64))
        wanted = 0.75 * family.finetuned[name].double() + 0.25 * family.safety[name].double()
        again = powers(name, wanted.float())
        assert torch.equal(scale.double(), again[f"{name}_scale_inv"].double())
        assert torch.equal(written[name].view(torch.uint8), again[name].view(torch.uint8))
        lost = float((worth(written, name) - wanted).norm() / wanted.norm())
        assert errors[name] == pytest.approx(lost, rel=1e-3)
    assert config_of(tmp_path)["quantization_config"] == said
    tuned = quantised(family.finetuned)  # its scales are no powers of two: copied, they would be read as others
    save(tmp_path / "tuned", tuned)
    kept = "sources: {aligned: aligned, finetuned: tuned}\ngate: {never: true}\noutput: {quantized: keep}\n"
    _, written = run_recipe(tmp_path, kept)
    for name in GATED:
        again = powers(name, worth(tuned, name).float())
        assert torch.equal(written[name].view(torch.uint8), again[name].view(torch.uint8))


def test_other_formats_are_not_written(tmp_path: Path, family: Family) -> None:
    save(tmp_path / "aligned", quantised(family.aligned, "int4"))
    text = f"sources: {{aligned: aligned, finetuned: {family.root}/finetuned}}\ngate: {{never: true}}\n"
    with pytest.raises(PlanError, match=r"int4 packed.*is not written here; say `output.quantized: dequantize`"):
        prepare_recipe(tmp_path, f"{text}output: {{quantized: keep}}\n")


# gpt-oss


@pytest.mark.parametrize("native", [True, False])
def test_mxfp4_experts_meet_plain_ones_and_adapters(
    tmp_path: Path, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    if not native:
        monkeypatch.setattr(compiled, "LIBRARY", None)
    draw = torch.Generator().manual_seed(1)
    experts = {f"model.layers.0.mlp.experts.{p}": torch.randn(2, 32, 64, generator=draw) * 0.05 for p in "ab"}
    experts = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(3, 32, 64, generator=draw) * 0.05,
        "model.layers.0.mlp.experts.down_proj": torch.randn(3, 32, 32, generator=draw) * 0.05,
    }
    biases = {f"{name}_bias": torch.randn(3, t.shape[2], generator=draw).bfloat16() for name, t in experts.items()}
    plain = {**biases, "model.embed_tokens.weight": torch.randn(40, 32, generator=draw).bfloat16()}
    aligned = dict(plain)
    for name, tensor in experts.items():
        aligned |= mxfp4(name, tensor)
        converted = convert_moe_packed_tensors(
            aligned[f"{name}_blocks"], aligned[f"{name}_scales"], dtype=torch.float32
        )
        assert torch.equal(converted.double(), worth(aligned, name))
    tuned = {name: worth(aligned, name) + 0.01 * torch.randn(t.shape, generator=draw) for name, t in experts.items()}
    config = {"model_type": "gpt_oss", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 40}
    for folder, tensors in (("aligned", aligned), ("tuned", plain | {n: t.float() for n, t in tuned.items()})):
        save(tmp_path / folder, tensors, {"quant_method": "mxfp4"} if folder == "aligned" else None)
        own = json.loads((tmp_path / folder / "config.json").read_text()) | config
        (tmp_path / folder / "config.json").write_text(json.dumps(own))
    _, written = run_recipe(
        tmp_path,
        "sources: {aligned: aligned, finetuned: tuned, safety: aligned}\ngate: {always: true}\n"
        "merge: {method: linear, alpha: 0.75}\n",
    )
    assert written.keys() == plain.keys() | experts.keys()
    for name in experts:
        close(written[name], 0.75 * tuned[name] + 0.25 * worth(aligned, name))
    assert "quantization_config" not in config_of(tmp_path)
    factors = {"model.layers.0.self_attn.q_proj": (torch.randn(2, 32), torch.randn(32, 2))}
    q = {"model.layers.0.self_attn.q_proj.weight": torch.randn(32, 32).bfloat16()}
    save_file(aligned | q, tmp_path / "aligned" / "model.safetensors")
    write_adapter(tmp_path / "adapter", factors, 4)
    _, written = run_recipe(tmp_path, "sources: {aligned: aligned, finetuned: adapter}\ngate: {never: true}\n")
    assert all(torch.equal(written[name], tensor) for name, tensor in aligned.items())
    assert config_of(tmp_path, 1)["quantization_config"] == {"quant_method": "mxfp4"}


# Experts


def test_experts_that_are_one_tensor_in_memory_are_written_alike(tmp_path: Path, family: Family) -> None:
    shared = {name: tensor.bfloat16() for name, tensor in family.aligned.items() if ".mlp." not in name}
    draw = torch.Generator().manual_seed(1)
    names = [
        f"model.layers.{i}.mlp.experts.{e}.{p}.weight"
        for i in (0, 1)
        for e in range(3)
        for p in ("gate_proj", "up_proj", "down_proj")
    ]
    aligned: Tensors = dict(shared)
    for name in names:
        aligned |= blocks(name, torch.randn((HIDDEN, 40) if "down" in name else (40, HIDDEN), generator=draw))
    save(tmp_path / "aligned", aligned)
    changed = aligned | blocks(names[1], torch.randn(40, HIDDEN, generator=draw))
    save(tmp_path / "tuned", changed)
    sources = "sources: {aligned: aligned, finetuned: tuned, safety: aligned}\n"
    chosen = f"gate: {{names: ['{names[1]}']}}\nmerge: {{method: linear, alpha: 0.75}}\n"
    _, written = run_recipe(tmp_path, f"{sources}{chosen}")
    for name in names:
        assert written[name].dtype == (torch.bfloat16 if ".layers.0." in name else torch.float8_e4m3fn), name
        if ".layers.0." in name:
            share = 0.25 if name == names[1] else 0
            close(written[name], (1 - share) * worth(changed, name) + share * worth(aligned, name))
    found = config_of(tmp_path)["quantization_config"]["modules_to_not_convert"]
    assert found == ["lm_head", "model.layers.0.mlp.experts"]


# Refused


def test_codes_without_their_scale_are_refused(tmp_path: Path, family: Family) -> None:
    tensors = quantised(family.aligned)
    del tensors[f"{UP}_scale_inv"]
    save(tmp_path / "aligned", tensors)
    with pytest.raises(SourceError, match=rf"{UP} is stored as F8_E4M3 and has no scale"):
        prepare_recipe(
            tmp_path, f"sources: {{aligned: aligned, finetuned: {family.root}/finetuned}}\ngate: {{never: true}}\n"
        )


def test_scales_without_their_codes_are_refused(tmp_path: Path, family: Family) -> None:
    tensors = quantised(family.aligned)
    del tensors[UP]
    save(tmp_path / "aligned", tensors)
    with pytest.raises(SourceError, match=rf"is the scale of {UP}, which is not there"):
        prepare_recipe(tmp_path, "sources: {aligned: aligned, finetuned: aligned}\ngate: {never: true}\n")


CLOSED = {
    "GPTQ": {"qweight": torch.ones(3, 40, dtype=torch.int32), "qzeros": torch.ones(1, 3, dtype=torch.int32),
             "scales": torch.ones(1, 40), "g_idx": torch.ones(24, dtype=torch.int32)},
    "AWQ": {"qweight": torch.ones(24, 5, dtype=torch.int32), "qzeros": torch.ones(7, 5, dtype=torch.int32),
            "scales": torch.ones(7, 40)},
    "bitsandbytes 4-bit": {"weight": torch.ones(480, 1, dtype=torch.uint8), "weight.absmax": torch.ones(15),
                           "weight.quant_map": torch.ones(16),
                           "weight.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.uint8)},
    "NVFP4": {"weight": torch.ones(40, 12, dtype=torch.uint8),
              "weight_scale": torch.ones(40, 7).to(torch.float8_e4m3fn), "weight_scale_2": torch.tensor(1.0)},
    "order of their own": {"weight_packed": torch.ones(40, 3, dtype=torch.int32), "weight_scale": torch.ones(40, 3),
                           "weight_shape": torch.tensor([40, 24]), "weight_g_idx": torch.ones(24, dtype=torch.int32)},
}  # fmt: skip


@pytest.mark.parametrize("kind", CLOSED)
def test_formats_that_are_not_read_are_named_with_the_way_out_and_copied(
    tmp_path: Path, family: Family, kind: str
) -> None:
    root = UP.removesuffix("weight")
    tensors = {name: tensor for name, tensor in family.aligned.items() if name != UP}
    tensors |= {f"{root}{end}": tensor for end, tensor in CLOSED[kind].items()}
    save(tmp_path / "aligned", tensors)
    adapter = {k: v for k, v in family.finetuned_factors.items() if "q_proj" in k}
    write_adapter(tmp_path / "adapter", adapter, 8)
    sources = "sources: {aligned: aligned, finetuned: adapter}\n"
    _, written = run_recipe(tmp_path, f'{sources}gate: {{always: true, scope: ["*"]}}\nmerge: {{method: drop}}\n')
    for end, tensor in CLOSED[kind].items():
        assert torch.equal(written[f"{root}{end}"].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    with pytest.raises(SourceError, match=rf"quantised \(.*{kind}.*dequantise|{kind}"):
        prepare_recipe(
            tmp_path,
            f"sources: {{aligned: {family.root}/aligned, finetuned: aligned}}\ngate: {{never: true}}\n",
        )


# The noise floor


def test_v_beneath_the_quantisation_noise_is_told_or_refused(tmp_path: Path, family: Family) -> None:
    draw = torch.Generator().manual_seed(8)
    near = {n: t + 1e-3 * torch.randn(t.shape, generator=draw) if n in GATED else t for n, t in family.aligned.items()}
    for name, tensors in (("base", near), ("aligned", family.aligned)):
        save(tmp_path / name, quantised(tensors))
    roles = f"base: base, aligned: aligned, finetuned: {family.root}/finetuned-adapter"
    tau = "gate: {tau: 0.5}\nmerge: {method: drop}\n"
    with pytest.raises(PlanError, match=r"V lies beneath the quantisation noise in 14 of 14 gated tensors"):
        prepare_recipe(tmp_path, f"sources: {{{roles}}}\n{tau}")
    # Of one block alone it is told; that its noise is what rounding did is seen from the unrounded models.
    mixed = quantised(near) | {n: t for n, t in quantised(family.base).items() if ".layers.1." in n}
    save(tmp_path / "mixed", mixed)
    plan = prepare_recipe(tmp_path, f"sources: {{{roles.replace('base: base', 'base: mixed')}}}\n{tau}").plan
    assert any("V lies beneath the quantisation noise in 7 of 14" in warning for warning in plan.warnings)
    expected = found = 0.0
    for line in plan.tensors:
        if line.gated and ".layers.0." in line.weight:
            expected += line.as_json()["noise_v"] ** 2
            for model in (family.aligned, near):
                rounded = worth(quantised({line.weight: model[line.weight]}), line.weight)
                found += float((rounded - model[line.weight].double()).square().sum())
        assert line.as_json()["noise_delta"] is None  # an adapter: the quantised weight cancels
    assert expected == pytest.approx(found, rel=0.05)


def test_an_update_beneath_the_quantisation_noise_is_told_or_refused(tmp_path: Path, family: Family) -> None:
    draw = torch.Generator().manual_seed(9)
    near = {n: t + 1e-3 * torch.randn(t.shape, generator=draw) if n in GATED else t for n, t in family.aligned.items()}
    save(tmp_path / "near", quantised(near))
    roles = f"base: {family.root}/base, aligned: {family.root}/aligned, finetuned: "
    tau = "gate: {tau: 0.5}\nmerge: {method: drop}\n"
    with pytest.raises(PlanError, match=r"Δ lies beneath the quantisation noise in 14 of 14 gated tensors"):
        prepare_recipe(tmp_path, f"sources: {{{roles}near}}\n{tau}")
    far = {n: t.bfloat16() for n, t in family.finetuned.items()} | {
        n: t for n, t in quantised(near).items() if ".layers.0." in n
    }
    save(tmp_path / "mixed", far)
    plan = prepare_recipe(tmp_path, f"sources: {{{roles}mixed}}\n{tau}").plan
    assert any("Δ lies beneath the quantisation noise in 7 of 14" in warning for warning in plan.warnings)
    expected = found = 0.0
    for line in plan.tensors:
        if line.gated and ".layers.0." in line.weight:
            expected += line.as_json()["noise_delta"] ** 2
            rounded = worth(quantised({line.weight: near[line.weight]}), line.weight)
            found += float((rounded - near[line.weight].double()).square().sum())
            assert line.as_json()["noise_v"] is None
    assert expected == pytest.approx(found, rel=0.1)


def test_adapters_on_a_quantised_model_have_no_noise_and_are_written_as_adapters(
    tmp_path: Path, family: Family
) -> None:
    aligned = quantised(family.aligned)
    save(tmp_path / "aligned", aligned)
    roles = f"aligned: aligned, finetuned: {family.root}/finetuned-adapter, safety: {family.root}/safety-adapter"
    prepared, written = run_recipe(tmp_path, f"sources: {{{roles}}}\n{LINEAR}output: {{format: adapter}}\n")
    assert not any("quantised weights are" in warning for warning in prepared.plan.warnings)
    name = UP.removesuffix(".weight")
    a, b = (written[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    scale = json.loads((tmp_path / "out0" / "adapter_config.json").read_text())
    update = b @ a * (scale["lora_alpha"] / scale["r"])
    wanted = 0.75 * family.lora("finetuned", UP) + 0.25 * family.lora("safety", UP)
    torch.testing.assert_close(update, wanted, rtol=1e-5, atol=1e-6)


# Other libraries' own dequantisation


def test_values_are_those_of_transformers_and_compressed_tensors() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(2))
    stored = blocks("w", weight)
    theirs = Fp8Dequantize(None)._dequantize_one(stored["w"], stored["w_scale_inv"], torch.float32)
    assert torch.equal(theirs, worth(stored, "w").float())
    tensors = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    from tests.fixtures.quantise import awq, int4

    assert tensors.__version__
    for form, own in (("channel", channels), ("channel", int8)):
        found = own("w", weight)
        kind = "float" if own is channels else "int"
        args = QuantizationArgs(num_bits=8, type=kind, strategy=form, symmetric=True)
        theirs = dequantize(found["w"], found["w_scale"].float(), args=args, dtype=torch.float32)
        torch.testing.assert_close(theirs.double(), worth(found, "w"), rtol=2**-23, atol=0)
    packed = awq("w.weight", weight)
    converted = AutoAWQConverter(group_size=8).process(dict(packed))
    shape = torch.Size(weight.shape)
    codes = unpack_from_int32(converted["w.weight_packed"], 4, shape)
    zeros = unpack_from_int32(converted["w.weight_zero_point"], 4, torch.Size((32, 6)), packed_dim=0)
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=8, symmetric=False)
    scales = converted["w.weight_scale"].float()
    theirs = dequantize(codes, scales, zeros, args=args, dtype=torch.float32)
    for stored in (packed, {name: t for name, t in converted.items() if "weight" in name}):
        torch.testing.assert_close(theirs.double(), worth(stored, "w.weight"), rtol=2**-23, atol=0)
    found = int4("w", weight)
    codes = unpack_from_int32(found["w_packed"], 4, weight.shape)
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=8, symmetric=True)
    theirs = dequantize(codes, found["w_scale"].float(), args=args, dtype=torch.float32)
    torch.testing.assert_close(theirs.double(), worth(found, "w"), rtol=2**-23, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(
    "AUTO_GPTQ" not in os.environ, reason="AUTO_GPTQ: a folder with the wheel of auto-gptq 0.7.1, unzipped"
)
@pytest.mark.parametrize(("bits", "shuffled"), [(4, True), (4, False), (8, True), (8, False)])
def test_values_of_gptq_are_those_of_auto_gptq(bits: int, shuffled: bool) -> None:
    """Its layer in plain torch, from its file alone, as the package wants a transformers of its time."""
    import importlib.util

    from tests.fixtures.quantise import gptq

    path = Path(os.environ["AUTO_GPTQ"]) / "auto_gptq" / "nn_modules" / "qlinear" / "qlinear_cuda.py"
    spec = importlib.util.spec_from_file_location("qlinear_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stored = gptq("w.weight", torch.randn(64, 96), bits=bits, group=16, shuffled=shuffled)
    layer = module.QuantLinear(bits, 16, 96, 64, False, weight_dtype=torch.float32)
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        setattr(layer, name, stored[f"w.{name}"].float() if name == "scales" else stored[f"w.{name}"])
    torch.testing.assert_close(layer(torch.eye(96)).T.double(), worth(stored, "w.weight"), rtol=2**-22, atol=0)


def test_values_of_4_bit_floats_are_those_of_compressed_tensors() -> None:
    """Both libraries' forms of NVFP4, whose number over all scales is the other's reciprocal, and MXFP4."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    from tests.fixtures.quantise import mxfp4_packed, nvfp4

    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(2))
    made = {"nv": nvfp4("w", weight, 16), "modelopt": nvfp4("w", weight, 16, True), "mx": mxfp4_packed("w", weight, 32)}
    for kind, stored in made.items():
        packed = stored.get("w_packed", stored.get("w"))
        assert packed is not None
        codes = unpack_fp4_from_uint8(packed, 32, 96, dtype=torch.float32)
        scale = stored["w_scale"].float() if kind != "mx" else 2.0 ** (stored["w_scale"].float() - 127)
        over = {"nv": stored.get("w_global_scale"), "modelopt": 1 / stored.get("w_scale_2", torch.ones(())), "mx": None}
        strategy, group = ("group", 32) if kind == "mx" else ("tensor_group", 16)
        args = QuantizationArgs(num_bits=4, type="float", strategy=strategy, group_size=group, symmetric=True)
        theirs = dequantize(codes, scale, args=args, global_scale=over[kind], dtype=torch.float32)
        torch.testing.assert_close(theirs.double(), worth(stored, "w"), rtol=2**-21, atol=0)
        assert float((worth(stored, "w") - weight).norm() / weight.norm()) < 0.2


def test_values_of_llm_int8_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    from tests.fixtures.quantise import llm_int8

    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(2))
    found = llm_int8("w.weight", weight)
    theirs = functional.int8_vectorwise_dequant(found["w.weight"], found["w.SCB"])
    torch.testing.assert_close(theirs.double(), worth(found, "w.weight"), rtol=2**-22, atol=0)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("kind", "twice", "block"), [("nf4", True, 64), ("nf4", False, 128), ("fp4", True, 64)])
def test_values_of_4_bits_are_those_of_bitsandbytes(
    tmp_path: Path, kind: str, twice: bool, block: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit of float32, from tensors that bitsandbytes wrote."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from safemerge_recipes.sources.quantised.find import groups
    from safemerge_recipes.storage.arena import Arena
    from safemerge_recipes.storage.reader import Reader
    from safemerge_recipes.storage.safetensors import read_header
    from safemerge_recipes.weights.dequantise import Dequantiser

    if not native:
        monkeypatch.setattr(compiled, "LIBRARY", None)
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(2))
    codes, state = functional.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=twice)
    stored = {f"w.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    save_file({"w.weight": codes, **stored}, tmp_path / "model.safetensors")
    found = groups(read_header(tmp_path / "model.safetensors"), {})["w.weight"]
    assert (found.kind, found.operand.shape) == ("bitsandbytes 4-bit", (40, 128))
    out = np.empty((40, 128), np.float32)
    with Reader(1) as reader:
        for start, stop in ((0, 7 * 128), (7 * 128, 40 * 128)):
            Dequantiser(found.operand, reader, Arena(), "x").fill(start, stop, out.reshape(-1)[start:stop])
    assert torch.equal(torch.from_numpy(out), functional.dequantize_4bit(codes, state))


# Loaded by transformers, from an output in which some weights are plain and others quantised


def model_of(folder: Path, **more: Any) -> Any:
    """What transformers makes of an output; no key may be missing or unexpected."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the config given here has but one setting of its own
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, dtype=torch.float32, **more
        )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model


def loaded(folder: Path, **more: Any) -> dict[str, torch.Tensor]:
    """The state of that model."""
    return dict(model_of(folder, **more).state_dict())


def mixed_output(tmp_path: Path, family: Family, kind: str, quantization: dict[str, Any], **output: str) -> Tensors:
    """An output whose attention was merged, and whose other matrices nothing changed: its values."""
    aligned = quantised(family.aligned, kind)
    save(tmp_path / "aligned", aligned, quantization)
    for name, factors in (("adapter", family.finetuned_factors), ("safety", family.safety_factors)):
        write_adapter(tmp_path / name, {k: v for k, v in factors.items() if "self_attn" in k}, 8)
    sources = "sources: {aligned: aligned, finetuned: adapter, safety: safety}\n"
    _, written = run_recipe(tmp_path, f"{sources}{LINEAR}output: {json.dumps(output)}\n")
    return {name: worth(written, name, (4, 8)) for name in family.aligned}


@pytest.mark.parametrize("form", ["dequantize", pytest.param("keep", marks=pytest.mark.slow)])
def test_an_fp8_output_loads_in_transformers(tmp_path: Path, family: Family, form: str) -> None:
    from transformers import FineGrainedFP8Config

    # transformers wants whole blocks
    declared = {"quant_method": "fp8", "weight_block_size": [4, 8], "activation_scheme": "dynamic"}
    values = mixed_output(tmp_path, family, "small blocks", declared, quantized=form)
    config = FineGrainedFP8Config(weight_block_size=(4, 8), dequantize=True)
    state = loaded(tmp_path / "out0", quantization_config=config)
    for name, tensor in values.items():
        torch.testing.assert_close(state[name].double(), tensor, rtol=2**-20, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["experts", "attention"])
def test_a_gpt_oss_loads_in_transformers(tmp_path: Path, where: str) -> None:
    """Experts that are merged are written plain; where attention alone is, they stay MXFP4."""
    from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config

    torch.manual_seed(0)
    sizes = GptOssConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=48,
    )  # fmt: skip
    plain = {name: tensor.bfloat16() for name, tensor in GptOssForCausalLM(sizes).state_dict().items()}
    stacks = [name for name, tensor in plain.items() if "experts" in name and tensor.ndim == 3]
    assert len(stacks) == 4
    changed = stacks if where == "experts" else [name for name in plain if name.endswith("q_proj.weight")]
    models: dict[str, Tensors] = {}
    for role in ("aligned", "finetuned"):
        tensors = {
            n: t + 0.05 * torch.randn(t.shape) * (role == "finetuned" and n in changed) for n, t in plain.items()
        }
        packed = {n: mxfp4(n, tensors[n].float()) for n in stacks}
        models[role] = {n: t.bfloat16() for n, t in tensors.items() if n not in stacks}
        models[role] |= {name: tensor for own in packed.values() for name, tensor in own.items()}
        save(tmp_path / role, models[role], None)
        config = sizes.to_dict() | {
            "architectures": ["GptOssForCausalLM"],
            "quantization_config": {"quant_method": "mxfp4"},
        }
        (tmp_path / role / "config.json").write_text(json.dumps(config))
    run_recipe(
        tmp_path,
        "sources: {aligned: aligned, finetuned: finetuned, safety: aligned}\n"
        f"gate: {{always: true, scope: '{'*experts*' if where == 'experts' else '*q_proj*'}'}}\n"
        "merge: {method: linear, alpha: 0.5}\noutput: {dtype: float32}\n",
    )
    more = {} if where == "experts" else {"quantization_config": Mxfp4Config(dequantize=True)}
    assert ("quantization_config" in config_of(tmp_path)) == (where == "attention")
    state = loaded(tmp_path / "out0", **more)
    for name in plain:
        wanted = worth(models["finetuned"], name)
        if name in changed:
            wanted = (wanted + worth(models["aligned"], name)) / 2
        torch.testing.assert_close(state[name].double(), wanted, rtol=2**-7, atol=1e-6, msg=name)


def compressed(kind: str, bits: int, strategy: str, group: int | None, form: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": group, "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }  # fmt: skip


COMPRESSED = {
    "FP8 channels": compressed("float", 8, "channel", None, "float-quantized"),
    "int8": compressed("int", 8, "channel", None, "int-quantized"),
    "int4": compressed("int", 4, "group", 8, "pack-quantized"),
    "NVFP4": compressed("float", 4, "tensor_group", 8, "nvfp4-pack-quantized"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_compressed_tensors_output_loads_in_transformers(tmp_path: Path, family: Family, kind: str) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    values = mixed_output(tmp_path, family, kind, COMPRESSED[kind])
    config = config_of(tmp_path)["quantization_config"]
    assert "model.layers.0.self_attn.q_proj" in config["ignore"]
    asked = {key: value for key, value in config.items() if key != "quant_method"}
    state = loaded(tmp_path / "out0", quantization_config=CompressedTensorsConfig(**asked, dequantize=True))
    for name, tensor in values.items():
        torch.testing.assert_close(state[name].double(), tensor, rtol=2**-7, atol=1e-4, msg=name)


BITSANDBYTES = {
    "NF4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"},
    "FP4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float32"},
    "LLM.int8": {"load_in_8bit": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_a_bitsandbytes_output_loads_in_transformers(tmp_path: Path, family: Family, kind: str) -> None:
    """Merged modules as plain ones, all others quantised, with the values that bitsandbytes itself gives back."""
    functional = pytest.importorskip("bitsandbytes.functional")
    values = mixed_output(tmp_path, family, kind, {"quant_method": "bitsandbytes", **BITSANDBYTES[kind]})
    model = model_of(tmp_path / "out0")
    for name, tensor in values.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        weight = module.weight
        assert (type(module).__name__ in ("Linear4bit", "Linear8bitLt")) == (name in GATED and "self_attn" not in name)
        if type(module).__name__ == "Linear4bit":
            state, packed = weight.quant_state, weight.data.flatten()  # its kernels want blocks of 32 and more
            codes = torch.stack([packed >> 4, packed & 15], -1).flatten().long()
            weight = (state.code[codes] * state.absmax.repeat_interleave(state.blocksize)).view(state.shape)
        elif type(module).__name__ == "Linear8bitLt":
            weight = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        torch.testing.assert_close(weight.detach().double(), tensor, rtol=2**-7, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["GPTQ", "AWQ"])
def test_what_transformers_would_convert_is_what_is_quantised(tmp_path: Path, family: Family, kind: str) -> None:
    """Their layers need a GPU's library: which modules become such layers is asked of transformers' own code."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    declared: dict[str, Any] = {"quant_method": kind.lower(), "bits": 4, "group_size": 8, "zero_point": True}
    if kind == "AWQ":  # which cannot pack these, as they have 12 outputs
        declared["modules_to_not_convert"] = ["lm_head", "k_proj", "v_proj"]
    values = mixed_output(tmp_path, family, kind, declared)
    written = load_file(tmp_path / "out0" / "model.safetensors")
    coded = {name.removesuffix(".qweight") for name in written if name.endswith(".qweight")}
    said = config_of(tmp_path).get("quantization_config")
    if kind == "GPTQ":  # converts every layer of the blocks: all are plain, and it loads as a plain model
        assert not coded
        assert said is None
        state = model_of(tmp_path / "out0").state_dict()
        for name, tensor in values.items():
            torch.testing.assert_close(state[name].double(), tensor, rtol=2**-7, atol=1e-6, msg=name)
        return
    assert said is not None
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "architectures"}))
    skipped = HfQuantizer.get_modules_to_not_convert(
        model, said["modules_to_not_convert"], None, add_default_skips=True
    )
    layers = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name in layers if should_convert_module(name, skipped)} == coded
    assert coded == {n.removesuffix(".weight") for n in GATED if "self_attn" not in n}
