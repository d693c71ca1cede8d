"""ρ, ρ₀ and the norms against their definitions in float64, for all forms of V and Δ.

Guards `gate.exact`, `gate.measurer`, `gate.sketch`, `gate.null`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from safemerge_recipes.gate.measure import measure
from safemerge_recipes.gate.moments import Effort, Moments
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import read_header
from safemerge_recipes.weights.algebra import LowRank, Stored, Weight
from tests.fixtures import reference

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
SHAPES = [(40, 24), (24, 40), (300, 420), (420, 300), (1, 9), (9, 1)]


def _stored(folder: Path, **tensors: torch.Tensor) -> dict[str, Any]:
    file = folder / "w.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return read_header(file)


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def _pair(folder: Path, shape: tuple[int, int], forms: tuple[str, str], seed: int = 0) -> tuple[Any, ...]:
    """(V, Δ as weights, V, Δ in float64): each dense, as a difference of two tensors, or a product."""
    tensors, build = {}, []
    left = _random(seed + 9, shape[0], 4)
    for number, form in enumerate(forms):
        if form == "dense":
            step = left @ _random(seed + number, 4, shape[1]) * 0.02 + 0.01 * _random(seed + 40 + number, *shape)
            tensors[f"hi{number}"] = _random(seed + 50 + number, *shape) * 0.05 + step
            tensors[f"lo{number}"] = _random(seed + 50 + number, *shape) * 0.05
        else:
            tensors[f"b{number}"] = torch.cat([left[:, :2], _random(seed + 60 + number, shape[0], 1)], dim=1)
            tensors[f"a{number}"] = 0.1 * _random(seed + 70 + number, 3, shape[1])
    refs = _stored(folder, **tensors)
    for number, form in enumerate(forms):
        if form == "dense":
            hi, lo = f"hi{number}", f"lo{number}"
            build.append(
                (
                    Weight.of(Stored(refs[hi])) - Weight.of(Stored(refs[lo])),
                    tensors[hi].double() - tensors[lo].double(),
                )
            )
        else:
            b, a = f"b{number}", f"a{number}"
            build.append((Weight.of(LowRank(refs[b], refs[a], 1.5)), 1.5 * (tensors[b].double() @ tensors[a].double())))
    (v, v_dense), (delta, delta_dense) = build
    return v, delta, v_dense, delta_dense


def _measure(v: Weight, delta: Weight, *, room: int = 1 << 30, exact: bool = True, null: bool = True) -> Moments:
    effort: Effort = "exact" if exact else "sketch"
    with Reader() as reader:
        return measure("model.layers.0.x.weight", v, delta, reader, Arena(), room, effort, null=null)


def _assert_moments(found: Moments, v: torch.Tensor, delta: torch.Tensor) -> None:
    assert found.rho == pytest.approx(reference.rho(v, delta), rel=2e-5, abs=1e-7)
    assert found.rho_null == pytest.approx(reference.rho_null(v), rel=2e-5)
    assert math.sqrt(found.v) == pytest.approx(float(v.norm()), rel=1e-5)
    assert math.sqrt(found.delta) == pytest.approx(float(delta.norm()), rel=1e-5)
    assert found.rho_error == 0
    assert found.null_error == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("forms", itertools.product(("dense", "low rank"), repeat=2))
def test_exact_measures_equal_their_definitions(tmp_path: Path, shape: Any, forms: Any) -> None:
    v, delta, *dense = _pair(tmp_path, shape, forms)
    _assert_moments(_measure(v, delta), *dense)


@pytest.mark.parametrize("shape", [(300, 420), (420, 300)])
@pytest.mark.parametrize("form", ["dense", "low rank"])
def test_room_and_piece_size_change_nothing_but_rounding(
    tmp_path: Path, shape: Any, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safemerge_recipes.gate import measure as module
    from safemerge_recipes.weights import matrix as panels

    v, delta, *dense = _pair(tmp_path, shape, ("dense", form))
    assert _measure(v, delta, room=0) == _measure(v, delta)
    monkeypatch.setattr(module, "ROW_PIECE", 1000)
    monkeypatch.setattr(panels, "PANEL", 64)
    _assert_moments(_measure(v, delta, room=0), *dense)


@pytest.mark.parametrize("effort", ["sketch", "exact"])
def test_a_worker_takes_over_what_it_held_and_holds_no_more_than_it_may(
    tmp_path: Path, effort: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices of many sizes and of two dtypes, one after the other: no rest of one in the next, one buffer a side."""
    monkeypatch.setattr("safemerge_recipes.gate.measure.EXACT_SIDE", 0)
    shapes = [(300, 420), (60, 44), (420, 300), (300, 200)]
    arena, room = Arena(), 2 * 8 * 300 * 420
    for number, (shape, double) in enumerate(itertools.product(shapes, (False, True))):
        folder = tmp_path / str(number)
        folder.mkdir()
        tensors = {f"{side}{at}": _random(10 * number + at, *shape) for side in "vd" for at in (0, 1)}
        refs = _stored(folder, **{name: x.double() if double else x for name, x in tensors.items()})
        pair = [Weight.of(Stored(refs[f"{side}1"])) - Weight.of(Stored(refs[f"{side}0"])) for side in "vd"]
        with Reader() as reader:
            assert measure("x", *pair, reader, arena, room, effort) == measure("x", *pair, reader, Arena(), 0, effort)
        held = [x.nbytes for (slot, _), x in arena._slots.items() if slot.endswith(":held")]
        assert len(held) == 2
        assert sum(held) <= room


