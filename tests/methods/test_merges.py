"""Written weights of every method against dense float64 references, PEFT, mergekit and transformers.

Guards `methods.linear`, `methods.factors`, `methods.replace`, `methods.drop`, `methods.task_arithmetic`,
`methods.dare_linear`, `methods.dare_ties`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.weights.draw import LEVELS, Draw
from tests.fixtures import reference
from tests.fixtures.gated_family import ROLES, Family, read_weights

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "alpha": 0.8},
    "linear-weights": {"method": "linear", "alpha": 0.35, "space": "weights"},
    "slerp": {"method": "slerp", "alpha": 0.3},
    "slerp-weights": {"method": "slerp", "alpha": 0.6, "space": "weights"},
    "ties": {"method": "ties", "alpha": 0.6},
    "ties-sum": {"method": "ties", "alpha": 0.5, "density": 0.2, "lambda": 1.5, "normalize": False},
    "ties-weights": {"method": "ties", "alpha": 0.7, "density": 0.9, "space": "weights"},
    "dare": {"method": "dare_linear", "density": 0.25, "seed": 3},
    "dare-l1": {"method": "dare_linear", "density": 0.25, "rescale": "l1"},
    "dare-odd": {"method": "dare_linear", "density": 0.3},
    "dare-weights": {"method": "dare_linear", "density": 0.5, "space": "weights"},
    "dare_ties": {"method": "dare_ties", "density": 0.5, "alpha": 0.4},
    "dare_ties-l1": {"method": "dare_ties", "density": 0.5, "rescale": "l1", "normalize": False, "lambda": 0.5},
    "task_arithmetic": {"method": "task_arithmetic", "lambda_finetuned": 0.7, "lambda_safety": -0.4},
    "replace": {"method": "replace"},
    "drop": {"method": "drop"},
    "add_safety_vector": {"method": "add_safety_vector", "gamma": 0.5},
}


def _dropped(x: Tensor, name: str, side: str, m: dict[str, Any]) -> Tensor:
    masks = Draw(m["density"], m.get("seed", 0)).keep(name, 0, x.numel(), Arena())
    masked = x * masks[side == "safety"].view_as(x)
    if m.get("rescale") == "l1":
        return masked * (x.abs().sum() / masked.abs().sum())
    return masked * (LEVELS / round(m["density"] * LEVELS))


def _merged(m: dict[str, Any], name: str, b: Tensor, a: Tensor, f: Tensor, s: Tensor, draw: int = 1) -> Tensor:
    """The merged weight in float64, by the table of methods."""
    origin = torch.zeros_like(a) if m.get("space") == "weights" else a
    x, y, method, alpha = f - origin, s - origin, m["method"], m.get("alpha", 0.8)
    ties = (alpha, m.get("normalize", True), m.get("lambda", 1.0), draw)
    if method.startswith("dare"):
        x, y = _dropped(x, name, "finetuned", m), _dropped(y, name, "safety", m)
    if method in ("linear", "dare_linear"):
        return origin + alpha * x + (1 - alpha) * y
    if method == "slerp":
        return origin + reference.slerp(x, y, 1 - alpha)
    if method == "ties":
        density = m.get("density", 0.5)
        return origin + reference.consensus(reference.trim(x, density), reference.trim(y, density), *ties)
    if method == "dare_ties":
        return origin + reference.consensus(x, y, *ties)
    if method == "task_arithmetic":
        return origin + m["lambda_finetuned"] * x + m["lambda_safety"] * y
    return {"replace": origin + y, "drop": origin, "add_safety_vector": origin + x + m.get("gamma", 1) * (a - b)}[
        method
    ]


def _models(family: Family, forms: str) -> dict[str, dict[str, Tensor]]:
    models = {role: family.dense(role) for role in ROLES}
    if "adapters" in forms:
        for role in ("finetuned", "safety"):
            update = family.update(f"{role}-lora")
            models[role] = {name: w + update.get(name, 0.0) for name, w in models["aligned"].items()}
    return models


def _sources(family: Family, forms: str) -> dict[str, Any]:
    if "adapters" not in forms:
        return {}
    return {role: {"adapter": str(family / f"{role}-lora")} for role in ("finetuned", "safety")}


@pytest.mark.parametrize("forms", ["full", "adapters"])
@pytest.mark.parametrize("name", ["llama", "qwen"])
@pytest.mark.parametrize("method", METHODS)
def test_written_weights_equal_the_reference(
    families: dict[str, Family], merge: Callable[..., Any], name: str, method: str, forms: str
) -> None:
    family, parameters = families[name], METHODS[method]
    output, plan = merge(family, merge=parameters, sources=_sources(family, forms))
    written, models = read_weights(output), _models(family, forms)
    stored = family.tensors("finetuned" if forms == "full" else "aligned")
    assert list(written) == [line["name"] for line in plan["tensors"]]
    assert set(written) == set(stored)
    merged = [line["name"] for line in plan["tensors"] if line["action"] == "merge"]
    assert len(merged) == (14 if forms == "full" else 6)
    for tensor, found in written.items():
        assert found.dtype == family.dtype
        if tensor in merged:
            b, a, f, s = (models[role][tensor] for role in ROLES)
            plus, minus = (_merged(parameters, tensor, b, a, f, s, draw) for draw in (1, -1))
            assert int((plus != minus).sum()) <= 0.01 * a.numel()  # votes that end in a draw are rare
            reference.assert_rounded(found, reference.nearer(found, plus, minus), tensor)
        else:
            assert torch.equal(found, stored[tensor]), tensor


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_output_dtype_is_reached_in_one_rounding(
    llama: Family, qwen: Family, merge: Callable[..., Any], dtype: str
) -> None:
    for family in (llama, qwen):
        content = {"output": {"path": "x", "dtype": dtype}, "merge": METHODS["linear"], "gate": {"tau": 0.5}}
        output, plan = merge(family, **content)
        models = _models(family, "full")
        actions = {line["name"]: line["action"] for line in plan["tensors"]}
        assert set(actions.values()) == {"merge", "keep"}
        for tensor, found in read_weights(output).items():
            assert found.dtype == getattr(torch, dtype)
            wanted = models["finetuned"][tensor]
            if actions[tensor] == "merge":
                wanted = _merged(METHODS["linear"], tensor, *(models[role][tensor] for role in ROLES))
            reference.assert_rounded(found, wanted, tensor)


@pytest.mark.parametrize("name", ["llama", "qwen"])
@pytest.mark.parametrize("adapter", ["finetuned-lora", "safety-lora", "patterned-lora"])
def test_an_adapter_that_is_kept_equals_merge_and_unload(
    families: dict[str, Family], merge: Callable[..., Any], name: str, adapter: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    family = families[name]
    output, _ = merge(
        family,
        sources={"finetuned": {"adapter": str(family / adapter)}},
        gate={"never": True},
        output={"path": "x", "dtype": "float32"},
    )
    model = AutoModelForCausalLM.from_pretrained(family / "aligned", dtype=torch.float32)
    wanted = PeftModel.from_pretrained(model, family / adapter).merge_and_unload().state_dict()
    aligned = family.tensors("aligned")
    changed = 0
    for tensor, found in read_weights(output).items():
        reference.assert_rounded(found, wanted[tensor].double(), tensor)
        changed += not torch.equal(found, aligned[tensor].float())
    assert changed == len(family.factors(adapter))


@pytest.mark.parametrize(
    ("method", "theirs"),
    [
        ("ties", ("ties", {"weight": [0.6, 0.4], "density": 0.5, "normalize": True, "lambda": 1.0})),
        ("ties-sum", ("ties", {"weight": [0.5, 0.5], "density": 0.2, "normalize": False, "lambda": 1.5})),
        ("slerp-weights", ("slerp", {"t": 0.4})),
        ("linear-weights", ("linear", {"weight": [0.35, 0.65], "normalize": False})),
        ("task_arithmetic", ("task_arithmetic", {"weight": [0.7, -0.4], "normalize": False, "lambda": 1.0})),
    ],
)
def test_methods_agree_with_mergekit(
    qwen: Family, merge: Callable[..., Any], method: str, theirs: tuple[str, dict[str, Any]]
) -> None:
    from mergekit.merge_methods import merge_tensors

    output, plan = merge(qwen, merge=METHODS[method])
    written = read_weights(output)
    models = {role: qwen.tensors(role) for role in ROLES}
    for line in plan["tensors"]:
        if line["action"] != "merge":
            continue
        name = line["name"]
        a, f, s = (models[role][name] for role in ("aligned", "finetuned", "safety"))
        based = theirs[0] in ("ties", "task_arithmetic")
        wanted = merge_tensors(
            [a, f, s] if based else [f, s],
            theirs[0],
            parameters=theirs[1],
            base_index=0 if based or theirs[0] == "slerp" else None,
        )
        assert torch.allclose(written[name], wanted, rtol=0, atol=2e-6 * float(wanted.abs().max())), name


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_transformers_loads_the_output_whole(families: dict[str, Family], merge: Callable[..., Any], name: str) -> None:
    from transformers import AutoModelForCausalLM

    family = families[name]
    output, plan = merge(family, gate={"tau": 0.5}, merge=METHODS["linear"])
    loaded, info = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    actions = {line["name"]: line["action"] for line in plan["tensors"]}
    assert 0 < list(actions.values()).count("merge") < 14
    dense = {role: family.dense(role) for role in ROLES}
    model = AutoModelForCausalLM.from_pretrained(family / "finetuned", dtype=torch.float32)
    with torch.no_grad():
        for tensor, parameter in model.named_parameters():
            if actions[tensor] == "merge":
                wanted = _merged(METHODS["linear"], tensor, *(dense[role][tensor] for role in ROLES))
                parameter.copy_(wanted.to(family.dtype))
        tokens = torch.arange(12).view(2, 6)
        found, wanted = loaded(tokens).logits, model(tokens).logits
        tuned = AutoModelForCausalLM.from_pretrained(family / "finetuned", dtype=torch.float32)(tokens).logits
    assert torch.allclose(found, wanted, atol=2e-3 * float(wanted.abs().max()))
    assert not torch.allclose(found, tuned, atol=2e-2 * float(wanted.abs().max()))


@pytest.mark.parametrize("change", [{"gate": {"never": True}}, {"merge": {"alpha": 1.0}}])
@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_nothing_to_merge_gives_back_the_finetuned_model(
    families: dict[str, Family], merge: Callable[..., Any], name: str, change: dict[str, Any]
) -> None:
    family = families[name]
    output, _ = merge(family, **{"merge": {"method": "linear"}, **change})
    found, wanted = read_weights(output), family.tensors("finetuned")
    assert list(found) == list(wanted)
    assert all(torch.equal(found[tensor], wanted[tensor]) for tensor in wanted)
    if name == "llama":
        ours, theirs = (p / "model.safetensors" for p in (output, family / "finetuned"))
        size = sum(tensor.nbytes for tensor in wanted.values())
        assert ours.read_bytes()[-size:] == theirs.read_bytes()[-size:]


@pytest.mark.parametrize("space", ["delta", "weights"])
@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_alpha_one_keeps_the_finetuned_tensors(
    llama: Family, merge: Callable[..., Any], method: str, space: str
) -> None:
    output, _ = merge(llama, merge={"method": method, "alpha": 1.0, "space": space})
    wanted = llama.tensors("finetuned")
    for tensor, found in read_weights(output).items():
        assert torch.equal(found, wanted[tensor]), tensor


def test_rules_take_tensors_from_other_roles(llama: Family, merge: Callable[..., Any]) -> None:
    output, plan = merge(
        llama,
        merge=METHODS["linear"],
        rules=[
            {"tensors": "model.embed_tokens.weight", "keep": "safety"},
            {"tensors": "*.q_proj.*", "keep": "aligned"},
            {"tensors": "*.layers.0.mlp.*", "merge": METHODS["slerp"]},
            {"tensors": "*.layers.1.mlp.*", "gate": {"never": True}},
        ],
    )
    models = _models(llama, "full")
    for tensor, found in read_weights(output).items():
        dense = [models[role][tensor] for role in ROLES]
        if tensor == "model.embed_tokens.weight":
            wanted = dense[3]
        elif "q_proj" in tensor:
            wanted = dense[1]
        elif ".0.mlp." in tensor:
            wanted = _merged(METHODS["slerp"], tensor, *dense)
        elif ".1.mlp." in tensor or "norm" in tensor or "lm_head" in tensor:
            wanted = dense[2]
        else:
            wanted = _merged(METHODS["linear"], tensor, *dense)
        reference.assert_rounded(found, wanted, tensor)
    assert len(plan["tensors"]) == len(load_file(output / "model.safetensors"))
