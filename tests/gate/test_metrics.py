"""Every metric of every kind of operand against dense float64 formulas; intervals hold the truth.

Guards `gate.metrics.base`, `gate.metrics.cosine`, `gate.metrics.e_diem`, `gate.metrics.norm_ratio`,
`gate.metrics.residual`, `gate.metrics.rho`, `gate.metrics.rho_ratio`.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safemerge_recipes.gate import measure as measuring
from safemerge_recipes.gate.measure import measure
from safemerge_recipes.gate.metrics import METRICS
from safemerge_recipes.gate.moments import Moments
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import read_header
from safemerge_recipes.weights import directions
from safemerge_recipes.weights.algebra import LowRank, Stored, Weight
from safemerge_recipes.weights.spectrum import leading

SCALE = 1.5
RANK = 3
SHAPES = {"square": (64, 64), "tall": (96, 48), "wide": (48, 96)}


def dense(metric: str, v: torch.Tensor, delta: torch.Tensor, k: int = RANK) -> float:
    """The metrics' definitions, float64, every matrix formed."""
    if metric == "cosine":
        return float((v * delta).sum() / v.norm() / delta.norm())
    if metric == "norm_ratio":
        return float(delta.norm() / v.norm())
    if metric == "residual":
        left = torch.linalg.svd(v).U[:, :k]
        return float((delta - left @ (left.T @ delta)).norm() ** 2 / delta.norm() ** 2)
    projected = v @ v.T / v.norm() @ delta
    if metric == "e_diem":
        n = v.numel()
        return (float((projected - delta).norm()) - math.sqrt(2 * n)) / math.sqrt(2 * n * (1 - 1 / math.pi))
    rho = float((projected * delta).sum() / projected.norm() / delta.norm())
    if metric == "rho":
        return rho
    null = float(v.norm() ** 2 / (v.T @ v).norm()) / math.sqrt(v.shape[0])
    return rho / null


def spectrum(shape: tuple[int, int], draw: torch.Generator, decay: float = 0.5) -> torch.Tensor:
    """A random matrix with singular values k^(−decay), float32."""
    left, right = (torch.linalg.qr(torch.randn(n, min(shape), generator=draw)).Q for n in shape)
    return (left * torch.arange(1, min(shape) + 1) ** -decay) @ right.T


class Operands:
    """V and Δ of each kind, stored, with their dense forms."""

    def __init__(self, folder: Path, shape: tuple[int, int], seed: int = 0, decay: float = 0.5) -> None:
        draw = torch.Generator().manual_seed(seed)
        d_out, d_in = shape
        b, bv = torch.randn(d_out, 4, generator=draw), torch.randn(d_out, 6, generator=draw)
        a, av = torch.randn(4, d_in, generator=draw), torch.randn(6, d_in, generator=draw)
        base, v = torch.randn(shape, generator=draw) * 0.1, spectrum(shape, draw, decay)
        aligned = base + v
        finetuned = aligned + 0.1 * torch.randn(shape, generator=draw) + 0.2 * v
        tensors = {"base": base, "aligned": aligned, "finetuned": finetuned, "a": a, "b": b, "av": av, "bv": bv}
        save_file(tensors, folder / "operands.safetensors")
        ref = read_header(folder / "operands.safetensors")
        stored = {name: Weight.of(Stored(ref[name])) for name in ("base", "aligned", "finetuned")}
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        self.v = {
            "full": (stored["aligned"] - stored["base"], wide["aligned"] - wide["base"]),
            "lora": (Weight.of(LowRank(ref["bv"], ref["av"], SCALE)), SCALE * wide["bv"] @ wide["av"]),
        }
        self.delta = {
            "full": (stored["finetuned"] - stored["aligned"], wide["finetuned"] - wide["aligned"]),
            "lora": (Weight.of(LowRank(ref["b"], ref["a"], SCALE)), SCALE * wide["b"] @ wide["a"]),
        }


def moments(v: Weight, delta: Weight, **given) -> Moments:
    with Reader() as reader:
        return measure("model.layers.0.x.weight", v, delta, reader, Arena(), given.pop("room", 1 << 30), **given)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kinds", [("full", "full"), ("full", "lora"), ("lora", "full"), ("lora", "lora")])