@pytest.mark.parametrize("v_form", ["dense", "low rank"])
@pytest.mark.parametrize("exact", [True, False])
def test_how_many_directions_carry_a_full_update_is_known_to_a_fraction(
    tmp_path: Path, v_form: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safemerge_recipes.gate import measure as module

    monkeypatch.setattr(module, "EXACT_SIDE", 0)
    ratios = []
    for seed in range(8):
        v, delta, _, dense = _pair(tmp_path, (300, 420), (v_form, "dense"), seed)
        found = _measure(v, delta, exact=exact)
        ratios.append(found.delta_gram / float((dense @ dense.T).square().sum()))
        assert found.rho_z is not None
    assert all(0.3 < ratio < 2.2 for ratio in ratios)
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.25)


def test_a_sketch_covers_the_truth_and_says_how_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safemerge_recipes.gate import measure as module

    monkeypatch.setattr(module, "EXACT_SIDE", 0)
    widths = []
    for seed in range(12):
        v, delta, v_dense, delta_dense = _pair(tmp_path, (280, 320), ("dense", "dense"), seed)
        found = _measure(v, delta, exact=False)
        assert abs(found.rho - reference.rho(v_dense, delta_dense)) <= found.rho_error
        assert abs(found.rho_null - reference.rho_null(v_dense)) <= found.null_error
        assert math.sqrt(found.delta) == pytest.approx(float(delta_dense.norm()), rel=1e-5)
        widths.append(found.rho_error)
    assert max(widths) > 0  # these were sketches
    adapter = _pair(tmp_path, (280, 320), ("dense", "low rank"))
    found = _measure(*adapter[:2], exact=False)
    assert found.rho == pytest.approx(reference.rho(*adapter[2:]), rel=2e-5)
    assert 0 < abs(found.rho_null - reference.rho_null(adapter[2])) <= found.null_error


@pytest.mark.parametrize("shape", [(280, 320), (320, 280), (700, 300)])
@pytest.mark.parametrize("form", ["dense", "low rank"])
def test_a_rough_null_covers_the_truth_beside_an_exact_rho(tmp_path: Path, shape: Any, form: str) -> None:
    for seed in range(8):
        v, delta, v_dense, delta_dense = _pair(tmp_path, shape, ("dense", form), seed)
        found = _measure(v, delta, null=False)
        assert found.rho == pytest.approx(reference.rho(v_dense, delta_dense), rel=2e-5)
        assert found.rho_error == 0
        error = abs(found.rho_null - reference.rho_null(v_dense))
        assert error <= found.null_error or error <= 1e-5
        careful = _measure(v, delta, exact=False, null=True)
        assert abs(careful.rho_null - reference.rho_null(v_dense)) <= max(careful.null_error, 1e-5)


