"""Merge methods of the neighbouring defenses against dense references, and the published procedure itself.

Guards `methods.mask`, `methods.top`, `recipe.mask_files`, `sources.masks`, `methods.add_safety_vector`,
`methods.svd_k`, `methods.products`.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safemerge_recipes.errors import PlanError, RecipeError, SourceError
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.weights.draw import Draw
from tests.fixtures.plain_family import (
    ADAPTERS,
    BLOCKS,
    CONFIG,
    FULL,
    GATED,
    MATRICES,
    Family,
    make_family,
    prepare_recipe,
    random_factors,
    recipe_text,
    run_recipe,
    write_adapter,
    write_model,
)

ALWAYS = "{always: true}"
PAIR = "{aligned: aligned, finetuned: finetuned}"
V_LORA = "{base: base, aligned: {adapter: alignment-adapter, on: base}, finetuned: %s, safety: %s}"
SIDES = {"full": "finetuned", "lora": "{adapter: finetuned-adapter}"}


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Family:
    made = make_family(tmp_path_factory.mktemp("family"))
    write_adapter(made.root / "alignment-adapter", random_factors(9, 6), 6)
    draw = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(made.aligned[name].shape, generator=draw) for name in GATED}
    save_file(scores, made.root / "scores.safetensors")
    save_file({n: (s > 0.7) for n, s in scores.items()}, made.root / "bool.safetensors")
    save_file({n: (s > 0.7).to(torch.uint8) for n, s in scores.items()}, made.root / "bytes.safetensors")
    save_file({n: s.to(torch.bfloat16) for n, s in scores.items()}, made.root / "halves.safetensors")
    return made


def deltas(family: Family, name: str, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(Δf, Δs), float64."""
    if kind == "lora":
        return family.lora("finetuned", name), family.lora("safety", name)
    aligned = family.aligned[name].double()
    return family.finetuned[name].double() - aligned, family.safety[name].double() - aligned


def sources(kind: str) -> str:
    return FULL if kind == "full" else ADAPTERS


