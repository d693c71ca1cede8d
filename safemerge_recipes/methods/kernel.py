"""Kernels and transforms: how a method computes, bound to its parameters; pieces to pieces, or over whole matrices.

Frozen descriptions without numbers. `work` says over which sums; `on_torch` and `on_compiled` make their bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.weights.algebra import Weight

if TYPE_CHECKING:
    import torch

    from safemerge_recipes.methods.compiled_tensor import Tensor

Pieces = Callable[..., Iterator["tuple[Any, ...]"]]
"""A fresh pass over (first element, a piece of each input…). `every=n`: a glance at every n-th piece is enough."""
Blocks = Pieces
"""The name that it had; plugins may use it."""

Dot = Callable[[Weight, Weight], float]
"""The inner product of two updates of low rank, float64."""

Rows = Callable[[int, int], "torch.Tensor"]
"""(first, last) -> rows [first, last) of the prepared matrix; asked for in order, valid until the next call."""


class Kernel(ABC):
    """A method that maps pieces to pieces, bound to its parameters. Frozen; a run's state is what `scan` returns."""

    __slots__ = ()

    is_compiled: ClassVar[bool] = False
    """Whether it has a twin in native/merge.c."""

    def scan(self, name: str, numel: int, pieces: Pieces, arena: Arena) -> Any:
        """Whatever `apply` needs to know of the whole tensor, in as many passes as it takes; else the tensor's name."""
        return name

    @property
    def whole_rows(self) -> bool:
        """Whether its pieces must be whole rows."""
        return False

    @property
    @abstractmethod
    def apply(self) -> Callable[..., torch.Tensor]:
        """(state, first element, a piece of each input…, arena) -> the merged piece.

        May overwrite its pieces. Called in their order.
        """

    def held(self, numel: int, piece: int) -> int:
        """Numbers it holds at most while it scans a tensor of `numel` elements in pieces of `piece`."""
        return 0

    def set_up(self, tensor: Tensor) -> None:
        """Sets what the twin needs to know of the whole tensor, in as many passes as that takes."""
        return None

    def as_sum(self, inputs: tuple[Weight, ...], dot: Dot) -> Weight | None:
        """What it makes of inputs of low rank, as a sum of them; None where that is none."""
        return None


class CompiledKernel(Kernel):
    """A kernel with a twin in native/merge.c, which gives the same bytes."""

    __slots__ = ()

    is_compiled: ClassVar[bool] = True

    @abstractmethod
    def set_up(self, tensor: Tensor) -> None:
        """Sets what the twin needs to know of the whole tensor, in as many passes as that takes."""


class Transform(ABC):
    """A method that is not piecewise, bound to its parameters. Frozen."""

    __slots__ = ()

    matrices: ClassVar[str] = ""
    """What it takes: any tensor (""), only one "matrix", or only one "oriented" matrix `(d_out, d_in)`."""

    @abstractmethod
    def memory(self, inputs: tuple[Weight, ...], shape: tuple[int, ...]) -> int:
        """Bytes it needs at most, besides pieces and `Tools.room`."""

    @abstractmethod
    def prepare(self, name: str, inputs: tuple[Weight, ...], shape: tuple[int, ...], tools: Tools) -> Rows:
        """Makes as many passes over the inputs as it must. Results must not depend on `tools.room`."""
