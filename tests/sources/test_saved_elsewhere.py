"""Checkpoints and adapters as other libraries and training wrappers saved them: found by name, exact, or refused.

Guards `sources.quantised.bitsandbytes`, `sources.quantised.gptq`, `sources.side_files`.
"""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from safemerge_recipes.errors import SourceError
from safemerge_recipes.sources.matching import renamed
from safemerge_recipes.sources.model_config import REMOVED, dtype_edits, edited
from safemerge_recipes.sources.parts import is_draft, part_of, unwrapped
from safemerge_recipes.weights.algebra import Stored, Weight
from tests.fixtures.plain_family import (
    BLOCKS,
    CONFIG,
    HIDDEN,
    MATRICES,
    VOCABULARY,
    WIDE,
    make_family,
    prepare_recipe,
    random_factors,
    random_model,
    run_recipe,
    write_adapter,
    write_model,
)

MERGE = "{method: linear, alpha: 0.75}"


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


def model(folder, tensors, **config):
    write_model(folder, tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))


def merged(tmp_path, family, name, tensors, **config):
    """The output of a linear merge of every tensor with the fine-tuned model saved as `tensors`, and its notes."""
    model(tmp_path / name, tensors, **config)
    sources = f"{{aligned: {family.root}/aligned, finetuned: {name}, safety: {family.root}/safety}}"
    prepared, written = run_recipe(tmp_path, f"sources: {sources}\ngate: {{always: true}}\nmerge: {MERGE}\n")
    return written, prepared.plan.warnings


def expected(family):
    """0.75 W_f + 0.25 W_s of the gated matrices, W_f of all others, in float64."""
    found = {name: tensor.double() for name, tensor in family.finetuned.items()}
    for i in range(BLOCKS):
        for module in MATRICES:
            name = f"model.layers.{i}.{module}.weight"
            found[name] = 0.75 * found[name] + 0.25 * family.safety[name].double()
    return found


def assert_equal(written, wanted):
    assert written.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(written[name].double(), tensor.double(), rtol=3e-7, atol=1e-7, msg=name)


PREFIXES = {
    "nested": lambda name: name.replace("model.", "model.language_model.", 1),
    "bare": lambda name: name.removeprefix("model."),
    "compiled": lambda name: f"_orig_mod.{name}",
    "parallel": lambda name: f"module.{name}",
    "sharded": lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "multimodal": lambda name: f"language_model.{name}",
}


@pytest.mark.parametrize("saved", PREFIXES)
def test_a_fine_tune_saved_under_other_prefixes_merges_as_if_under_the_aligned_names(tmp_path, family, saved):
    other = {PREFIXES[saved](name): tensor for name, tensor in family.finetuned.items()}
    assert other.keys() != family.finetuned.keys()
    written, notes = merged(tmp_path, family, "other", other)
    assert_equal(written, expected(family))
    if saved not in ("compiled", "parallel", "sharded"):
        assert any("found under other names" in note for note in notes)


def test_names_are_not_matched_where_one_is_left_over(tmp_path, family):
    other = {name.removeprefix("model."): tensor for name, tensor in family.finetuned.items()}
    other["adapter.extra.weight"] = torch.ones(3, 3)
    with pytest.raises(SourceError, match=r"lacks 20 tensors .* and has 21 tensors"):
        merged(tmp_path, family, "other", other)