def close(written: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(written.double(), expected, rtol=1e-5, atol=2e-6)


# Project


def projection(v: torch.Tensor, normalize: str) -> torch.Tensor:
    if normalize == "frobenius":
        return v @ v.T / v.norm()
    if normalize == "spectral":
        return v @ v.T / torch.linalg.matrix_norm(v @ v.T, 2)
    left = torch.linalg.svd(v).U[:, : int(normalize.partition(":")[2])]
    return left @ left.T


@pytest.mark.parametrize("normalize", ["frobenius", "spectral", "rank:3"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_project(family, kind, normalize):
    text = recipe_text(sources(kind), ALWAYS, f"{{method: project, normalize: '{normalize}'}}")
    _, written = run_recipe(family.root, text)
    for name in GATED:
        expected = family.aligned[name].double() + projection(family.v(name), normalize) @ deltas(family, name, kind)[0]
        close(written[name], expected)


@pytest.mark.parametrize("normalize", ["frobenius", "spectral", "rank:3"])
@pytest.mark.parametrize("method", ["project", "svd_k"])
def test_on_an_alignment_that_is_an_adapter(family, method, normalize):
    """V = s·B·A: of low rank itself, and never formed."""
    merge = f"{{method: project, normalize: '{normalize}'}}" if method == "project" else "{method: svd_k, rank: 3}"
    text = recipe_text(V_LORA % ("{adapter: finetuned-adapter}", "safety"), ALWAYS, merge)
    _, written = run_recipe(family.root, text)
    factors = random_factors(9, 6)
    for name in GATED:
        a, b = (factor.double() for factor in factors[name.removesuffix(".weight")])
        v = b @ a  # alpha 6 over rank 6
        delta = family.lora("finetuned", name)
        aligned = family.base[name].double() + v
        if method == "project":
            close(written[name], aligned + projection(v, normalize) @ delta)
        else:
            close(written[name], aligned + delta + projection(v, "rank:3") @ v)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_project_does_not_depend_on_memory_or_workers(family, kind, monkeypatch):
    from safemerge_recipes.gate import measure
    from safemerge_recipes.methods import project as transforms

    monkeypatch.setattr(transforms, "PANEL", 7)
    monkeypatch.setattr(measure, "ROW_PIECE", 100)
    text = recipe_text(sources(kind), ALWAYS, "{method: project}")
    _, plenty = run_recipe(family.root, text, workers=2)
    monkeypatch.setattr("safemerge_recipes.planning.memory.room_of", lambda task, share: 0)
    _, little = run_recipe(family.root, text, workers=1)
    for name in GATED:
        assert torch.equal(plenty[name], little[name])
        expected = projection(family.v(name), "frobenius") @ deltas(family, name, kind)[0]
        close(plenty[name], family.aligned[name].double() + expected)


def test_safe_lora_with_no_alignment_gives_the_aligned_weight(family, tmp_path):
    """V = 0, so C = 0: the published code merges nothing in. All tensors but one are alike here."""
    write_model(tmp_path / "base", {**family.aligned, GATED[0]: family.base[GATED[0]]})
    text = recipe_text(PAIR.replace("{", f"{{base: {tmp_path / 'base'}, "), ALWAYS, "{method: project}")
    _, written = run_recipe(family.root, text)
    assert all(torch.equal(written[name], family.aligned[name]) for name in GATED[1:])
    assert not torch.equal(written[GATED[0]], family.aligned[GATED[0]])


# The safety vector


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_svd_k(family, kind):
    text = recipe_text(sources(kind), ALWAYS, "{method: svd_k, rank: 3, gamma: 0.5}")
    _, written = run_recipe(family.root, text)
    for name in GATED:
        v = family.v(name)
        expected = family.aligned[name].double() + deltas(family, name, kind)[0] + 0.5 * projection(v, "rank:3") @ v
        close(written[name], expected)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("on", [None, "vector", "delta"])
def test_add_safety_vector(family, kind, on):
    dare = f", dare: {{on: {on}, density: 0.25, seed: 3}}" if on else ""
    text = recipe_text(sources(kind), ALWAYS, f"{{method: add_safety_vector, gamma: 0.5{dare}}}")
    _, written = run_recipe(family.root, text)
    for name in GATED:
        aligned, v, delta = family.aligned[name].double(), family.v(name), deltas(family, name, kind)[0]
        keep_delta, keep_v = (mask.view(v.shape).double() for mask in Draw(0.25, 3).keep(name, 0, v.numel(), Arena()))
        if on == "vector":
            assert 0.1 < float(keep_v.mean()) < 0.4
            v = v * keep_v / 0.25
        elif on == "delta":
            delta = delta * keep_delta / 0.25
        close(written[name], aligned + delta + 0.5 * v)


# Masks


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    "mask",
    [
        "path: scores.safetensors, threshold: 0.7",
        "path: scores.safetensors, threshold: 0.7, invert: true, fill: aligned",
        "path: halves.safetensors, threshold: 0.7, fill: zero",
        "path: bool.safetensors",
        "path: bytes.safetensors, fill: zero",
        "path: bytes.safetensors, invert: true",
        "path: scores.safetensors",
        "path: scores.safetensors, invert: true",
    ],
)
def test_mask(family, kind, mask):
    text = recipe_text(sources(kind), ALWAYS, f"{{method: mask, mask: {{{mask}}}}}")
    prepared, written = run_recipe(family.root, text)
    from safetensors.torch import load_file

    file = mask.split(",")[0].split()[1]
    values = load_file(family.root / file)
    for name in GATED:
        aligned = family.aligned[name].double()
        delta_f, delta_s = deltas(family, name, kind)
        fill = torch.zeros_like(aligned) if "zero" in mask else aligned if "aligned" in mask else aligned + delta_s
        share = values[name].double()
        if "threshold" in mask:
            share = (share > 0.7).double()
        if "invert" in mask:
            share = 1 - share
        close(written[name], (1 - share) * (aligned + delta_f) + share * fill)
    assert any(one.path.endswith(file) for one in prepared.identities)


def test_binary_masks_copy_the_numbers_themselves(family):
    text = recipe_text(FULL, ALWAYS, "{method: mask, mask: {path: bool.safetensors}}")
    _, written = run_recipe(family.root, text)
    from safetensors.torch import load_file

    masks = load_file(family.root / "bool.safetensors")
    for name in GATED:
        expected = torch.where(masks[name], family.safety[name], family.finetuned[name])
        assert torch.equal(written[name], expected)


def test_another_mask_is_another_result(family):
    def keys(mask: str) -> list[str]:
        text = recipe_text(FULL, ALWAYS, f"{{method: mask, mask: {{path: {mask}}}}}")
        return [task.key for task in prepare_recipe(family.root, text).graph.tasks if task.slot.name in GATED]

    assert not set(keys("bool.safetensors")) & set(keys("bytes.safetensors"))
    before = keys("bool.safetensors")
    changed = family.root / "bool.safetensors"
    content = changed.read_bytes()
    changed.write_bytes(content)  # the same bytes, written again: may have been anything
    assert not set(before) & set(keys("bool.safetensors"))


def test_the_stored_recipe_finds_its_mask_again(family):
    import yaml

    text = recipe_text(FULL, ALWAYS, "{method: mask, mask: {path: bool.safetensors}}")
    before = set(family.root.glob("out*"))
    run_recipe(family.root, text)
    (folder,) = set(family.root.glob("out*")) - before
    stored = yaml.safe_load((folder / "safemerge_recipe.yaml").read_text())
    assert (folder / stored["merge"]["mask"]["path"]).samefile(family.root / "bool.safetensors")
    assert '"mask"' in (folder / "safemerge_manifest.json").read_text()
    from safemerge_recipes.errors import CheckError
    from safemerge_recipes.events import ignore
    from safemerge_recipes.storage.workers import Resources
    from safemerge_recipes.verification.verify import verify

    checked = verify(folder, Resources(2, 2_000_000_000), ignore, deep=True)
    assert checked["recomputed"] == len(family.aligned)
    mask = family.root / "bool.safetensors"
    content = mask.read_bytes()
    mask.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(CheckError, match=r"merge\.mask: .*bool\.safetensors has sha256"):
            verify(folder, Resources(2, 2_000_000_000), ignore, deep=True)
    finally:
        mask.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks: {n: m for n, m in masks.items() if n != GATED[3]}, "has no tensor"),
        (
            lambda masks: {n: m.T.contiguous() for n, m in masks.items()},
            r"down_proj.weight is \(40, 24\), the weight is \(24, 40\)",
        ),
        (lambda masks: {n: m.to(torch.float8_e4m3fn) for n, m in masks.items()}, "is stored as F8_E4M3"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_before_measuring(family, tmp_path, monkeypatch, change, message):
    made = make_family(tmp_path)
    masks = {name: torch.zeros(made.aligned[name].shape) for name in GATED}
    save_file(change(masks), tmp_path / "mask.safetensors")
    refuse_reading(monkeypatch)
    with pytest.raises(SourceError, match=message):
        prepare_recipe(tmp_path, recipe_text(FULL, "{tau: 0.5}", "{method: mask, mask: {path: mask.safetensors}}"))


@pytest.mark.parametrize(
    ("value", "mask", "message"),
    [
        (float("nan"), "threshold: 0.5", "the mask holds NaN"),
        (1.5, "invert: false", "holds values from 0 to 1.5"),
        (-0.5, "invert: true", "holds values from -0.5 to 0"),
    ],
)
def test_mask_values_that_mean_nothing_are_refused(tmp_path, value, mask, message):
    made = make_family(tmp_path)
    masks = {name: torch.zeros(made.aligned[name].shape) for name in GATED}
    masks[GATED[5]][3, 3] = value
    save_file(masks, tmp_path / "mask.safetensors")
    with pytest.raises(SourceError, match=message):
        run_recipe(tmp_path, recipe_text(FULL, ALWAYS, f"{{method: mask, mask: {{path: mask.safetensors, {mask}}}}}"))


# Refusals


def refuse_reading(monkeypatch) -> None:
    """From here on, reading tensor data is a failure of the test."""
    from safemerge_recipes.storage.reader import Reader

    def fail(*args, **kwargs):
        raise AssertionError("tensor data was read")

    monkeypatch.setattr(Reader, "read_bytes", fail)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (recipe_text(FULL, "{lowest: 15}", "{method: linear}"), PlanError, "15 are to be chosen, only 14 can be"),
        (recipe_text(FULL, "{random: {count: 15}}", "{method: linear}"), PlanError, "15 are to be drawn"),
        (recipe_text(FULL, "{tau: 0.5}", "{method: linear, space: factors}"), SourceError, "is not an adapter on the"),
        (
            recipe_text(ADAPTERS.replace("safety-adapter", "other-rank"), "{tau: 0.5}", "{space: factors}"),
            SourceError,
            "has rank 2, the fine-tuned adapter 4",
        ),
        (recipe_text(FULL, "{tau: 0.5}", "{method: nothing}"), RecipeError, "'nothing' is not known; expected one of"),
        (recipe_text(FULL, "{tau: 0.5}", "{method: 'mergekit:nothing'}"), RecipeError, "mergekit knows no such method"),
        (
            recipe_text(FULL, "{tau: 0.5}", "{method: 'mergekit:ties', options: {dens: 1}}"),
            RecipeError,
            r"merge\.options\.dens: mergekit:ties has no such parameter; expected density",
        ),
        (recipe_text(FULL, "{tau: 0.5, metric: nothing}", "{}"), RecipeError, "gate.metric: 'nothing' is not known"),
        (recipe_text(FULL, "{names: '*.nothing.*'}", "{}"), RecipeError, "matches none of the 14 gated tensors"),
        (
            recipe_text(
                "{aligned: aligned, finetuned: finetuned}", ALWAYS, "{method: mask, mask: {path: bool.safetensors}}"
            ),
            RecipeError,
            "sources.safety: missing",
        ),
        (
            recipe_text(PAIR, ALWAYS, "{method: svd_k}"),
            RecipeError,
            "sources.base: missing",
        ),
    ],
)
def test_what_cannot_be_is_refused_from_headers_alone(family, monkeypatch, text, error, message):
    if not (family.root / "other-rank").exists():
        write_adapter(family.root / "other-rank", random_factors(7, 2), 2)
    refuse_reading(monkeypatch)
    with pytest.raises(error, match=message):
        prepare_recipe(family.root, text)


