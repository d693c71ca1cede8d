"""Synthetic checkpoint families: base, aligned, finetuned and safety models, and adapters, made from a seed.

Values are drawn, rounded and written a block of rows at a time: no model is ever in memory. The scales follow
what fine-tuned language models show (weights 0.02, alignment 1e-3, fine-tuning 3e-4, as root mean squares),
and the share of a fine-tuning update that lies in the alignment's column space differs from tensor to tensor,
so a gate has something to decide. Knows nothing of the engine.

    python -m benchmarks.timing.families llama-1.1b sparse-70b --data benchmarks/data
"""

from __future__ import annotations

import argparse
import json
import os
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np

from benchmarks.timing.architectures import SIZES, Architecture
from benchmarks.timing.stored import Files, lay_out, write_json, write_tokenizer

PLAIN = argparse.RawDescriptionHelpFormatter
ADAPTERS = {"finetuned-adapter": "aligned", "safety-adapter": "aligned", "alignment-adapter": "base"}
DATA = Path(__file__).parents[1] / "data"

VERSION = 1  # part of the marker: families of an older recipe are made again
WEIGHT, ALIGNMENT, UPDATE, ADAPTER_UPDATE = 0.02, 1e-3, 3e-4, 2e-4  # root mean squares
RANK, LORA_RANK, LORA_ALPHA = 32, 16, 32
BLOCK_ELEMENTS = 1 << 18  # 1 MiB in float32: the working set of one thread stays in its cache


