"""Updates of experts, collected as PEFT's `target_parameters` holds them: the factors of all experts side by side.

transformers holds the experts of a block in two parameters, `gate_up_proj` `(count, 2·d_ff, d_model)` and `down_proj`
`(count, d_model, d_ff)`, or both with their last dimensions exchanged, however they lie on disk. PEFT stores A
`(count·r, d_in)`, one expert after the other, and B `(d_out, r·count)`, the experts interleaved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from safemerge_recipes.sources.experts import FUSED, SeparateExperts, separate_groups

if TYPE_CHECKING:
    import torch

    Pair = tuple[torch.Tensor, torch.Tensor]
    """(left `(rows, r)`, right `(r, columns)`) of one matrix as it is stored, float64."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """A parameter of experts with its factors as PEFT stores them."""

    parent: str
    parameter: str
    a: torch.Tensor
    b: torch.Tensor
    rank: int


@dataclass(slots=True)
class ExpertUpdates:
    """The factors that were found so far.

    Attributes:
        groups: experts that lie on disk one by one, by their parent's name there.
        shapes: of every tensor on disk.
        found: (parent, parameter) -> (expert, which of the parameter's matrices) -> its factors.
        turned: (parent, parameter) of those stored `(count, d_in, d_out)`.
    """

    groups: Mapping[str, SeparateExperts]
    shapes: Mapping[str, tuple[int, ...]]
    found: dict[tuple[str, str], dict[tuple[int, int], Pair]] = field(default_factory=dict)
    turned: set[tuple[str, str]] = field(default_factory=set)

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> ExpertUpdates:
        """Of a checkpoint with these tensors."""
        return cls(separate_groups(shapes), shapes)

    def place(self, name: str) -> tuple[str, str, int, int] | None:
        """(parent, parameter, expert, which of its matrices) of a tensor that is one expert's; None for others."""
        for parent, experts in self.groups.items():
            if name.startswith(f"{parent}."):
                number, projection = name.removeprefix(f"{parent}.").split(".")[:2]
                which = experts.projections.index(projection)
                return parent, FUSED[which == 2], int(number), which % 2
        return None

    def fused(self, name: str) -> bool:
        """Whether a tensor is a parameter of all experts."""
        return len(self.shapes[name]) == 3 and name.endswith(tuple(f"experts.{one}" for one in FUSED))

    def put(self, parent: str, parameter: str, expert: int, which: int, pair: Pair, turned: bool = False) -> None:
        """Takes up the factors of one matrix."""
        self.found.setdefault((parent, parameter), {})[expert, which] = pair
        if turned:
            self.turned.add((parent, parameter))

    def adapted(self) -> Iterator[Adapted]:
        """Every parameter that something was found for; experts of lower rank are filled up with zeros."""
        import torch

        for (parent, parameter), pairs in self.found.items():
            experts = self.groups.get(parent)
            shape = experts.fused(parameter, self.shapes) if experts else self.shapes[f"{parent}.{parameter}"]
            assert shape is not None  # only parameters of experts are put
            count, rows, columns = shape
            if experts is None:
                parts = [pairs.get((number, 0)) for number in range(count)]
            else:
                parts = [_joined(pairs, number, parameter, rows) for number in range(count)]
            rank = max(part[0].shape[1] for part in parts if part is not None)
            left = torch.zeros(count, rows, rank, dtype=torch.float64)
            right = torch.zeros(count, rank, columns, dtype=torch.float64)
            for number, part in enumerate(parts):
                if part is not None:
                    left[number, :, : part[0].shape[1]] = part[0]
                    right[number, : part[1].shape[0]] = part[1]
            if (parent, parameter) in self.turned:
                left, right = right.transpose(1, 2), left.transpose(1, 2)
            a = right.reshape(count * rank, -1).float().contiguous()
            b = left.permute(1, 2, 0).reshape(-1, rank * count).float().contiguous()
            yield Adapted(parent, parameter, a, b, rank)


def _joined(pairs: Mapping[tuple[int, int], Pair], number: int, parameter: str, rows: int) -> Pair | None:
    """An expert's factors; gate above up, with one A where both have the same, else with A below A."""
    import torch

    first, second = pairs.get((number, 0)), pairs.get((number, 1))
    if parameter == FUSED[1] or (first is None and second is None):
        return first
    half = rows // 2
    known = first if first is not None else second
    assert known is not None
    if first is not None and second is not None and torch.equal(first[1], second[1]):
        return torch.cat([first[0], second[0]]), first[1]
    nothing = torch.zeros(half, 0, dtype=known[0].dtype), known[1][:0]
    (gate, above), (up, below) = first or nothing, second or nothing
    return torch.block_diag(gate, up), torch.cat([above, below])