def test_a_method_that_needs_too_much_memory_is_refused_by_name_with_the_size(tmp_path):
    from safemerge_recipes.storage.workers import SLACK

    make_family(tmp_path)
    with pytest.raises(PlanError, match=r"--max-memory .*: model\.layers\.\d.*weight alone needs .*; raise it"):
        prepare_recipe(tmp_path, recipe_text(FULL, ALWAYS, "{method: project}"), memory=SLACK + 1_000_000)


# mergekit

TWO_SIDED = {
    "slerp", "nearswap", "ram", "ramplus_tl", "sce", "linear", "multislerp", "nuslerp", "passthrough", "model_stock",
    "arcee_fusion", "karcher", "task_arithmetic", "ties", "dare_ties", "dare_linear", "breadcrumbs",
    "breadcrumbs_ties", "della", "della_linear",
}  # fmt: skip
OPTIONS = {"ties": {"density": 0.5}, "della": {"density": 0.5, "epsilon": 0.1}, "dare_linear": {"density": 0.5}}


def test_all_of_mergekits_methods_are_known():
    from mergekit.merge_methods import registered_methods

    assert {method.spec.name for method in registered_methods()} == TWO_SIDED


@pytest.mark.parametrize("method", sorted(TWO_SIDED))
def test_mergekit(family, method):
    """What is written is what mergekit computes from the whole weights of its YAML's models, base first."""
    from mergekit.merge_methods import get, merge_tensors

    from safemerge_recipes.methods.mergekit import tensor_seed

    options = OPTIONS.get(method, {})
    merge = f"{{method: 'mergekit:{method}', alpha: 0.7, options: {options}}}"
    _, written = run_recipe(family.root, recipe_text(FULL, ALWAYS, merge))
    spec = get(method).spec
    names = {parameter.name for parameter in spec.parameters}
    required = {parameter.name for parameter in spec.parameters if parameter.required}
    pairwise = spec.contract.base.value != "required" or spec.contract.max_inputs == 2
    for name in GATED[:4]:
        sides = [family.finetuned[name], family.safety[name]]
        inputs = sides[:1] if method == "passthrough" else sides if pairwise else [family.aligned[name], *sides]
        parameters = dict(options)
        if "weight" in required:
            parameters["weight"] = [0.7, 1 - 0.7]
        if "t" in required:
            parameters["t"] = 1 - 0.7
        assert set(parameters) <= names
        torch.manual_seed(tensor_seed(0, name))
        base = 0 if spec.contract.base.value == "required" else None
        expected = merge_tensors(inputs, method, parameters=parameters, base_index=base, name=name)
        torch.testing.assert_close(written[name], expected, rtol=1e-6, atol=1e-7)


