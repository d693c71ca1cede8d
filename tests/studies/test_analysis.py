"""The pre-registered analysis against direct sums and simulations."""

import itertools

import numpy as np
import pytest

scipy_stats = pytest.importorskip("scipy.stats")
from benchmarks.study.analysis import corrected, pooled, rank_p, weighted  # noqa: E402
from safemerge_recipes.evaluation.separation import Sides, separation_change  # noqa: E402


def family(draw, shift, n=(120, 80)):
    """(this, against) of a model whose harmful requests are refused more often by `shift`."""
    harm, safe = draw.random(n[0]), draw.random(n[1])

    def sides(level):
        return Sides(
            {f"h{i}": float(x < level) for i, x in enumerate(harm)},
            {f"s{i}": float(x < 0.1) for i, x in enumerate(safe)},
        )

    return sides(0.4 + shift), sides(0.4)


def test_the_parts_of_a_family_sum_to_its_difference_in_j():
    this, against = family(np.random.default_rng(0), 0.2)
    assert np.mean(weighted(this, against)) == pytest.approx(separation_change(this, against)[0])


def test_families_are_what_counts():
    draw = np.random.default_rng(1)
    shifts = [0.3, 0.1, 0.0, 0.25, 0.1, 0.2]
    families = {str(i): family(draw, shift) for i, shift in enumerate(shifts)}
    found = pooled(families)
    means = [separation_change(*pair)[0] for pair in families.values()]
    expected = scipy_stats.ttest_1samp(means, 0)
    assert found.mean == pytest.approx(np.mean(means))
    assert found.interval == pytest.approx(tuple(expected.confidence_interval()))
    moved = [mean for mean in means if mean]
    every = [abs(np.dot(signs, moved)) for signs in itertools.product((1, -1), repeat=len(moved))]
    assert found.p == pytest.approx(np.mean([total >= abs(sum(moved)) - 1e-12 for total in every]))
    assert found.bootstrap[0] < found.mean < found.bootstrap[1]
    assert not found.equivalent
    assert pooled({str(i): family(draw, 0.0) for i in range(6)}).equivalent
    with pytest.raises(ValueError, match="two families"):
        pooled({"one": family(draw, 0.1)})


def test_ranks_among_draws():
    # Best of 20 in every family of three: (1/21)³ of all outcomes, give or take what was drawn.
    best = {str(i): (1.0, [j / 100 for j in range(20)]) for i in range(3)}
    assert rank_p(best) == pytest.approx(1 / 21**3, abs=1e-4)
    middle = {str(i): (0.095, [j / 100 for j in range(20)]) for i in range(3)}
    assert 0.4 < rank_p(middle) < 0.6
    # If ρ knows nothing, small p are as rare as they say.
    draw = np.random.default_rng(2)
    p = [
        rank_p({str(i): (float(draw.random()), draw.random(20).tolist()) for i in range(4)}, seed=k) for k in range(100)
    ]
    assert np.mean(np.array(p) < 0.1) < 0.2
    assert scipy_stats.kstest(p, "uniform").pvalue > 0.01


def test_holm_over_the_comparisons():
    assert corrected({"A": 0.01, "B": 0.04, "C": 0.5, "D": 0.02}) == pytest.approx(
        {"A": 0.04, "B": 0.08, "C": 0.5, "D": 0.06}
    )