def make_family(size: str, data: Path = DATA, seed: int = 0) -> Path:
    """Return the folder of a family, made first unless a complete one of the same seed is there."""
    folder = data.resolve() / size
    marker, stamp = folder / "family.json", {"size": size, "seed": seed, "version": VERSION}
    if marker.exists() and json.loads(marker.read_text()) == stamp:
        return folder
    marker.unlink(missing_ok=True)
    architecture = SIZES[size]()
    places = {
        r: lay_out(folder / r, architecture.tensors, "BF16", architecture.shard_bytes, others=architecture.dtypes)
        for r in architecture.roles
    }
    for role in architecture.roles:
        write_json(folder / role / "config.json", architecture.config)
        write_json(folder / role / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
        write_tokenizer(folder / role)
    if not architecture.sparse:
        files = {role: Files(places[role]) for role in architecture.roles}
        drawn = architecture.tensors
        if architecture.repeated:
            drawn = architecture.adapted_tensors()
            _over_tensors(
                _repeat, {n: shape for n, shape in architecture.tensors.items() if n not in drawn}, seed, files
            )
        _over_tensors(_fill_tensor, drawn, seed, files)
        for role in architecture.roles:
            files[role].close()
        write_adapters(folder, architecture, seed)
    write_json(marker, stamp)
    return folder


def _over_tensors(
    task: Callable[..., None], tensors: dict[str, tuple[int, ...]], seed: int, files: dict[str, Files]
) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread a tensor; the products inside are small
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [pool.submit(task, name, shape, seed, files) for name, shape in tensors.items()]
            for job in jobs:
                job.result()
    finally:
        torch.set_num_threads(threads)


class Draws:
    """The random numbers of one tensor: every use has its own stream, so nothing depends on the order."""

    def __init__(self, seed: int, name: str) -> None:
        self.key = (seed, zlib.crc32(name.encode()))

    def stream(self, use: str, block: int = 0) -> np.random.Generator:
        """Return the generator of one use of one block."""
        return np.random.Generator(np.random.SFC64((*self.key, zlib.crc32(use.encode()), block)))

    def normal(self, use: str, *shape: int, block: int = 0) -> np.ndarray:
        """Return standard normal float32 numbers."""
        return self.stream(use, block).standard_normal(shape, dtype=np.float32)

    def share(self, role: str) -> float:
        """Return the share of the energy of a role's update that lies in the alignment's column space."""
        return float(self.stream(f"share {role}").uniform(0.02, 0.98))


def _spectrum(rank: int) -> np.ndarray:
    values = np.arange(1, rank + 1, dtype=np.float32) ** -0.5
    return values / np.sqrt((values**2).sum())


def _fill_tensor(name: str, shape: tuple[int, ...], seed: int, files: dict[str, Files]) -> None:
    """Write one tensor of all models there are: W, W + V, and the latter plus each update, rounded to bf16."""
    import torch

    draws = Draws(seed, name)
    rows, columns = shape if len(shape) == 2 else (1, shape[0])
    rank = min(RANK, rows, columns) if len(shape) == 2 else 0
    left = torch.from_numpy(draws.normal("left", rows, rank) * _spectrum(rank))
    shares = {"aligned": 0.8, **{role: draws.share(role) for role in ("finetuned", "safety")}}
    sizes = {"aligned": ALIGNMENT, "finetuned": UPDATE, "safety": UPDATE}
    right = {role: torch.from_numpy(draws.normal(f"right {role}", rank, columns)) for role in shares}
    for role in shares:
        right[role] *= sizes[role] * shares[role] ** 0.5

    step = max(1, BLOCK_ELEMENTS // columns)
    for block, start in enumerate(range(0, rows, step)):
        count = min(step, rows - start)
        weight = torch.from_numpy(draws.normal("base", count, columns, block=block)).mul_(WEIGHT)
        if len(shape) == 1 and not name.endswith("bias"):
            weight += 1.0  # norm scales lie around one
        stored = {"base": weight.to(torch.bfloat16)}
        for role, on in (("aligned", "base"), ("finetuned", "aligned"), ("safety", "aligned")):
            if role not in files:
                continue
            noise = torch.from_numpy(draws.normal(role, count, columns, block=block))
            noise *= sizes[role] * (1.0 - shares[role] if rank else 1.0) ** 0.5
            if rank:
                noise.addmm_(left[start : start + count], right[role])
            stored[role] = noise.add_(stored[on]).to(torch.bfloat16)
        for role, tensor in stored.items():
            data = tensor.view(torch.uint8).numpy().data.cast("B")
            files[role].write(name, start * columns * 2, data)


def _repeat(name: str, shape: tuple[int, ...], seed: int, files: dict[str, Files]) -> None:
    """Write one tensor of every model as a piece of W over and over; unlike files still differ by where it is cut."""
    piece = _bf16(Draws(seed, name).normal("base", BLOCK_ELEMENTS) * WEIGHT)
    size = 2 * prod(shape)
    for role, file in files.items():
        data = piece if role == "base" else piece[2:] + piece[:2]
        for start in range(0, size, len(data)):
            file.write(name, start, memoryview(data)[: size - start])


def _bf16(values: np.ndarray) -> bytes:
    """The bytes of float32 numbers rounded to bf16."""
    import torch

    return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()


def write_adapters(folder: Path, architecture: Architecture, seed: int) -> None:
    """Write the adapters of a family, on every matrix that the architecture says."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (d_out, d_in) in architecture.adapted_tensors().items():
        module = "base_model.model." + name.removesuffix(".weight")
        shapes[f"{module}.lora_A.weight"] = (LORA_RANK, d_in)
        shapes[f"{module}.lora_B.weight"] = (d_out, LORA_RANK)
    for adapter, on in ADAPTERS.items():
        files = Files(lay_out(folder / adapter, shapes, "F32", stem="adapter_model"))
        for name, shape in architecture.adapted_tensors().items():
            A, B = _factors(adapter, name, shape, seed)
            module = "base_model.model." + name.removesuffix(".weight")
            files.write(f"{module}.lora_A.weight", 0, A.data.cast("B"))
            files.write(f"{module}.lora_B.weight", 0, B.data.cast("B"))
        files.close()
        write_json(folder / adapter / "adapter_config.json", {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(folder / on),
            "r": LORA_RANK, "lora_alpha": LORA_ALPHA, "lora_dropout": 0.0, "bias": "none",
            "target_modules": list(architecture.adapted), "fan_in_fan_out": False, "inference_mode": True,
        })  # fmt: skip


def _factors(adapter: str, name: str, shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return A (r, d_in) as PEFT initialises it and B (d_out, r) of the size that gives the wanted ΔW."""
    draws = Draws(seed, name)
    d_out, d_in = shape
    bound = d_in**-0.5
    A = draws.stream(f"{adapter} A").uniform(-bound, bound, (LORA_RANK, d_in)).astype(np.float32)
    rank = min(RANK, d_out, d_in)
    # The same left factor as the alignment of the full models: its leading columns are the safe directions.
    safe = (draws.normal("left", d_out, rank) * _spectrum(rank) * rank**0.5)[:, :LORA_RANK]
    other = draws.normal(f"{adapter} B", d_out, LORA_RANK)
    share = 0.8 if adapter == "alignment-adapter" else draws.share(adapter)
    update = ALIGNMENT if adapter == "alignment-adapter" else ADAPTER_UPDATE
    B = share**0.5 * safe + (1 - share) ** 0.5 * other
    scale = LORA_ALPHA / LORA_RANK * LORA_RANK**0.5 * bound / 3**0.5
    return A, np.ascontiguousarray(B * np.float32(update / scale))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=PLAIN)
    parser.add_argument("sizes", nargs="+", choices=sorted(SIZES))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for size in options.sizes:
        began = time.perf_counter()
        folder = make_family(size, options.data, options.seed)
        print(f"{folder}  {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