def test_mergekit_draws_do_not_depend_on_workers_and_leave_the_global_generator_alone(family):
    text = recipe_text(FULL, ALWAYS, "{method: 'mergekit:dare_ties', options: {density: 0.3}, seed: 4}")
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    _, one = run_recipe(family.root, text, workers=1)
    assert torch.equal(torch.rand(3), expected)
    _, two = run_recipe(family.root, text, workers=2)
    assert all(torch.equal(one[name], two[name]) for name in GATED)


def test_mergekit_options_may_be_given_by_role(family):
    text = recipe_text(FULL, ALWAYS, "{method: 'mergekit:linear', options: {weight: {safety: 0.9, finetuned: 0.1}}}")
    _, written = run_recipe(family.root, text)
    for name in GATED:
        close(written[name], 0.1 * family.finetuned[name].double() + 0.9 * family.safety[name].double())


def test_without_mergekit_the_message_says_how_to_get_it(family, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mergekit", None)
    monkeypatch.setitem(sys.modules, "mergekit.merge_methods", None)
    with pytest.raises(RecipeError, match=r"mergekit is not installed.*pip install 'safemerge-recipes\[mergekit\]'"):
        prepare_recipe(family.root, recipe_text(FULL, ALWAYS, "{method: 'mergekit:slerp'}"))


# The published procedure


def peft_merged(family: Family, folders: list[Path], weights: list[float], kind: str = "linear", **given):
    """PEFT's own merged adapter: module -> (A, B, scale)."""
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{key: value for key, value in CONFIG.items() if key not in ("model_type", "architectures")})
    with torch.random.fork_rng():
        model = PeftModel.from_pretrained(LlamaForCausalLM(config), folders[0], adapter_name="a0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=f"a{number}")
    names = [f"a{number}" for number in range(len(folders))]
    model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **given)
    found = {}
    for i in range(BLOCKS):
        for module in MATRICES:
            layer = model.get_submodule(f"base_model.model.model.layers.{i}.{module}")
            pair = layer.lora_A["merged"].weight.detach(), layer.lora_B["merged"].weight.detach()
            found[f"model.layers.{i}.{module}.weight"] = (*pair, layer.scaling["merged"])
    return found


