"""How often the adaptive gate of full checkpoints falls back to exact measuring, and what it saves.

    python -m benchmarks.timing.adaptive --data benchmarks/data

For each family and each question (thresholds at quantiles of ρ, `fraction`, `lowest`) the decisions are made
adaptively and from exact measurements of everything, and compared. Times are CPU seconds of one worker. Families:
synthetic ones, low-rank by construction or random; the demo's adapters written out as full checkpoints; and full-
parameter fine-tunes of the demo's model (`benchmarks.timing.finetunes`), where those are in the cache. The demo's
matrices have a side of 576 and would be measured exactly at once: here they are sketched all the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing.families import DATA, make_family
from benchmarks.timing.finetunes import DEMO, folder
from benchmarks.timing.run import RESULTS, machine
from safemerge_recipes.events import ignore
from safemerge_recipes.gate import measure as measuring
from safemerge_recipes.gate.measurer import Measurer
from safemerge_recipes.gate.moments import Effort, Moments
from safemerge_recipes.pipeline.opening import resolve
from safemerge_recipes.pipeline.preparing import decide, prepare
from safemerge_recipes.pipeline.writing import carry_out
from safemerge_recipes.planning.plan import Plan
from safemerge_recipes.recipe.loading import load_recipe
from safemerge_recipes.sources.family import open_family
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.digests import Digests
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.storage.workers import Resources
from safemerge_recipes.weights.algebra import Stored, Weight
from safemerge_recipes.weights.spectrum import SMALL

WORKER = Resources(workers=1, memory=2_000_000_000)
SIDES = (1024, 2048, 4096, 8192)
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
EFFORTS: tuple[Effort, ...] = ("sketch", "exact")


class Counted:
    """A measurer that keeps what it has measured, and counts tensors and CPU seconds by effort."""

    def __init__(self, measurer: Measurer) -> None:
        self.measurer = measurer
        self.seconds: dict[tuple[Effort, bool, str], float] = {}
        self.known: dict[tuple[Effort, bool, str], Moments] = {}
        self.asked: list[tuple[Effort, bool, str]] = []

    def __call__(self, names: Sequence[str], effort: Effort, rank: int, null: bool) -> Mapping[str, Moments]:
        for name in names:
            self.asked.append((effort, null, name))
            if (effort, null, name) not in self.known:
                began = time.process_time()
                self.known[effort, null, name] = self.measurer([name], effort, rank, null)[name]
                self.seconds[effort, null, name] = time.process_time() - began
        return {name: self.known[effort, null, name] for name in names}


def recipe(sources: Mapping[str, Any], where: Path, gate: Mapping[str, Any] | None = None) -> Path:
    """Write a recipe; a folder with an adapter_config.json is an adapter."""
    kinds = {
        role: {"adapter": str(path)} if (Path(path) / "adapter_config.json").exists() else str(path)
        for role, path in sources.items()
    }
    path = where / "recipe.yaml"
    path.write_text(json.dumps({"name": "adaptive", "sources": kinds, "gate": gate or {"tau": 0.5},
                                "merge": {"method": "linear", "alpha": 0.8}}))  # fmt: skip
    return path


def materialised(base: Path, adapters: Sequence[Path], where: Path) -> Path:
    """Write base plus adapters as a full bf16 checkpoint, one after the other, with the engine itself."""
    for number, adapter in enumerate(adapters):
        output = where / f"{len(list(where.iterdir()))}-{number}"
        sources = {"aligned": base, "finetuned": adapter, "safety": adapter}
        resolved = resolve(load_recipe(recipe(sources, where, {"never": True}), ["output.format=full"]))
        carry_out(prepare(resolved, WORKER, ignore), output, Digests(resolved.identities), ignore)
        base = output
    return base


def families(data: Path, where: Path) -> dict[str, dict[str, Path]]:
    """Return base, aligned, finetuned and safety of each family that can be had."""
    found = {}
    for size in ("llama-0.3b",):
        root = make_family(size, data)
        roles = {r: root / r for r in ("base", "aligned", "finetuned")}
        found[f"synthetic {size}, rank 32 and noise"] = roles
        found[f"random V and Δ, {size}"] = roles
    base = folder("base")
    aligned = materialised(base, [DEMO / "alignment"], where)
    found["demo adapters, rank 8, as checkpoints"] = {
        "base": base, "aligned": aligned, "finetuned": materialised(aligned, [DEMO / "task-arithmetic"], where),
    }  # fmt: skip
    for name in ("sums", "refusals"):
        if folder(name).is_dir():
            roles = {"base": base, "aligned": folder("aligned"), "finetuned": folder(name)}
            found[f"full fine-tunes of the demo's model, {name}"] = roles
            found.setdefault(
                "random V and Δ, demo's model", {"base": base, "aligned": folder("aligned"), "finetuned": folder(name)}
            )
    return found


def shuffled(root: Mapping[str, Path], where: Path) -> dict[str, Path]:
    """Write the models with the updates replaced by normal noise of the same size: flat spectra."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = {role: load_file(next(root[role].glob("*.safetensors"))) for role in root}
    draw = torch.Generator().manual_seed(0)
    before, made = weights["base"], dict(root)
    for role, old in (("aligned", "base"), ("finetuned", "aligned")):
        target = Path(tempfile.mkdtemp(prefix="random-", dir=where))
        for file in root[role].glob("*.json"):
            (target / file.name).write_bytes(file.read_bytes())
        new = {}
        for name, weight in before.items():
            size = (weights[role][name].float() - weights[old][name].float()).square().mean().sqrt()
            noise = torch.randn(weight.shape, generator=draw) * size
            new[name] = (weight.float() + noise).to(weight.dtype).contiguous()
        save_file(new, target / "model.safetensors", metadata={"format": "pt"})
        made[role], before = target, new
    return made


