"""Any number of deltas: against float64, mergekit, the form for two, and PEFT's factors; gradients over depth.

Guards `recipe.merge_forms`, `recipe.numbers`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from safemerge_recipes.errors import RecipeError, SafemergeError, SourceError
from safemerge_recipes.recipe.loading import parse_recipe
from safemerge_recipes.recipe.writing import dump_recipe
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.weights.draw import LEVELS, Draw
from tests.fixtures import reference
from tests.fixtures.plain_family import (
    BLOCKS,
    GATED,
    Family,
    make_family,
    prepare_recipe,
    random_factors,
    random_model,
    recipe_text,
    run_recipe,
    write_adapter,
    write_model,
)

ALWAYS = "{always: true}"
OTHERS = ("math", "code", "law")
FIVE = {"finetuned": 0.7, "safety": 0.2, "math": -0.3, "code": 0.5, "law": 0.25}
POSITIVE = {role: abs(weight) for role, weight in FIVE.items()}
THREE = {"finetuned": 0.7, "safety": 0.2, "math": -0.3}
FULL = "{base: base, aligned: aligned, finetuned: finetuned, safety: safety, others: {%s}}"
LORA = "{aligned: aligned, finetuned: {adapter: finetuned-adapter}, safety: {adapter: safety-adapter}, others: {%s}}"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    made = make_family(tmp_path_factory.mktemp("many"))
    for seed, name in enumerate(OTHERS):
        write_model(made.root / name, random_model(20 + seed, made.aligned))
        write_adapter(made.root / f"{name}-adapter", random_factors(30 + seed, 4), 8)
    return made


def sources(kind: str, names: Any) -> str:
    others = [name for name in names if name in OTHERS]
    form = "%s: %s" if kind == "full" else "%s: {adapter: %s-adapter}"
    return (FULL if kind == "full" else LORA) % ", ".join(form % (name, name) for name in others)


def deltas(family: Family, kind: str, name: str, names: Any) -> dict[str, Tensor]:
    """Δ of every role, float64."""
    found = {}
    for role in names:
        if kind == "full":
            model = load_file(family.root / role / "model.safetensors")
            found[role] = model[name].double() - family.aligned[name].double()
        elif role in OTHERS:
            a, b = random_factors(30 + OTHERS.index(role), 4)[name.removesuffix(".weight")]
            found[role] = 2 * b.double() @ a.double()
        else:
            found[role] = family.lora(role, name)
    return found


def merge_text(method: str, weights: dict[str, Any], rest: str = "") -> str:
    return f"{{method: '{method}', weights: {json.dumps(weights)}{rest}}}"


def elected(sides: list[Tensor], weights: list[float], normalize: bool) -> Tensor:
    """TIES' election as the paper and mergekit have it, float64."""
    parts = [weight * side for weight, side in zip(weights, sides, strict=True)]
    sign = torch.where(sum(parts) >= 0, 1.0, -1.0)
    agree = [(part.sign() == sign).double() for part in parts]
    total = sum(part * keep for part, keep in zip(parts, agree, strict=True))
    if not normalize:
        return total
    share = sum(weight * keep for weight, keep in zip(weights, agree, strict=True))
    return total / torch.where(share.abs() < 1e-8, 1.0, share)


def dropped(x: Tensor, name: str, place: int, count: int) -> Tensor:
    keep = Draw(0.5, 3).keep(name, 0, x.numel(), Arena(), count)[place]
    return x * keep.view(x.shape) * (LEVELS / round(0.5 * LEVELS))


