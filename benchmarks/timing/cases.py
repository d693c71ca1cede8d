"""What is compared with what: for each case its contestants, their commands, and how the results must agree.

The first contestant of a case is the one the others are divided by. Nothing is run here, except that the
cases with a threshold ask the engine for its readings first, to place τ at a quantile of them.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.timing.agreement import compare_checkpoints, compare_rho, read_rho
from benchmarks.timing.contest import ENGINE, HELP, HOLES, MERGEKIT, PYTHON, TORCH, Bench, Case, Contestant

# One merge, told to both: weights 0.8 and 0.2 on every tensor of the two models.
FULL_MERGES: dict[str, tuple[list[str], dict[str, Any], dict[str, Any]]] = {
    "linear": (["finetuned", "safety"], {"space": "weights"}, {"each": {}}),
    "slerp": (["finetuned", "safety"], {"space": "weights"}, {"all": {"t": 0.2}}),
    "dare_linear": (
        ["aligned", "finetuned", "safety"],
        {"density": 0.5, "rescale": "l1", "seed": 0},
        {"each": {"density": 0.5}},
    ),
    "ties": (
        ["aligned", "finetuned", "safety"],
        {"density": 0.5},
        {"each": {"density": 0.5}, "all": {"normalize": True}},
    ),
}


def full_merge(method: str, bench: Bench) -> Case:
    """Merge two full checkpoints with one method, everywhere: the engine, mergekit, the floor."""
    roles, ours, theirs = FULL_MERGES[method]
    out = bench.work / method
    recipe = bench.recipe(
        method, bench.sources(aligned="aligned", finetuned="finetuned", safety="safety"),
        {"always": True, "scope": ["*"]}, {"method": method, "alpha": 0.8, **ours},
    )  # fmt: skip
    config: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16", "models": []}
    for role, weight in (("finetuned", 0.8), ("safety", 0.2)):
        parameters = {} if method == "slerp" else {"weight": weight, **theirs["each"]}
        config["models"].append({"model": str(bench.role(role)), "parameters": parameters})
    if method != "linear":
        config["base_model"] = str(bench.role("finetuned" if method == "slerp" else "aligned"))
    config["parameters"] = theirs.get("all", {})
    mergekit = bench.work / f"{method}.mergekit.yaml"
    mergekit.write_text(yaml.safe_dump(config, sort_keys=False))
    command = [MERGEKIT, str(mergekit), str(out / "mergekit"), "--quiet", "--random-seed", "0"]
    return Case(
        method, f"{method}, {len(roles)} full models",
        [
            Contestant("ours", bench.ours(recipe, out / "ours"), out / "ours", warm=HELP),
            Contestant("mergekit", [*command, *bench.mergekit_args], out / "mergekit",
                       warm=[MERGEKIT, "--help"], peer=True),
            bench.known(roles, recipe, out / "known"),
            bench.floor(roles, out / "floor"),
            bench.floor(roles, out / "floor", promises=True),
        ],
        bench.files(*roles), partial(compare_checkpoints, out / "ours", out / "mergekit"),
    )  # fmt: skip


def _adapter_recipe(bench: Bench, name: str, gate: dict[str, Any]) -> Path:
    roles = {"base": "base", "aligned": "aligned", **{r: f"{r}-adapter" for r in ("finetuned", "safety")}}
    return bench.recipe(name, bench.sources(**roles), gate)


def _full_recipe(bench: Bench, name: str, gate: dict[str, Any]) -> Path:
    roles = {role: role for role in ("base", "aligned", "finetuned", "safety")}
    return bench.recipe(name, bench.sources(**roles), gate)


def quantiles(bench: Bench, recipe: Path, *shares: float) -> list[float]:
    """Return the thresholds that select these shares of the gated tensors, from the engine's own readings.

    A threshold lies midway between two readings, so no rounding can move a decision.
    """
    log = bench.work / f"{recipe.stem}.readings.log"
    with log.open("wb") as file:
        subprocess.run(bench.ours(recipe, None), stdout=file, check=True, env=bench.env, cwd=bench.root)
    rho = sorted(read_rho(log).values())
    at = [min(max(round(share * len(rho)), 1), len(rho) - 1) for share in shares]
    return [(rho[i - 1] + rho[i]) / 2 for i in at]


def adapters(bench: Bench) -> Case:
    """Gate two adapters at their median ρ, mix, and write the full model."""
    out = bench.work / "adapters"
    tau = quantiles(bench, _adapter_recipe(bench, "adapters", {"tau": 0.35}), 0.5)[0]
    recipe = _adapter_recipe(bench, "adapters", {"tau": tau})
    folders = ["base", "aligned", "finetuned-adapter", "safety-adapter"]
    published = _published(bench, "--safety", str(bench.role("safety-adapter")), "--tau", repr(tau),
                           "--output", str(out / "published"))  # fmt: skip
    peft = [*PYTHON, "-m", "benchmarks.peers.peft_merge", "--model", str(bench.role("aligned")), "--adapter",
            str(bench.role("finetuned-adapter")), "--output", str(out / "peft")]  # fmt: skip
    return Case(
        "adapters", "gate and merge two adapters into the full model",
        [
            Contestant("ours", bench.ours(recipe, out / "ours"), out / "ours", warm=HELP),
            Contestant("published", published, out / "published", warm=TORCH, peer=True),
            Contestant("peft (one adapter, no gate)", peft, out / "peft", peer=True,
                       warm=[*PYTHON, "-c", "import peft, transformers.models.llama.modeling_llama"]),
            bench.known(folders, recipe, out / "known"),
            bench.floor(folders, out / "floor"),
            bench.floor(folders, out / "floor", promises=True),
        ],
        bench.files(*folders), partial(compare_checkpoints, out / "ours", out / "published"),
    )  # fmt: skip


def beside_copy(bench: Bench) -> Case:
    """Gate and merge two adapters beside a bare copy of the model, which is the least that anybody does."""
    name, out = "beside-copy", bench.work / "beside-copy" / "model"
    tau = quantiles(bench, _adapter_recipe(bench, name, {"tau": 0.35}), 0.5)[0]
    recipe = _adapter_recipe(bench, name, {"tau": tau})
    copy = ["sh", "-c", 'mkdir -p "$1" && cp "$0"/* "$1" && sync', str(bench.role("aligned")), str(out)]
    return Case(
        name, "two adapters beside a bare copy with sync",
        [
            Contestant("bare copy", copy, out),
            Contestant("ours", bench.ours(recipe, out), out, warm=HELP),
            bench.known(["base", "aligned", "finetuned-adapter", "safety-adapter"], recipe, out),
            Contestant("gate alone", bench.ours(recipe, None)),
        ],
        bench.files("aligned"),
    )  # fmt: skip


def _published(bench: Bench, *more: str) -> list[str]:
    roles = {"base": "base", "aligned": "aligned", "finetuned": "finetuned-adapter"}
    given = [text for role, folder in roles.items() for text in (f"--{role}", str(bench.role(folder)))]
    return [*PYTHON, "-m", "benchmarks.peers.published_gate", *given, *more]


def gate_adapters(bench: Bench) -> Case:
    """Read the gate of an adapter, write nothing."""
    name, folders = "gate-adapters", ["base", "aligned", "finetuned-adapter"]
    recipe = _adapter_recipe(bench, name, {"tau": 0.35})
    return Case(
        name, "gate only, adapters",
        [
            Contestant("ours", bench.ours(recipe, None), warm=HELP),
            Contestant("published", _published(bench), warm=TORCH, peer=True),
            bench.floor(folders, None),
        ],
        bench.files(*folders), partial(compare_rho, bench.log(name, "ours"), bench.log(name, "published")),
    )  # fmt: skip


def gate_full(bench: Bench) -> Case:
    """Read the gate of full checkpoints, adaptively and exactly, write nothing."""
    name, folders = "gate-full", ["base", "aligned", "finetuned"]
    recipe = _full_recipe(bench, name, {"tau": 0.35})
    exact = bench.ours(recipe, None, "--set", "gate.precision=exact")
    return Case(
        name, "gate only, full checkpoints",
        [
            Contestant("ours", bench.ours(recipe, None), warm=HELP),
            Contestant("ours, exact", exact),
            bench.floor(folders, None),
        ],
        bench.files(*folders), partial(compare_rho, bench.log(name, "ours"), bench.log(name, "ours, exact")),
    )  # fmt: skip


def retune(kind: str, bench: Bench) -> Case:
    """Run again with a threshold that changes a tenth of the decisions, into the output of the first run."""
    make = _adapter_recipe if kind == "adapters" else _full_recipe
    name, ending = f"retune-{kind}", "-adapter" if kind == "adapters" else ""
    folders = ["base", "aligned", "finetuned" + ending, "safety" + ending]
    out = bench.work / name
    before, after = quantiles(bench, make(bench, name, {"tau": 0.35}), 0.5, 0.6)
    recipe = make(bench, name, {"tau": before})
    change = ("--set", f"gate.tau={after!r}")
    again = bench.ours(recipe, out / "second", *change)
    return Case(
        name, f"another τ, a tenth of the decisions changed, {kind}",
        [
            Contestant("second run", again, out / "second", bench.ours(recipe, out / "second"), HELP),
            Contestant("first run", bench.ours(recipe, out / "first", *change), out / "first"),
            bench.floor(folders, out / "floor"),
        ],
        bench.files(*folders), partial(compare_checkpoints, out / "second", out / "first"),
    )  # fmt: skip


def planning(size: str, bench: Bench) -> Case:
    """Plan a model far larger than this machine: headers alone decide."""
    sparse = Bench(bench.data / size, bench.data, bench.work, bench.env, bench.root)
    roles = sparse.sources(aligned="aligned", finetuned="finetuned", safety="safety")
    recipes = {kind: sparse.recipe(f"plan-{size}-{kind}", roles, {kind: True}) for kind in ("always", "never")}
    kinds = {kind: [*HOLES, *bench.ours(recipe, None)[len(ENGINE) :]] for kind, recipe in recipes.items()}
    parse = "import sys, huggingface_hub as h; [h.get_local_safetensors_metadata(p) for p in sys.argv[1:]]"
    return Case(
        f"plan-{size}", f"plan {size}",
        [
            Contestant("ours, always", kinds["always"], warm=HELP),
            Contestant("ours, never", kinds["never"]),
            Contestant("headers parsed by huggingface_hub", [*PYTHON, "-c", parse, *roles.values()]),
        ],
    )  # fmt: skip


def start(bench: Bench) -> Case:
    """Start the command line, as often happens."""
    recipe = _adapter_recipe(bench, "start", {"tau": 0.35})
    validate = [*ENGINE, "validate", str(recipe)]
    return Case(
        "start", "start of the command line",
        [
            Contestant("ours --help", HELP, warm=HELP),
            Contestant("ours validate", validate, warm=validate),
            Contestant("mergekit-yaml --help", [MERGEKIT, "--help"], warm=[MERGEKIT, "--help"]),
            Contestant("import torch", TORCH, warm=TORCH),
            Contestant("bare python", [*PYTHON, "-c", "pass"]),
        ],
    )  # fmt: skip


def memory(bench: Bench) -> Case:
    """The heaviest merge under a small memory limit and under a comfortable one: same bytes."""
    out, roles = bench.work / "memory", ["aligned", "finetuned", "safety"]
    recipe = bench.recipe(
        "memory", bench.sources(aligned="aligned", finetuned="finetuned", safety="safety"),
        {"always": True, "scope": ["*"]}, {"method": "ties", "alpha": 0.8, "density": 0.5},
    )  # fmt: skip
    small = bench.ours(recipe, out / "256MB", max_memory="256MB")
    return Case(
        "memory", "ties within 256 MB",
        [
            Contestant("ours, 256MB", small, out / "256MB", warm=HELP),
            Contestant(f"ours, {bench.max_memory}", bench.ours(recipe, out / "large"), out / "large"),
            bench.floor(roles, out / "floor"),
        ],
        bench.files(*roles), partial(compare_checkpoints, out / "256MB", out / "large"),
    )  # fmt: skip


CASES: dict[str, Callable[[Bench], Case]] = {
    **{method: partial(full_merge, method) for method in FULL_MERGES},
    "adapters": adapters,
    "beside-copy": beside_copy,
    "gate-adapters": gate_adapters,
    "gate-full": gate_full,
    "retune-adapters": partial(retune, "adapters"),
    "retune-full": partial(retune, "full"),
    "plan-sparse-70b": partial(planning, "sparse-70b"),
    "plan-headers-671b": partial(planning, "headers-671b"),
    "start": start,
    "memory": memory,
}
