"""Adapters and checkpoints of every kind mean what PEFT and transformers say they mean, or are refused by name.

Guards `engine.adapter.config`, `engine.adapter.experts`, `engine.adapter.parts`, `engine.adapter.update`,
`engine.adapter.in_memory`, `engine.adapter.write`, `sources.checkpoint`, `sources.experts`, `sources.locate`,
`sources.reconcile`, `sources.vocabulary`, `sources.peft.config`, `sources.peft.keys`, `sources.peft.apply`,
`sources.peft.application`, `sources.peft.layers`, `sources.peft.expert_updates`, `methods.stacks`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safemerge_recipes.errors import CheckError, PlanError, SourceError
from safemerge_recipes.storage import cut
from tests.fixtures import peft_families
from tests.whole.fidelity_table import EXACT, KINDS, MIXTURES, Bench, cases

TABLE = Path(__file__).parents[2] / "docs" / "fidelity.md"
QUICK = [
    (family, kind)
    for family, kind in cases()
    if family in ("llama", "gpt2")
    or (kind == "LoRA" and family not in peft_families.WIDER)
    or (kind == "experts" and family in MIXTURES)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("families"))


def _rows() -> dict[tuple[str, str], list[str]]:
    rows = [line.strip("| \n").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    return {(row[0], row[1].removesuffix(" (t)")): row[2:] for row in rows[1:]}


def _check(bench: Bench, family: str, kind: str) -> None:
    """The case is exact or refused, as the published table says."""
    outcome = bench.outcome(family, kind)
    for found, shown in zip((outcome.kept, outcome.merged, outcome.adapter), _rows()[family, kind], strict=True):
        assert isinstance(found, str) == shown.startswith(("refused", "–")), found
        if isinstance(found, float):
            assert found <= EXACT


@pytest.mark.parametrize(("family", "kind"), QUICK)
def test_adapters_are_exact_or_refused(bench: Bench, family: str, kind: str) -> None:
    _check(bench, family, kind)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), [case for case in cases() if case not in QUICK])
def test_adapters_are_exact_or_refused_in_every_family(bench: Bench, family: str, kind: str) -> None:
    _check(bench, family, kind)


def test_the_published_table_has_every_case() -> None:
    assert list(_rows()) == cases()


@pytest.mark.parametrize("kind", ["experts", "DoRA", "trained tokens", "rsLoRA, patterns"])
def test_blocks_smaller_than_a_matrix_change_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    family = "gpt_oss" if kind == "experts" else "gpt2"
    adapter = peft_families.save_adapter(bench.model(family), tmp_path / "adapter", **KINDS[kind](family))
    monkeypatch.setattr(cut, "PIECE", 48)
    peft_families.fold(bench.model(family), adapter, tmp_path / "out")
    oracle = peft_families.merge_with_peft(bench.model(family), adapter, tmp_path / "peft")
    assert peft_families.largest_error(tmp_path / "out", oracle) <= EXACT


# Experts fused on disk


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_that_are_fused_on_disk_too(tmp_path: Path, family: str) -> None:
    base = peft_families.save_model(family, tmp_path / "base", save_original_format=False)
    assert any(tensor.ndim == 3 for tensor in peft_families.tensors(base).values())
    adapter = peft_families.save_adapter(base, tmp_path / "adapter", **KINDS["experts"](family))
    peft_families.fold(base, adapter, tmp_path / "out")
    oracle = peft_families.load_model(peft_families.merge_with_peft(base, adapter, tmp_path / "peft")).state_dict()
    ours = peft_families.load_model(tmp_path / "out").state_dict()
    assert max(float((ours[name] - oracle[name]).abs().max()) for name in oracle) <= EXACT


# Tied embeddings


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(3, 23).view(2, 10)).logits
    return logits


@pytest.mark.parametrize("kind", ["lm_head LoRA", "embedding LoRA", "lm_head saved"])
def test_a_tied_model_is_untied_where_an_adapter_parts_head_and_embedding(
    bench: Bench, tmp_path: Path, kind: str
) -> None:
    base = bench.model("llama-tied")
    adapter = peft_families.save_adapter(base, tmp_path / "adapter", **KINDS[kind]("llama-tied"))
    plan = peft_families.fold(base, adapter, tmp_path / "out")
    ours, trained = (
        _logits(m) for m in (peft_families.load_model(tmp_path / "out"), peft_families.with_adapter(base, adapter))
    )
    torch.testing.assert_close(ours, trained, rtol=1e-5, atol=1e-6)
    before, after = (base / "config.json").read_text(), (tmp_path / "out" / "config.json").read_text()
    assert after == before.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false') != before
    assert any("tie_word_embeddings is set to False" in warning for warning in plan["warnings"])


@pytest.mark.parametrize("lora", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}])
def test_what_was_trained_tied_stays_tied(bench: Bench, tmp_path: Path, lora: dict[str, Any]) -> None:
    base = bench.model("llama-tied")
    lora = {"target_modules": ["q_proj"], **lora, "ensure_weight_tying": True}
    lora["target_modules"] = [*lora["target_modules"], "v_proj"]
    adapter = peft_families.save_adapter(base, tmp_path / "adapter", **lora)
    peft_families.fold(base, adapter, tmp_path / "out")
    assert "lm_head.weight" not in peft_families.tensors(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def _with(folder: Path, target: Path, change: Any) -> Path:
    """A copy of a model whose tensors `change` (a function on the dictionary) has altered."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def _merge(aligned: Path, finetuned: Path, output: Path, **more: Any) -> dict[str, Any]:
    sources = {"aligned": str(aligned), "finetuned": str(finetuned), **more.pop("sources", {})}
    return peft_families.run({"sources": sources, "gate": {"never": True}, **more}, output)