@pytest.mark.parametrize("weights", [THREE, FIVE, {"math": 0.6, "finetuned": 0.4}], ids=["three", "five", "two"])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    "method", ["linear", "linear-normalized", "task_arithmetic", "ties", "ties-sum", "dare_linear", "dare_ties"]
)
def test_against_float64(family: Family, method: str, kind: str, weights: dict[str, float]) -> None:
    rest = {
        "linear-normalized": ", normalize: true", "ties": ", density: 0.3",
        "ties-sum": ", density: 0.3, normalize: false, lambda: 1.5", "dare_linear": ", seed: 3",
        "dare_ties": ", seed: 3, normalize: false",
    }.get(method, "")  # fmt: skip
    text = recipe_text(sources(kind, weights), ALWAYS, merge_text(method.partition("-")[0], weights, rest))
    _, written = run_recipe(family.root, text)
    for name in GATED:
        sides, shares = list(deltas(family, kind, name, weights).values()), list(weights.values())
        if method.startswith("dare"):
            sides = [dropped(x, name, place, len(sides)) for place, x in enumerate(sides)]
        if method.startswith("ties"):
            sides = [reference.trim(x.float().double(), 0.3) for x in sides]
        if "ties" in method:
            wanted = elected(sides, shares, method == "ties") * (1.5 if method == "ties-sum" else 1.0)
        else:
            wanted = sum(share * x for share, x in zip(shares, sides, strict=True))
            wanted = wanted / sum(shares) if method == "linear-normalized" else wanted
        found, wanted = written[name].double(), family.aligned[name].double() + wanted
        bad = ((found - wanted).abs() > 3e-6).double().mean()
        assert float(bad) <= (0.004 if "ties" in method else 0.0), (name, float(bad))  # votes and trims on the edge