@pytest.mark.parametrize("forms", [("dense", "low rank"), ("low rank", "dense"), ("low rank", "low rank")])
def test_numpy_and_torch_measure_alike(tmp_path: Path, forms: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from safemerge_recipes.gate import low_rank

    v, delta, *_ = _pair(tmp_path, (300, 420), forms)
    assert not low_rank.needs_torch(v, delta, "cpu")
    assert low_rank.needs_torch(v, delta, "cuda:0")
    light = _measure(v, delta, exact=False, null=False)
    monkeypatch.setattr(low_rank, "numpy_suffices", lambda weight: False)
    heavy = _measure(v, delta, exact=False, null=False)
    assert asdict(light) == pytest.approx(asdict(heavy), rel=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_plain_sums_of_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    from safemerge_recipes.weights.numpy_rows import NumpyRows

    x, y = _random(1, 30, 20).to(dtype), _random(2, 30, 20).to(dtype)
    refs = _stored(tmp_path, x=x, y=y)
    weight = Weight.of(Stored(refs["x"])) * 0.5 - Weight.of(Stored(refs["y"]))
    with Reader() as reader:
        rows = NumpyRows(weight, reader, Arena(), 128)
        found = torch.cat([torch.from_numpy(piece.copy()) for _, piece in rows])
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(found, x.to(wide) * 0.5 - y.to(wide))


@pytest.mark.parametrize("forms", itertools.product(("dense", "low rank"), repeat=2))
def test_rho_is_free_of_scale(tmp_path: Path, forms: Any) -> None:
    v, delta, *_ = _pair(tmp_path, (60, 44), forms)
    rho = _measure(v, delta).rho
    for factors in ((1000, 0.001), (0.5, -3)):
        assert _measure(v * factors[0], delta * factors[1]).rho == pytest.approx(rho, rel=1e-5)


@QUICK
@given(rows=st.integers(2, 40), columns=st.integers(2, 40), seed=st.integers(0, 10**6))
def test_rho_lies_in_the_unit_interval_and_does_not_see_a_rotation(
    tmp_path: Path, rows: int, columns: int, seed: int
) -> None:
    v, delta = _random(seed, rows, columns).double(), _random(seed + 1, rows, columns).double()
    left = torch.linalg.qr(_random(seed + 2, rows, rows).double())[0]
    right = torch.linalg.qr(_random(seed + 3, columns, columns).double())[0]
    refs = _stored(tmp_path, v=v, delta=delta, v2=left @ v @ right, delta2=left @ delta)
    weights = {name: Weight.of(Stored(ref)) for name, ref in refs.items()}
    plain = _measure(weights["v"], weights["delta"])
    turned = _measure(weights["v2"], weights["delta2"])
    assert 0 <= plain.rho <= 1
    assert turned.rho == pytest.approx(plain.rho, rel=1e-9)
    assert turned.rho_null == pytest.approx(plain.rho_null, rel=1e-9)


def test_rho_of_the_extremes(tmp_path: Path) -> None:
    u = torch.linalg.qr(_random(0, 32, 32).double())[0]
    inside, outside = u[:, :1] @ _random(1, 1, 20).double(), u[:, 1:2] @ _random(2, 1, 20).double()
    refs = _stored(tmp_path, v=inside, same=inside * 0.3, outside=outside, zero=torch.zeros(32, 20).double())
    w = {name: Weight.of(Stored(ref)) for name, ref in refs.items()}
    assert _measure(w["v"], w["same"]).rho == pytest.approx(1, abs=1e-12)
    assert _measure(w["v"], w["outside"]).rho == pytest.approx(0, abs=1e-12)
    assert _measure(w["v"], w["zero"]).degenerate == "the update is zero"
    assert _measure(w["zero"], w["v"]).degenerate == "V is zero"
    assert _measure(w["v"] - w["v"], w["same"]).degenerate == "V is zero"
    assert _measure(w["v"], w["zero"]).rho is None


def _lines(plan: dict[str, Any]) -> dict[str, Any]:
    return {line["name"]: line for line in plan["tensors"] if line["rho"] is not None}


@pytest.mark.parametrize("name", ["llama", "qwen"])
@pytest.mark.parametrize("finetuned", ["full", "finetuned-lora", "safety-lora", "patterned-lora"])
@pytest.mark.parametrize("aligned", ["full", "chat-lora"])
def test_plans_carry_the_measures_of_real_sources(
    families: Any, call: Callable[..., Any], recipe: Callable[..., Path], name: str, finetuned: str, aligned: str
) -> None:
    family = families[name]
    base, full = family.dense("base"), family.dense("aligned")
    chat = family.update("chat-lora")
    v = {n: full[n] - base[n] if aligned == "full" else chat.get(n, torch.zeros(1)) for n in base}
    if finetuned != "full":
        delta = family.update(finetuned)
    else:
        aligned_weights = full if aligned == "full" else {n: base[n] + chat.get(n, 0.0) for n in base}
        delta = {n: w - aligned_weights[n] for n, w in family.dense("finetuned").items()}
    path = recipe(
        sources={
            "base": family / "base",
            "aligned": family / "aligned" if aligned == "full" else {"adapter": str(family / aligned), "on": "base"},
            "finetuned": family / "finetuned" if finetuned == "full" else {"adapter": str(family / finetuned)},
            "safety": family / "safety",
        },
        gate={"tau": 0.5},
    )
    done = call("plan", path, "--json")
    assert done.code == 0, done.err
    found = _lines(done.json)
    assert len(found) >= 5
    expected = {n for n in delta if delta[n].ndim == 2 and ".layers." in n and v[n].norm() > 0}
    assert set(found) == expected
    for tensor, line in found.items():
        assert line["rho"] == pytest.approx(reference.rho(v[tensor], delta[tensor]), rel=3e-5), tensor
        assert line["rho_null"] == pytest.approx(reference.rho_null(v[tensor]), rel=3e-5), tensor
        assert line["norm_v"] == pytest.approx(float(v[tensor].norm()), rel=1e-5), tensor
        assert line["norm_delta"] == pytest.approx(float(delta[tensor].norm()), rel=1e-5), tensor
        assert line["action"] == ("merge" if reference.rho(v[tensor], delta[tensor]) < 0.5 else "keep"), tensor