def dense_published(family: Family, tau: float) -> tuple[dict[str, float], set[str]]:
    """The published gate as its formula reads: every C formed, cosines of flattened matrices, compared to τ."""
    cosines = {}
    for name in GATED:
        v = family.aligned[name] - family.base[name]
        projector = v @ v.T / v.norm()
        a, b = family.finetuned_factors[name.removesuffix(".weight")]
        update = b @ a
        cosines[name] = float(
            torch.nn.functional.cosine_similarity((projector @ update).reshape(1, -1), update.reshape(1, -1))
        )
    return cosines, {name for name, cosine in cosines.items() if round(cosine, 5) < tau}


def test_the_published_procedure(family):
    """ρ to 1e-5, the same decisions, and the weights of PEFT's merged adapter where merged."""
    cosines, _ = dense_published(family, 0.5)
    tau = round(sorted(cosines.values())[len(cosines) // 2] + 1e-4, 4)
    cosines, merged = dense_published(family, tau)
    assert 0 < len(merged) < len(GATED)
    prepared, written = run_recipe(family.root, recipe_text(ADAPTERS, f"{{tau: {tau}}}", "{space: factors}"))
    lines = {line.name: line for line in prepared.plan.tensors}
    for name in GATED:
        assert lines[name].moments.rho == pytest.approx(cosines[name], abs=1e-5)
    assert {name for name in GATED if lines[name].action == "merge"} == merged
    reference = peft_merged(family, [family.root / "finetuned-adapter", family.root / "safety-adapter"], [0.8, 0.2])
    for name in GATED:
        a, b, scale = reference[name]
        delta = scale * b.double() @ a.double() if name in merged else family.lora("finetuned", name)
        close(written[name], family.aligned[name].double() + delta)


def test_the_merged_factors_are_pefts(family):
    """Not only their product: A and B themselves, so a written adapter is PEFT's."""
    from safemerge_recipes.storage.reader import Reader
    from safemerge_recipes.weights.torch_factors import joined_factors

    prepared = prepare_recipe(family.root, recipe_text(ADAPTERS, ALWAYS, "{space: factors, alpha: 0.6}"))
    reference = peft_merged(family, [family.root / "finetuned-adapter", family.root / "safety-adapter"], [0.6, 0.4])
    with Reader() as reader:
        for task in prepared.graph.tasks:
            if task.slot.name in GATED:
                b, a = joined_factors(task.work.weight, reader, torch.float32, "cpu")
                expected_a, expected_b, scale = reference[task.slot.name]
                assert scale == 1
                torch.testing.assert_close(a, expected_a, rtol=1e-5, atol=1e-7)
                torch.testing.assert_close(b, expected_b, rtol=1e-5, atol=1e-7)


def test_a_written_adapter_is_pefts_merged_adapter(family):
    """The same rank and the same update, module by module, as a folder that PEFT loads."""
    import json

    from safetensors.torch import load_file

    text = recipe_text(ADAPTERS, ALWAYS, "{space: factors}", "output: {format: adapter}")
    before = set(family.root.glob("out*"))
    run_recipe(family.root, text)
    (folder,) = set(family.root.glob("out*")) - before
    written, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    reference = peft_merged(family, [family.root / "finetuned-adapter", family.root / "safety-adapter"], [0.8, 0.2])
    scale = config["lora_alpha"] / config["r"]
    for name, (a, b, own) in reference.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        left, right = written[f"{module}.lora_B.weight"], written[f"{module}.lora_A.weight"]
        assert right.shape == a.shape
        torch.testing.assert_close(scale * left @ right, own * b @ a, rtol=1e-4, atol=1e-6)
    assert set(peft_merged(family, [folder], [1.0])) == set(GATED)


def test_dare_linear_is_pefts_given_its_draw(family, monkeypatch):
    """PEFT draws with torch.bernoulli, A of each adapter and then B, module by module; here it gets our draws."""
    from peft.utils import merge_utils

    text = recipe_text(ADAPTERS, ALWAYS, "{method: dare_linear, space: factors, density: 0.5, seed: 7}")
    _, written = run_recipe(family.root, text)
    a_of = {tuple(a.flatten()[:3].tolist()): (name, 0) for name, (a, _) in family.finetuned_factors.items()}
    a_of |= {tuple(a.flatten()[:3].tolist()): (name, 1) for name, (a, _) in family.safety_factors.items()}
    b_of = {tuple(b.flatten()[:3].tolist()): (name, 0) for name, (_, b) in family.finetuned_factors.items()}
    b_of |= {tuple(b.flatten()[:3].tolist()): (name, 1) for name, (_, b) in family.safety_factors.items()}
    seen = []

    def pruned(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        key = tuple(tensor.flatten()[:3].tolist())
        letter, (name, side) = ("A", a_of[key]) if key in a_of else ("B", b_of[key])
        seen.append((name, letter, side))
        keep = Draw(density, 7).keep(f"{name}.weight:lora_{letter}", 0, tensor.numel(), Arena())[side]
        kept = tensor * keep.view(tensor.shape)
        return kept / density if rescale else kept

    monkeypatch.setattr(merge_utils, "random_pruning", pruned)
    folders = [family.root / "finetuned-adapter", family.root / "safety-adapter"]
    reference = peft_merged(family, folders, [0.8, 0.2], "dare_linear", density=0.5)
    assert len(seen) == 4 * len(GATED)
    for name in GATED:
        a, b, scale = reference[name]
        close(written[name], family.aligned[name].double() + scale * b.double() @ a.double())


def test_the_same_a_on_both_sides_weighs_the_deltas_1_2_and_0_6(tmp_path):
    """At 0.8 and 0.2: (√0.8·B_f + √0.2·B_s)(√0.8 + √0.2)A = 1.2·B_f·A + 0.6·B_s·A."""
    family = make_family(tmp_path)
    shared = {name: (a, family.safety_factors[name][1]) for name, (a, _) in family.finetuned_factors.items()}
    write_adapter(tmp_path / "shared", shared, 8)
    text = recipe_text(ADAPTERS.replace("safety-adapter", "shared"), ALWAYS, "{alpha: 0.8, space: factors}")
    _, written = run_recipe(tmp_path, text)
    for name in GATED:
        a, b = shared[name.removesuffix(".weight")]
        safety = family.scale * b.double() @ a.double()
        close(written[name], family.aligned[name].double() + 1.2 * family.lora("finetuned", name) + 0.6 * safety)


def test_the_default_is_the_papers_formula_and_differs(family):
    """αΔf + (1−α)Δs; PEFT's linear is far from it for independent adapters."""
    _, exact = run_recipe(family.root, recipe_text(ADAPTERS, ALWAYS, "{alpha: 0.8}"))
    _, factors = run_recipe(family.root, recipe_text(ADAPTERS, ALWAYS, "{alpha: 0.8, space: factors}"))
    for name in GATED:
        delta_f, delta_s = deltas(family, name, "lora")
        delta = 0.8 * delta_f + 0.2 * delta_s
        close(exact[name], family.aligned[name].double() + delta)
        off = (factors[name].double() - family.aligned[name].double() - delta).norm() / delta.norm()
        assert 0.4 < float(off) < 1.0


def test_an_adapter_that_lacks_a_module_takes_no_part_as_in_peft(family):
    some = {name: pair for name, pair in random_factors(6, 4, 0.1).items() if "q_proj" in name}
    if not (family.root / "q-only").exists():
        write_adapter(family.root / "q-only", some, 8)
    text = recipe_text(ADAPTERS.replace("safety-adapter", "q-only"), ALWAYS, "{alpha: 0.8, space: factors}")
    _, written = run_recipe(family.root, text)
    for name in GATED:
        if "q_proj" not in name:
            close(written[name], family.aligned[name].double() + 0.8 * family.lora("finetuned", name))


def test_negative_scales_keep_their_sign(tmp_path):
    family = make_family(tmp_path)
    write_adapter(tmp_path / "negative", family.safety_factors, -8)
    text = recipe_text(ADAPTERS.replace("safety-adapter", "negative"), ALWAYS, "{alpha: 0.8, space: factors}")
    _, written = run_recipe(tmp_path, text)
    root_f, root_s = math.sqrt(0.8 * 2), math.sqrt(0.2 * 2)
    for name in GATED:
        a, b = (x.double() for x in family.finetuned_factors[name.removesuffix(".weight")])
        a_s, b_s = (x.double() for x in family.safety_factors[name.removesuffix(".weight")])
        delta = (root_f * b + root_s * b_s) @ (root_f * a - root_s * a_s)
        close(written[name], family.aligned[name].double() + delta)


# What is on top of a score


def on_top(scores: torch.Tensor, part: float, per: str) -> torch.Tensor:
    """By sorting: the ⌊part·n⌋ highest of the tensor, of each row or of each column; ties by position."""

    def line(values: torch.Tensor) -> torch.Tensor:
        chosen = torch.zeros(len(values), dtype=torch.bool)
        chosen[values.argsort(descending=True, stable=True)[: math.floor(part * len(values) + 1e-9)]] = True
        return chosen

    if per == "tensor":
        return line(scores.flatten()).view(scores.shape)
    rows = scores if per == "row" else scores.T
    chosen = torch.stack([line(row) for row in rows])
    return chosen if per == "row" else chosen.T


@pytest.fixture(scope="module")
def ranked(family) -> dict[str, dict[str, torch.Tensor]]:
    """Two score files with many equal scores."""
    found = {}
    for seed, file in enumerate(("harmful", "utility")):
        draw = torch.Generator().manual_seed(seed)
        found[file] = {n: torch.randint(0, 9, family.aligned[n].shape, generator=draw).float() for n in GATED}
        save_file(found[file], family.root / f"{file}.safetensors")
    return found


@pytest.mark.parametrize("per", ["tensor", "row", "column"])
@pytest.mark.parametrize("part", [0.05, 0.3, 1.0])
def test_the_highest_scores_are_replaced(family, ranked, per, part, monkeypatch):
    from safemerge_recipes.methods import top
    from safemerge_recipes.storage import cut

    monkeypatch.setattr(top, "HELD", 200)  # several panels of columns
    monkeypatch.setattr(cut, "PIECE", 100)  # several pieces
    mask = f"{{path: harmful.safetensors, top: {part}, per: {per}}}"
    _, written = run_recipe(family.root, recipe_text(FULL, ALWAYS, f"{{method: mask, mask: {mask}}}"))
    for name in GATED:
        chosen = on_top(ranked["harmful"][name], part, per)
        assert torch.equal(written[name], torch.where(chosen, family.safety[name], family.finetuned[name]))


@pytest.mark.parametrize("how", ["minus", "and", "or"])
def test_two_scores_combine(family, ranked, how):
    other = "{path: utility.safetensors, top: 0.5, per: row}"
    mask = f"{{path: harmful.safetensors, threshold: 5, {how}: {other}, fill: zero}}"
    prepared, written = run_recipe(family.root, recipe_text(FULL, ALWAYS, f"{{method: mask, mask: {mask}}}"))
    for name in GATED:
        one, two = ranked["harmful"][name] > 5, on_top(ranked["utility"][name], 0.5, "row")
        chosen = one & ~two if how == "minus" else one & two if how == "and" else one | two
        assert torch.equal(written[name], torch.where(chosen, 0.0, family.finetuned[name]))
    assert {Path(path).name for path in prepared.family.mask_files} == {"harmful.safetensors", "utility.safetensors"}


def test_shares_combine_as_probabilities_do(family):
    mask = "{path: scores.safetensors, minus: {path: halves.safetensors}, fill: aligned}"
    _, written = run_recipe(family.root, recipe_text(FULL, ALWAYS, f"{{method: mask, mask: {mask}}}"))
    from safetensors.torch import load_file

    one, two = (load_file(family.root / f"{file}.safetensors") for file in ("scores", "halves"))
    for name in GATED:
        share = one[name].double() * (1 - two[name].double())
        close(written[name], (1 - share) * family.finetuned[name].double() + share * family.aligned[name].double())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("top: 0.1, threshold: 1", "found threshold and top; expected one of them"),
        ("per: row", "found `per` without `top`"),
        ("minus: {path: a}, or: {path: b}", "found `minus` and `or`; expected at most one"),
        ("top: 0", "merge.mask.top"),
    ],
)
def test_a_mask_that_says_two_things_is_refused(family, mask, message):
    with pytest.raises(RecipeError, match=message):
        prepare_recipe(
            family.root, recipe_text(FULL, ALWAYS, f"{{method: mask, mask: {{path: scores.safetensors, {mask}}}}}")
        )


def test_negative_scores_of_a_whole_tensor_have_no_top(family, ranked):
    save_file({n: -s for n, s in ranked["harmful"].items()}, family.root / "negative.safetensors")
    text = recipe_text(FULL, ALWAYS, "{method: mask, mask: {path: negative.safetensors, top: 0.1}}")
    with pytest.raises(SourceError, match="negative scores or NaN"):
        run_recipe(family.root, text)
