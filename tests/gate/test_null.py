"""ρ₀ and its spread against what random updates really show, of single tensors and of groups of unlike ones."""

from dataclasses import replace
from functools import reduce
from operator import add

import numpy as np
import pytest

from safemerge_recipes.gate.moments import Moments
from safemerge_recipes.gate.null import DELTA_PROBES, pair_moment


def moments(v, delta):
    """The definitions, in float64."""
    vtd = v.T @ delta
    return Moments(
        overlap=np.sum(vtd**2),
        image=np.sum((v @ vtd) ** 2),
        delta=np.sum(delta**2),
        v=np.sum(v**2),
        gram=np.sum((v.T @ v) ** 2),
        d_out=v.shape[0],
        delta_gram=np.sum((delta.T @ delta) ** 2),
    )


def low_rank(draw, rows, columns, rank, flat=True):
    scales = np.ones(rank) if flat else 0.7 ** np.arange(rank)
    return (draw.normal(size=(rows, rank)) * scales) @ draw.normal(size=(rank, columns)) / np.sqrt(columns)


CASES = {
    "one": [((96, 64), 8, 8, 1.0)],
    "one of few directions": [((96, 64), 4, 2, 1.0)],
    "unlike members": [((96, 64), 8, 8, 1.0), ((24, 64), 4, 4, 5.0), ((160, 32), 16, 4, 0.1)],
    "full V": [((64, 64), 64, 8, 1.0), ((128, 64), 64, 8, 2.0)],
}


@pytest.mark.parametrize("members", CASES.values(), ids=CASES)
def test_the_null_of_a_group_is_what_random_updates_show(members):
    draw = np.random.default_rng(3)
    vs = [size * low_rank(draw, *shape, rank_v) for shape, rank_v, _, size in members]
    bs = [low_rank(draw, *shape, rank, flat=False) for shape, _, rank, _ in members]
    found = []
    for _ in range(1500):
        # The same update in a direction that knows nothing of V: the rows turned at random.
        turned = [np.linalg.qr(draw.normal(size=(len(b), 24)))[0] @ (np.linalg.qr(b)[0][:, :24].T @ b) for b in bs]
        found.append(reduce(add, (moments(v, b) for v, b in zip(vs, turned, strict=True))))
    rhos = np.array([one.rho for one in found])
    null = found[0]
    assert all(one.rho_null == pytest.approx(null.rho_null, rel=1e-6) for one in found[:5])
    assert rhos.mean() == pytest.approx(null.rho_null, rel=0.04)
    spread = null.null.spread()
    assert rhos.std() / rhos.mean() == pytest.approx(spread, rel=0.25)
    z = np.array([one.rho_z for one in found])
    assert abs(z.mean()) < 0.35
    assert 0.75 < z.std() < 1.25
    # The formula that takes all members as alike is off where they are not.
    if len(members) == 3:
        v, gram, rows = null.v, null.gram, null.d_out
        assert abs(v / np.sqrt(gram * rows) / rhos.mean() - 1) > 0.07


def test_a_full_update_has_a_z_score_from_random_columns():
    """As for factors: unrelated full updates lie about one spread from ρ₀, whatever their own spectrum."""
    draw = np.random.default_rng(4)
    v = low_rank(draw, 96, 64, 8)
    for decay in (1.0, 0.9):
        own = draw.normal(size=(96, 64)) * decay ** np.arange(64)
        basis = np.linalg.qr(own)[1]
        scores = []
        for _ in range(400):
            delta = np.linalg.qr(draw.normal(size=(96, 64)))[0] @ basis  # the same update, its rows turned
            seen = delta @ draw.normal(size=(64, DELTA_PROBES))
            scores.append(replace(moments(v, delta), delta_gram=pair_moment(seen.T @ seen)).rho_z)
        assert abs(np.mean(scores)) < 0.4
        assert 0.7 < np.std(scores) < 1.4


def test_members_add_up_in_any_order_and_without_rounding_to_each_other():
    draw = np.random.default_rng(0)
    parts = [moments(low_rank(draw, 30, 20, 5), low_rank(draw, 30, 20, 3)) for _ in range(4)]
    forward, backward = reduce(add, parts), reduce(add, parts[::-1])
    nested = (parts[0] + parts[1]) + (parts[2] + parts[3])
    for one in (backward, nested):
        assert one.rho_null == pytest.approx(forward.rho_null, rel=1e-12)
        assert one.rho_z == pytest.approx(forward.rho_z, rel=1e-12)
    assert Moments(**{f: getattr(forward, f) for f in Moments.__dataclass_fields__}) == forward
    expected = sum(p.v * p.delta / 30 for p in parts)
    expected /= np.sqrt(sum(p.gram * p.delta / 30 for p in parts) * sum(p.delta for p in parts))
    assert forward.rho_null == pytest.approx(expected, rel=1e-12)


def test_the_interval_of_a_group_holds_what_its_members_allow():
    draw = np.random.default_rng(1)
    exact = [moments(low_rank(draw, 30, 20, 5), low_rank(draw, 30, 20, 3)) for _ in range(3)]
    for shift in (0.9, 1.0, 1.1):
        # ρ₀ goes with the root of the Gram norm: members whose ρ₀ is off by no more than their half-widths.
        seen = []
        for one in exact:
            off = Moments(one.overlap, one.image, one.delta, one.v, one.gram / shift**2, d_out=one.d_out)
            error = abs(off.rho_null - one.rho_null)
            seen.append(Moments(one.overlap, one.image, one.delta, one.v, off.gram, 0.0, error, one.d_out))
        group, true = reduce(add, seen), reduce(add, exact)
        assert abs(group.rho_null - true.rho_null) <= group.null_error + 1e-12


def test_an_interval_that_reaches_zero_is_no_end_of_a_plan():
    """Seen with an aligned model whose every weight was trained: the sketch's ρ₀ was known to no better than itself."""
    draw = np.random.default_rng(3)
    exact = moments(low_rank(draw, 30, 20, 5), low_rank(draw, 30, 20, 3))
    for error in (exact.rho_null, 1.0):
        vague = replace(exact, null_error=error)
        assert vague.rho_z == pytest.approx(exact.rho_z)
        group = vague + exact
        assert group.rho_null == pytest.approx(exact.rho_null)
        assert group.null_error == pytest.approx(group.rho_null), "down to 0"


def test_what_has_no_null_adds_nothing():
    draw = np.random.default_rng(2)
    one = moments(low_rank(draw, 30, 20, 5), low_rank(draw, 30, 20, 3))
    still = Moments(0.0, 0.0, 0.0, 2.0, 1.0, d_out=30)
    assert (one + still).rho_null == pytest.approx(one.rho_null)
    assert still.rho_z is None
    unknown = Moments(one.overlap, one.image, one.delta, one.v, one.gram, d_out=30)
    assert unknown.rho_z is None
    assert (one + unknown).rho_z is None