def test_a_stored_copy_of_a_tied_embedding_is_no_second_tensor(bench: Bench, tmp_path: Path) -> None:
    base = bench.model("llama-tied")
    embedding = peft_families.tensors(base)["model.embed_tokens.weight"]
    copied = _with(base, tmp_path / "copied", lambda t: t.update({"lm_head.weight": embedding.clone()}))
    for aligned, finetuned in ((base, copied), (copied, base)):
        _merge(aligned, finetuned, tmp_path / "out")
        assert peft_families.largest_error(tmp_path / "out", base) == 0
        shutil.rmtree(tmp_path / "out")


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_unties_the_output(bench: Bench, tmp_path: Path) -> None:
    base = bench.model("llama-tied")
    head = torch.randn(40, 16)
    apart = _with(base, tmp_path / "apart", lambda t: t.update({"lm_head.weight": head}))
    _merge(base, apart, tmp_path / "out")
    model = peft_families.load_model(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(model.model.embed_tokens.weight, peft_families.tensors(base)["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


# Checkpoints


def test_shards_and_single_files_give_the_same_weights(bench: Bench, tmp_path: Path) -> None:
    base = bench.model("qwen3")
    peft_families.load_model(base).save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    _merge(tmp_path / "sharded", base, tmp_path / "out")
    assert peft_families.largest_error(tmp_path / "out", base) == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(peft_families.tensors(base))


def test_mixed_dtypes_stay_as_the_aligned_model_has_them(bench: Bench, tmp_path: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        for number, name in enumerate(sorted(tensors)):
            dtype = (torch.float32, torch.float16, torch.bfloat16)[number % 3]
            tensors[name] = tensors[name].to(dtype)

    base = bench.model("mistral")
    mixed = _with(base, tmp_path / "mixed", narrow)
    _merge(mixed, base, tmp_path / "out")
    expected = peft_families.tensors(mixed)
    found = peft_families.tensors(tmp_path / "out")
    assert all(found[name].dtype == expected[name].dtype for name in expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_tensors_are_copied_and_never_converted(bench: Bench, tmp_path: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = (tensors[name] * 100).to(dtype)

    base = bench.model("llama")
    packed = _with(base, tmp_path / "packed", quantise)
    tuned = _with(packed, tmp_path / "tuned", lambda t: t["model.layers.0.self_attn.q_proj.weight"].mul_(2))
    _merge(packed, tuned, tmp_path / "out")
    found, expected = peft_families.tensors(tmp_path / "out")[name], peft_families.tensors(packed)[name]
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    with pytest.raises(SourceError, match=r"up_proj\.weight is stored as .*never converted"):
        _merge(packed, base, tmp_path / "mixed")


def test_buffers_may_be_stored_or_not(bench: Bench, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    base = bench.model("llama")
    old = _with(base, tmp_path / "old", lambda t: t.update({name: torch.arange(2.0)}))
    plan = _merge(base, old, tmp_path / "left-out")
    assert peft_families.largest_error(tmp_path / "left-out", base) == 0
    assert any(name in warning for warning in plan["warnings"])
    _merge(old, base, tmp_path / "kept")
    assert torch.equal(peft_families.tensors(tmp_path / "kept")[name], torch.arange(2.0))


def test_a_tensor_that_only_one_model_has_is_refused(bench: Bench, tmp_path: Path) -> None:
    base = bench.model("llama")
    more = _with(base, tmp_path / "more", lambda t: t.update({"model.extra.weight": torch.ones(2, 2)}))
    with pytest.raises(SourceError, match=r"has 1 tensors that the aligned model lacks.*model\.extra\.weight"):
        _merge(base, more, tmp_path / "out")
    with pytest.raises(SourceError, match=r"lacks 1 tensors of the aligned model.*model\.extra\.weight"):
        _merge(more, base, tmp_path / "out")


def test_of_a_multimodal_model_the_text_is_merged_and_the_rest_carried_over(bench: Bench, tmp_path: Path) -> None:
    base = bench.model("llava")
    lora = {"target_modules": r".*language_model.*\.(q|v)_proj"}
    adapter = peft_families.save_adapter(base, tmp_path / "adapter", **lora)
    plan = peft_families.run(
        {
            "sources": {
                "aligned": str(base), "finetuned": {"adapter": str(adapter)},
                "safety": {"adapter": str(peft_families.save_adapter(base, tmp_path / "safety", seed=5, **lora))},
            },
            "gate": {"always": True},
        },
        tmp_path / "out",
    )  # fmt: skip
    merged = {line["name"] for line in plan["tensors"] if line["action"] == "merge"}
    before, after = peft_families.tensors(base), peft_families.tensors(tmp_path / "out")
    assert merged == {name for name in before if not torch.equal(before[name], after[name])}
    assert len(merged) == 4
    assert all("language_model" in name for name in merged)


# What is refused


def _edited(adapter: Path, target: Path, **values: Any) -> Path:
    shutil.copytree(adapter, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return target


@pytest.fixture(scope="module")
def plain(bench: Bench) -> Path:
    return bench.safety("llama")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'.*weight_conversion"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is"),
        ({"a_field_of_tomorrow": 1}, "a_field_of_tomorrow is .1., which changes what the adapter adds"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"r": 5}, "the config says rank 5, lora_A has 3 rows"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"lora_bias": True}, r"lora_B\.bias is missing"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names 'lm_head'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"target_modules": ["q_proj", "k_proj"]}, "has nothing for .*k_proj"),
        ({"bias": "all"}, None),
        ({"init_lora_weights": "orthogonal"}, None),
    ],
)
def test_configs_that_mean_something_else(
    bench: Bench, plain: Path, tmp_path: Path, values: dict[str, Any], message: str | None
) -> None:
    adapter = _edited(plain, tmp_path / "adapter", **values)
    if message is None:  # llama has no biases, and orthogonal factors leave the base alone
        peft_families.fold(bench.model("llama"), adapter, tmp_path / "out")
        return
    with pytest.raises(SourceError, match=message):
        peft_families.fold(bench.model("llama"), adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(16)}), "unexpected key.*norm"),
        (lambda t: t.update({"model.x.lora_C.weight": torch.ones(3, 16)}), "unexpected key"),
        (lambda t: t.pop(min(t)), "has no lora_A; expected both factors"),
        (lambda t: [t.pop(k) for k in list(t) if ".1." in k], r"has nothing for model\.layers\.1"),
        (lambda t: t.update({k: torch.ones(3, 9) for k in t if "lora_A" in k}), r"the update is \(16, 9\)"),
        (
            lambda t: t.update({k.replace("q_proj", "z_proj"): t.pop(k) for k in list(t) if "q_proj" in k}),
            r"adapts .*z_proj\.weight, which the model it is applied to does not have",
        ),
    ],
)
def test_files_that_do_not_fit(bench: Bench, plain: Path, tmp_path: Path, change: Any, message: str) -> None:
    shutil.copytree(plain, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(SourceError, match=message):
        peft_families.fold(bench.model("llama"), tmp_path / "adapter", tmp_path / "out")


def test_pickles_are_refused_with_a_safe_conversion(bench: Bench, plain: Path, tmp_path: Path) -> None:
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(bench.model("llama"), model)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"pytorch_model\.bin, a pickle.*never loaded.*python -c"):
        _merge(model, bench.model("llama"), tmp_path / "out")
    shutil.copytree(plain, adapter)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"adapter_model\.bin is a pickle.*never loaded") as refused:
        peft_families.fold(bench.model("llama"), adapter, tmp_path / "out")
    command = re.search(r'python -c "(.+)"', str(refused.value))
    assert command is not None
    subprocess.run([sys.executable, "-c", command[1]], check=True)
    assert (
        load_file(adapter / "adapter_model.safetensors").keys() == load_file(plain / "adapter_model.safetensors").keys()
    )


