"""What a merge method is, and the kinds of work it may ask for: a copy, a sum, a kernel over pieces, whole matrices.

Frozen descriptions without numbers. A method looks at the symbolic weights of one tensor and says what is to be done;
it reads headers only, so whatever it refuses is refused before anything is measured. What is read, and how much memory
it takes, follow from the work; `planning.graph` orders it, `on_torch` and `on_compiled` make its bytes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from safemerge_recipes.errors import RecipeError
from safemerge_recipes.recipe.builtins import Role
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.cut import largest
from safemerge_recipes.storage.layout import Slot
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.algebra import Stored, Weight

if TYPE_CHECKING:
    import torch

    from safemerge_recipes.methods.on_compiled import Tensor


Blocks = Callable[..., Iterator["tuple[Any, ...]"]]
"""A fresh pass over (first element, a piece of each input…). `every=n`: a glance at every n-th piece is enough."""

Rows = Callable[[int, int], "torch.Tensor"]
"""(first, last) -> rows [first, last) of the prepared matrix; asked for in order, valid until the next call."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What work is done with: open files, the worker's buffers, bytes it may hold between passes."""

    reader: Reader
    arena: Arena
    room: int


# Kernels and transforms


class Kernel(ABC):
    """A method that maps pieces to pieces, bound to its parameters. Frozen; a run's state is what `scan` returns."""

    __slots__ = ()

    def scan(self, name: str, numel: int, blocks: Blocks, arena: Arena) -> Any:
        """Whatever `apply` needs to know of the whole tensor, in as many passes as it takes; else the tensor's name."""
        return name

    @property
    @abstractmethod
    def apply(self) -> Callable[..., torch.Tensor]:
        """(state, first element, a piece of each input…, arena) -> the merged piece.

        May overwrite its pieces. Called in their order.
        """

    def held(self, numel: int, piece: int) -> int:
        """Numbers it holds at most while it scans a tensor of `numel` elements in pieces of `piece`."""
        return 0


class CompiledKernel(Kernel):
    """A kernel with a twin in native/merge.c, which gives the same bytes."""

    __slots__ = ()

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


# Work


class Work(ABC):
    """What is to be done for one output tensor."""

    __slots__ = ()

    @property
    @abstractmethod
    def weights(self) -> tuple[Weight, ...]:
        """The sums it evaluates."""

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """What is read, each tensor once."""
        return tuple(dict.fromkeys(ref for weight in self.weights for ref in weight.refs))

    @property
    def is_compiled(self) -> bool:
        """Whether native/merge.c knows how; `on_compiled.fits` says whether it can for these operands."""
        return False

    @property
    def is_named(self) -> bool:
        """Whether its result depends on more than its weights: on the tensor's name and the method's parameters."""
        return True

    def set_up(self, tensor: Tensor) -> None:
        """Sets what the compiled twin needs besides the weights; for work that `is_compiled`."""
        return None

    def held(self, slot: Slot) -> int:
        """Bytes that its search over the whole tensor holds at most."""
        return 0

    @abstractmethod
    def less(self, weight: Weight) -> Work:
        """The same work with `weight` taken from its result, symbolically, so that what cancels is never computed."""

    @abstractmethod
    def memory(self, slot: Slot) -> int:
        """Bytes of its own that a worker needs to do it with torch, without what it may hold between passes."""

    @property
    def width(self) -> int:
        """Bytes of a number of the arithmetic."""
        return 8 if "F64" in {ref.dtype for ref in self.refs} else 4


@dataclass(frozen=True, slots=True)
class Copy(Work):
    """Write the stored bytes of `source` unchanged."""

    source: TensorRef

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The tensor itself."""
        return (Weight.of(Stored(self.source)),)

    @property
    def is_named(self) -> bool:
        """The bytes are all there is."""
        return False

    def less(self, weight: Weight) -> Sum:
        """A sum, whatever is taken."""
        return Sum(Weight.of(Stored(self.source)) - weight)

    def memory(self, slot: Slot) -> int:
        """Bytes of a buffer, where the system cannot copy inside the kernel."""
        return 1 << 22


@dataclass(frozen=True, slots=True)
class Sum(Work):
    """Evaluate `weight` and round it to the output dtype."""

    weight: Weight

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The sum."""
        return (self.weight,)

    @property
    def is_compiled(self) -> bool:
        """Sums are."""
        return True

    @property
    def is_named(self) -> bool:
        """The sum is all there is."""
        return False

    def less(self, weight: Weight) -> Sum:
        """Another sum."""
        return Sum(self.weight - weight)

    def memory(self, slot: Slot) -> int:
        """Bytes of pieces and factors."""
        piece = largest(slot.shape)
        return piece * (3 * self.width + 8) + self.weight.memory(piece)


