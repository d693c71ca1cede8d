"""A patched model is, to the bit, the model the engine writes."""

import hashlib
import json

import pytest

pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

from safemerge_recipes.errors import CheckError  # noqa: E402
from safemerge_recipes.evaluation.live import LiveModel  # noqa: E402
from safemerge_recipes.events import ignore  # noqa: E402
from safemerge_recipes.pipeline.opening import resolve  # noqa: E402
from safemerge_recipes.pipeline.preparing import as_source, prepare  # noqa: E402
from safemerge_recipes.pipeline.writing import carry_out  # noqa: E402
from safemerge_recipes.recipe.loading import load_recipe  # noqa: E402
from safemerge_recipes.storage.digests import Digests  # noqa: E402
from safemerge_recipes.storage.workers import Resources  # noqa: E402
from tests.fixtures.chat_family import llama, make_family, save_model, tokenizer  # noqa: E402
from tests.fixtures.quantise import blocks  # noqa: E402

RESOURCES = Resources(1, 1 << 28)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def recipe(request, tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"), tied=request.param)


def prepared_for(recipe, *overrides):
    return prepare(resolve(load_recipe(recipe, overrides)), RESOURCES, ignore)


def written(prepared, folder):
    carry_out(prepared, folder, Digests(prepared.identities), ignore)
    return load_file(folder / "model.safetensors")


def digests(tensors):
    return {
        name: hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, value in tensors.items()
    }


def assert_is(live, tensors):
    state = live.model.state_dict()
    assert digests({name: state[name] for name in tensors}) == digests(tensors)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("merge.method=slerp",),
        ("merge.method=ties",),
        ("merge.method=dare_linear",),
        ("merge.method=add_safety_vector",),
        ("gate.always=true", "merge.alpha=0.3"),
        ("gate.never=true",),
    ],
    ids=str,
)
def test_a_patched_model_has_the_bytes_the_engine_writes(recipe, overrides, tmp_path):
    live = LiveModel(prepared_for(recipe), device="cpu", dtype="bfloat16")
    other = prepared_for(recipe, *overrides)
    live.become(other.graph)
    assert live.patched
    assert_is(live, written(other, tmp_path / "out"))


def test_going_on_patches_only_what_differs_and_comes_back(recipe, tmp_path):
    first, all_ = prepared_for(recipe), prepared_for(recipe, "gate.always=true")
    tensors = written(first, tmp_path / "first")
    live = LiveModel(first, tmp_path / "first", device="cpu", dtype="bfloat16")
    live.become(first.graph)
    assert live.patched == 0
    live.become(all_.graph)
    # The recipe merges half of the six gated matrices.
    assert live.patched == 3
    assert_is(live, written(all_, tmp_path / "all"))
    live.become(first.graph)
    assert live.patched == 3
    assert_is(live, tensors)


def test_roles_that_exist_only_as_adapters_are_those_of_peft(recipe, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    prepared = prepared_for(recipe)
    live = LiveModel(prepared, device="cpu", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(recipe.parent / "base", dtype=torch.float32)
    live.become(as_source(prepared, "base"))
    assert_is(live, load_file(recipe.parent / "base" / "model.safetensors"))
    for role, adapter in (("aligned", "alignment"), ("finetuned", "task")):
        model = PeftModel.from_pretrained(model, recipe.parent / adapter).merge_and_unload()
        live.become(as_source(prepared, role))
        for name, value in model.state_dict().items():
            torch.testing.assert_close(live.model.state_dict()[name], value.bfloat16(), rtol=1e-2, atol=1e-4)
    assert live.patched == 6


def test_a_model_that_computes_wider_gets_the_same_numbers(recipe, tmp_path):
    prepared = prepared_for(recipe)
    live = LiveModel(prepared, device="cpu", dtype="float32")
    live.become(prepared.graph)
    state = live.model.state_dict()
    for name, value in written(prepared, tmp_path / "out").items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], value.float())


def test_tensors_stored_otherwise_are_written_and_loaded(tmp_path):
    """Mixtral's experts are apart in the files and stacked in the loaded model."""
    from transformers import MixtralConfig, MixtralForCausalLM

    tok = tokenizer()
    for seed, role in enumerate(("base", "aligned", "finetuned", "safety")):
        torch.manual_seed(seed)
        config = MixtralConfig(
            vocab_size=len(tok), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=2, max_position_embeddings=64, pad_token_id=3, bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
        save_model(MixtralForCausalLM(config), tok, tmp_path / role)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sources: {base: ./base, aligned: ./aligned, finetuned: ./finetuned, safety: ./safety}\n"
                      "gate: {fraction: 0.5}\n")  # fmt: skip
    prepared = prepared_for(recipe)
    live = LiveModel(prepared, device="cpu", dtype="bfloat16")
    stacked = set(live.model.state_dict()) - {tensor.name for tensor in prepared.plan.tensors}
    assert stacked, "transformers no longer stacks experts: this test wants another architecture"
    live.become(prepared.graph)
    carry_out(prepared, tmp_path / "out", Digests(prepared.identities), ignore)
    loaded = MixtralForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert digests(live.model.state_dict()) == digests(loaded.state_dict())


def test_what_transformers_cannot_load_is_said_plainly(tmp_path):
    recipe = make_family(tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    with pytest.raises(CheckError, match="transformers could not load it"):
        LiveModel(prepared_for(recipe), device="cpu")
    assert not list(tmp_path.glob("safemerge-*"))


def test_full_checkpoints_in_shards_load_too(tmp_path):
    tok = tokenizer()
    for seed, role in enumerate(("aligned", "finetuned")):
        torch.manual_seed(seed)
        llama(len(tok)).to(torch.bfloat16).save_pretrained(tmp_path / role, max_shard_size="20KB")
        tok.save_pretrained(tmp_path / role)
    assert (tmp_path / "aligned" / "model.safetensors.index.json").exists()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "sources: {aligned: ./aligned, finetuned: ./finetuned, safety: ./aligned}\ngate: {always: true}\n"
    )
    prepared = prepared_for(recipe)
    live = LiveModel(prepared, device="cpu", dtype="bfloat16")
    live.become(prepared.graph)
    carry_out(prepared, tmp_path / "out", Digests(prepared.identities), ignore)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert_is(live, {name: value for file in files for name, value in load_file(file).items()})


@pytest.mark.slow
def test_a_family_on_a_quantised_base_is_scored_as_it_would_be_written(tmp_path):
    """FP8, which transformers turns into plain weights where no GPU is; both models answer alike to rounding."""
    from transformers import AutoModelForCausalLM

    recipe = make_family(tmp_path)
    file, config = tmp_path / "base" / "model.safetensors", tmp_path / "base" / "config.json"
    stored = {}
    for name, weight in load_file(file).items():
        stored |= blocks(name, weight.float(), (128, 128)) if "proj" in name else {name: weight}
    save_file(stored, file, metadata={"format": "pt"})
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": fp8}))
    live = LiveModel(prepared_for(recipe, "gate.never=true"), device="cpu", dtype="float32")
    prompt = torch.arange(5, 25)[None]
    other = prepared_for(recipe, "gate.always=true", "merge.alpha=0.2")
    before = live.model(prompt).logits
    live.become(other.graph)
    carry_out(other, tmp_path / "out", Digests(other.identities), ignore)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    found, wanted = live.model(prompt).logits, model(prompt).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3 * wanted.abs().max().item())
    assert (found - before).abs().max() > 20 * (found - wanted).abs().max()
