"""What merges of 2, 3, 5 and 8 deltas cost an element beside mergekit's, in one run: one matrix, one thread.

Ours reads the stored tensors from a warm page cache, computes and rounds, piece by piece; mergekit is given the tensors
in memory, as its own loader would hand them over, and its result is rounded. Neither writes.

    python -m benchmarks.timing.many [--side 4096] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.timing.run import RESULTS, machine
from safemerge_recipes.methods import on_compiled, on_torch
from safemerge_recipes.methods.dare import DareKernel
from safemerge_recipes.methods.kernel import Tools
from safemerge_recipes.methods.ties import Consensus, TiesKernel
from safemerge_recipes.methods.work import Apply, Sum
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.layout import Slot
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import read_header
from safemerge_recipes.weights.algebra import Stored, Weight, total
from safemerge_recipes.weights.draw import Draw

COUNTS = (2, 3, 5, 8)
METHODS = ("linear", "task_arithmetic", "ties", "dare_linear")


def _work(method: str, aligned: Weight, models: list[Weight]) -> Any:
    parts = [Fraction(1, len(models))] * len(models)
    shares = tuple(map(float, parts))
    if method in ("linear", "task_arithmetic"):
        deltas = models if method == "linear" else [model - aligned for model in models]
        return Sum((Weight() if method == "linear" else aligned) + total(parts, deltas))
    deltas = [model - aligned for model in models]
    if method == "ties":
        return Apply(aligned, tuple(deltas), TiesKernel(0.5, Consensus(shares, True, 1.0)))
    return Apply(aligned, tuple(deltas), DareKernel(Draw(0.5, 0), False, shares, None))


def _best(rounds: int, once: Callable[[], None]) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        once()
        times.append(time.perf_counter() - began)
    return min(times)


def _ours(work: Any, side: int) -> None:
    slot = Slot("w", "BF16", (side, side), 0, 0, 2 * side**2)
    rounded = on_compiled.rounded if on_compiled.fits(work, "BF16") else on_torch.rounded
    with Reader() as reader:
        for _ in rounded(work, slot, Tools(reader, Arena(), 0), threading.Event(), False):
            pass


def _theirs(method: str, tensors: list[torch.Tensor]) -> None:
    from mergekit.merge_methods import merge_tensors

    names = [f"m{number}" for number in range(len(tensors) - 1)]
    based = method != "linear"
    parameters: dict[str, Any] = {"weight": {name: 1 / len(names) for name in names}}
    if method in ("ties", "dare_linear"):
        parameters["density"] = 0.5
    given = tensors if based else tensors[1:]
    merge_tensors(
        given, method, parameters=parameters, ids=("aligned", *names) if based else tuple(names),
        base_index=0 if based else None, name="w", dtype=torch.float32, out_dtype=torch.bfloat16,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    near = torch.randn(given.side, given.side, generator=draw) * 0.02
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "x.safetensors"
        names = ["aligned", *(f"m{number}" for number in range(max(COUNTS)))]
        save_file(
            {name: (near + torch.randn(near.shape, generator=draw) * 1e-3).bfloat16() for name in names}, str(file)
        )
        refs, loaded = read_header(file), load_file(file)
        weights = {name: Weight.of(Stored(refs[name])) for name in names}
        for method in METHODS:
            for count in COUNTS:
                models = names[1 : count + 1]
                work = _work(method, weights["aligned"], [weights[name] for name in models])
                ours = _best(given.rounds, lambda work=work: _ours(work, given.side))  # type: ignore[misc]
                tensors = [loaded[name] for name in ("aligned", *models)]
                theirs = _best(given.rounds, lambda m=method, t=tensors: _theirs(m, t))  # type: ignore[misc]
                each = 1e9 / given.side**2
                row = {"method": method, "deltas": count, "ns_ours": ours * each, "ns_mergekit": theirs * each}
                rows.append(row)
                print(f"{method:16} {count} deltas: {row['ns_ours']:6.2f} ns, mergekit {row['ns_mergekit']:6.2f} ns")
    record = {"machine": machine(), "side": given.side, "load": os.getloadavg(), "rows": rows}
    (RESULTS / "many.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
