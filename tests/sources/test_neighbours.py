"""Neighbours of the checkpoints and adapters that people have: other trainers, other formats, other parts, other files.

Each is merged with its expected values, or refused in one sentence that names what was found and the way out.
Guards `sources.instead`, `sources.quantised.names`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safemerge_recipes.errors import SourceError
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

UP = "model.layers.0.mlp.up_proj."


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


def merged(tmp_path: Path, family: Family, tensors: Tensors) -> Tensors:
    """A linear merge of everything with a fine-tuned model that was saved as `tensors`."""
    (tmp_path / "other").mkdir()
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, tmp_path / "other" / "model.safetensors")
    (tmp_path / "other" / "config.json").write_text(json.dumps(CONFIG))
    sources = f"{{aligned: {family.root}/aligned, finetuned: other, safety: {family.root}/safety}}"
    merge = "gate: {always: true}\nmerge: {method: linear, alpha: 0.75}\n"
    found: Tensors = run_recipe(tmp_path, f"sources: {sources}\n{merge}")[1]
    return found


# Names of other trainers


@pytest.mark.parametrize("prefix", ["model.", "base_model.model.", "policy.", "pretrained_model.", "llm.", "actor."])
def test_a_fine_tune_that_a_trainer_wrapped(tmp_path: Path, family: Family, prefix: str) -> None:
    written = merged(tmp_path, family, {f"{prefix}{name}": t for name, t in family.finetuned.items()})
    assert written.keys() == family.aligned.keys()
    for name in GATED:
        wanted = 0.75 * family.finetuned[name].double() + 0.25 * family.safety[name].double()
        torch.testing.assert_close(written[name].double(), wanted, rtol=3e-7, atol=1e-7)


HEADS = {"regression_head": "reward model", "rm_head": "reward model", "classifier": "classification head"}


@pytest.mark.parametrize("head", HEADS)
def test_another_head_is_named(tmp_path: Path, family: Family, head: str) -> None:
    rest = {name: t for name, t in family.finetuned.items() if "lm_head" not in name}
    with pytest.raises(SourceError, match=rf"{head}\.weight is a {HEADS[head]}"):
        merged(tmp_path, family, rest | {f"{head}.weight": torch.ones(1, HIDDEN)})


CHANGES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no head": (lambda t: {n: x for n, x in t.items() if "lm_head" not in n}, "without its output head"),
    "ZeRO-3": (lambda t: {n: torch.empty(0) if "layers" in n else x for n, x in t.items()}, "empty: DeepSpeed ZeRO-3"),
    "unmerged": (
        lambda t: {n.replace("q_proj.w", "q_proj.base_layer.w"): x for n, x in t.items()}, "never merged.*unload",
    ),
    "original": (
        lambda t: {n.replace("model.", "").replace("self_attn.q_proj", "attention.wq"): x for n, x in t.items()},
        "names are those of the original release",
    ),
    "fused": (
        lambda t: {n.replace("q_proj", "qkv_proj"): x for n, x in t.items() if ".k_" not in n and ".v_" not in n},
        "qkv_proj.weight holds several matrices",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_what_was_saved_otherwise_is_named_with_the_way_out(tmp_path: Path, family: Family, kind: str) -> None:
    change, told = CHANGES[kind]
    with pytest.raises(SourceError, match=told):
        merged(tmp_path, family, change(family.finetuned))


# Formats of quantisation that are named


U8, I8, I16, I32 = torch.uint8, torch.int8, torch.int16, torch.int32
FORMATS: dict[str, tuple[Tensors, str]] = {
    "EXL2": ({"q_weight": torch.ones(3, 40, dtype=I32), "q_scale": torch.ones(1, 5, dtype=I32)}, "no way back"),
    "EXL3": ({"trellis": torch.ones(2, 3, 48, dtype=I16), "suh": torch.ones(24)}, "no way back"),
    "HQQ": ({"W_q": torch.ones(480, dtype=U8), "scale": torch.ones(40, 1), "zero": torch.ones(40, 1)}, "dequantize"),
    "Quanto": ({"weight._data": torch.ones(40, 24, dtype=I8), "weight._scale": torch.ones(40, 1)}, "optimum-quanto"),
    "AQLM": ({"codes": torch.ones(40, 3, 1, dtype=I8), "codebooks": torch.ones(1, 256, 1, 8)}, "no exact way"),
    "torchao": ({"_weight_qdata": torch.ones(40, 24, dtype=I8), "_weight_scale": torch.ones(40, 1)}, "of torchao"),
    "EETQ int8": ({"weight": torch.ones(24, 40, dtype=I8), "weight_scales": torch.ones(40)}, "no way back"),
    "MLX": (
        {"weight": torch.ones(40, 3, dtype=torch.uint32), "scales": torch.ones(40, 1), "biases": torch.ones(40, 1)},
        "mlx_lm.convert --dequantize",
    ),
    "BitNet": ({"weight": torch.ones(10, 24, dtype=U8), "weight_scale": torch.ones(1)}, "master weights"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_format_that_is_not_read_is_named_with_the_way_out(tmp_path: Path, family: Family, kind: str) -> None:
    parts, way = FORMATS[kind]
    rest = {name: t for name, t in family.finetuned.items() if not name.startswith(UP)}
    with pytest.raises(SourceError, match=rf"other: .*quantised \({kind}.*before quantisation.*{way}"):
        merged(tmp_path, family, rest | {f"{UP}{end}": t for end, t in parts.items()})


# Parts


PARTS = ("visual", "vpm", "apm", "sam_model", "qformer", "talker", "conformer", "tts", "dinov2", "speculator", "mtp",
         "video_tower", "speech_encoder", "encoder")  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_an_adapter_of_another_part_never_lands_in_the_text_part(tmp_path: Path, family: Family, part: str) -> None:
    factors = {name.replace("model.", f"{part}.", 1): pair for name, pair in family.finetuned_factors.items()}
    write_adapter(tmp_path / "adapter", factors, 8)
    text = f"sources: {{aligned: {family.root}/aligned, finetuned: adapter}}\ngate: {{never: true}}\n"
    with pytest.raises(SourceError, match=rf"adapts {part}\..*model\.layers\.\d.* is like it, in another part"):
        prepare_recipe(tmp_path, text)


FOREIGN = {
    "lora_down": (lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"), "kohya"),
    "lora_a": (lambda key: key.replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b"), "MLX"),
    "lora_a.weight": (lambda key: key.replace("lora_A", "lora_a").replace("lora_B", "lora_b"), "torchtune"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_an_adapter_of_another_trainer_is_named(tmp_path: Path, family: Family, kind: str) -> None:
    change, told = FOREIGN[kind]
    write_adapter(tmp_path / "adapter", family.finetuned_factors, 8)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({change(key): t for key, t in load_file(path).items()}, path)
    text = f"sources: {{aligned: {family.root}/aligned, finetuned: adapter}}\ngate: {{never: true}}\n"
    with pytest.raises(SourceError, match=told):
        prepare_recipe(tmp_path, text)


# Files


FILES = {
    "zero_to_fp32.py": "DeepSpeed's partitions.*zero_to_fp32",
    "global_step10/zero_pp_rank_0_mp_rank_00_model_states.pt": "DeepSpeed's partitions",
    "__0_0.distcp": "FSDP.*accelerate merge-weights",
    "pytorch_model_fsdp_0/__0_0.distcp": "FSDP",
    "model_world_size_8_rank_0.pt": "rank of an FSDP run",
    "iter_0000100/mp_rank_00/model_optim_rng.pt": "Megatron",
    "model.nemo": "NeMo",
    "lit_model.pth": "LitGPT",
    "hf_model_0001_0.pt": "torchtune",
    "checkpoint-500/model.safetensors": "checkpoint-N",
    "flax_model.msgpack": "Flax",
    "model.onnx": "ONNX",
    "weights.npz": "MLX",
    "qmodel.pt": "HQQ",
    "ggml-model-q4_0.bin": "GGML",
}


@pytest.mark.parametrize("file", FILES)
def test_files_of_other_trainers_are_named_with_or_without_a_config(tmp_path: Path, family: Family, file: str) -> None:
    (tmp_path / "other" / file).parent.mkdir(parents=True)
    (tmp_path / "other" / file).write_bytes(b"x")
    text = f"sources: {{aligned: {family.root}/aligned, finetuned: {{model: other}}}}\ngate: {{never: true}}\n"
    for _ in range(2):
        with pytest.raises(SourceError, match=FILES[file]):
            prepare_recipe(tmp_path, text)
        (tmp_path / "other" / "config.json").write_text(json.dumps(CONFIG))