@dataclass(frozen=True, slots=True)
class Apply(Work):
    """Evaluate origin + kernel(*inputs) piece by piece and round it to the output dtype."""

    origin: Weight
    inputs: tuple[Weight, ...]
    kernel: Kernel

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The origin, then the inputs."""
        return (self.origin, *self.inputs)

    @property
    def is_compiled(self) -> bool:
        """Whether the kernel has a twin."""
        return isinstance(self.kernel, CompiledKernel)

    def set_up(self, tensor: Tensor) -> None:
        """What the kernel's twin needs to know of the whole tensor."""
        assert isinstance(self.kernel, CompiledKernel)  # `is_compiled` lets no other through
        self.kernel.set_up(tensor)

    def held(self, slot: Slot) -> int:
        """Bytes that the kernel holds while it scans."""
        return self.width * self.kernel.held(math.prod(slot.shape), largest(slot.shape))

    def less(self, weight: Weight) -> Apply:
        """From another origin."""
        return replace(self, origin=self.origin - weight)

    def memory(self, slot: Slot) -> int:
        """Bytes of pieces, factors and what the kernel holds."""
        piece = largest(slot.shape)
        slots = 8 + 5 * len(self.inputs)  # sums of up to two buffers each, the kernel's scratch, temporaries
        factors = sum(weight.memory(piece) for weight in self.weights)
        return piece * slots * self.width + self.held(slot) + factors


@dataclass(frozen=True, slots=True)
class Prepare(Work):
    """Evaluate origin + transform(*inputs), where the transform must see whole matrices first, and round it."""

    origin: Weight
    inputs: tuple[Weight, ...]
    transform: Transform

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The origin, then the inputs."""
        return (self.origin, *self.inputs)

    def less(self, weight: Weight) -> Prepare:
        """From another origin."""
        return replace(self, origin=self.origin - weight)

    def memory(self, slot: Slot) -> int:
        """Bytes of pieces, factors and what the transform needs."""
        piece = largest(slot.shape)
        factors = sum(weight.memory(piece) for weight in self.weights)
        return piece * 6 * self.width + factors + self.transform.memory(self.inputs, slot.shape)


# Methods


@dataclass(frozen=True, slots=True)
class Sides:
    """The weights of one tensor that a method may use; a role the recipe does not give is None.

    Attributes:
        name: the tensor.
        shape: its shape.
        weights: role -> weight.
        masks: tensors of the recipe's mask files, by path and name.
    """

    name: str
    shape: tuple[int, ...]
    weights: Mapping[Role, Weight]
    masks: Mapping[str, Mapping[str, TensorRef]] = field(default_factory=dict)

    def need(self, role: Role) -> Weight:
        """The role's weight. Raises RecipeError where the recipe does not give it."""
        if role not in self.weights:
            raise RecipeError(f"sources.{role}: missing; the merge of {self.name} needs it")
        return self.weights[role]

    @property
    def aligned(self) -> Weight:
        """W_a."""
        return self.weights["aligned"]

    @property
    def finetuned(self) -> Weight:
        """W_f."""
        return self.weights["finetuned"]

    @property
    def delta(self) -> Weight:
        """Δf = W_f − W_a."""
        return self.finetuned - self.aligned

    @property
    def safety_delta(self) -> Weight:
        """Δs = W_s − W_a; zero where the recipe gives no safety model."""
        return self.weights["safety"] - self.aligned if "safety" in self.weights else Weight()

    @property
    def v(self) -> Weight:
        """V = W_a − W_b. Raises RecipeError where the recipe gives no base."""
        return self.aligned - self.need("base")

    def pair(self, space: str) -> tuple[Weight, Weight, Weight]:
        """(origin, x, y): what a method of two sides adds to, and what it sees, by the space it works in."""
        if space == "weights":
            return Weight(), self.finetuned, self.weights.get("safety", Weight())
        return self.aligned, self.delta, self.safety_delta


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method; what the entry-point group `safemerge.methods` names.

    Attributes:
        work: from the recipe's `merge` and a selected tensor's sides to what is to be done. Raises RecipeError or
            SourceError for what cannot be.
        needs: the roles it needs besides `aligned` and `finetuned`, for plugins (a built-in one's stand in its row).
        link: where it comes from, for plugins.
        alike: whether it fits every tensor if it fits one (no mask, no ranks to agree), so that one is enough to try.
    """

    work: Callable[[Any, Sides], Work]
    needs: tuple[Role, ...] = ()
    link: str = ""
    alike: Callable[[Any], bool] = lambda merge: False


def always(merge: Any) -> bool:
    """For methods that fit every tensor if they fit one, whatever their parameters."""
    return True
