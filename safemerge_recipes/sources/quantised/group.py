"""One quantised weight as it is stored: its tensors, and what they are worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.quantised import Quantised


@dataclass(frozen=True, slots=True)
class Group:
    """A quantised weight as it is stored.

    Attributes:
        name: of the weight: what a plain checkpoint would call it.
        kind: how it was quantised, in words.
        root: what the names of its tensors begin with.
        parts: the rest of a name -> tensor: codes, scales, and what belongs to them.
        operand: what it is worth; None where that is not known here.
        powers: whether its scales are powers of two (ue8m0), by their dtype or by config.json's `scale_fmt`.
    """

    name: str
    kind: str
    root: str
    parts: Mapping[str, TensorRef]
    operand: Quantised | None
    powers: bool = False

    @property
    def names(self) -> dict[str, TensorRef]:
        """Its tensors by name."""
        return {f"{self.root}{end}": ref for end, ref in self.parts.items()}

    @property
    def codes(self) -> str:
        """The name of its codes. Undefined without an operand."""
        assert self.operand is not None
        return next(name for name, ref in self.names.items() if ref is self.operand.codes)

    @property
    def scales(self) -> str:
        """The name of its scales. Undefined without an operand."""
        assert self.operand is not None
        return next(name for name, ref in self.names.items() if ref is self.operand.scales)

    @property
    def requantisable(self) -> bool:
        """Whether other values can be written in its format: FP8 (e4m3), with scales of any dtype."""
        return self.operand is not None and self.operand.code == "e4m3" and self.operand.divisor == 1

    def like(self, other: Group) -> bool:
        """Whether the other's tensors may take the place of these."""
        mine, theirs = self.operand, other.operand
        if mine is None or theirs is None or mine.code != theirs.code or mine.divisor != theirs.divisor:
            return False
        if self.powers and not other.powers:
            return False  # loaders that expect powers of two may take the exponent alone
        if (mine.stored_shape, mine.block, mine.turned) != (theirs.stored_shape, theirs.block, theirs.turned):
            return False
        orders = [one.packing and (one.packing.order, one.packing.less) for one in (mine, theirs)]
        if orders[0] != orders[1]:
            return False
        parts = [{end: (ref.dtype, ref.shape) for end, ref in one.parts.items()} for one in (self, other)]
        return parts[0] == parts[1]
