"""From the names of a model in memory, which adapters use, to the names of its tensors on disk.

They are the same for most models. Where they differ (a prefix left out, blocks of a multimodal model under
another parent, experts fused in memory and separate on disk) the tensor is found by what cannot differ: its
block's number and the end of its path, in the same part of the model. Anything not unique is not found.
"""

from __future__ import annotations

from collections.abc import Iterable

from safemerge_recipes.sources.experts import SeparateExperts, separate_groups
from safemerge_recipes.sources.parts import part_of
from safemerge_recipes.tensor_names import block_of


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


_CALLED = (
    ("attention", frozenset(("self_attn", "attn", "attention", "self_attention", "selfattention"))),
    ("mlp", frozenset(("mlp", "feed_forward", "ffn", "ff", "moe", "block_sparse_moe"))),
    ("shared", frozenset(("shared_expert", "shared_experts", "shared_mlp"))),
)
"""What a block's modules are called in memory one way and on disk another; all else is what it is called."""


def _place(name: str) -> tuple[str, str]:
    """The part of the model, and the module of a block, that a tensor belongs to: attention to another input than a
    block's own has matrices of the same names."""
    block = block_of(name)
    inside = name.removeprefix(f"{block}.").split(".") if block is not None else []
    around = inside[-3].lower() if len(inside) > 2 else ""
    known = next((kind for kind, names in _CALLED if around in names), around)
    return part_of(name), "" if known.isdigit() else known


_ROUTERS = {"router": "gate", "gate": "router"}
"""What models call the layer that chooses experts: in memory one way, on disk it may be the other (PhiMoE)."""


class DiskNames:
    """Finds tensors of one inventory by their names in memory."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._similar: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
        for name in sorted(self._names):
            self._similar.setdefault(_key(name), []).append(name)
        self._groups = separate_groups(self._names)

    def __call__(self, name: str) -> str | None:
        """The tensor's name on disk: the same, or the only one that is most like it; None without one."""
        if name in self._names:
            return name
        found = self.candidates(name) or self._router(name)
        return found[0] if len(found) == 1 else None

    def _router(self, name: str) -> tuple[str, ...]:
        """The other name of a mixture's router, `router` or `gate`, where it stands beside experts."""
        parts = name.split(".")
        if len(parts) < 3 or parts[-2] not in _ROUTERS:
            return ()
        other = ".".join((*parts[:-2], _ROUTERS[parts[-2]], parts[-1]))
        found = (other,) if other in self._names else self.candidates(other)
        return tuple(one for one in found if self._has_experts(one.rsplit(".", 2)[0]))

    def _has_experts(self, parent: str) -> bool:
        return f"{parent}.experts" in self._groups or any(one.startswith(f"{parent}.experts.") for one in self._names)

    def candidates(self, name: str) -> tuple[str, ...]:
        """The tensors on disk that are as much like a name in memory as each other: more than one is ambiguous."""
        place = _place(name)
        similar = [other for other in self._similar.get(_key(name), []) if _place(other) == place]
        best = max((_tail(name, other) for other in similar), default=None)
        return tuple(other for other in similar if _tail(name, other) == best)

    def elsewhere(self, name: str) -> tuple[str, ...]:
        """The tensors that are most like it in other parts of the model, where it must not be looked for."""
        similar = [other for other in self._similar.get(_key(name), []) if _place(other) != _place(name)]
        best = max((_tail(name, other) for other in similar), default=None)
        return tuple(other for other in similar if _tail(name, other) == best)

    def experts(self, module: str) -> SeparateExperts | None:
        """The separate experts of a module that is fused in memory, if its block has exactly one such group."""
        own = _key(f"{module}.weight")[0]
        groups = [
            group
            for parent, group in self._groups.items()
            if _key(f"{parent}.weight")[0] == own
            and parent.split(".")[-1] == module.split(".")[-1]
            and part_of(f"{parent}.weight") == part_of(f"{module}.weight")
        ]
        return groups[0] if len(groups) == 1 and block_of(module) is not None else None
