"""What the merge methods cost an element, compiled and in torch: one matrix, one thread, warm page cache.

All passes over the stored blocks are timed: reading, arithmetic and rounding, without writing and hashing. Both ways
must give the same bytes, but for products of LoRA factors, where the order of the sums differs.

    python -m benchmarks.timing.kernels
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.timing.run import RESULTS, machine
from safemerge_recipes.methods import on_compiled, on_torch
from safemerge_recipes.methods.dare import DareKernel as Dare
from safemerge_recipes.methods.slerp import SlerpKernel as Slerp
from safemerge_recipes.methods.ties import Consensus
from safemerge_recipes.methods.ties import TiesKernel as Ties
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.methods.work import Apply, Sum
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.layout import Slot
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import read_header
from safemerge_recipes.weights import compiled
from safemerge_recipes.weights.algebra import LowRank, Stored, Weight
from safemerge_recipes.weights.draw import Draw

SIDE = 4096
RANK = 16
ROUNDS = 5


def _works(folder: Path) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=draw) * scale

    near = normal(SIDE, SIDE, scale=0.02)
    tensors = {role: near + normal(SIDE, SIDE, scale=1e-3) for role in ("aligned", "finetuned", "safety")}
    for role in ("finetuned", "safety"):
        tensors |= {f"{role}.b": normal(SIDE, RANK, scale=0.02), f"{role}.a": normal(RANK, SIDE, scale=0.02)}
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "x.safetensors")
    refs = read_header(folder / "x.safetensors")
    a, f, s = (Weight.of(Stored(refs[role])) for role in ("aligned", "finetuned", "safety"))
    lora_f, lora_s = (Weight.of(LowRank(refs[f"{role}.b"], refs[f"{role}.a"], 2.0)) for role in ("finetuned", "safety"))
    even = Consensus((0.8, 0.2), True, 1.0)
    return {
        "linear, two models": Sum(0.8 * f + 0.2 * s),
        f"linear, two adapters of rank {RANK}": Sum(a + 0.8 * lora_f + 0.2 * lora_s),
        "slerp": Apply(Weight(), (f, s), Slerp(0.2)),
        "dare_linear, rescaled by l1": Apply(a, (f - a, s - a), Dare(Draw(0.5, 0), True, (0.8, 0.2), None)),
        "dare_ties": Apply(a, (f - a, s - a), Dare(Draw(0.5, 0), False, (0.8, 0.2), even)),
        "ties": Apply(a, (f - a, s - a), Ties(0.5, even)),
    }


def _timed(rounded: Callable[..., Iterator[memoryview]], work: Any, tools: Tools) -> tuple[float, np.ndarray]:
    slot = Slot("w", "BF16", (SIDE, SIDE), 0, 0, 2 * SIDE**2)
    best, found = float("inf"), np.empty(2 * SIDE**2, np.uint8)
    for _ in range(ROUNDS):
        began, at = time.perf_counter(), 0
        for view in rounded(work, slot, tools, threading.Event(), False):
            found[at : at + len(view)] = np.frombuffer(view, np.uint8)
            at += len(view)
        best = min(best, time.perf_counter() - began)
    return best / SIDE**2 * 1e9, found


def main() -> None:
    torch.set_num_threads(1)
    libraries = {"compiled": compiled.LIBRARY, "compiled for any processor": compiled.load("_merge")}
    record: dict[str, Any] = {"side": SIDE, "unit": "ns an element, best of rounds", "machine": machine(), "ways": {}}
    with tempfile.TemporaryDirectory() as place, Reader() as reader:
        for name, work in _works(Path(place)).items():
            line = {}
            line["torch"], expected = _timed(on_torch.rounded, work, Tools(reader, Arena(), 0))
            for way, library in libraries.items():
                compiled.LIBRARY = library
                line[way], found = _timed(on_compiled.rounded, work, Tools(reader, Arena(), 0))
                same = np.array_equal(found, expected)
                if not same and "adapters" not in name:
                    raise SystemExit(f"{name}: {way} gives other bytes than torch")
            record["ways"][name] = line
            print(f"{name:36}" + "".join(f"  {way} {cost:6.2f}" for way, cost in line.items()), flush=True)
    (RESULTS / "kernels.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