def test_names_are_not_matched_across_parts():
    def stored(name, shape=(4, 4)):
        from safemerge_recipes.storage.safetensors import TensorRef

        return Weight.of(Stored(TensorRef("file", 0, 64, "F32", shape)))

    own = {"vision_tower.layers.0.self_attn.q_proj.weight": stored("a")}
    like = {"model.layers.0.self_attn.q_proj.weight": stored("b")}
    assert renamed(own, like, ())[1] == ()
    own = {"language_model.layers.0.self_attn.q_proj.weight": stored("a")}
    assert renamed(own, like, ())[1] == tuple(zip(own, like, strict=True))
    wide = {"language_model.layers.0.self_attn.q_proj.weight": stored("a", (2, 8))}
    assert renamed(wide, like, ())[1] == ()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "text"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "text"),
        ("model.visual.blocks.0.attn.qkv.weight", "vision"),
        ("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight", "vision"),
        ("audio_tower.layers.0.fc1.weight", "audio"),
        ("mtp.layers.0.self_attn.q_proj.weight", "draft"),
        ("multi_modal_projector.linear_1.weight", "projector"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder"),
        ("model.decoder.layers.0.encoder_attn.q_proj.weight", "decoder"),
    ],
)
def test_parts_are_told_by_the_path(name, part):
    assert part_of(name) == part


def test_wrappers_are_taken_off_wherever_they_stand():
    assert unwrapped("module._orig_mod.model.layers.0._fsdp_wrapped_module.mlp.weight") == "model.layers.0.mlp.weight"
    assert unwrapped("model.module.weight") == "model.module.weight"


# Experts


def experts(family, seed):
    """A mixture of three experts, saved one by one and fused."""
    draw = torch.Generator().manual_seed(seed)
    separate = {name: tensor for name, tensor in family.aligned.items() if ".mlp." not in name}
    fused = dict(separate)
    for i in range(BLOCKS):
        gate, up = (torch.randn(3, WIDE, HIDDEN, generator=draw) for _ in range(2))
        down = torch.randn(3, HIDDEN, WIDE, generator=draw)
        parent = f"model.layers.{i}.mlp.experts"
        for e in range(3):
            for projection, stack in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                separate[f"{parent}.{e}.{projection}.weight"] = stack[e]
        fused |= {f"{parent}.gate_up_proj": torch.cat([gate, up], 1), f"{parent}.down_proj": down}
    return separate, fused


@pytest.mark.parametrize("form", ["separate", "fused"])
def test_experts_of_a_full_fine_tune_may_be_saved_the_other_way(tmp_path, family, form):
    aligned, tuned = experts(family, 1), experts(family, 2)
    own = ("separate", "fused").index(form)
    model(tmp_path / "aligned", aligned[own], model_type="qwen3_moe")
    model(tmp_path / "tuned", tuned[1 - own], model_type="qwen3_moe")
    sources = "{aligned: aligned, finetuned: tuned, safety: aligned}"
    prepared, written = run_recipe(tmp_path, f"sources: {sources}\ngate: {{always: true}}\nmerge: {MERGE}\n")
    wanted = {
        name: 0.75 * tuned[own][name].double() + 0.25 * tensor.double() if "experts" in name else tensor.double()
        for name, tensor in aligned[own].items()
    }
    assert_equal(written, wanted)
    assert any("experts" in note for note in prepared.plan.warnings)


@pytest.mark.parametrize(
    "projections", [["gate_proj"], ["up_proj", "down_proj"], ["gate_proj", "up_proj", "down_proj"]]
)
def test_an_adapter_of_single_experts_adds_to_the_fused_tensors(tmp_path, family, projections):
    _, fused = experts(family, 1)
    model(tmp_path / "aligned", fused, model_type="qwen3_moe")
    draw, factors, wanted = torch.Generator().manual_seed(3), {}, {name: t.double() for name, t in fused.items()}
    for i in range(BLOCKS):
        for e in (0, 2):
            for projection in projections:
                d_out, d_in = (HIDDEN, WIDE) if projection == "down_proj" else (WIDE, HIDDEN)
                a, b = torch.randn(4, d_in, generator=draw), torch.randn(d_out, 4, generator=draw)
                factors[f"model.layers.{i}.mlp.experts.{e}.{projection}"] = a, b
                name = f"model.layers.{i}.mlp.experts." + ("down_proj" if projection == "down_proj" else "gate_up_proj")
                first = WIDE if projection == "up_proj" else 0
                wanted[name][e, first : first + d_out] += 2 * b.double() @ a.double()
    write_adapter(tmp_path / "adapter", factors, 8)
    _, written = run_recipe(tmp_path, "sources: {aligned: aligned, finetuned: adapter}\ngate: {never: true}\n")
    for name, tensor in wanted.items():
        torch.testing.assert_close(written[name].double(), tensor, rtol=1e-6, atol=1e-5, msg=name)