@pytest.mark.parametrize("metric", METRICS)
def test_exact_where_small(tmp_path, shape, kinds, metric):
    operands = Operands(tmp_path, shape)
    (v, dense_v), (delta, dense_delta) = operands.v[kinds[0]], operands.delta[kinds[1]]
    value, error = METRICS[metric](moments(v, delta, rank=RANK), RANK)
    assert error == 0
    assert value == pytest.approx(dense(metric, dense_v, dense_delta), rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kinds", [("full", "full"), ("full", "lora"), ("lora", "full")])
@pytest.mark.parametrize("metric", METRICS)
def test_sketches_hold_the_truth_and_exact_measurement_agrees(tmp_path, monkeypatch, shape, kinds, metric):
    monkeypatch.setattr(directions, "SMALL", 0)  # everything is big enough for a sketch
    monkeypatch.setattr(measuring, "EXACT_SIDE", 0)
    operands = Operands(tmp_path, shape, seed=1)
    (v, dense_v), (delta, dense_delta) = operands.v[kinds[0]], operands.delta[kinds[1]]
    truth = dense(metric, dense_v, dense_delta)
    value, error = METRICS[metric](moments(v, delta, rank=RANK), RANK)
    assert abs(value - truth) <= error + 2e-5 * abs(truth) + 2e-6
    value, error = METRICS[metric](moments(v, delta, rank=RANK, effort="exact", null=True), RANK)
    assert error == 0
    assert value == pytest.approx(truth, rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("kinds", [("full", "full"), ("full", "lora")])
def test_room_changes_no_number(tmp_path, monkeypatch, kinds):
    monkeypatch.setattr(directions, "SMALL", 0)
    monkeypatch.setattr(measuring, "EXACT_SIDE", 0)
    monkeypatch.setattr(measuring, "ROW_PIECE", 500)  # many pieces
    operands = Operands(tmp_path, SHAPES["tall"])
    pair = operands.v[kinds[0]][0], operands.delta[kinds[1]][0]
    assert moments(*pair, rank=RANK, room=0) == moments(*pair, rank=RANK, room=1 << 30)


@pytest.mark.parametrize("kinds", [("full", "full"), ("full", "lora"), ("lora", "lora")])
@pytest.mark.parametrize("metric", ["rho", "cosine", "norm_ratio", "e_diem", "rho_ratio"])
@pytest.mark.parametrize("sketched", [False, True])
def test_a_group_is_one_block_diagonal_matrix(tmp_path, monkeypatch, kinds, metric, sketched):
    if sketched:
        monkeypatch.setattr(directions, "SMALL", 0)
        monkeypatch.setattr(measuring, "EXACT_SIDE", 0)
    parts, dense_v, dense_delta = [], [], []
    for seed, shape in enumerate(SHAPES.values()):
        (tmp_path / str(seed)).mkdir()
        operands = Operands(tmp_path / str(seed), shape, seed)
        (v, full_v), (delta, full_delta) = operands.v[kinds[0]], operands.delta[kinds[1]]
        parts.append(moments(v, delta))
        dense_v.append(full_v)
        dense_delta.append(full_delta)
    value, error = METRICS[metric](parts[0] + parts[1] + parts[2], RANK)
    if metric == "e_diem":  # counts the elements that are there, not the zeros between the blocks
        v, delta = torch.block_diag(*dense_v), torch.block_diag(*dense_delta)
        n = sum(part.numel() for part in dense_v)
        d = float((v @ v.T / v.norm() @ delta - delta).norm())
        truth = (d - math.sqrt(2 * n)) / math.sqrt(2 * n * (1 - 1 / math.pi))
    elif metric == "rho_ratio":  # ρ₀ of the members together: from each one's own size and rows
        rows = [(float(v.norm() ** 2), float((v.T @ v).norm() ** 2), float(d.norm() ** 2), len(v))
                for v, d in zip(dense_v, dense_delta, strict=True)]  # fmt: skip
        image = sum(g * d / m for _, g, d, m in rows) * sum(d for _, _, d, _ in rows)
        null = sum(v * d / m for v, _, d, m in rows) / math.sqrt(image)
        truth = dense("rho", torch.block_diag(*dense_v), torch.block_diag(*dense_delta)) / null
    else:
        truth = dense(metric, torch.block_diag(*dense_v), torch.block_diag(*dense_delta))
    assert abs(value - truth) <= error + 2e-5 * abs(truth) + 2e-6
    assert sketched or error == 0


def test_residual_of_a_group_adds_energies_inside_each_members_own_subspace(tmp_path):
    parts, outside, total = [], 0.0, 0.0
    for seed, shape in enumerate(SHAPES.values()):
        (tmp_path / str(seed)).mkdir()
        operands = Operands(tmp_path / str(seed), shape, seed)
        (v, full_v), (delta, full_delta) = operands.v["full"], operands.delta["lora"]
        parts.append(moments(v, delta, rank=RANK))
        energy = float(full_delta.norm() ** 2)
        outside, total = outside + dense("residual", full_v, full_delta) * energy, total + energy
    value, error = METRICS["residual"](parts[0] + parts[1] + parts[2], RANK)
    assert value == pytest.approx(outside / total, rel=1e-5)
    assert error == 0


class TestLeading:
    class Matrix:
        """Pieces of rows of a dense matrix."""

        def __init__(self, matrix: torch.Tensor) -> None:
            self.matrix, self.rows, self.columns, self.dtype = matrix, *matrix.shape, matrix.dtype

        def __iter__(self):
            for first in range(0, self.rows, 64):
                yield slice(first, min(first + 64, self.rows)), self.matrix[first : first + 64]

    @pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
    @pytest.mark.parametrize("decay", [0.3, 0.7, 1.5])
    @pytest.mark.parametrize("k", [1, 8])
    def test_the_true_subspace_is_within_the_stated_angle(self, shape, decay, k):
        matrix = spectrum(shape, torch.Generator().manual_seed(3), decay)
        found = leading(self.Matrix(matrix), k, "x", "cpu")
        left, values, _ = torch.linalg.svd(matrix.double())
        away = torch.linalg.matrix_norm(found.left @ found.left.T - left[:, :k] @ left[:, :k].T, 2)
        assert float(away) <= found.error + 1e-5
        assert found.values.tolist() == pytest.approx(values[:k].tolist(), rel=1e-3)
        identity = torch.eye(k, dtype=torch.float64)
        torch.testing.assert_close(found.left.T @ found.left, identity, atol=1e-6, rtol=0)
        if decay >= 0.7:  # a decaying spectrum, as V's: the tolerance is reached
            assert found.error <= 5e-3

    def test_a_lower_rank_than_asked_for(self):
        draw = torch.Generator().manual_seed(0)
        matrix = torch.randn(300, 2, generator=draw) @ torch.randn(2, 200, generator=draw)
        found = leading(self.Matrix(matrix), 5, "x", "cpu")
        assert found.left.shape == (300, 2)
        torch.testing.assert_close(
            (found.left @ (found.left.T @ matrix.double())).float(), matrix, atol=1e-4, rtol=1e-4
        )

    def test_the_same_name_finds_the_same_directions(self):
        matrix = self.Matrix(spectrum((300, 200), torch.Generator().manual_seed(3)))
        first, second = leading(matrix, 4, "x", "cpu"), leading(matrix, 4, "x", "cpu")
        assert torch.equal(first.left, second.left)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("zero", ["v", "delta"])
def test_undefined_where_either_is_zero(tmp_path, metric, zero):
    operands = Operands(tmp_path, SHAPES["square"])
    v, delta = operands.v["full"][0], operands.delta["lora"][0]
    found = moments(Weight() if zero == "v" else v, Weight() if zero == "delta" else delta, rank=RANK)
    assert METRICS[metric](found, RANK) == (None, 0.0)


def test_residual_is_zero_inside_and_one_outside(tmp_path):
    """Δ built from V's own leading directions, and from directions orthogonal to all of V."""
    draw = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(40, 10, generator=draw)).Q
    v = left[:, :5] @ torch.diag(torch.tensor([5.0, 4.0, 3.0, 1.0, 0.5])) @ torch.randn(5, 30, generator=draw)
    a = torch.randn(2, 30, generator=draw)
    save_file(
        {"v": v, "in": left[:, :2].contiguous(), "out": left[:, 8:].contiguous(), "a": a}, tmp_path / "x.safetensors"
    )
    ref = read_header(tmp_path / "x.safetensors")
    for name, expected in (("in", 0.0), ("out", 1.0)):
        found = moments(Weight.of(Stored(ref["v"])), Weight.of(LowRank(ref[name], ref["a"], 1.0)), rank=5)
        assert METRICS["residual"](found, 5)[0] == pytest.approx(expected, abs=1e-5)
