"""Exact numbers: a recipe's decimals as the rational numbers that they stand for."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

Number = int | float | Fraction
Rational = int | Fraction
"""An exact coefficient; whole ones are plain integers, which are much faster."""


def exact(number: Number) -> Rational:
    """The rational number a recipe's decimal stands for: 0.8 is 4/5, not its nearest binary double."""
    return _decimal(number) if isinstance(number, float) else number


@lru_cache(maxsize=64)
def _decimal(number: float) -> Rational:
    """Asked for the same few keys of a recipe at every tensor."""
    return int(number) if number.is_integer() else Fraction(repr(number))