def compare(sources: Mapping[str, Path], where: Path) -> dict[str, Any]:
    """Decide every question both ways over one family."""
    loaded = load_recipe(recipe({**sources, "safety": sources["aligned"]}, where))
    family = open_family(loaded.recipe, loaded.directory)
    measure = Counted(Measurer(family, WORKER, use_cache=False))

    def plan(gate: Mapping[str, Any], precision: str) -> Plan:
        path = recipe({**sources, "safety": sources["aligned"]}, where, {**gate, "precision": precision})
        return decide(resolve(load_recipe(path), family), measure)

    exact = [tensor for tensor in plan({"tau": 0.5}, "exact").gated if tensor.value is not None]
    values = sorted(tensor.value for tensor in exact if tensor.value is not None)
    at = {q: values[min(int(q * len(values)), len(values) - 1)] for q in QUANTILES}
    questions: dict[str, dict[str, Any]] = {
        **{f"tau at the {q:.0%} quantile of ρ": {"tau": at[q]} for q in QUANTILES},
        "fraction: 0.5": {"fraction": 0.5},
        "lowest: a tenth": {"lowest": max(1, len(values) // 10)},
        "metric: rho_ratio, fraction: 0.5": {"metric": "rho_ratio", "fraction": 0.5},
    }
    rows = {}
    for question, gate in questions.items():
        measure.asked.clear()
        first = plan(gate, "exact")
        whole = sum(measure.seconds[one] for one in measure.asked)
        measure.asked.clear()
        second = plan(gate, "adaptive")
        fallbacks = sum(effort == "exact" for effort, _, _ in measure.asked)
        spent = sum(measure.seconds[one] for one in dict.fromkeys(measure.asked))
        agree = sum(a.action == b.action for a, b in zip(first.gated, second.gated, strict=True))
        rows[question] = {
            "gated": len(first.gated), "merged": first.summary()["merged"], "agree": agree, "fallbacks": fallbacks,
            "adaptive_s": spent, "exact_s": whole, "speed_up": whole / spent,
        }  # fmt: skip
        print(f"  {question:36} agree {agree}/{len(first.gated)}  exact fallbacks {fallbacks:3}  "
              f"{spent:6.1f} s against {whole:6.1f} s: {whole / spent:5.1f} ×", flush=True)  # fmt: skip
    sketched = [m for (effort, null, _), m in measure.known.items() if effort == "sketch" and not null]
    widths = sorted(m.rho_error for m in sketched)
    outside = sum(
        abs((m.rho or 0) - (measure.known["exact", False, name].rho or 0)) > m.rho_error + 1e-6
        for (effort, null, name), m in measure.known.items()
        if effort == "sketch" and not null
    )
    spread = {"rho": [values[0], values[len(values) // 2], values[-1]], "truth_outside": outside,
              "half_width": [widths[0], widths[len(widths) // 2], widths[-1]]}  # fmt: skip
    print(f"  ρ {values[0]:.3f} … {values[-1]:.3f}; half-width median {spread['half_width'][1]:.2g}, "
          f"largest {widths[-1]:.2g}; truth outside {outside} times", flush=True)  # fmt: skip
    return {"questions": rows, **spread}


def square_pair(side: int, flat: bool, draw: Any, where: Path) -> tuple[Weight, Weight]:
    """V and Δ of bf16 checkpoints, `(side, side)`.

    V is 64 directions of falling strength over noise, or nothing but noise; Δ lies halfway between V's image and noise.
    """
    import torch

    v = torch.randn(side, side, generator=draw)
    if not flat:
        strength = 8 * math.sqrt(side) / torch.arange(1, 65)
        v += (torch.randn(side, 64, generator=draw) * strength) @ torch.randn(64, side, generator=draw) / 8
    image = v @ torch.randn(side, side, generator=draw)
    delta = image / image.square().mean().sqrt() + torch.randn(side, side, generator=draw)
    refs = {}
    base = torch.randn(side, side, generator=draw) * 0.02
    for name, weight in (("base", base), ("aligned", base + 1e-3 * v), ("finetuned", base + 1e-3 * (v + delta))):
        path = where / f"{name}.bin"
        path.write_bytes(weight.bfloat16().view(torch.uint8).numpy().tobytes())
        refs[name] = Weight.of(Stored(TensorRef(str(path), 0, 2 * side * side, "BF16", (side, side))))
    return refs["aligned"] - refs["base"], refs["finetuned"] - refs["aligned"]


def timed(operands: tuple[Weight, Weight], effort: Effort, times: int = 1) -> tuple[Moments, float]:
    """The moments, and the least CPU seconds of one thread in so many measurements."""
    seconds, arena = math.inf, Arena()
    with Reader() as reader:
        for _ in range(times):
            began = time.process_time()
            found = measuring.measure("x", *operands, reader, arena, WORKER.memory, effort)
            seconds = min(seconds, time.process_time() - began)
    return found, seconds


def square_pairs(where: Path, sides: Sequence[int]) -> Iterator[tuple[dict[str, Any], tuple[Weight, Weight]]]:
    """Single square matrices of each spectrum, with what they are; torch takes one thread."""
    import torch

    draw = torch.Generator().manual_seed(0)
    torch.set_num_threads(1)
    for side, flat in itertools.product(sides, (False, True)):
        yield {"side": side, "spectrum": "flat" if flat else "falling"}, square_pair(side, flat, draw, where)


def by_side(where: Path, sides: Sequence[int]) -> list[dict[str, Any]]:
    """Measure single square matrices both ways: CPU seconds of one thread, ρ and its interval."""
    rows = []
    for row, operands in square_pairs(where, sides):
        (sketch, sketch_s), (exact, exact_s) = timed(operands, "sketch"), timed(operands, "exact")
        row |= {"rho": exact.rho, "sketch": sketch.rho, "half_width": sketch.rho_error}
        rows.append(row | {"sketch_s": sketch_s, "exact_s": exact_s})
        print(f"  {row['side']} × {row['side']}, {row['spectrum']:8} ρ {exact.rho:.4f}, sketched {sketch.rho:.4f} "
              f"± {sketch.rho_error:.2g}: {sketch_s:.2f} s against {exact_s:.2f} s: "
              f"{exact_s / sketch_s:.1f} ×", flush=True)  # fmt: skip
    return rows


def matrix_units(where: Path, sides: Sequence[int]) -> list[dict[str, Any]]:
    """The same matrices where float32 products may be made of bfloat16 ones, as a prefilter would: what that saves."""
    import torch

    rows = []
    for row, operands in square_pairs(where, sides):
        for precision, effort in itertools.product(("ieee", "bf16"), EFFORTS):
            torch.backends.mkldnn.matmul.fp32_precision = precision
            found, seconds = timed(operands, effort, 3)
            row[f"{effort} {precision}"] = {"rho": found.rho, "half_width": found.rho_error, "cpu_s": seconds}
        rows.append(row)
        for effort in EFFORTS:
            one, two = row[f"{effort} ieee"], row[f"{effort} bf16"]
            saved = one["cpu_s"] / two["cpu_s"]
            print(f"  {row['side']}², {row['spectrum']:8} {effort}: ρ {one['rho']:.6f} and {two['rho']:.6f}, "
                  f"{one['cpu_s']:.3f} and {two['cpu_s']:.3f} s: {saved:.2f} ×", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, help="where checkpoints are written meanwhile (default: beside --data)")
    parser.add_argument("--only", default="", help="families whose name contains this")
    parser.add_argument("--matrix-units", action="store_true", help="single matrices in float32 and bfloat16 products")
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "families": {}}
    if options.matrix_units:
        with tempfile.TemporaryDirectory(dir=options.work) as scratch:
            results = {"machine": machine(), "matrices": matrix_units(Path(scratch), SIDES[1:3])}
        (RESULTS / "matrix-units.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        return
    measuring.EXACT_SIDE = SMALL
    with tempfile.TemporaryDirectory(dir=options.work or options.data) as scratch:
        where = Path(scratch)
        for name, sources in families(options.data, where).items():
            if options.only not in name:
                continue
            print(name, flush=True)
            roles = shuffled(sources, where) if name.startswith("random") else sources
            results["families"][name] = compare(roles, where)
        if not options.only:
            results["by_side"] = by_side(where, SIDES)
    if not options.only:
        (RESULTS / "adaptive.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
