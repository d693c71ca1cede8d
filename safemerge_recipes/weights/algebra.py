"""Weights as exact symbolic sums, so that what cancels on paper never reaches the floating-point unit.

A weight of any role is a sum of terms, each an exact rational coefficient times an operand: a tensor as
stored, the product of two LoRA factors, or one of the rarer things in `operands`. Differences of roles are
differences of sums, in which equal operands cancel: with two adapters on one model, W_f − W_a is the product
of the factors alone, and αW_f + (1−α)W_s over full checkpoints does not mention W_a any more. Knows nothing
of files being read or of torch; `torch_rows` turns sums into numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from safemerge_recipes.recipe.numbers import Number, Rational, exact
from safemerge_recipes.storage.safetensors import TensorRef

Naming = Callable[[TensorRef], str]
"""Names a stored tensor by its content, such as its file's identity and its place in it."""


class Operand(ABC):
    """Something a coefficient can multiply. Frozen and hashable: equal operands cancel."""

    __slots__ = ()

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix this operand stands for."""

    @property
    @abstractmethod
    def refs(self) -> tuple[TensorRef, ...]:
        """Every stored tensor that evaluating it reads."""

    @abstractmethod
    def describe(self, name: Naming) -> str:
        """Everything the numbers depend on, as text: equal texts, equal numbers."""

    @abstractmethod
    def memory(self, piece: int) -> int:
        """Bytes that evaluating it takes, besides the one piece of `piece` elements that every operand has."""

    @property
    def inside(self) -> tuple[Weight, ...]:
        """The weights that it is made of; none where it is read from files itself."""
        return ()

    def transpose(self) -> Operand | None:
        """The transpose of a matrix; None where that takes the whole matrix."""
        return None

    def entry(self, number: int) -> Weight:
        """One entry of the first dimension; of operands that are stacks."""
        raise TypeError(f"{type(self).__name__} is no stack")


@dataclass(frozen=True, slots=True)
class Stored(Operand):
    """A tensor exactly as a checkpoint stores it."""

    ref: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        """Its stored shape."""
        return self.ref.shape

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Itself."""
        return (self.ref,)

    def describe(self, name: Naming) -> str:
        """Its place."""
        return f"Stored({name(self.ref)})"

    def memory(self, piece: int) -> int:
        """Nothing more."""
        return 0

    def entry(self, number: int) -> Weight:
        """As it is stored."""
        return Weight.of(Stored(self.ref.part(number)))