# Side files


def test_side_files_are_copied_byte_for_byte_and_code_is_not_run(bench: Bench, tmp_path: Path) -> None:
    finetuned = tmp_path / "finetuned"
    shutil.copytree(bench.model("llama"), finetuned)
    shutil.copytree(bench.model("llama"), tmp_path / "aligned")
    content = {
        "tokenizer.json": b'{"model": {"vocab": {"a": 0}}}\r\n', "tokenizer_config.json": b"{ }",
        "tokenizer.model": b"\0",
        "chat_template.jinja": b"{{ x }}\n\n", "additional_chat_templates/tool.jinja": b"t",
        "preprocessor_config.json": b"{}", "processor_config.json": b" {}", "special_tokens_map.json": b"{}\n",
        "modeling_own.py": b"raise SystemExit('run')\n", "LICENSE": b"terms",
    }  # fmt: skip
    for name, data in content.items():
        (finetuned / name).parent.mkdir(exist_ok=True)
        (finetuned / name).write_bytes(data)
    shutil.copy(finetuned / "tokenizer.json", tmp_path / "aligned")
    for name in ("optimizer.pt", "training_args.bin", "README.md", "adapter_config.json.bak"):
        (finetuned / name).write_bytes(b"x")
    (tmp_path / "aligned" / "only_aligned.json").write_text("{}")
    config = finetuned / "config.json"
    config.write_text(config.read_text().replace("{", '{\n  "auto_map": {"AutoModel": "modeling_own.Own"},', 1))
    _merge(tmp_path / "aligned", finetuned, tmp_path / "out")
    for name in (*content, "config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (finetuned / name).read_bytes(), name
    for name in ("optimizer.pt", "training_args.bin", "only_aligned.json"):
        assert not (tmp_path / "out" / name).exists()


# Vocabulary


def _tokenizer(folder: Path, tokens: list[str], added: dict[str, int]) -> None:
    entries = [{"id": row, "content": token, "special": True} for token, row in added.items()]
    vocab = {token: row for row, token in enumerate(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": entries}))


def _speaking(folder: Path, target: Path, rows: int, tokens: list[str], added: dict[str, int], seed: int = 0) -> Path:
    """A copy of a 40-row model with other tokens, its rows random but for those of the first 38 tokens."""
    shutil.copytree(folder, target)
    path, generator = target / "model.safetensors", torch.Generator().manual_seed(seed)
    tensors = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        fresh = torch.randn(rows, 16, generator=generator)
        for row, token in enumerate(tokens):
            fresh[row] = tensors[name][int(token[1:])]
        tensors[name] = fresh
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    _tokenizer(target, tokens, added)
    return target


PLAIN = [f"t{row}" for row in range(38)]


@pytest.fixture
def speakers(bench: Bench, tmp_path: Path) -> dict[str, Path]:
    base = bench.model("llama")
    swapped = [*PLAIN]
    swapped[3], swapped[8] = swapped[8], swapped[3]
    return {
        "aligned": _speaking(base, tmp_path / "aligned", 40, PLAIN, {"<pad>": 38}),
        "appends": _speaking(base, tmp_path / "appends", 48, PLAIN, {"<pad>": 38, "<tool>": 39}, seed=1),
        "moves": _speaking(base, tmp_path / "moves", 48, swapped, {"<tool>": 38, "<pad>": 39}, seed=2),
    }


def test_a_vocabulary_that_only_appends_is_taken(speakers: dict[str, Path], tmp_path: Path) -> None:
    plan = _merge(speakers["aligned"], speakers["appends"], tmp_path / "out")
    assert peft_families.largest_error(tmp_path / "out", speakers["appends"]) == 0
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (speakers["appends"] / name).read_bytes()
    assert any("matched" in warning for warning in plan["warnings"])
    assert peft_families.load_model(tmp_path / "out").lm_head.weight.shape == (48, 16)


def test_a_vocabulary_that_moves_tokens_is_an_error_that_shows_them(speakers: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"3 tokens differ: 't3': row 3 before, row 8 after.*vocabulary: finetuned"):
        _merge(speakers["aligned"], speakers["moves"], tmp_path / "out")
    _merge(speakers["aligned"], speakers["moves"], tmp_path / "taken", vocabulary="finetuned")
    assert peft_families.largest_error(tmp_path / "taken", speakers["moves"]) == 0


def test_rows_are_matched_by_token_where_the_aligned_vocabulary_is_kept(
    speakers: dict[str, Path], tmp_path: Path
) -> None:
    _merge(speakers["aligned"], speakers["moves"], tmp_path / "out", vocabulary="aligned")
    ours, theirs, before = (
        peft_families.tensors(p) for p in (tmp_path / "out", speakers["moves"], speakers["aligned"])
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expected = theirs[name][:40].clone()
        expected[[3, 8, 38]] = theirs[name][[8, 3, 39]]  # by token; <pad> is row 39 there
        expected[39] = before[name][39]  # no token: padding of the aligned model
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=0)
    assert (tmp_path / "out" / "config.json").read_bytes() == (speakers["aligned"] / "config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (speakers["aligned"] / "tokenizer.json").read_bytes()


def test_merged_embeddings_meet_by_token_too(speakers: dict[str, Path], tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    peft_families.run(
        {
            "sources": {role: str(speakers[path]) for role, path in
                        [("aligned", "aligned"), ("finetuned", "moves"), ("safety", "appends")]},
            "vocabulary": "finetuned", "gate": {"always": True, "scope": name}, "merge": {"alpha": 0.5},
        },
        tmp_path / "out",
    )  # fmt: skip
    ours, tuned, safe = (
        peft_families.tensors(p)[name] for p in (tmp_path / "out", speakers["moves"], speakers["appends"])
    )
    rows = list(range(48))
    rows[3], rows[8], rows[38], rows[39] = 8, 3, 39, 38
    torch.testing.assert_close(ours, 0.5 * tuned + 0.5 * safe[rows], rtol=0, atol=1e-7)


def test_strict_refuses_any_difference(speakers: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"vocabulary: strict.*aligned 40, finetuned 48"):
        _merge(speakers["aligned"], speakers["appends"], tmp_path / "out", vocabulary="strict")


def test_an_adapter_that_resized_the_embedding_sets_the_vocabulary_size(bench: Bench, tmp_path: Path) -> None:
    base = bench.model("llama")
    resized = peft_families.load_model(base)
    resized.resize_token_embeddings(44)
    lora = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    resized.save_pretrained(tmp_path / "resized")
    peft_families.save_adapter(tmp_path / "resized", tmp_path / "adapter", **lora)
    peft_families.merge_with_peft(tmp_path / "resized", tmp_path / "adapter", tmp_path / "peft")
    peft_families.fold(base, tmp_path / "adapter", tmp_path / "out")
    assert peft_families.largest_error(tmp_path / "out", tmp_path / "peft") <= EXACT
    before, after = (json.loads((p / "config.json").read_text()) for p in (base, tmp_path / "out"))
    assert after == {**before, "vocab_size": 44}
    peft_families.load_model(tmp_path / "out")


# Measuring


def _moments(v: torch.Tensor, delta: torch.Tensor) -> tuple[float, float, float]:
    """‖VᵀΔ‖², ‖VVᵀΔ‖ and ‖Δ‖ of matrices (d_out, d_in), float64."""
    v, delta = v.double(), delta.double()
    t = v.T @ delta
    return float((t * t).sum()), float(((v @ t) ** 2).sum()), float((delta * delta).sum())


def _rhos(plan: dict[str, Any]) -> dict[str, float]:
    return {line["name"]: line["rho"] for line in plan["tensors"] if line["rho"] is not None}


@pytest.mark.parametrize("kind", ["adapter", "full"])
@pytest.mark.parametrize("family", ["gpt2", "llama", *MIXTURES])
def test_rho_is_that_of_the_layers_whichever_way_they_are_stored(tmp_path: Path, family: str, kind: str) -> None:
    saving = {"save_original_format": False} if family in MIXTURES else {}
    base = peft_families.save_model(family, tmp_path / "base", seed=3, **saving)
    aligned = peft_families.save_model(family, tmp_path / "aligned", seed=0, **saving)
    experts = KINDS["experts"](family) if family in MIXTURES else {"target_modules": "all-linear"}
    adapter = peft_families.save_adapter(aligned, tmp_path / "adapter", **experts)
    tuned = peft_families.merge_with_peft(aligned, adapter, tmp_path / "peft")
    peft_families.fold(aligned, adapter, tmp_path / "tuned")  # with the names on disk of `aligned`
    finetuned: Any = {"adapter": str(adapter)} if kind == "adapter" else str(tmp_path / "tuned")
    sources = {"base": str(base), "aligned": str(aligned), "finetuned": finetuned, "safety": str(tuned)}
    if family in MIXTURES:
        del sources["safety"]
    plan = peft_families.run(
        {"sources": sources, "gate": {"never": True}, "merge": {"method": "drop"}}, tmp_path / "out"
    )
    before, middle, after = (peft_families.tensors(p) for p in (base, aligned, tmp_path / "tuned"))
    found = _rhos(plan)
    assert found
    assert family not in MIXTURES or any(middle[name].ndim == 3 for name in found)
    for name, rho in found.items():
        v, delta = middle[name] - before[name], after[name] - middle[name]
        if family == "gpt2" or (family == "gpt_oss" and v.ndim == 3):  # these are stored (d_in, d_out)
            v, delta = v.transpose(-1, -2), delta.transpose(-1, -2)
        parts = [_moments(v, delta)] if v.ndim == 2 else [_moments(*pair) for pair in zip(v, delta, strict=True)]
        overlap, image, square = (sum(part[i] for part in parts) for i in range(3))
        assert rho == pytest.approx(overlap / (image * square) ** 0.5, rel=1e-4), name


# Adapters as output


def _three(bench: Bench, tmp_path: Path, **more: Any) -> dict[str, Any]:
    tuned = peft_families.save_adapter(
        bench.model("llama"), tmp_path / "tuned", seed=4, target_modules="all-linear", r=6
    )
    sources = {
        "aligned": str(bench.model("llama")), "finetuned": {"adapter": str(tuned)},
        "safety": {"adapter": str(bench.safety("llama"))},
    }  # fmt: skip
    return {"sources": sources, "gate": {"always": True}, **more}


@pytest.mark.parametrize("method", ["slerp", "linear", "task_arithmetic", "replace"])
def test_adapters_of_small_exact_rank_lose_nothing(bench: Bench, tmp_path: Path, method: str) -> None:
    recipe = _three(bench, tmp_path, merge={"method": method})
    peft_families.run(recipe, tmp_path / "full")
    plan = peft_families.run({**recipe, "output": {"format": "adapter"}}, tmp_path / "out")
    oracle = peft_families.merge_with_peft(bench.model("llama"), tmp_path / "out", tmp_path / "peft")
    assert peft_families.largest_error(tmp_path / "full", oracle) <= EXACT
    assert all(line.get("lost_energy", 0) == 0 for line in plan["tensors"])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert method != "linear" or set(config["rank_pattern"].values()) | {config["r"]} == {6, 9}


@pytest.mark.parametrize(("method", "rank"), [("ties", 5), ("dare_ties", 5), ("linear", 4)])
def test_truncated_adapters_are_the_best_of_their_rank_and_say_what_is_lost(
    bench: Bench, tmp_path: Path, method: str, rank: int
) -> None:
    recipe = _three(bench, tmp_path, merge={"method": method})
    peft_families.run(recipe, tmp_path / "full")
    plan = peft_families.run({**recipe, "output": {"format": "adapter", "rank": rank}}, tmp_path / "out")
    peft_families.merge_with_peft(bench.model("llama"), tmp_path / "out", tmp_path / "peft")
    before, full, written = (
        peft_families.tensors(p) for p in (bench.model("llama"), tmp_path / "full", tmp_path / "peft")
    )
    lines = {line["name"]: line for line in plan["tensors"] if "lost_energy" in line}
    assert lines
    assert any(line["lost_energy"] > 0.01 for line in lines.values())
    for name, line in lines.items():
        delta = (full[name] - before[name]).double()
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close((written[name] - before[name]).double(), best, rtol=0, atol=1e-5)
        assert line["lost_energy"] == pytest.approx(float((s[rank:] ** 2).sum() / (s**2).sum()), abs=1e-5)
        assert line["rank"] == min(rank, *delta.shape)


@pytest.mark.parametrize(("family", "kind"), [("llama", "DoRA"), ("mixtral", "experts")])
def test_updates_without_a_small_exact_rank_are_truncated_where_the_recipe_says_a_rank(
    bench: Bench, tmp_path: Path, family: str, kind: str
) -> None:
    """DoRA rescales every row of W, TIES elects elements; of experts, each one's matrix is truncated by itself."""
    tuned = peft_families.save_adapter(bench.model(family), tmp_path / "tuned", **KINDS[kind](family))
    sources = {"aligned": str(bench.model(family)), "finetuned": {"adapter": str(tuned)}}
    merge = {"method": "ties", "weights": {"finetuned": 1}, "density": 0.5}
    recipe = {"sources": sources, "gate": {"always": True}, "merge": merge}
    peft_families.run(recipe, tmp_path / "full")
    plan = peft_families.run({**recipe, "output": {"format": "adapter", "rank": 3}}, tmp_path / "out")
    peft_families.merge_with_peft(bench.model(family), tmp_path / "out", tmp_path / "peft")
    before, full, written = (
        peft_families.load_model(p).state_dict() for p in (bench.model(family), tmp_path / "full", tmp_path / "peft")
    )
    for name in before:
        wanted, found = (model[name].double() - before[name].double() for model in (full, written))
        if wanted.ndim < 2 or not bool(wanted.any()):
            assert torch.equal(found, wanted), name
            continue
        parts = 2 if "gate_up" in name else 1  # gate and up are truncated apart, as they lie apart on disk
        for delta, own in zip(wanted, found, strict=True) if wanted.ndim == 3 else [(wanted, found)]:
            for one, two in zip(delta.chunk(parts), own.chunk(parts), strict=True):
                u, s, vh = torch.linalg.svd(one, full_matrices=False)
                torch.testing.assert_close(two, (u[:, :3] * s[:3]) @ vh[:3], rtol=0, atol=1e-5)
    assert any(line.get("lost_energy", 0) > 0.01 for line in plan["tensors"])


@pytest.mark.parametrize("change", ["rows", "rows, adapter", "embedding", "head"])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_embeddings_and_heads_are_set_by_an_adapter_whether_tied_or_grown(
    bench: Bench, tmp_path: Path, family: str, change: str
) -> None:
    """PEFT loads it on the model with as many rows; what it computes is what the full output does, merged or not."""
    base, head = bench.model(family), family == "llama" or change == "head"
    draw = torch.Generator().manual_seed(3)
    tuned = peft_families.load_model(base)
    rows = 44 if "rows" in change else 40
    tuned.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for module in [tuned.lm_head] if change == "head" else [tuned.model.embed_tokens, tuned.lm_head]:
            module.weight.copy_(torch.randn(rows, 16, generator=draw))
    tuned.save_pretrained(tmp_path / "tuned")
    finetuned: Any = str(tmp_path / "tuned")
    if change == "head" and family == "llama-tied":
        shutil.rmtree(tmp_path / "tuned")
        lora = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
        finetuned = {"adapter": str(peft_families.save_adapter(base, tmp_path / "tuned", **lora))}
    if change == "rows, adapter":
        lora = {"target_modules": ["q_proj"]}
        peft_families.save_adapter(
            tmp_path / "tuned", tmp_path / "adapter", saving={"save_embedding_layers": True}, **lora
        )
        finetuned = {"adapter": str(tmp_path / "adapter")}
    sources = {"aligned": str(base), "finetuned": finetuned, "safety": {"adapter": str(bench.safety(family))}}
    recipe = {"sources": sources, "vocabulary": "finetuned", "gate": {"always": True}, "merge": {"alpha": 0.5}}
    peft_families.run(recipe, tmp_path / "full")
    plan = peft_families.run({**recipe, "output": {"format": "adapter", "rank": 16}}, tmp_path / "out")
    assert any("resize_token_embeddings(44)" in warning for warning in plan["warnings"]) == ("rows" in change)
    wanted = _logits(peft_families.load_model(tmp_path / "full"))
    resized = peft_families.load_model(base)
    resized.resize_token_embeddings(rows, mean_resizing=False)
    resized.save_pretrained(tmp_path / "resized")
    above = peft_families.with_adapter(tmp_path / "resized", tmp_path / "out")
    torch.testing.assert_close(_logits(above), wanted, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the two are no longer tied
        torch.testing.assert_close(_logits(above.merge_and_unload()), wanted, rtol=1e-4, atol=1e-5)
    peft_families.fold(base, tmp_path / "out", tmp_path / "again")
    assert peft_families.largest_error(tmp_path / "again", tmp_path / "full") <= 1e-5
    assert ("lm_head.weight" in peft_families.tensors(tmp_path / "full")) == head


def test_full_checkpoints_become_an_adapter_of_the_wanted_rank(bench: Bench, tmp_path: Path) -> None:
    recipe = _three(bench, tmp_path)
    peft_families.fold(bench.model("llama"), tmp_path / "tuned", tmp_path / "merged")
    recipe["sources"]["finetuned"] = str(tmp_path / "merged")
    recipe["merge"] = {"method": "linear"}
    peft_families.run(recipe, tmp_path / "full")
    with pytest.raises(PlanError, match=r"no small exact rank; say `output\.rank`"):
        peft_families.run({**recipe, "output": {"format": "adapter"}}, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    peft_families.run({**recipe, "output": {"format": "adapter", "rank": 9}}, tmp_path / "out")
    oracle = peft_families.merge_with_peft(bench.model("llama"), tmp_path / "out", tmp_path / "peft")
    assert peft_families.largest_error(tmp_path / "full", oracle) <= 1e-5


@pytest.mark.parametrize(
    "family",
    ["mixtral", "gpt_oss", *(pytest.param(one, marks=pytest.mark.slow) for one in ("qwen3_moe", "llama4", "llava"))],
)
def test_full_checkpoints_of_any_family_become_adapters_under_the_names_that_peft_sees(
    bench: Bench, tmp_path: Path, family: str
) -> None:
    """Experts that lie one by one, routers and towers whose tensors have other names in memory, none told by an
    adapter; with every rank kept nothing is lost."""
    aligned = bench.model(family)
    tuned = peft_families.save_model(family, tmp_path / "tuned", seed=5)
    if family == "gpt_oss":  # whose experts lie the other way round; only matrices change
        before, after = load_file(aligned / "model.safetensors"), load_file(tuned / "model.safetensors")
        after |= {name: tensor for name, tensor in before.items() if name.endswith(("_bias", ".sinks"))}
        save_file(after, tuned / "model.safetensors", {"format": "pt"})
    recipe = {"sources": {"aligned": str(aligned), "finetuned": str(tuned)}, "gate": {"never": True}}
    peft_families.run({**recipe, "output": {"format": "adapter", "rank": 24}}, tmp_path / "out")
    oracle = peft_families.merge_with_peft(aligned, tmp_path / "out", tmp_path / "peft")
    assert peft_families.largest_error(tuned, oracle) <= 1e-5
    peft_families.fold(aligned, tmp_path / "out", tmp_path / "again")
    assert peft_families.largest_error(tuned, tmp_path / "again") <= 1e-5


def test_biases_of_adapted_experts_have_no_place_in_an_adapter(bench: Bench, tmp_path: Path) -> None:
    tuned = peft_families.save_model("gpt_oss", tmp_path / "tuned", seed=5)
    sources = {"aligned": str(bench.model("gpt_oss")), "finetuned": str(tuned)}
    recipe = {"sources": sources, "gate": {"never": True}, "output": {"format": "adapter", "rank": 4}}
    with pytest.raises(PlanError, match=r"experts has a changed parameter of its own, .* holds one or the other"):
        peft_families.run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_folder_has_its_papers_and_no_model_config(bench: Bench, tmp_path: Path) -> None:
    _tokenizer(tmp_path, ["a"], {})
    recipe = _three(bench, tmp_path)
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "tuned")
    peft_families.run({**recipe, "output": {"format": "adapter"}}, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "safemerge_plan.json", "safemerge_recipe.yaml",
            "safemerge_manifest.json", "README.md", "tokenizer.json"} <= names  # fmt: skip
    assert "config.json" not in names
    manifest = json.loads((tmp_path / "out" / "safemerge_manifest.json").read_text())
    assert {entry["file"] for entry in manifest["outputs"]} == names - {"safemerge_manifest.json"}


def test_an_adapter_output_can_be_verified_and_damage_is_found(bench: Bench, tmp_path: Path) -> None:
    from safemerge_recipes.events import ignore
    from safemerge_recipes.storage.workers import Resources
    from safemerge_recipes.verification.verify import verify

    recipe = _three(bench, tmp_path, merge={"method": "ties"})
    peft_families.run({**recipe, "output": {"format": "adapter", "rank": 4}}, tmp_path / "out")
    resources = Resources(device="cpu", workers=1, memory=2_000_000_000)
    assert verify(tmp_path / "out", resources, ignore, deep=True)["recomputed"] > 0
    path = tmp_path / "out" / "adapter_model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckError, match=r"adapter_model\.safetensors: it changed"):
        verify(tmp_path / "out", resources, ignore)


def _formula(merge: str, v: torch.Tensor, delta: torch.Tensor, other: torch.Tensor, scores: torch.Tensor) -> Any:
    """What the merges below make of one matrix (d_out, d_in), float64."""
    if merge.startswith("project"):
        image = v @ v.T / v.norm() @ delta
        chosen = scores.double().mean(dim=1).argsort(descending=True, stable=True)[: len(v) // 4]
        return image if merge == "project" else delta.index_copy(0, chosen, image[chosen])
    if merge == "iso_c":
        u, sizes, w = _triplets(delta, len(delta))
        return sizes.mean() * u @ w if len(sizes) else 0 * delta
    if merge == "tsv":
        found = [_triplets(one, min(delta.shape) // 2) for one in (delta, other)]
        u, w = (_polar(torch.cat(side, 1)) for side in ([u for u, _, _ in found], [w.T for _, _, w in found]))
        return (u * torch.cat([found[0][1], 0.5 * found[1][1]])) @ w.T
    u, sizes, w = _triplets(v, 2)
    return delta + (u * sizes) @ w


def _triplets(x: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular triplets, without those of the value zero."""
    u, sizes, w = torch.linalg.svd(x, full_matrices=False)
    rank = min(rank, int((sizes > 1e-6 * sizes[0]).sum()))
    return u[:, :rank], sizes[:rank], w[:rank]


def _polar(x: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal columns."""
    u, _, w = torch.linalg.svd(x, full_matrices=False)
    return u @ w


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss"])
def test_methods_that_multiply_matrices_take_each_one_the_way_round_that_the_formula_has_it(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stacks of experts, Conv1D, and stacks that are stored (d_in, d_out); adapters and full models, whose projections
    are computed in bands of rows."""
    monkeypatch.setattr("safemerge_recipes.methods.project.PANEL", 5)
    saving = {"save_original_format": False} if family in MIXTURES else {}
    base = peft_families.save_model(family, tmp_path / "base", seed=3, **saving)
    aligned = peft_families.save_model(family, tmp_path / "aligned", seed=0, **saving)
    other = peft_families.save_model(family, tmp_path / "other", seed=5, **saving)
    experts = KINDS["experts"](family) if family in MIXTURES else {"target_modules": "all-linear"}
    adapter = peft_families.save_adapter(aligned, tmp_path / "adapter", **experts)
    peft_families.fold(aligned, adapter, tmp_path / "tuned")
    before, middle, after, beside = (peft_families.tensors(p) for p in (base, aligned, tmp_path / "tuned", other))
    draw = torch.Generator().manual_seed(9)
    scores = {name: torch.rand(tensor.shape, generator=draw) for name, tensor in middle.items() if tensor.ndim > 1}
    save_file(scores, tmp_path / "scores.safetensors")
    merges: dict[str, dict[str, Any]] = {
        "project": {}, "svd_k": {"rank": 2}, "iso_c": {"weights": {"finetuned": 1}},
        "tsv": {"weights": {"finetuned": 1, "safety": 0.5}},
        "project_rows": {"mask": {"path": str(tmp_path / "scores.safetensors"), "top": 0.25}},
    }  # fmt: skip
    stacked = False
    for kind, finetuned in (("adapter", {"adapter": str(adapter)}), ("full", str(tmp_path / "tuned"))):
        sources = {"base": str(base), "aligned": str(aligned), "finetuned": finetuned, "safety": str(other)}
        for merge, keys in merges.items():
            out = tmp_path / f"{kind}-{merge}"
            recipe = {"sources": sources, "gate": {"always": True}, "merge": {"method": merge, **keys}}
            plan = peft_families.run(recipe, out)
            written = peft_families.tensors(out)
            lines = [line["name"] for line in plan["tensors"] if line["action"] == "merge"]
            assert lines
            for name in lines:
                pairs = (middle, before), (after, middle), (beside, middle)
                sides = [(x[name] - y[name]).double() for x, y in pairs] + [scores[name]]
                ndim = sides[0].ndim
                stacked |= ndim == 3
                turned = family == "gpt2" or (family == "gpt_oss" and ndim == 3)
                if turned:
                    sides = [side.transpose(-1, -2) for side in sides]
                alone = [tuple(sides)] if ndim == 2 else list(zip(*sides, strict=True))
                wanted = torch.stack([_formula(merge, *one) for one in alone]).view(sides[0].shape)
                wanted = wanted.transpose(-1, -2) if turned else wanted
                torch.testing.assert_close(
                    written[name].double(), middle[name].double() + wanted, rtol=1e-5, atol=2e-5, msg=f"{merge} {name}"
                )
    assert stacked == (family in MIXTURES)