def test_experts_brought_together_are_gated_by_the_same_number(tmp_path, family):
    """ρ of a stack is that of its members, whichever way the fine-tuned side was saved."""
    base, aligned, tuned = (experts(family, seed) for seed in (7, 1, 2))
    for name, (_, fused) in (("base", base), ("aligned", aligned)):
        model(tmp_path / name, fused, model_type="qwen3_moe")
    found = []
    for form in (0, 1):
        model(tmp_path / f"tuned{form}", tuned[form], model_type="qwen3_moe")
        sources = f"{{base: base, aligned: aligned, finetuned: tuned{form}}}"
        plan = prepare_recipe(tmp_path, f"sources: {sources}\ngate: {{tau: 0.5}}\nmerge: {{method: drop}}\n").plan
        found.append({line.name: line.as_json()["rho"] for line in plan.tensors if "experts" in line.name})
    assert found[0].keys() == found[1].keys() != set()
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], abs=1e-6), name


# Multi-token prediction


def with_drafts(tensors):
    draw = torch.Generator().manual_seed(9)
    extra = {f"mtp.layers.0.{module}.weight": torch.randn(shape, generator=draw) for module, shape in MATRICES.items()}
    extra |= {
        f"model.layers.{BLOCKS}.{module}.weight": torch.randn(shape, generator=draw)
        for module, shape in MATRICES.items()
    }
    return tensors | extra | {f"model.layers.{BLOCKS}.eh_proj.weight": torch.randn(HIDDEN, 2 * HIDDEN)}


@pytest.mark.parametrize("side", ["full", "adapter"])
def test_tensors_for_multi_token_prediction_stay_the_aligned_models(tmp_path, family, side):
    aligned = with_drafts(family.aligned)
    model(tmp_path / "aligned", aligned, num_nextn_predict_layers=1)
    finetuned = f"{family.root}/finetuned" if side == "full" else f"{{adapter: {family.root}/finetuned-adapter}}"
    sources = f"{{aligned: aligned, finetuned: {finetuned}}}"
    prepared, written = run_recipe(tmp_path, f"sources: {sources}\ngate: {{never: true}}\n")
    assert written.keys() == aligned.keys()
    for name in aligned.keys() - family.aligned.keys():
        assert torch.equal(written[name], aligned[name]), name
    for name in family.aligned:
        wanted = family.finetuned[name].double() if side == "full" else family.aligned[name].double()
        if side == "adapter" and name.removesuffix(".weight") in family.finetuned_factors:
            wanted = wanted + family.lora("finetuned", name)
        torch.testing.assert_close(written[name].double(), wanted, rtol=0, atol=1e-6)
    if side == "full":
        reasons = {line.reason for line in prepared.plan.tensors if line.name not in family.aligned}
        assert reasons == {"only in aligned"}


def test_a_fine_tune_with_tensors_for_multi_token_prediction_of_its_own(tmp_path, family):
    written, notes = merged(tmp_path, family, "drafts", with_drafts(family.finetuned))
    assert_equal(written, expected(family))
    assert any("left out" in note for note in notes)


def test_blocks_behind_the_last_one_are_drafts_of_the_text_part_alone():
    config = {"text_config": {"num_hidden_layers": 2}}
    assert is_draft("model.layers.2.eh_proj.weight", config)
    assert not is_draft("model.layers.1.mlp.up_proj.weight", config)
    assert not is_draft("vision_tower.encoder.layers.7.self_attn.q_proj.weight", config)


# Adapters


