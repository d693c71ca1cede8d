"""The table of dtypes against torch and the safetensors library. Guards storage.dtypes and storage.finite."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from safemerge_recipes.storage.arena import torch_dtype
from safemerge_recipes.storage.dtypes import BY_TORCH_NAME, DTYPES, FLOAT_DTYPES, itemsize
from safemerge_recipes.storage.finite import non_finite

OF_TORCH = [name for name, dtype in DTYPES.items() if dtype.torch is not None]


@pytest.mark.parametrize("name", OF_TORCH)
def test_names_and_sizes_are_those_that_safetensors_writes(tmp_path: Path, name: str) -> None:
    tensor = torch.zeros(3, dtype=torch_dtype(name))
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["x"]["dtype"] == name
    assert itemsize(name) == tensor.element_size()
    assert BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")] == name


@pytest.mark.parametrize("name", FLOAT_DTYPES)
def test_every_value_of_a_float_dtype_is_counted_as_torch_counts_it(name: str) -> None:
    dtype, size = torch_dtype(name), itemsize(name)
    if size == 2:
        content = np.arange(1 << 16, dtype=np.uint16).tobytes()
    else:
        content = np.random.Generator(np.random.PCG64(0)).bytes(1 << 16)
        special = [float("inf"), float("-inf"), float("nan"), torch.finfo(dtype).max, torch.finfo(dtype).min]
        content += bytes(torch.tensor(special, dtype=dtype).view(torch.uint8).numpy())
    values = torch.frombuffer(bytearray(content), dtype=dtype)
    bad = int((~values.isfinite()).sum())
    assert bad
    assert non_finite(memoryview(content), name) == bad


def test_what_is_no_float_is_always_finite() -> None:
    content = memoryview(b"\xff" * 64)
    assert all(non_finite(content, name) == 0 for name in DTYPES if name not in FLOAT_DTYPES)
