"""The processor as far as results depend on it: sums of a matrix library are rounded otherwise on other vectors."""

from __future__ import annotations

import platform
from functools import cache

from safemerge_recipes.errors import SourceError
from safemerge_recipes.storage.files import reading

_SETS = ("amx_bf16", "avx512f", "avx2", "avx", "sve", "asimd")
"""Instruction sets between which matrix libraries choose, the widest first, as Linux names them."""


@cache
def instruction_set() -> str:
    """The widest of them that this processor has, such as `x86_64 avx512f`; where nobody says, its kind alone."""
    flags: set[str] = set()
    try:
        with reading("/proc/cpuinfo", links="any") as file:
            for line in file:
                name, _, value = line.decode("utf-8", "replace").partition(":")
                if name.strip() in ("flags", "Features"):
                    flags = set(value.split())
                    break
    except (OSError, SourceError):
        pass
    return " ".join([platform.machine(), *(one for one in _SETS if one in flags)][:2])


def device_room(device: str) -> int | None:
    """Bytes that a run may hold on a GPU: nine tenths of what is free, as its libraries take some. None: no GPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return int(free) * 9 // 10


@cache
def device_name(device: str) -> str:
    """What a device's rounding depends on: of a GPU its model and the version of its libraries, else its kind."""
    kind = device.partition(":")[0]
    if kind != "cuda":
        return kind
    import torch

    model = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "elsewhere"  # of another node
    return f"cuda {model} {torch.__version__} {torch.version.cuda} ieee"
