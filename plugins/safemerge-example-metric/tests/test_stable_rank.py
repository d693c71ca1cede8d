"""The metric on matrices whose spectrum is known."""

from __future__ import annotations

import pytest
import torch
from safemerge_example_metric import stable_rank

from safemerge_recipes.plugins import Moments


@pytest.mark.parametrize(("values", "expected"), [([2.0] * 5, 5.0), ([3.0, 0.0, 0.0], 1.0), ([2.0, 1.0], 25 / 17)])
def test_known_spectra(values, expected):
    squares = torch.tensor(values, dtype=torch.float64) ** 2
    moments = Moments(0.1, 0.1, 1.0, float(squares.sum()), float((squares**2).sum()), d_out=8)
    assert stable_rank(moments, 1) == (pytest.approx(expected), 0.0)


def test_undefined_without_alignment():
    assert stable_rank(Moments(0.0, 0.0, 1.0, 0.0, 0.0, d_out=8), 1) == (None, 0.0)
