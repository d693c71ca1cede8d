"""Every recipe of `recipes/defenses`: sound, labelled, run on a tiny family, and equal to its own formula.

Guards `methods.iso_c`, `methods.tsv`, `methods.project_rows`.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safemerge_recipes.recipe.loading import load_recipe
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.weights.draw import Draw
from tests.fixtures.plain_family import (
    GATED,
    Family,
    make_family,
    prepare_recipe,
    random_model,
    run_recipe,
    write_model,
)

ROOT = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes" / "defenses").glob("*.yaml"))}
HEADER = ("Source", "Formula", "Fidelity", "Differs", "Direction")
PLACES = {
    "meta-llama/Llama-2-7b-hf": "base",
    "meta-llama/Llama-2-7b-chat-hf": "aligned",
    "./finetuned-lora": "finetuned-adapter",
    "./safety-lora": "safety-adapter",
    "./finetuned": "finetuned",
    "./safety": "safety",
    "./domain": "finetuned",
    "./sft": "base",
    "./harmful": "harmful",
}
"""What stands for each source of the recipes in the tiny family."""
SCORES = (
    "harm-drift", "fisher", "opposed", "safe-delta", "safety-wanda", "safety-snip", "utility-snip", "harm-wanda",
    "utility-wanda",
)  # fmt: skip
"""Score files of the recipes; drawn at random but for those of weights alone, which are what they say."""


class Parts:
    """The matrices of one tensor that formulas speak of, float64."""

    def __init__(self, family: Family, name: str, masks: dict[str, torch.Tensor]) -> None:
        self.name, self.family = name, family
        self.base, self.aligned = family.base[name].double(), family.aligned[name].double()
        self.finetuned, self.safety = family.finetuned[name].double(), family.safety[name].double()
        self.harmful = load_file(family.root / "harmful" / "model.safetensors")[name].double()
        self.scores = {file: load_file(family.root / f"{file}.safetensors")[name] for file in SCORES}
        self.v, self.mask = self.aligned - self.base, masks[name].double()
        self.lora_f, self.lora_s = family.lora("finetuned", name), family.lora("safety", name)
        self.factors = [
            tuple(factor.double() for factor in factors[name.removesuffix(".weight")])
            for factors in (family.finetuned_factors, family.safety_factors)
        ]

    @property
    def c(self) -> torch.Tensor:
        """VVᵀ/‖V‖_F."""
        return self.v @ self.v.T / self.v.norm()

    @property
    def rho(self) -> float:
        """cos(CΔf, Δf) of the adapter."""
        image = self.c @ self.lora_f
        return float((image * self.lora_f).sum() / image.norm() / self.lora_f.norm())

    def entropy_rank(self, part: float) -> int:
        """The fewest directions of V that hold this part of the entropy of its squared singular values."""
        shares = torch.linalg.svdvals(self.v) ** 2 / self.v.norm() ** 2
        held = (-(shares * shares.log()).nan_to_num()).cumsum(0)
        return 1 + int((held < part * held[-1] - 1e-12).sum())

    def top(self, file: str, part: float, rows: bool = False) -> torch.Tensor:
        """The highest scores of a file, of the tensor or of each row, by sorting."""
        scores = self.scores[file] if rows else self.scores[file].reshape(1, -1)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : int(part * scores.shape[1] + 1e-9)]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
        return chosen.view(self.v.shape)

    def neurons(self, file: str, part: float) -> torch.Tensor:
        """The rows with the highest mean score, by sorting; `(rows, 1)`."""
        means = self.scores[file].double().mean(dim=1)
        chosen = torch.zeros_like(means, dtype=torch.bool)
        chosen[means.argsort(descending=True, stable=True)[: int(part * len(means) + 1e-9)]] = True
        return chosen[:, None]

    def leading(self, k: int) -> torch.Tensor:
        """The projection on the k leading left directions of V."""
        left = torch.linalg.svd(self.v).U[:, :k]
        return left @ left.T

    def kept(self, name: str, density: float, count: int, side: int) -> torch.Tensor:
        """DARE's draw."""
        return Draw(density, 0).keep(name, 0, count, Arena())[side].double()

    def blended(
        self, draw: Callable[[str, int, torch.Tensor], torch.Tensor] = lambda letter, side, x: x
    ) -> torch.Tensor:
        """Both adapters' factors combined one by one at 0.8 and 0.2."""
        roots = [math.sqrt(0.8 * self.family.scale), math.sqrt(0.2 * self.family.scale)]
        combined = []
        for place, letter in enumerate("AB"):
            sides = [pair[place] for pair in self.factors]
            kept = [draw(letter, number, side) if draw else side for number, side in enumerate(sides)]
            combined.append(roots[0] * kept[0] + roots[1] * kept[1])
        a, b = combined
        return b @ a

    def dropped(self, letter: str, side: int, x: torch.Tensor) -> torch.Tensor:
        """A factor after DARE."""
        return x * self.kept(f"{self.name}:lora_{letter}", 0.5, x.numel(), side).view(x.shape) / 0.5


