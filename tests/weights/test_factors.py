"""Smaller products of factors are the best of their rank (Eckart-Young), and say what they lose."""

from __future__ import annotations

import pytest
import torch

from safemerge_recipes.weights import factors


def tail(delta: torch.Tensor, rank: int) -> float:
    """The part of ‖Δ‖² outside the `rank` largest singular values, in float64."""
    energy = torch.linalg.svdvals(delta.double()) ** 2
    return float(energy[rank:].sum() / energy.sum())


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_recompressed_factors_are_the_best_of_their_rank(rank: int) -> None:
    torch.manual_seed(0)
    b, a = torch.randn(40, 6, dtype=torch.float64), torch.randn(6, 30, dtype=torch.float64)
    left, right, lost = factors.recompress(b, a, rank)
    assert (left.shape, right.shape) == ((40, rank), (rank, 30))
    error = float(((b @ a - left @ right) ** 2).sum() / ((b @ a) ** 2).sum())
    assert error == pytest.approx(tail(b @ a, rank), abs=1e-12)
    assert lost == pytest.approx(error, abs=1e-12)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))  # neither factor carries all of the size


@pytest.mark.parametrize("rank", [2, 5, 20])
def test_truncated_small_matrices_are_the_best_of_their_rank(rank: int) -> None:
    torch.manual_seed(1)
    delta = torch.randn(24, 15, dtype=torch.float64)
    b, a, lost = factors.truncate(delta, rank)
    assert b.shape[1] == a.shape[0] == min(rank, 15)
    assert float(((delta - b @ a) ** 2).sum() / (delta**2).sum()) == pytest.approx(tail(delta, rank), abs=1e-12)
    assert lost == pytest.approx(tail(delta, rank), abs=1e-12)


def test_truncated_large_matrices_are_nearly_the_best_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "DENSE_SIDE", 50)
    torch.manual_seed(2)
    delta = torch.randn(300, 200) * torch.linspace(1, 0.01, 200) ** 2
    b, a, lost = factors.truncate(delta, 8)
    best = tail(delta, 8)
    assert best <= lost + 1e-6
    assert lost <= best * 1.01
    again, *_ = factors.truncate(delta, 8)
    assert torch.equal(again, b)
    assert float(((delta - b @ a) ** 2).sum() / (delta**2).sum()) == pytest.approx(lost, rel=1e-4)


def test_nothing_loses_nothing() -> None:
    assert factors.truncate(torch.zeros(5, 4), 2)[2] == 0.0
