"""From the names of a model in memory, which adapters use, to the names of its tensors on disk.

They are the same for most models. Where they differ (a prefix left out, blocks of a multimodal model under
another parent, experts fused in memory and separate on disk) the tensor is found by what cannot differ: its
block's number and the end of its path. Anything not unique is not found.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from safemerge_recipes.tensor_names import block_of

GATED_EXPERTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""What checkpoints with separate experts call the gate, up and down projections."""


def _key(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    parts = name.split(".")
    return tuple(part for part in parts if part.isdigit()), tuple(parts[-2:])


def _tail(one: str, other: str) -> tuple[int, int]:
    """Components in common at the end, and among the rest."""
    left, right = one.split("."), other.split(".")
    count = 0
    while count < min(len(left), len(right)) and left[-1 - count] == right[-1 - count]:
        count += 1
    return count, len(set(left[: len(left) - count]) & set(right[: len(right) - count]))


def different_starts(one: str, other: str) -> tuple[str, str]:
    """What stands before the common end of two names."""
    count, _ = _tail(one, other)
    return ".".join(one.split(".")[:-count]), ".".join(other.split(".")[:-count])


class DiskNames:
    """Finds tensors of one inventory by their names in memory."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._similar: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
        for name in sorted(self._names):
            self._similar.setdefault(_key(name), []).append(name)

    def __call__(self, name: str) -> str | None:
        """The tensor's name on disk: the same, or the only one that is most like it; None without one."""
        if name in self._names:
            return name
        ranked = sorted(((_tail(name, other), other) for other in self._similar.get(_key(name), [])), reverse=True)
        if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
            return None
        return ranked[0][1]

    def experts(self, module: str) -> SeparateExperts | None:
        """The separate experts of a module that is fused in memory, if its block has exactly one such group."""
        block = block_of(module)
        own = _key(f"{module}.weight")[0]
        groups: dict[str, dict[str, set[int]]] = {}
        for name in self._names:
            match = re.fullmatch(r"(.+)\.(\d+)\.(\w+)\.weight", name)
            if match and _key(f"{match[1]}.weight")[0] == own and match[1].split(".")[-1] == module.split(".")[-1]:
                groups.setdefault(match[1], {}).setdefault(match[3], set()).add(int(match[2]))
        if block is None or len(groups) != 1:
            return None
        ((parent, projections),) = groups.items()
        for names in GATED_EXPERTS:
            counts = {len(projections.get(name, ())) for name in names}
            if len(counts) == 1 and projections.get(names[0]) == set(range(*counts)):
                return SeparateExperts(parent, names, counts.pop())
        return None


@dataclass(frozen=True, slots=True)
class SeparateExperts:
    """Experts that lie on disk one by one: `parent`.e.`projection`.weight for e below `count`."""

    parent: str
    projections: tuple[str, str, str]
    count: int

    def fused(self, parameter: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int] | None:
        """Shape in memory of `gate_up_proj` or `down_proj`, None for other parameters."""
        gate, _, down = (shapes[self.name(0, projection)] for projection in self.projections)
        if parameter == "gate_up_proj":
            return (self.count, 2 * gate[0], gate[1])
        return (self.count, *down) if parameter == "down_proj" else None  # type: ignore[return-value]  # 2-D

    def name(self, expert: int, projection: str) -> str:
        """The name of one matrix."""
        return f"{self.parent}.{expert}.{projection}.weight"