def adapter_with(tmp_path, family, change, **config):
    """The family's adapter with its file's tensors changed; what an output that keeps it holds."""
    write_adapter(tmp_path / "adapter", family.finetuned_factors, 8, **config)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    return run_recipe(
        tmp_path, f"sources: {{aligned: {family.root}/aligned, finetuned: adapter}}\ngate: {{never: true}}\n"
    )


WRAPPED = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "parallel": lambda key: f"module.{key}",
    "both": lambda key: f"module._orig_mod.{key}",
    "inside": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "checkpointed": lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "live": lambda key: key.replace(".weight", ".default.weight"),
    "named": lambda key: key.replace(".weight", ".gsm8k.weight"),
    "bare": lambda key: key.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrappers_in_an_adapters_names_change_nothing(tmp_path, family, wrapped):
    change = WRAPPED[wrapped]
    _, written = adapter_with(tmp_path, family, lambda tensors: {change(key): t for key, t in tensors.items()})
    for name, tensor in family.aligned.items():
        wanted = tensor.double()
        if name.removesuffix(".weight") in family.finetuned_factors:
            wanted = wanted + family.lora("finetuned", name)
        torch.testing.assert_close(written[name].double(), wanted, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("fault", ["", "a shard", "a name", "another"])
def test_an_adapter_in_shards_with_an_index(tmp_path, family, fault):
    write_adapter(tmp_path / "adapter", family.finetuned_factors, 8)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    listed = {}
    for number in range(3):
        file = f"adapter_model-{number + 1:05d}-of-00003.safetensors"
        part = {name: tensor for place, (name, tensor) in enumerate(tensors.items()) if place % 3 == number}
        listed |= dict.fromkeys(part, file)
        save_file(part, tmp_path / "adapter" / file)
    if fault == "a shard":
        (tmp_path / "adapter" / file).unlink()
    if fault == "a name":
        del listed[next(iter(listed))]
    if fault == "another":
        listed["another.lora_A.weight"] = file
    (tmp_path / "adapter" / f"{path.name}.index.json").write_text(json.dumps({"weight_map": listed}))
    text = f"sources: {{aligned: {family.root}/aligned, finetuned: adapter}}\ngate: {{never: true}}\n"
    if fault:
        with pytest.raises(SourceError, match=r"index\.json: (names|does not name)|00003.*cannot be read"):
            prepare_recipe(tmp_path, text)
        return
    prepared, written = run_recipe(tmp_path, text)
    for name in written:
        wanted = family.aligned[name].double()
        if name.removesuffix(".weight") in family.finetuned_factors:
            wanted = wanted + family.lora("finetuned", name)
        torch.testing.assert_close(written[name].double(), wanted, rtol=0, atol=1e-6, msg=name)
    assert sum("adapter_model-0" in one.path for one in prepared.identities) == 3


def test_two_adapters_in_one_file_are_refused_by_their_names(tmp_path, family):
    def both(tensors):
        return {
            k.replace(".weight", f".{name}.weight"): t.clone() for name in ("one", "two") for k, t in tensors.items()
        }

    with pytest.raises(SourceError, match="several adapters, 'one' and 'two'"):
        adapter_with(tmp_path, family, both)


def test_empty_tensors_name_zero_3(tmp_path, family):
    with pytest.raises(SourceError, match=r"ZeRO-3.*zero_to_fp32"):
        adapter_with(tmp_path, family, lambda tensors: {key: torch.zeros(0) for key in tensors})


def test_factors_of_all_experts_in_one_tensor_are_named(tmp_path, family):
    with pytest.raises(SourceError, match="not PEFT's format"):
        adapter_with(tmp_path, family, lambda tensors: {key: t[None].repeat(2, 1, 1) for key, t in tensors.items()})


def test_a_text_adapter_on_a_multimodal_model_touches_its_text_part_alone(tmp_path, family):
    towers = {
        f"vision_tower.encoder.layers.{i}.self_attn.{q}.weight": torch.randn(HIDDEN, HIDDEN)
        for i in range(BLOCKS + 2)
        for q in ("q_proj", "o_proj")
    }
    tensors = {f"language_model.{name}": tensor for name, tensor in family.aligned.items()} | towers
    model(tmp_path / "aligned", tensors)
    _, written = run_recipe(
        tmp_path, f"sources: {{aligned: aligned, finetuned: {family.root}/finetuned-adapter}}\ngate: {{never: true}}\n"
    )
    for name, tensor in towers.items():
        assert torch.equal(written[name], tensor), name
    for name in family.aligned:
        wanted = family.aligned[name].double()
        if name.removesuffix(".weight") in family.finetuned_factors:
            wanted = wanted + family.lora("finetuned", name)
        torch.testing.assert_close(written[f"language_model.{name}"].double(), wanted, rtol=0, atol=1e-6)


def test_a_text_adapter_never_lands_in_a_tower_that_has_more_blocks(tmp_path, family):
    tensors = {f"language_model.{name}": tensor for name, tensor in family.aligned.items()}
    tensors |= {f"vision_tower.layers.{i}.self_attn.q_proj.weight": torch.randn(HIDDEN, HIDDEN) for i in range(6)}
    model(tmp_path / "aligned", tensors)
    draw = torch.Generator().manual_seed(0)
    factors = {
        f"model.layers.{i}.self_attn.q_proj": (torch.randn(4, HIDDEN, generator=draw), torch.randn(HIDDEN, 4))
        for i in range(4)  # the text part has two
    }
    write_adapter(tmp_path / "adapter", factors, 8)
    with pytest.raises(SourceError, match=r"adapts model\.layers\.2.*does not have"):
        prepare_recipe(tmp_path, "sources: {aligned: aligned, finetuned: adapter}\ngate: {never: true}\n")


def test_a_name_that_fits_two_places_is_refused_with_both(tmp_path, family):
    tensors = {f"{part}.{name}": t.clone() for part in ("thinker", "talker") for name, t in family.aligned.items()}
    model(tmp_path / "aligned", tensors)
    with pytest.raises(SourceError, match=r"could be (thinker|talker).* or (thinker|talker)"):
        prepare_recipe(
            tmp_path,
            f"sources: {{aligned: aligned, finetuned: {family.root}/finetuned-adapter}}\ngate: {{never: true}}\n",
        )


@pytest.mark.parametrize("rows", [VOCABULARY + 2, VOCABULARY - 2])
def test_an_embedding_and_head_that_peft_saved_of_its_own_accord(tmp_path, family, rows):
    tokens = {f"t{n}": n for n in range(min(rows, VOCABULARY - 2))}
    draw = torch.Generator().manual_seed(4)
    embedding, head = (torch.randn(rows, HIDDEN, generator=draw) for _ in range(2))

    def change(tensors):
        prefix = "base_model.model."
        return tensors | {f"{prefix}model.embed_tokens.weight": embedding, f"{prefix}lm_head.weight": head}

    model(tmp_path / "aligned", family.aligned)
    write_adapter(tmp_path / "adapter", family.finetuned_factors, 8)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    for folder, own in (("aligned", tokens), ("adapter", tokens | {"<a>": rows - 1} if rows > VOCABULARY else tokens)):
        (tmp_path / folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": own}, "added_tokens": []}))
    _, written = run_recipe(tmp_path, "sources: {aligned: aligned, finetuned: adapter}\ngate: {never: true}\n")
    assert torch.equal(written["model.embed_tokens.weight"], embedding)
    assert torch.equal(written["lm_head.weight"], head)
    assert json.loads((tmp_path / "out0" / "config.json").read_text())["vocab_size"] == rows


def test_any_other_whole_tensor_stays_unexpected(tmp_path, family):
    with pytest.raises(SourceError, match=r"unexpected key 'model\.projection\.weight'"):
        adapter_with(
            tmp_path, family, lambda tensors: tensors | {"base_model.model.model.projection.weight": torch.ones(3, 3)}
        )


# config.json and side files


@pytest.mark.parametrize(
    "config",
    [
        {key: value for key, value in CONFIG.items() if key != "num_key_value_heads"},
        {"model_type": "llama", "text_config": {k: v for k, v in CONFIG.items() if k != "model_type"}},
    ],
)
def test_configs_are_compared_only_where_both_say_something(tmp_path, family, config):
    write_model(tmp_path / "other", family.finetuned)
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    sources = f"{{aligned: {family.root}/aligned, finetuned: other, safety: {family.root}/safety}}"
    _, written = run_recipe(tmp_path, f"sources: {sources}\ngate: {{always: true}}\nmerge: {MERGE}\n")
    assert_equal(written, expected(family))


def test_sizes_that_differ_are_refused(tmp_path, family):
    with pytest.raises(SourceError, match="num_attention_heads '8'"):
        merged(tmp_path, family, "other", family.finetuned, num_attention_heads=8)


def test_a_stale_quantization_config_is_judged_by_the_tensors_and_dropped(tmp_path, family):
    stale = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    written, notes = merged(tmp_path, family, "other", family.finetuned, quantization_config=stale)
    assert_equal(written, expected(family))
    config = json.loads((tmp_path / "out0" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["hidden_size"] == HIDDEN
    assert any("quantization_config" in note for note in notes)


QUANTISED = {
    "FP8": ("model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(1, 1)),
    "GPTQ codes without .scales": ("model.layers.0.mlp.up_proj.qweight", torch.ones(3, 3, dtype=torch.int32)),
    "MXFP4 codes without": ("model.layers.0.mlp.experts.gate_up_proj_blocks", torch.ones(3, 3, dtype=torch.uint8)),
    "bitsandbytes 4-bit": ("model.layers.0.mlp.up_proj.weight.absmax", torch.ones(3)),
    "packed integers without": ("model.layers.0.mlp.up_proj.weight_packed", torch.ones(3, 3, dtype=torch.int32)),
}


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_named(tmp_path, family, kind, declared):
    name, tensor = QUANTISED[kind]
    config = {"quantization_config": {"quant_method": "x"}} if declared else {}
    with pytest.raises(SourceError, match=kind):
        merged(tmp_path, family, "other", family.finetuned | {name: tensor}, **config)


@pytest.mark.parametrize(("asked", "says"), [(None, "bfloat16"), ("float16", "float16"), ("float32", "float32")])
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_config_says_the_dtype_that_was_written(tmp_path, family, asked, says, key):
    model(tmp_path / "aligned", {k: t.bfloat16() for k, t in family.aligned.items()}, **{key: "bfloat16"})
    model(tmp_path / "finetuned", family.finetuned, **{key: "float32"}, text_config={key: "float32"})
    rest = f"output: {{dtype: {asked}}}\n" if asked else ""
    _, written = run_recipe(tmp_path, "sources: {aligned: aligned, finetuned: finetuned}\ngate: {never: true}\n" + rest)
    config = json.loads((tmp_path / "out0" / "config.json").read_text())
    assert {tensor.dtype for tensor in written.values()} == {getattr(torch, says)}
    assert config[key] == config["text_config"][key] == says


def test_edits_leave_every_other_byte():
    content = b'{"a": 1,   "dtype": "float32", "text_config": {"dtype": "float32"}, "b": "dtype"}'
    edits = dtype_edits(json.loads(content), {"BF16": 9, "F32": 1})
    assert edited(content, edits) == content.replace(b'"float32"', b'"bfloat16"')
    assert dtype_edits({"dtype": None}, {"BF16": 9}) == {}
    assert json.loads(edited(content, {"text_config": REMOVED})) == {"a": 1, "dtype": "float32", "b": "dtype"}


def test_a_folder_owns_the_tokenizer_only_with_a_vocabulary(tmp_path, family):
    model(tmp_path / "aligned", family.aligned)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "aligned" / name).write_text(json.dumps({"of": f"aligned {name}"}))
    write_adapter(tmp_path / "adapter", family.finetuned_factors, 8)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "adapter" / name).write_text(json.dumps({"of": f"adapter {name}"}))
    prepared, _ = run_recipe(tmp_path, "sources: {aligned: aligned, finetuned: adapter}\ngate: {never: true}\n")
    found = {
        path.name: json.loads(path.read_text())["of"]
        for path in (tmp_path / "out0").iterdir()
        if "token" in path.name or "chat" in path.name
    }
    assert found == {
        "tokenizer.json": "aligned tokenizer.json",
        "tokenizer_config.json": "adapter tokenizer_config.json",
        "chat_template.jinja": "adapter chat_template.jinja",
    }
    assert not any("vocabulary (" in warning for warning in prepared.plan.warnings)


def test_an_output_without_a_tokenizer_is_noticed(tmp_path, family):
    _, notes = merged(tmp_path, family, "other", family.finetuned)
    assert any("no source has a tokenizer's vocabulary" in note for note in notes)


def test_links_into_the_hubs_blobs_are_followed_and_no_others(tmp_path, family):
    write_model(tmp_path / "linked", family.finetuned)
    blobs = tmp_path / "hub" / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        os.replace(tmp_path / "linked" / name, blobs / name[:5])
        (tmp_path / "linked" / name).symlink_to(blobs / name[:5])
    text = f"sources: {{aligned: {family.root}/aligned, finetuned: linked}}\ngate: {{never: true}}\n"
    _, written = run_recipe(tmp_path, text)
    assert_equal(written, {name: tensor.double() for name, tensor in family.finetuned.items()})
    elsewhere = tmp_path / "private"
    os.replace(blobs / "model", elsewhere)
    (tmp_path / "linked" / "model.safetensors").unlink()
    (tmp_path / "linked" / "model.safetensors").symlink_to(elsewhere)
    with pytest.raises(SourceError, match="leads out of its folder"):
        prepare_recipe(tmp_path, text)


def test_the_output_of_a_renamed_fine_tune_loads_without_missing_keys(tmp_path, family):
    from transformers import AutoModelForCausalLM

    other = {PREFIXES["nested"](name): tensor for name, tensor in family.finetuned.items()}
    merged(tmp_path, family, "other", other, rms_norm_eps=1e-6)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out0", output_loading_info=True, local_files_only=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_factors_and_models_of_the_family_are_what_the_tests_take_them_for():
    assert random_factors(1, 2).keys() == {f"model.layers.{i}.{module}" for i in range(BLOCKS) for module in MATRICES}
    assert len(random_model(1)) == 2 + 1 + BLOCKS * (len(MATRICES) + 2)


def test_a_scale_beyond_float32_is_one_message(tmp_path, family):
    write_adapter(tmp_path / "adapter", family.finetuned_factors, 1)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 1e300}))
    with pytest.raises(SourceError, match="lora_alpha is '1e\\+300'"):
        prepare_recipe(
            tmp_path, f"sources: {{aligned: {family.root}/aligned, finetuned: adapter}}\ngate: {{never: true}}\n"
        )


