"""Score files: every kind against float64 formulas over a model run whole, their masks, and what is refused.

Guards `scores.kinds`, `scores.subject`, `scores.inputs`, `scores.passes`, `scores.score_file`, `scores.skeleton`,
`scores.tape`, `scores.prompts`, `api.masks`, `cli.masks`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from safemerge_recipes import api
from safemerge_recipes.errors import CheckError, PlanError, RecipeError, SafemergeError, SourceError
from safemerge_recipes.scores.inputs import inverse_diagonal
from safemerge_recipes.scores.run import described
from safemerge_recipes.scores.score_file import check_target, score_file
from tests.fixtures.chat_family import make_family

ROWS = [
    ("How do I bake bread?", "Mix flour and water, and wait."),
    ("Name a colour.", "Blue."),
    ("What is two and two?", "Four, as everybody knows."),
]
NAMES = tuple(
    f"model.layers.{i}.{module}.weight"
    for i in range(2)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    make_family(folder)
    rows = [json.dumps({"instruction": prompt, "output": answer}) for prompt, answer in ROWS]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "lines.txt").write_text("\n".join(prompt for prompt, _ in ROWS))
    return folder


def dense(folder: Path, *adapters: str) -> dict[str, torch.Tensor]:
    """The weights of the base with adapters on it, float64."""
    weights = {name: value.double() for name, value in load_file(folder / "base" / "model.safetensors").items()}
    for adapter in adapters:
        factors = load_file(folder / adapter / "adapter_model.safetensors")
        for key in (key for key in factors if "lora_A" in key):
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            weights[name] = (
                weights[name] + 2 * factors[key.replace("lora_A", "lora_B")].double() @ factors[key].double()
            )
    return weights


class Oracle:
    """The whole model in float64, as transformers runs it."""

    def __init__(self, folder: Path, *adapters: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.weights = dense(folder, *adapters)
        self.model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64).eval()
        self.model.load_state_dict(self.weights, strict=False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "base")

    def ids(self, prompt: str, answer: str) -> tuple[torch.Tensor, int]:
        turns = [{"role": "user", "content": prompt}]
        before = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        head = self.tokenizer(before, add_special_tokens=False).input_ids
        tail = self.tokenizer(f"{answer}<|end|>", add_special_tokens=False).input_ids
        return torch.tensor([[*head, *tail]]), len(head)

    def inputs(self, name: str, first: Callable[[int], int]) -> torch.Tensor:
        """X of a layer over all prompts, `(tokens, d_in)`."""
        found: list[torch.Tensor] = []
        module = self.model.get_submodule(name.removesuffix(".weight"))
        hook = module.register_forward_pre_hook(lambda _, given: found.append(given[0][0].detach()))
        cut = []
        for prompt, answer in ROWS:
            ids, length = self.ids(prompt, answer)
            with torch.no_grad():
                self.model(input_ids=ids)
            cut.append(found[-1][first(length) :])
        hook.remove()
        return torch.cat(cut)

    def snip(self, squared: bool = False) -> dict[str, torch.Tensor]:
        total = {name: torch.zeros_like(self.weights[name]) for name in NAMES}
        own = dict(self.model.named_parameters())
        for prompt, answer in ROWS:
            ids, length = self.ids(prompt, answer)
            labels = ids.clone()
            labels[:, :length] = -100
            self.model.zero_grad()
            self.model(input_ids=ids, labels=labels).loss.backward()
            for name in NAMES:
                scores = own[name].grad ** 2 if squared else (own[name].detach() * own[name].grad).abs()
                total[name] += scores / len(ROWS)
        return total


def scored(folder: Path, by: str, **given: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    about = api.score(folder / "recipe.yaml", by, output=folder / f"{by}.safetensors", device="cpu", **given)
    with safe_open(about["path"], "pt") as file:
        written = json.loads(file.metadata()["safemerge_score"])
    assert written == {key: value for key, value in about.items() if key != "path"}
    return load_file(about["path"]), about


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    worst = float((found.double() - wanted).abs().max() / wanted.abs().max())
    assert worst < tolerance, worst


def test_of_weights_alone(family: Path) -> None:
    aligned, finetuned = dense(family, "alignment"), dense(family, "alignment", "task")
    magnitudes, about = scored(family, "magnitude")
    drifts, _ = scored(family, "drift")
    assert set(magnitudes) == set(drifts) == set(NAMES)
    assert "prompts" not in about
    for name in NAMES:
        close(magnitudes[name], finetuned[name].abs())
        close(drifts[name], (finetuned[name] - aligned[name]).abs())
    of_aligned, _ = scored(family, "magnitude", of="aligned")
    close(of_aligned[NAMES[0]], aligned[NAMES[0]].abs())


@pytest.mark.parametrize("tokens", ["all", "answer"])
def test_wanda_is_the_weight_times_the_norm_of_its_inputs(family: Path, tokens: str) -> None:
    oracle = Oracle(family, "alignment", "task")
    found, about = scored(family, "wanda", prompts=[family / "rows.jsonl"], tokens=tokens)
    for name in NAMES:
        x = oracle.inputs(name, lambda length: length if tokens == "answer" else 0)
        close(found[name], oracle.weights[name].abs() * x.norm(dim=0), 1e-4)
    assert about["prompts"]["prompts"] == 3
    assert about["prompts"]["counted_tokens"] == len(x)
    assert described(about).startswith("wanda of finetuned: |W|·‖X_j‖₂, column j, 3 prompts")


def test_snip_is_the_mean_over_prompts_of_weight_times_gradient(family: Path) -> None:
    found, about = scored(family, "snip", prompts=[family / "rows.jsonl"])
    assert about["prompts"]["tokens"] == "answer"
    for name, wanted in Oracle(family, "alignment", "task").snip().items():
        close(found[name], wanted, 2e-4)


def test_safe_delta_is_the_cost_of_an_update_by_the_inverse_of_the_inputs_products(family: Path) -> None:
    oracle = Oracle(family, "alignment")
    finetuned = dense(family, "alignment", "task")
    found, _ = scored(family, "safe-delta", prompts=[family / "rows.jsonl"])
    for name in NAMES:
        x = oracle.inputs(name, lambda length: 0)
        h = 2 / len(ROWS) * x.T @ x
        h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
        delta = finetuned[name] - oracle.weights[name]
        close(found[name], delta**2 / (2 * torch.linalg.inv(h).diagonal()), 1e-3)


def test_fisher_and_what_is_opposed(family: Path) -> None:
    oracle = Oracle(family, "alignment", "task")
    found, _ = scored(family, "fisher", prompts=[family / "rows.jsonl"])
    for name, wanted in oracle.snip(squared=True).items():
        close(found[name], wanted, 1e-3)
    opposed, _ = scored(family, "opposed")
    aligned, safety = dense(family, "alignment"), dense(family, "alignment", "safety")
    for name in NAMES:
        own, other = oracle.weights[name] - aligned[name], safety[name] - aligned[name]
        close(opposed[name], own.abs() * (own.sign() != other.sign()))


def test_columns_that_no_input_uses_get_one_and_all_the_damping() -> None:
    h = torch.diag(torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64))
    damped = torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64) + 0.01 * 2
    torch.testing.assert_close(inverse_diagonal(h.clone()), 1 / damped)


def test_plain_lines_count_whole_and_prompts_are_drawn_by_the_seed(family: Path) -> None:
    _, all_ = scored(family, "wanda", prompts=[family / "lines.txt"])
    assert all_["prompts"]["prompts"] == 3
    first, about = scored(family, "wanda", prompts=[family / "rows.jsonl"], limit=1, seed=1)
    again, _ = scored(family, "wanda", prompts=[family / "rows.jsonl"], limit=1, seed=1)
    assert about["prompts"]["prompts"] == 1
    assert all(torch.equal(first[name], again[name]) for name in NAMES)


def test_the_stated_memory_is_asked_for_before_anything_is_written(family: Path, tmp_path: Path) -> None:
    """A line so long that its attention alone takes more than 64 MB."""
    (tmp_path / "long.txt").write_text("x y z " * 700)
    target = family / "never.safetensors"
    with pytest.raises(PlanError, match=r"takes about .* GB, for one block at a time .* try --max-memory"):
        api.score(
            family / "recipe.yaml", "wanda", prompts=[tmp_path / "long.txt"], output=target, device="cpu",
            max_memory=64_000_000,
        )  # fmt: skip
    assert not target.exists()


@pytest.mark.parametrize(
    ("by", "given", "error", "message"),
    [
        ("nothing", {}, RecipeError, "--by nothing: expected one of magnitude, drift, opposed, wanda"),
        ("wanda", {}, RecipeError, "looks at activations; expected --prompts FILE"),
        ("opposed", {"of": "safety"}, RecipeError, "compares with sources.safety"),
        ("drift", {"of": "aligned"}, RecipeError, "the aligned model has none"),
        ("magnitude", {"of": "teacher"}, RecipeError, "the recipe has no such source; expected one of base"),
        ("magnitude", {"prompts": ["rows.jsonl"]}, RecipeError, "looks at weights alone; expected no --prompts"),
        ("snip", {"prompts": ["lines.txt"]}, RecipeError, "holds lines without answers"),
        ("wanda", {"prompts": ["lines.txt"], "tokens": "some"}, RecipeError, "expected all or answer"),
        ("wanda", {"prompts": ["rows.jsonl"], "tokens": "answer", "max_length": 3}, CheckError, "none of 3 prompts"),
        ("wanda", {"prompts": ["missing.txt"]}, RecipeError, "No such file"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    family: Path, by: str, given: dict[str, Any], error: type[SafemergeError], message: str
) -> None:
    given = {**given, "prompts": [family / name for name in given.get("prompts", ())]}
    target = family / "never.safetensors"
    with pytest.raises(error, match=message):
        api.score(family / "recipe.yaml", by, output=target, device="cpu", **given)
    assert not target.exists()
    assert not list(family.glob(".never*"))


def test_activations_that_are_not_finite_are_refused(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family, tmp_path / "family")
    weights = load_file(family / "base" / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"][:] = 3e38
    save_file(weights, tmp_path / "family" / "base" / "model.safetensors", metadata={"format": "pt"})
    recipe = tmp_path / "family" / "recipe.yaml"
    with pytest.raises(CheckError, match=r"its inputs are not finite on rows\.jsonl:1"):
        api.score(recipe, "wanda", prompts=[family / "rows.jsonl"], output=tmp_path / "w.safetensors", device="cpu")
    weights["model.embed_tokens.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "family" / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="holds values that are not finite"):
        api.score(recipe, "wanda", prompts=[family / "rows.jsonl"], output=tmp_path / "w.safetensors", device="cpu")


def test_a_score_file_of_another_model_is_refused_before_measuring(family: Path, call: Callable[..., Any]) -> None:
    made = call("score", family / "recipe.yaml", "--by", "drift", "-o", family / "other.safetensors")
    assert (made.code, made.out.strip()) == (0, str(family / "other.safetensors"))
    merge = "merge={method: mask, mask: {path: other.safetensors, top: 0.1, fill: aligned}}"
    plan = api.plan(api.load_recipe(family / "recipe.yaml", [merge]), device="cpu")
    assert plan.plan.summary()["merged"] == 3
    swapped = api.load_recipe(family / "recipe.yaml", [merge, "sources.finetuned.adapter=./safety"])
    with pytest.raises(SourceError, match=r"other\.safetensors: was made from another finetuned model"):
        api.plan(swapped, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("by", ["wanda", "snip", "safe-delta"])
def test_the_stated_memory_is_kept(family: Path, tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 260 MB in float32: one block of it at a time, and no more than is stated, imports aside."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from safemerge_recipes.scores import run
    from tests.fixtures.own_memory import OwnMemory

    tok = AutoTokenizer.from_pretrained(family / "base")
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=640, intermediate_size=1280, num_hidden_layers=16, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=3,
    )  # fmt: skip
    for seed, role in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / role)
        tok.save_pretrained(tmp_path / role)
    (tmp_path / "recipe.yaml").write_text(
        "sources: {aligned: ./base, finetuned: ./tuned}\ngate: {always: true}\nmerge: {method: drop}\n"
    )
    whole = sum(value.numel() * 4 for value in load_file(tmp_path / "base" / "model.safetensors").values())
    stated = []
    asked = run.memory_of
    monkeypatch.setattr(run, "memory_of", lambda *given: stated.append(asked(*given)) or stated[-1])
    rows = family / ("lines.txt" if by == "wanda" else "rows.jsonl")
    scored(family, by, prompts=[rows])  # imports, and what torch keeps for good
    with OwnMemory() as own:
        scored(tmp_path, by, prompts=[rows])
    assert 0 < own.grown <= stated[-1] + 16_000_000 < whole, (own.grown, stated, whole)


def test_scores_replace_scores_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    check_target(path)
    with score_file(path, {"a": (2, 3)}, {"by": "magnitude"}) as out:
        out.put("a", 0, torch.ones(6))
    check_target(path)
    for content in (path.read_bytes().replace(b"safemerge_score", b"somebodys_score"), b"precious"):
        path.write_bytes(content)
        with pytest.raises(RecipeError, match="is no file of scores and not replaced"):
            check_target(path)
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(RecipeError, match="not replaced"):
        check_target(path)
