"""What is to be done for one output tensor: copy it, sum it, run a kernel over its blocks, or prepare it whole.

Frozen descriptions without numbers. What is read follows from them; `graph` orders them and `execute` carries
them out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.algebra import Weight

if TYPE_CHECKING:
    import torch

    from safemerge_recipes.methods.kernels import Blocks


@dataclass(frozen=True, slots=True)
class Copy:
    """Write the stored bytes of `source` unchanged."""

    source: TensorRef

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """What is read."""
        return (self.source,)


@dataclass(frozen=True, slots=True)
class Sum:
    """Evaluate `weight` and round it to the output dtype."""

    weight: Weight

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """What is read."""
        return self.weight.refs


class Kernel(Protocol):
    """A method that maps blocks to blocks, bound to its parameters. Frozen; a run's state is what `scan` returns."""

    def scan(self, name: str, numel: int, blocks: Blocks, arena: Arena) -> Any:
        """Whatever `apply` needs to know of the whole tensor; makes as many passes as it must."""

    @property
    def apply(self) -> Callable[..., torch.Tensor]:
        """(state, first element, a block of each input…, arena) -> the merged block.

        May overwrite its blocks. Called in the order of the blocks.
        """


@dataclass(frozen=True, slots=True)
class Apply:
    """Evaluate origin + kernel(*inputs) block by block and round it to the output dtype."""

    origin: Weight
    inputs: tuple[Weight, ...]
    kernel: Kernel

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """What is read."""
        return _refs(self.origin, *self.inputs)


@dataclass(frozen=True, slots=True)
class Prepare:
    """Evaluate origin + transform(*inputs), where the transform must see whole matrices first, and round it."""

    origin: Weight
    inputs: tuple[Weight, ...]
    transform: Transform

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """What is read."""
        return _refs(self.origin, *self.inputs)


Work = Copy | Sum | Apply | Prepare

Rows = Callable[[int, int], "torch.Tensor"]
"""(first, last) -> rows [first, last) of the prepared matrix; asked for in order, valid until the next call."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What a transform works with: open files, the worker's buffers, bytes it may hold between passes."""

    reader: Reader
    arena: Arena
    room: int


class Transform(Protocol):
    """A method that is not blockwise, bound to its parameters. Frozen."""

    def memory(self, inputs: tuple[Weight, ...], shape: tuple[int, ...]) -> int:
        """Bytes it needs at most, besides blocks and `Tools.room`."""

    def prepare(self, name: str, inputs: tuple[Weight, ...], shape: tuple[int, ...], tools: Tools) -> Rows:
        """Makes as many passes over the inputs as it must. Results must not depend on `tools.room`."""


def _refs(*weights: Weight) -> tuple[TensorRef, ...]:
    return tuple(dict.fromkeys(ref for weight in weights for ref in weight.refs))