@pytest.mark.parametrize("form", ["full", "adapter"])
def test_an_adapter_that_float16_cannot_hold_is_refused_in_either_format(tmp_path, form):
    family = make_family(tmp_path / "family", torch.float16)
    write_adapter(tmp_path / "over", {k: (a * 1e3, b * 1e3) for k, (a, b) in family.finetuned_factors.items()}, 8)
    sources = "{aligned: family/aligned, finetuned: over, safety: family/safety-adapter}"
    rest = f"output: {{format: {form}}}\n"
    with pytest.raises(SourceError, match="do not fit F16"):
        run_recipe(tmp_path, f"sources: {sources}\ngate: {{always: true}}\nmerge: {MERGE}\n{rest}")


# What is not a checkpoint


FOLDERS = {
    "model-00001-of-00002.safetensors": "2 shards|1 shards",
    "pytorch_model.bin": "pickle",
    "consolidated.00.pth": "pickle",
    "model-q4.gguf": r"llama\.cpp.*gguf_file",
    "consolidated.safetensors": "original release",
    "weights.safetensors": "rename it",
    "notes.txt": "no model.safetensors",
    "mp_rank_00_model_states.pt": "DeepSpeed's partitions",
    "mp_rank_00": "Megatron checkpoint",
    "context": "NeMo checkpoint",
    "onnx": "exported for inference",
    "rank0.engine": "exported for inference",
    "vocabulary.json": "exported for CTranslate2",
    "ndarray-cache.json": "compiled for MLC",
    "model_index.json": "pipeline of diffusers",
    "manifest.ocdbt": "Orbax checkpoint",
    "epoch=3.ckpt": "Lightning.*a pickle",
    "optimizer.pt": r"state of a training run \(optimizer, scheduler\) and no model",
    "final.pth": "pickled files",
    "model.safetensors.incomplete": "download that did not end",
    "model.safetensors.zip": "archive; .*unpack it",
    "pytorch_model.bin.index.json": "index of pickled weights",
    "tokenizer.json": "a tokenizer and no weights",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_other_weight_files_are_named_with_the_way_out(tmp_path, family, name):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "other" / name).write_bytes(b"x")
    text = f"sources: {{aligned: {family.root}/aligned, finetuned: {{model: other}}}}\ngate: {{never: true}}\n"
    with pytest.raises(SourceError, match=FOLDERS[name]):
        prepare_recipe(tmp_path, text)