@pytest.mark.parametrize("weights", [THREE, POSITIVE], ids=["three", "five"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties"])
def test_against_mergekit(family: Family, method: str, weights: dict[str, float]) -> None:
    """Each method by its own code there; DARE's draw is fed in as what is left of the deltas."""
    from mergekit.merge_methods import merge_tensors

    rest = {"linear": ", normalize: true, space: weights", "ties": ", density: 0.3", "dare_ties": ", seed: 3"}
    text = recipe_text(sources("full", weights), ALWAYS, merge_text(method, weights, rest.get(method, "")))
    _, written = run_recipe(family.root, text)
    ids = ("aligned", *weights)
    for name in GATED:
        aligned = family.aligned[name]
        sides = list(deltas(family, "full", name, weights).values())
        if method == "dare_ties":
            sides = [dropped(x, name, place, len(sides)) for place, x in enumerate(sides)]
        models = [(aligned.double() + x).float() for x in sides]
        parameters: dict[str, Any] = {"weight": weights}
        if method.endswith("ties"):
            parameters |= {"density": 0.3 if method == "ties" else 1.0, "normalize": True, "lambda": 1.0}
        based = method != "linear"
        wanted = merge_tensors(
            [aligned, *models] if based else models, "ties" if method == "dare_ties" else method,
            parameters=parameters, ids=ids if based else ids[1:], base_index=0 if based else None,
        )  # fmt: skip
        bad = ((written[name] - wanted).abs() > 5e-6).double().mean()
        assert float(bad) <= (0.004 if method.endswith("ties") else 0.0), (name, float(bad))


@pytest.mark.parametrize("name", ["linear", "ties", "task_arithmetic"])
def test_methods_of_mergekit_take_weights(family: Family, name: str) -> None:
    from mergekit.merge_methods import merge_tensors

    text = recipe_text(sources("full", THREE), ALWAYS, merge_text(f"mergekit:{name}", THREE))
    _, written = run_recipe(family.root, text)
    models = {role: load_file(family.root / role / "model.safetensors") for role in ("aligned", *THREE)}
    ids = tuple(THREE) if name == "linear" else tuple(models)
    for tensor in GATED[:3]:
        wanted = merge_tensors(
            [models[role][tensor] for role in ids], name, parameters={"weight": THREE}, ids=ids,
            base_index=None if name == "linear" else 0,
        )  # fmt: skip
        torch.testing.assert_close(written[tensor], wanted)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    ("method", "short"),
    [
        ("linear", "alpha: 0.7"), ("ties", "alpha: 0.7"), ("dare_linear", "alpha: 0.7"), ("dare_ties", "alpha: 0.7"),
        ("task_arithmetic", "lambda_finetuned: 0.7, lambda_safety: 0.3"), ("linear", "alpha: 0.7, space: weights"),
    ],
)  # fmt: skip
def test_the_long_form_for_two_gives_the_bytes_of_the_short_one(
    family: Family, method: str, short: str, kind: str
) -> None:
    given = sources(kind, ()).replace(", others: {}", "")
    space = ", space: weights" if "space" in short else ""
    _, one = run_recipe(family.root, recipe_text(given, ALWAYS, f"{{method: {method}, {short}}}"))
    long = merge_text(method, {"finetuned": 0.7, "safety": 0.3}, space)
    _, two = run_recipe(family.root, recipe_text(given, ALWAYS, long))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_factors_of_three_adapters_combine_one_by_one(family: Family) -> None:
    weights = {"finetuned": 0.7, "math": 0.2, "code": 0.1}
    text = recipe_text(sources("lora", weights), ALWAYS, merge_text("linear", weights, ", space: factors"))
    _, written = run_recipe(family.root, text)
    for name in GATED:
        module = name.removesuffix(".weight")
        others = [random_factors(30 + OTHERS.index(other), 4)[module] for other in ("math", "code")]
        factors = [family.finetuned_factors[module], *others]
        roots = [(2 * weight) ** 0.5 for weight in weights.values()]
        a, b = (sum(root * pair[at].double() for root, pair in zip(roots, factors, strict=True)) for at in (0, 1))
        torch.testing.assert_close(written[name].double(), family.aligned[name].double() + b @ a, rtol=1e-5, atol=2e-6)


def test_a_mask_is_filled_with_a_sum_of_deltas(family: Family) -> None:
    from safetensors.torch import save_file

    chosen = {name: torch.rand(family.aligned[name].shape) > 0.6 for name in GATED}
    save_file(chosen, family.root / "mask.safetensors")
    text = merge_text("mask", THREE, ", mask: {path: mask.safetensors}")
    _, written = run_recipe(family.root, recipe_text(sources("full", THREE), ALWAYS, text))
    for name in GATED:
        sides = deltas(family, "full", name, THREE)
        fill = family.aligned[name].double() + sum(weight * sides[role] for role, weight in THREE.items())
        wanted = torch.where(chosen[name], fill, family.finetuned[name].double())
        torch.testing.assert_close(written[name].double(), wanted, rtol=1e-5, atol=2e-6)


def test_the_plan_and_the_output_name_every_delta(family: Family) -> None:
    text = recipe_text(sources("full", THREE), ALWAYS, merge_text("ties", THREE))
    before = set(family.root.glob("out*"))
    prepared, _ = run_recipe(family.root, text)
    (folder,) = set(family.root.glob("out*")) - before
    line = next(line for line in prepared.plan_json()["tensors"] if line["name"] == GATED[0])
    assert (line["alpha"], line["parameters"]["weights"]) == (None, THREE)
    stored = parse_recipe((folder / "safemerge_recipe.yaml").read_text(), folder / "safemerge_recipe.yaml").recipe
    assert stored.sources.others["math"].where.endswith("math")
    assert (folder / stored.sources.others["math"].where).is_dir()
    roles = {
        r for entry in json.loads((folder / "safemerge_manifest.json").read_text())["inputs"] for r in entry["roles"]
    }
    assert {"finetuned", "safety", "math"} <= roles
    assert "math" in (folder / "safemerge_report.html").read_text()
    assert "math" in (folder / "README.md").read_text()
    assert "ties of finetuned 0.7, safety 0.2, math" in (folder / "README.md").read_text()


# Gradients


def test_a_gradient_gives_each_block_its_number(family: Family) -> None:
    given = sources("full", ()).replace(", others: {}", "")
    prepared, written = run_recipe(family.root, recipe_text(given, ALWAYS, "{alpha: {gradient: [0.2, 1.0]}}"))
    for name in GATED:
        alpha = 0.2 if ".0." in name else 1.0
        found = alpha * family.finetuned[name].double() + (1 - alpha) * family.safety[name].double()
        torch.testing.assert_close(written[name].double(), found, rtol=1e-5, atol=2e-6)
    lines = {line["name"]: line["alpha"] for line in prepared.plan_json()["tensors"]}
    assert (lines[GATED[0]], lines[GATED[-1]]) == (0.2, 1.0)
    assert BLOCKS == 2


def test_gradients_are_straight_lines_between_evenly_spread_values() -> None:
    from safemerge_recipes.recipe.merge_keys import Gradient

    gradient = Gradient(gradient=(0.2, 0.8, 0.5))
    assert [round(gradient.at(block, 5), 9) for block in range(5)] == [0.2, 0.5, 0.8, 0.65, 0.5]
    assert Gradient(gradient=(0.0, 1.0)).at(0, 2) == 0


def test_a_recipe_with_weights_and_gradients_is_written_as_it_is_read(family: Family) -> None:
    weights = {"finetuned": {"gradient": [0.2, 0.4]}, "math": 1.0}
    ruled = "{tensors: '*q_proj*', merge: {weights: {math: 0.5}}}, {tensors: '*k_proj*', merge: {alpha: 0.1}}"
    text = recipe_text(sources("full", weights), ALWAYS, merge_text("linear", weights), f"rules: [{ruled}]\n")
    recipe = parse_recipe(text, family.root / "recipe.yaml").recipe
    assert parse_recipe(dump_recipe(recipe), family.root / "recipe.yaml").recipe == recipe
    merges = [policy.merge.parameters() for policy in recipe.policies()]
    assert merges[0]["weights"] == {"math": 0.5}
    assert (merges[1]["alpha"], "weights" in merges[1]) == (0.1, False)
    over = parse_recipe(text, family.root / "recipe.yaml", ["merge.alpha=0.5", "rules=[]", "sources.others={}"]).recipe
    assert over.merge.parameters()["alpha"] == 0.5


@pytest.mark.parametrize(
    ("merge", "error", "message"),
    [
        ("{weights: {finetuned: 1, mth: 1}}", RecipeError, r"merge\.weights\.mth: no source goes by it; expected"),
        ("{method: slerp}", RecipeError, r"sources\.others\.math: nothing weighs it; .* slerp has alpha, space"),
        ("{method: ties, weights: {finetuned: 1, math: -1}}", RecipeError, "the weights sum to 0, by which normalize"),
        ("{normalize: true, weights: {finetuned: 1, math: -1}}", RecipeError, "the weights sum to 0"),
        ("{method: 'mergekit:linear', weights: {finetuned: 1, math: -1}}", RecipeError, "sum to 0, by which mergekit"),
        ("{method: 'mergekit:slerp', weights: {finetuned: 1, safety: 1, math: 1}}", RecipeError, "expected at most 2"),
        ("{alpha: 0.5, weights: {finetuned: 1, math: 1}}", RecipeError, "found weights and alpha"),
        ("{weights: {finetuned: {gradient: [1, 2, 3]}, math: 1}}", RecipeError, "a gradient of 3 values for 2 blocks"),
        ("{weights: {finetuned: 1, math: {gradient: [1]}}}", RecipeError, "a list of at least two"),
        ("{space: factors, weights: {finetuned: 1, math: 1}}", SourceError, "is not an adapter on the aligned model"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_measuring(
    family: Family, monkeypatch: pytest.MonkeyPatch, merge: str, error: type[SafemergeError], message: str
) -> None:
    from safemerge_recipes.storage.reader import Reader

    monkeypatch.setattr(Reader, "read_bytes", lambda *_: pytest.fail("tensor data was read"))
    with pytest.raises(error, match=message) as raised:
        prepare_recipe(family.root, recipe_text(sources("full", THREE), "{tau: 0.5}", merge))
    assert len(str(raised.value).splitlines()) == 1


def test_a_name_of_a_role_is_none_of_an_other(family: Family) -> None:
    text = recipe_text("{aligned: aligned, finetuned: finetuned, others: {base: base}}", ALWAYS, "{method: drop}")
    with pytest.raises(RecipeError, match=r"sources\.others\.base: found the name of a role"):
        parse_recipe(text, family.root / "recipe.yaml")


def test_another_place_stands_in_for_an_other(family: Family, tmp_path: Path) -> None:
    text = recipe_text(sources("full", THREE), ALWAYS, merge_text("linear", THREE))
    found = parse_recipe(text, family.root / "recipe.yaml", stand_ins={"math": str(family.root / "law")}).recipe
    assert found.sources.others["math"].where == str(family.root / "law")