def ties(p: Parts) -> torch.Tensor:
    """TIES of two deltas as the paper says it, by sorting."""

    def trim(x: torch.Tensor) -> torch.Tensor:
        keep = x.abs().flatten().argsort(descending=True, stable=True)[: x.numel() // 2]
        kept = torch.zeros_like(x.flatten())
        kept[keep] = x.flatten()[keep]
        return kept.view(x.shape)

    x, y = trim(p.lora_f), trim(p.lora_s)
    sign = torch.where(0.8 * x + 0.2 * y >= 0, 1.0, -1.0)
    parts, total = [(0.8, x), (0.2, y)], torch.zeros_like(x)
    weight = torch.zeros_like(x)
    for share, side in parts:
        agrees = (side.sign() == sign).double()
        total, weight = total + share * side * agrees, weight + share * agrees
    return torch.where(weight > 0, total / weight.clamp(min=1e-12), 0.0)  # fmt: skip


def slerp(p: Parts) -> torch.Tensor:
    x, y = p.lora_f, p.lora_s
    theta = math.acos(float((x * y).sum() / x.norm() / y.norm()))
    return (math.sin(0.8 * theta) * x + math.sin(0.2 * theta) * y) / math.sin(theta)


def isotropic(delta: torch.Tensor) -> torch.Tensor:
    """σ̄·U·Wᵀ."""
    u, sizes, w = torch.linalg.svd(delta, full_matrices=False)
    return sizes.mean() * u @ w


def task_singular_vectors(deltas: list[torch.Tensor]) -> torch.Tensor:
    """As the paper has it: leading triplets side by side, both sides replaced by the polar factor of their SVD."""
    found = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    rank = min(deltas[0].shape) // len(deltas)
    u, w = torch.cat([u[:, :rank] for u, _, _ in found], 1), torch.cat([w[:rank] for _, _, w in found])
    (p, _, q), (x, _, y) = torch.linalg.svd(u, full_matrices=False), torch.linalg.svd(w, full_matrices=False)
    return p @ q @ torch.cat([sizes[:rank] for _, sizes, _ in found]).diag() @ x @ y


FORMULAS: dict[str, Callable[[Parts], torch.Tensor]] = {
    "safemerge": lambda p: p.aligned + 0.8 * p.lora_f + 0.2 * p.lora_s,
    "safemerge_published": lambda p: p.aligned + p.blended(),
    "safemerge_dare": lambda p: p.aligned + p.blended(p.dropped),
    "safemerge_ties": lambda p: p.aligned + ties(p),
    "safemerge_slerp": lambda p: p.aligned + slerp(p),
    "safemerge_within_type": lambda p: p.aligned + 0.8 * p.lora_f + 0.2 * p.lora_s,
    "safe_lora_threshold": lambda p: p.aligned + p.c @ p.lora_f,
    "safe_lora_number": lambda p: p.aligned + p.c @ p.lora_f,
    "resta": lambda p: p.aligned + p.lora_f + 0.5 * p.v,
    "resta_dare": lambda p: p.aligned + 0.5 * p.v
    + p.lora_f * p.kept(p.name, 0.7, p.v.numel(), 0).view(p.v.shape) * Draw(0.7, 0).rescale,
    "wise_ft": lambda p: 0.5 * p.finetuned + 0.5 * p.aligned,
    "task_arithmetic": lambda p: p.aligned + 0.8 * (p.finetuned - p.aligned) + 0.4 * (p.safety - p.aligned),
    "model_soup": lambda p: (p.finetuned + p.safety) / 2,
    "expo": lambda p: p.aligned + 0.3 * (p.aligned - p.base),
    "lox": lambda p: p.aligned + 1.25 * p.leading(6) @ p.v,
    "lssf": lambda p: p.aligned + p.lora_f + 0.5 * p.leading(p.entropy_rank(0.9)) @ p.v,
    "splora": lambda p: p.aligned,
    "mergealign": lambda p: p.base + 0.5 * (p.finetuned - p.base) + 0.5 * (p.aligned - p.base),
    "led_merging": lambda p: torch.where(p.mask > 0.5, p.safety, p.finetuned),
    "antidote": lambda p: torch.where(p.mask > 0.9, 0.0, p.finetuned),
    "somf": lambda p: p.aligned + p.mask * (p.finetuned - p.aligned),
    "safety_arithmetic": lambda p: p.finetuned - 0.5 * (p.harmful - p.aligned) * p.top("harm-drift", 0.1),
    "irr": lambda p: torch.where(p.top("fisher", 0.2) & (p.scores["opposed"] > 0), p.aligned, p.finetuned),
    "safe_delta": lambda p: torch.where(p.top("safe-delta", 0.1), p.aligned, p.finetuned),
    "nlsr": lambda p: torch.where(p.top("safety-wanda", 0.2, rows=True), p.safety, p.finetuned),
    "safety_minus_utility": lambda p: torch.where(
        p.top("safety-snip", 0.1, rows=True) & ~p.top("utility-snip", 0.2, rows=True), p.aligned, p.finetuned
    ),
    "model_soup_many": lambda p: (p.finetuned + p.safety + p.harmful) / 3,
    "iso_c": lambda p: p.aligned + isotropic(p.finetuned + p.safety - 2 * p.aligned),
    "tsv": lambda p: p.aligned + task_singular_vectors([p.finetuned - p.aligned, p.safety - p.aligned]),
    "mscp": lambda p: p.aligned + torch.where(
        p.neurons("harm-wanda", 0.1) & ~p.neurons("utility-wanda", 0.1), p.c @ p.lora_f, p.lora_f
    ),
    "layer_safety_vector": lambda p: p.aligned + p.lora_f + 0.5 * p.v,
    "harm_negation": lambda p: p.finetuned - 0.3 * (p.harmful - p.aligned),
}  # fmt: skip
"""What a merged tensor must be."""


def chosen(stem: str, parts: dict[str, Parts]) -> set[str]:
    """What the recipe's gate must choose, from dense matrices."""
    if stem == "splora":

        def distance(p: Parts) -> float:
            n = p.v.numel()
            return (float((p.c @ p.lora_f - p.lora_f).norm()) - math.sqrt(2 * n)) / math.sqrt(2 * n * (1 - 1 / math.pi))

        return set(sorted(parts, key=lambda name: -distance(parts[name]))[:10])
    if stem == "layer_safety_vector":
        return {name for name in parts if ".layers.1." in name}
    if stem == "safe_lora_number":
        return set(sorted(parts, key=lambda name: parts[name].rho)[:10])
    if stem == "safe_lora_threshold":
        return {name for name, p in parts.items() if p.rho <= TAU}
    if stem == "safemerge_within_type":
        found = set()
        for kind in {re.sub(r"\d+", "", name) for name in parts}:
            members = [name for name in parts if re.sub(r"\d+", "", name) == kind]

            def ratio(name: str) -> float:
                v = parts[name].v
                return parts[name].rho / (float(v.norm() ** 2 / (v.T @ v).norm()) / math.sqrt(v.shape[0]))

            found |= set(sorted(members, key=ratio, reverse=True)[: math.ceil(len(members) / 2)])
        return found
    if stem.startswith("safemerge"):
        return {name for name, p in parts.items() if p.rho < TAU}
    return set(parts)


TAU = 0.72
"""For the recipes with τ: between the values of this family, so that both decisions happen."""


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Family:
    made = make_family(tmp_path_factory.mktemp("defenses"))
    draw = torch.Generator().manual_seed(1)
    scores = {name: torch.rand(made.aligned[name].shape, generator=draw) for name in GATED}
    save_file(scores, made.root / "harm-scores.safetensors")
    save_file(scores, made.root / "keep-mask.safetensors")
    harmful = random_model(40, made.aligned)
    write_model(made.root / "harmful", harmful)
    for file in SCORES:
        drawn = {name: torch.rand(made.aligned[name].shape, generator=draw) for name in GATED}
        if file == "harm-drift":
            drawn = {name: (harmful[name] - made.aligned[name]).abs() for name in GATED}
        if file == "opposed":
            for name in GATED:
                own, other = (model[name] - made.aligned[name] for model in (made.finetuned, made.safety))
                drawn[name] = own.abs() * (own.sign() != other.sign())
        save_file(drawn, made.root / f"{file}.safetensors")
    save_file({name: (score > 0.5) for name, score in scores.items()}, made.root / "safety-mask.safetensors")
    return made


def scores(family: Family) -> dict[str, torch.Tensor]:
    return load_file(family.root / "harm-scores.safetensors")


def local(text: str) -> str:
    """The recipe with the tiny family's folders for its sources."""
    for place, folder in sorted(PLACES.items(), key=lambda item: -len(item[0])):
        text = re.sub(rf"(?<=[ :]){re.escape(place)}(?=[\s}}])", f"./{folder}", text)
    return text


def test_there_are_formulas_for_all_of_them():
    assert set(FORMULAS) == set(RECIPES)
    assert len(RECIPES) == 32


@pytest.mark.parametrize("stem", RECIPES)
def test_it_is_sound_and_says_what_it_is(stem):
    load_recipe(RECIPES[stem], metrics=(), methods=())
    _, *lines = RECIPES[stem].read_text().splitlines()  # the first is for editors
    header = [line[2:] for line in lines if line.startswith("# ")]
    assert [line.partition(":")[0] for line in header if not line.startswith(" ")] == list(HEADER)
    assert next(line for line in header if line.startswith("Fidelity")).removeprefix("Fidelity: ") in (
        "exact", "published code", "surrogate",
    )  # fmt: skip
    assert max(map(len, lines)) <= 120
    assert len([line for line in lines if not line.startswith("#")]) <= 11


@pytest.mark.parametrize("stem", RECIPES)
def test_it_does_what_its_formula_says(stem, family):
    text = (
        local(RECIPES[stem].read_text()).replace("tau: 0.35", f"tau: {TAU}").replace("at_most: 0.5", f"at_most: {TAU}")
    ).replace("layers.1[0-5].", "layers.1.")
    prepared, written = run_recipe(family.root, text)
    parts = {name: Parts(family, name, scores(family)) for name in GATED}
    merged = {tensor.name for tensor in prepared.plan.tensors if tensor.action == "merge"}
    assert merged == chosen(stem, parts)
    if "always" not in text:
        assert 0 < len(merged) < len(GATED)
    lora = "finetuned-adapter" in text
    for name, p in parts.items():
        kept = p.aligned + p.lora_f if lora else p.finetuned
        expected = FORMULAS[stem](p) if name in merged else kept
        torch.testing.assert_close(written[name].double(), expected, rtol=2e-5, atol=3e-6)


def test_the_table_names_every_recipe_and_its_fidelity():
    table = (ROOT / "docs" / "defenses.md").read_text()
    for stem, path in RECIPES.items():
        fidelity = re.search(r"^# Fidelity: (.*)$", path.read_text(), re.M)[1]
        assert re.search(rf"^\|.*\[`{stem}`\]\(\.\./recipes/defenses/{stem}\.yaml\).*\| {fidelity} \|", table, re.M), (
            stem
        )


DEMO = ROOT / "recipes" / "demo"


@pytest.mark.slow
@pytest.mark.skipif(not (DEMO / "base" / "model.safetensors").exists(), reason="python recipes/demo/family.py makes it")
@pytest.mark.parametrize("stem", RECIPES)
def test_it_runs_on_the_demo_family(stem, tmp_path):
    """SmolLM2-135M with its alignment, task and safety adapters; masks drawn at random."""
    from safemerge_recipes.events import ignore
    from safemerge_recipes.pipeline.opening import resolve
    from safemerge_recipes.pipeline.preparing import prepare
    from safemerge_recipes.pipeline.writing import carry_out
    from safemerge_recipes.recipe.loading import parse_recipe
    from safemerge_recipes.storage.digests import Digests
    from safemerge_recipes.storage.safetensors import read_header
    from safemerge_recipes.storage.workers import Resources

    folders = {
        "base": f"{DEMO}/base",
        "aligned": f"{{adapter: {DEMO}/alignment, on: base}}",
        "finetuned": f"{{adapter: {DEMO}/task-arithmetic}}",
        "safety": f"{{adapter: {DEMO}/safety}}",
    }
    roles = {role: folders.get(role, "") for role in ("base", *load_recipe(RECIPES[stem]).recipe.sources.roles())}
    if stem in ("expo", "lox"):
        roles["finetuned"] = folders["aligned"]
    if stem == "mergealign":  # the unaligned model in the role of the aligned one
        roles = {"aligned": folders["base"], "finetuned": f"{{adapter: {DEMO}/alignment}}", "safety": folders["base"]}
    others = {role: folders["safety"] for role in roles if role not in folders}
    roles = {role: source for role, source in roles.items() if role in folders}
    sources = ", ".join(f"{role}: {source}" for role, source in roles.items())
    sources += f", others: {{{', '.join(f'{role}: {source}' for role, source in others.items())}}}" if others else ""
    overrides = [f"sources={{{sources}}}"]
    loaded = parse_recipe(RECIPES[stem].read_text(), tmp_path / "recipe.yaml", overrides)
    for path in loaded.recipe.merge.mask_files:
        inventory = read_header(DEMO / "base" / "model.safetensors")
        masks = {name: torch.rand(ref.shape) for name, ref in inventory.items() if "_proj" in name}
        if "top" not in RECIPES[stem].read_text() and "threshold" not in RECIPES[stem].read_text():
            masks = {name: scores > 0.9 for name, scores in masks.items()}
        save_file(masks, tmp_path / path)
    prepared = prepare(resolve(loaded), Resources(2, 2_000_000_000), ignore)
    assert prepared.plan.gated
    output = tmp_path / "out"
    carry_out(prepared, output, Digests(prepared.identities), ignore)
    written = (output / "model.safetensors").stat().st_size
    shutil.rmtree(output)
    assert written == (DEMO / "base" / "model.safetensors").stat().st_size


def test_decisions_cost_no_reading_of_masks(family):
    """A mask is read where it is used, not when the plan is made."""
    text = local(RECIPES["led_merging"].read_text())
    prepared = prepare_recipe(family.root, text)
    masks = [ref for task in prepared.graph.tasks for ref in task.work.refs if "mask" in ref.path]
    assert len(masks) == len(GATED)
