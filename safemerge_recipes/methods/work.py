"""Work: what is to be done for one output tensor. A copy, a sum, a kernel over pieces, a transform of whole matrices.

Any of them may be written as codes with scales.

Each kind knows what it reads, how much memory it takes, and whether it is compiled; whoever needs to know asks it.
`planning.graph` orders it, `on_torch` and `on_compiled` make its bytes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from safemerge_recipes.methods.kernel import Dot, Kernel, Transform
from safemerge_recipes.storage.cut import largest
from safemerge_recipes.storage.layout import Slot
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.algebra import Stored, Weight
from safemerge_recipes.weights.quantised import Quantised

if TYPE_CHECKING:
    from safemerge_recipes.methods.compiled_tensor import Tensor


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
    def copied(self) -> TensorRef | None:
        """The stored tensor whose bytes are the result; None where that is computed."""
        return None

    @property
    def sum(self) -> Weight | None:
        """The sum that the result is; None where there is more to it."""
        return None

    @property
    def matrices(self) -> str:
        """What it takes: any tensor (""), only one "matrix", or only one "oriented" matrix `(d_out, d_in)`."""
        return ""

    @property
    def ranked(self) -> tuple[Weight, ...]:
        """The sums that are not zero and whose ranks bound that of the result, together."""
        return tuple(weight for weight in self.weights if not weight.is_zero)

    def factored(self, dot: Dot) -> Work:
        """The same as a sum, where it is one once inner products of its low-rank inputs are known; else itself."""
        return self

    @property
    def is_compiled(self) -> bool:
        """Whether native/merge.c knows how; `on_compiled.fits` says whether it can for these operands."""
        return False

    @property
    def is_named(self) -> bool:
        """Whether its result depends on more than its weights: on the tensor's name and the method's parameters."""
        return True

    @property
    def written_as(self) -> str:
        """What its bytes depend on besides its values and the output's dtype."""
        return ""

    def before_writing(self, slot: Slot) -> tuple[Work, Slot]:
        """What makes the values, and the slot that these would have: itself, where they are written as they are."""
        return self, slot

    def encoding(self, slot: Slot) -> int:
        """Bytes that writing the values in another form takes."""
        return 0

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
    def copied(self) -> TensorRef:
        """The tensor."""
        return self.source

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
    def sum(self) -> Weight:
        """The sum."""
        return self.weight

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
        return self.kernel.is_compiled

    def set_up(self, tensor: Tensor) -> None:
        """What the kernel's twin needs to know of the whole tensor."""
        self.kernel.set_up(tensor)

    def factored(self, dot: Dot) -> Work:
        """What the kernel makes of low-rank inputs, as a sum, if it can."""
        if not self.origin.is_zero or not all(weight.is_zero or weight.low_rank for weight in self.inputs):
            return self
        found = self.kernel.as_sum(self.inputs, dot)
        return self if found is None else Sum(found)

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
    def matrices(self) -> str:
        """What the transform takes."""
        return self.transform.matrices

    @property
    def ranked(self) -> tuple[Weight, ...]:
        """Its rank is at most that of the updates among its inputs."""
        return tuple(weight for weight in self.weights if weight.low_rank)

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


@dataclass(frozen=True, slots=True)
class Requantise(Work):
    """Do `inner` in float32 and write its codes, or the scales of its blocks, in the FP8 format of `form`.

    Attributes:
        inner: what makes the values.
        form: of the aligned model's weight.
        part: which of the two.
        powers: whether scales are rounded up to powers of two.
    """

    inner: Work
    form: Quantised
    part: Literal["codes", "scales"]
    powers: bool = False

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Those of the work inside."""
        return self.inner.weights

    @property
    def is_named(self) -> bool:
        """Whether the work inside is."""
        return self.inner.is_named

    @property
    def written_as(self) -> str:
        """Codes or scales, of blocks of which size."""
        form, powers = self.form, "^" if self.powers else ""
        return f"{self.part} of {form.code}{form.stored_shape}/{form.block}:{form.scales.dtype}{powers}"

    def before_writing(self, slot: Slot) -> tuple[Work, Slot]:
        """The work inside, with the slot that its values would have if they were written as float32."""
        return self.inner, replace(slot, dtype="F32", shape=self.form.stored_shape)

    def less(self, weight: Weight) -> Work:
        """The values alone."""
        return self.inner.less(weight)

    def memory(self, slot: Slot) -> int:
        """What the values take, a piece of them with its codes, and all scales."""
        inner, values = self.before_writing(slot)
        return inner.memory(values) + self.encoding(slot)

    def encoding(self, slot: Slot) -> int:
        """Bytes of the scales, and of a piece while it is divided by them."""
        return 12 * largest(self.form.stored_shape) + 16 * math.prod(self.form.scales.shape)
