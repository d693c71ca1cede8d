"""Choices without branches give the bits of comparisons, whatever the numbers are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safemerge_recipes.methods.branchless import bits, choose, spread_sign, zero_where_dropped
from safemerge_recipes.storage.arena import Arena

NUMBERS = st.lists(st.floats(width=32), min_size=1, max_size=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(NUMBERS, st.randoms())
def test_the_sign_bit_chooses(dtype: torch.dtype, numbers: list[float], random: object) -> None:
    a = torch.tensor(numbers, dtype=dtype)
    random.shuffle(numbers)  # type: ignore[attr-defined]
    b = torch.tensor(numbers, dtype=dtype)
    expected = torch.where(torch.signbit(a), a, b)
    mask = spread_sign(bits(a), torch.empty_like(bits(a)))
    assert torch.equal(mask.bool(), torch.signbit(a))
    assert torch.equal(bits(choose(mask, a, b.clone(), Arena())), bits(expected))


@given(st.lists(st.tuples(st.floats(width=32, allow_nan=False, allow_infinity=False), st.booleans()), min_size=1))
def test_what_is_dropped_is_zero(pairs: list[tuple[float, bool]]) -> None:
    x = torch.tensor([value for value, _ in pairs])
    keep = torch.tensor([kept for _, kept in pairs])
    assert torch.equal(zero_where_dropped(x.clone(), keep), torch.where(keep, x, torch.zeros_like(x)))