BEGINNINGS = {
    b"version https://git-lfs.github.com/spec/v1": "pointer of Git LFS.*git lfs pull",
    b"<!DOCTYPE html><html>": "a web page",
    b"PK\x03\x04" + bytes(60): "an archive or a pickle",
    b"GGUF" + bytes(60): "a GGUF file",
}


@pytest.mark.parametrize("content", BEGINNINGS)
def test_other_files_of_the_right_name_are_told_by_their_beginning(tmp_path, family, content):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "other" / "model.safetensors").write_bytes(content)
    text = f"sources: {{aligned: {family.root}/aligned, finetuned: {{model: other}}}}\ngate: {{never: true}}\n"
    with pytest.raises(SourceError, match=BEGINNINGS[content]):
        prepare_recipe(tmp_path, text)


@pytest.mark.parametrize("module", ["cross_attn", "encoder_attn", "crossattention", "adapter_attn", "self_attn.draft"])
def test_another_attention_of_the_same_block_takes_no_update(tmp_path, family, module):
    """Its matrices have the names and shapes of the block's own attention."""
    factors = {
        f"model.layers.{i}.{module}.q_proj": (torch.randn(4, HIDDEN), torch.randn(HIDDEN, 4)) for i in range(BLOCKS)
    }
    write_adapter(tmp_path / "adapter", factors, 8)
    text = f"sources: {{aligned: {family.root}/aligned, finetuned: adapter}}\ngate: {{never: true}}\n"
    with pytest.raises(SourceError, match=r"adapts model\.layers\.0.*q_proj\.weight, which .* does not have"):
        prepare_recipe(tmp_path, text)


def test_a_classification_head_is_named(tmp_path, family):
    tensors = {name: t for name, t in family.finetuned.items() if name != "lm_head.weight"}
    with pytest.raises(SourceError, match=r"score\.weight is a classification head"):
        merged(tmp_path, family, "other", tensors | {"score.weight": torch.ones(2, HIDDEN)})


def test_loftq_is_named(tmp_path, family):
    with pytest.raises(SourceError, match="LoftQ"):
        adapter_with(tmp_path, family, lambda tensors: tensors, init_lora_weights="loftq")