@dataclass(frozen=True, slots=True)
class LowRank(Operand):
    """`scale`·B·A, or its transpose, for stored LoRA factors B `(d_out, r)` and A `(r, d_in)`.

    Where the factors of several experts are stored interleaved, `columns` (first, step) says which columns of
    the stored B are this one's.
    """

    b: TensorRef
    a: TensorRef
    scale: float
    transposed: bool = False
    columns: tuple[int, int] = (0, 1)

    @property
    def rank(self) -> int:
        """r, the inner dimension of the factors."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the product."""
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.transposed else shape

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Both factors."""
        return (self.b, self.a)

    def describe(self, name: Naming) -> str:
        """Factors, scale and orientation."""
        which = f"C{self.columns}" if self.columns != (0, 1) else ""
        return f"LowRank({name(self.b)},{name(self.a)}*{self.scale!r}T{self.transposed}{which})"

    def memory(self, piece: int) -> int:
        """Its factors in float32, twice: as loaded and as joined."""
        return 8 * (self.b.numel + self.a.numel)

    def transpose(self) -> LowRank:
        """Aᵀ·Bᵀ."""
        return replace(self, transposed=not self.transposed)


@dataclass(frozen=True, slots=True)
class Blend(Operand):
    """(Σᵢ bᵢ·Bᵢ)·(Σᵢ aᵢ·Aᵢ): LoRA factors of one rank combined one by one, as PEFT's `linear` does.

    Attributes:
        parts: (coefficient of B, coefficient of A, factors) of each adapter; the scale of the factors is in
            the coefficients.
        draw: (density, seed, tensor name) where elements of every factor are dropped at random first, the rest
            divided by the density; None: all stay.
    """

    parts: tuple[tuple[float, float, LowRank], ...]
    draw: tuple[float, int, str] | None = None
    scale: float = 1.0

    @property
    def transposed(self) -> bool:
        """Whether the product is transposed; the same for all parts."""
        return self.parts[0][2].transposed

    @property
    def rank(self) -> int:
        """r, common to all parts."""
        return self.parts[0][2].rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the product."""
        return self.parts[0][2].shape

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All factors."""
        return tuple(ref for _, _, factors in self.parts for ref in factors.refs)

    def describe(self, name: Naming) -> str:
        """Coefficients, factors and draw."""
        parts = ",".join(f"{b!r}:{a!r}:{factors.describe(name)}" for b, a, factors in self.parts)
        return f"Blend({parts}*{self.scale!r}D{self.draw!r})"

    def memory(self, piece: int) -> int:
        """Its factors, as loaded and as summed."""
        return sum(factors.memory(piece) for _, _, factors in self.parts)


Factored = (LowRank, Blend)
"""The operands that are products of factors."""


@dataclass(frozen=True, slots=True)
class Weight:
    """Σ coefficient · operand. The empty sum is zero."""

    terms: tuple[tuple[Rational, Operand], ...] = ()

    @classmethod
    def of(cls, operand: Operand) -> Weight:
        """The weight that is just this operand."""
        return cls(((1, operand),))

    def __add__(self, other: Weight) -> Weight:
        if not self.terms or not other.terms:
            return self if self.terms else other
        total: dict[Operand, Rational] = {operand: coefficient for coefficient, operand in self.terms}
        for coefficient, operand in other.terms:
            total[operand] = total.get(operand, 0) + coefficient
        return Weight(tuple((coefficient, operand) for operand, coefficient in total.items() if coefficient))

    def __mul__(self, factor: Number) -> Weight:
        by = exact(factor)
        if by == 1:
            return self
        return Weight(tuple((coefficient * by, operand) for coefficient, operand in self.terms if by))

    __rmul__ = __mul__

    def __sub__(self, other: Weight) -> Weight:
        return self + Weight(tuple((-coefficient, operand) for coefficient, operand in other.terms))

    @property
    def is_zero(self) -> bool:
        """Whether nothing is left: the two sides of a difference are the same tensor."""
        return not self.terms

    @property
    def stored(self) -> TensorRef | None:
        """The tensor this weight equals byte for byte, if it is just one stored tensor."""
        if len(self.terms) == 1 and self.terms[0][0] == 1 and isinstance(self.terms[0][1], Stored):
            return self.terms[0][1].ref
        return None

    @property
    def low_rank(self) -> bool:
        """Whether the sum holds nothing but LoRA products, so that its factors say everything."""
        return bool(self.terms) and all(isinstance(operand, Factored) for _, operand in self.terms)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape common to all operands. Undefined for zero."""
        return self.terms[0][1].shape

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Every stored tensor that evaluating this weight reads, each once, in order of appearance."""
        return tuple(dict.fromkeys(ref for _, operand in self.terms for ref in operand.refs))

    def describe(self, name: Naming) -> str:
        """The sum as text in which `name` stands for stored tensors: equal texts, equal numbers."""
        return "+".join(f"{coefficient}*{operand.describe(name)}" for coefficient, operand in self.terms)

    def memory(self, piece: int) -> int:
        """Bytes that its operands take, besides pieces of `piece` elements."""
        return sum(operand.memory(piece) for _, operand in self.terms)

    def __iter__(self) -> Iterator[tuple[Rational, Operand]]:
        return iter(self.terms)


ZERO = Weight()


def total(shares: Iterable[Rational], weights: Iterable[Weight]) -> Weight:
    """Σ share · weight, in order; over one denominator, since sums of fractions take planning's time."""
    given = tuple(shares)
    scale = math.lcm(*(share.denominator for share in given))
    found: dict[Operand, Rational] = {}
    for share, weight in zip(given, weights, strict=True):
        whole = share.numerator * (scale // share.denominator)
        for coefficient, operand in weight if whole else ():
            found[operand] = found.get(operand, 0) + whole * coefficient
            if not found[operand]:
                del found[operand]
    return Weight(tuple((Fraction(n, scale) if scale > 1 else n, operand) for operand, n in found.items()))


def describe(weight: Weight, identity: Mapping[str, str]) -> str:
    """A weight as text that names its operands by the identity of their files: equal texts, equal numbers."""
    return weight.describe(lambda r: f"{identity[r.path]}@{r.offset}+{r.nbytes}:{r.dtype}{r.shape}")


def has_factors(weight: Weight) -> bool:
    """Whether evaluating the weight takes a matrix product or the like, and so whole rows."""
    return any(not isinstance(operand, Stored) for _, operand in weight)
