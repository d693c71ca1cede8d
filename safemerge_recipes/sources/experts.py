"""Experts of a mixture, fused in one tensor or lying one by one: the same weights, whichever way they were saved.

Fused: `experts.gate_up_proj` `(count, 2·d_ff, d_model)`, gate above up, and `experts.down_proj` `(count, d_model,
d_ff)`, as transformers 5 keeps them in memory. Separate: `experts.0.gate_proj.weight` and so on, as most
checkpoints have them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from safemerge_recipes.sources.parts import part_of
from safemerge_recipes.weights.algebra import Operand, Rational, Stored, Weight
from safemerge_recipes.weights.operands import Fused, LowRankStack

GATED_EXPERTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""What checkpoints with separate experts call the gate, up and down projections."""
FUSED = ("gate_up_proj", "down_proj")
"""What fused ones are called."""

_SEPARATE = re.compile(r"(?P<parent>.+\.\w*experts)\.(?P<number>\d{1,6})\.(?P<projection>\w+)\.weight")


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

    @property
    def names(self) -> tuple[str, ...]:
        """Every matrix."""
        return tuple(self.name(number, one) for number in range(self.count) for one in self.projections)


def separate_groups(names: Iterable[str]) -> dict[str, SeparateExperts]:
    """Parent -> complete group of separate experts."""
    found: dict[str, dict[str, set[int]]] = {}
    for name in names:
        match = _SEPARATE.fullmatch(name)
        if match:
            found.setdefault(match["parent"], {}).setdefault(match["projection"], set()).add(int(match["number"]))
    groups = {}
    for parent, projections in found.items():
        for wanted in GATED_EXPERTS:
            counts = {len(projections.get(name, ())) for name in wanted}
            if len(counts) == 1 and projections.get(wanted[0]) == set(range(*counts)):
                groups[parent] = SeparateExperts(parent, wanted, counts.pop())
    return groups


def _pieces(experts: SeparateExperts, parameter: str) -> list[str]:
    """The separate matrices that a fused tensor holds, in the order of its bytes."""
    gate, up, down = experts.projections
    own = (gate, up) if parameter == "gate_up_proj" else (down,)
    return [experts.name(number, projection) for number in range(experts.count) for projection in own]


def _fused_parents(names: Iterable[str]) -> list[str]:
    return [name.removesuffix(f".{FUSED[0]}") for name in names if name.endswith(f".{FUSED[0]}")]


def _twin(parent: str, others: Iterable[str]) -> str | None:
    """The one of other parents that stands for the same experts: same block, same last component, same part."""

    def key(name: str) -> tuple[list[str], str, str]:
        parts = name.split(".")
        return [part for part in parts if part.isdigit()], parts[-1], part_of(f"{name}.weight")

    found = [other for other in others if key(other) == key(parent)]
    return found[0] if len(found) == 1 else None


def _fuse(own: dict[str, Weight], experts: SeparateExperts, parent: str, like: Mapping[str, tuple[int, ...]]) -> bool:
    shapes = {name: own[name].shape for name in experts.names}
    made = {}
    for parameter in FUSED:
        pieces = [own[piece] for piece in _pieces(experts, parameter)]
        shape = experts.fused(parameter, shapes)
        if shape is None or like.get(f"{parent}.{parameter}") != shape or len({piece.shape for piece in pieces}) != 1:
            return False
        made[f"{parent}.{parameter}"] = Weight.of(Fused(shape, tuple((piece.shape[0], piece) for piece in pieces)))
    for name in experts.names:
        del own[name]
    own.update(made)
    return True


def _rows(weight: Weight, expert: int, first: int, count: int) -> Weight | None:
    """Rows [first, first + count) of one expert of a fused weight; None for what cannot be taken apart."""
    terms: list[tuple[Rational, Operand]] = []
    for coefficient, operand in weight:
        if isinstance(operand, Stored):
            terms.append((coefficient, Stored(operand.ref.part(expert).part(first, count))))
        elif isinstance(operand, LowRankStack) and not operand.transposed:
            terms.append((coefficient, operand.member(expert, (first, count))))
        else:
            return None
    return Weight(tuple(terms))


def _separate(
    own: dict[str, Weight], experts: SeparateExperts, parent: str, like: Mapping[str, tuple[int, ...]]
) -> bool:
    fused, lower = (own.get(f"{parent}.{parameter}") for parameter in FUSED)
    if fused is None or lower is None:
        return False
    if (fused.shape, lower.shape) != tuple(experts.fused(parameter, like) for parameter in FUSED):
        return False
    half, (gate, up, down) = fused.shape[1] // 2, experts.projections
    made: dict[str, Weight | None] = {}
    for number in range(experts.count):
        made[experts.name(number, gate)] = _rows(fused, number, 0, half)
        made[experts.name(number, up)] = _rows(fused, number, half, half)
        made[experts.name(number, down)] = _rows(lower, number, 0, lower.shape[1])
    if any(weight is None for weight in made.values()):
        return False
    for parameter in FUSED:
        del own[f"{parent}.{parameter}"]
    own.update({name: weight for name, weight in made.items() if weight is not None})
    return True


def as_saved(own: dict[str, Weight], like: Mapping[str, Weight]) -> int:
    """Brings a role's experts into the form that the aligned model's have, in place.

    Args:
        own: the role's weights by name.
        like: the aligned model's.

    Returns:
        How many groups were fused or taken apart.
    """
    shapes = {name: weight.shape for name, weight in like.items()}
    wanted, separate = separate_groups(like), separate_groups(own)
    changed = 0
    if separate and not wanted:
        parents = _fused_parents(like)
        for parent, experts in separate.items():
            twin = _twin(parent, parents)
            changed += twin is not None and _fuse(own, experts, twin, shapes)
    elif wanted and not separate:
        parents = _fused_parents(own)
        for parent, experts in wanted.items():
            twin = _twin(parent, parents)
            changed += twin is not None and _separate(own, experts, twin, shapes)
    return changed


def expert_delta(
    name: str, shapes: Mapping[str, tuple[int, ...]], find: Callable[[str], str | None]
) -> tuple[str, int, int, int] | None:
    """(fused tensor, expert, first row, rows) that a separate expert's matrix is in a fused checkpoint, else None.

    Args:
        name: the matrix as an adapter names it, such as `…experts.3.up_proj.weight`.
        shapes: those of the fused checkpoint's tensors.
        find: from a name in memory to one on disk.
    """
    match = _SEPARATE.fullmatch(name)
    if match is None:
        return None
    for gate, up, down in GATED_EXPERTS:
        if match["projection"] not in (gate, up, down):
            continue
        fused = find(f"{match['parent']}.{FUSED[match['projection'] == down]}")
        shape = shapes[fused] if fused is not None else ()
        number = int(match["number"])
        if fused is None or len(shape) != 3 or number >= shape[0]:
            return None
        if match["projection"] == down:
            return fused, number, 0, shape[1]
        half = shape[1] // 2
        return fused, number, half if match["projection"] == up else 0, half
    return None
