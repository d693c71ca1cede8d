"""Every formula against an independent one: published examples, a direct solution, simulations of coverage."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

scipy_stats = pytest.importorskip("scipy.stats")
from safemerge_recipes.evaluation.rates import (  # noqa: E402
    cluster_bootstrap,
    difference_of,
    holm,
    independent_rates,
    mcnemar,
    mean_interval,
    paired_rates,
    sign_flip,
    spearman,
    wilson,
)


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 5), (1, 64), (59, 64), (130, 264)])
def test_wilson_solves_its_equation(k, n):
    # (p − k/n)² = z² p(1 − p) / n
    z = 1.959963984540054
    for bound, end in zip(wilson(k, n), (0.0, 1.0), strict=True):
        assert bound == end or (bound - k / n) ** 2 == pytest.approx(z * z * bound * (1 - bound) / n)
    assert wilson(k, n)[0] <= k / n <= wilson(k, n)[1]


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_rejects_counts_that_cannot_be(k, n):
    with pytest.raises(ValueError, match="expected 0 <="):
        wilson(k, n)


@pytest.mark.parametrize(("b", "c"), list(itertools.product((0, 1, 3, 17, 200), repeat=2)))
def test_mcnemar_is_the_exact_binomial_test(b, c):
    n = b + c
    tail = sum(math.comb(n, k) for k in range(min(b, c) + 1))
    assert mcnemar(b, c) == pytest.approx(min(1.0, 2 * tail / 2**n), rel=1e-9)


# Paired rates


def test_tangos_interval_of_a_published_example():
    # Airway reactivity before and after a transplantation (Bentur et al. 2009): 1 both, 1 before only, 7 after only,
    # 12 neither; Fagerland, Lydersen & Laake 2014 (Stat. Med. 33:2850) give −0.517 to −0.026 for before − after.
    assert paired_rates(7, 1, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


def likelihood_score(only_first, only_second, n, difference):
    """Z of the hypothesis, with the nuisance share found by maximising the likelihood on a fine grid."""
    low = max(0.0, -difference) + 1e-9
    q = np.linspace(low, (1 - difference) / 2 - 1e-9, 400_001)
    rest = n - only_first - only_second
    with np.errstate(divide="ignore", invalid="ignore"):
        value = only_first * np.log(q) + only_second * np.log(q + difference) + rest * np.log(1 - 2 * q - difference)
    best = q[np.nanargmax(value)]
    return (only_second - only_first - n * difference) / math.sqrt(n * (2 * best + difference - difference**2))


@pytest.mark.parametrize("counts", [(2, 12, 50), (20, 40, 160), (5, 6, 210), (1, 1, 20), (60, 30, 100)])
def test_tangos_interval_inverts_the_score_test(counts):
    for bound, side in zip(paired_rates(*counts), (1, -1), strict=True):
        assert likelihood_score(*counts, bound) == pytest.approx(side * 1.959963985, abs=2e-3)


def test_tangos_interval_at_the_edges():
    low, high = paired_rates(0, 0, 210)
    # With no pair that differs, z²/(n + z²).
    assert high == -low == pytest.approx(1.959963985**2 / (210 + 1.959963985**2))
    assert paired_rates(0, 5, 5)[1] == 1.0
    assert paired_rates(5, 0, 5) == pytest.approx([-end for end in reversed(paired_rates(0, 5, 5))])
    with pytest.raises(ValueError, match="pairs differ"):
        paired_rates(3, 3, 5)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 200))
def test_tangos_interval_is_antisymmetric_and_holds_the_difference(first, second, rest):
    n = max(1, first + second + rest)
    low, high = paired_rates(first, second, n)
    assert -1 <= low <= (second - first) / n <= high <= 1
    assert low < high
    assert paired_rates(second, first, n) == pytest.approx((-high, -low), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("shares", [(0.02, 0.02), (0.01, 0.06), (0.1, 0.3), (0.2, 0.2)])
def test_tangos_interval_covers_as_often_as_it_says(shares):
    draw, n, inside = np.random.default_rng(1), 90, 0
    for first, second, _ in draw.multinomial(n, [*shares, 1 - sum(shares)], size=2000):
        low, high = paired_rates(int(first), int(second), n)
        inside += low <= shares[1] - shares[0] <= high
    assert 0.935 <= inside / 2000 <= 0.985


# Independent rates


def test_newcombes_interval_of_published_examples():
    # Newcombe 1998 (Stat. Med. 17:873), table II, method 10: 56/70 − 48/80 and 9/10 − 3/10.
    assert independent_rates((56, 70), (48, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert independent_rates((9, 10), (3, 10)) == pytest.approx((0.1705, 0.8090), abs=5e-5)
    assert independent_rates((10, 10), (0, 10)) == pytest.approx((0.6075, 1.0), abs=5e-5)


def test_a_difference_of_symmetric_intervals_is_that_of_normal_estimates():
    low, high = difference_of(5.0, (2.0, 8.0), 1.0, (-3.0, 5.0))
    assert (low, high) == (4.0 - 5.0, 4.0 + 5.0)  # √(3² + 4²)


# Means


def test_the_interval_of_a_mean_is_students():
    values = [0.1, 0.4, 0.35, -0.2, 0.0]
    expected = scipy_stats.ttest_1samp(values, 0).confidence_interval()
    assert mean_interval(values) == pytest.approx((expected.low, expected.high))
    assert mean_interval([0.3]) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_the_sign_flip_test_is_exact_for_few_differences():
    values = [0.5, -0.1, 0.3, 0.0, 0.2, 0.0]
    moved = [v for v in values if v]
    sums = [
        abs(sum(s * v for s, v in zip(signs, moved, strict=True))) for signs in itertools.product((1, -1), repeat=4)
    ]
    expected = sum(s >= abs(sum(moved)) - 1e-12 for s in sums) / len(sums)
    assert sign_flip(values) == pytest.approx(expected)
    assert sign_flip([0.0, 0.0]) == 1.0
    # Many: drawn, and near the paired t-test's.
    many = np.random.default_rng(0).normal(0.2, 1, 200)
    assert sign_flip(many.tolist()) == pytest.approx(scipy_stats.ttest_1samp(many, 0).pvalue, abs=0.01)


def test_binary_sign_flips_are_mcnemars_test():
    assert sign_flip([1.0] * 3 + [-1.0] * 9) == pytest.approx(mcnemar(3, 9))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_stepping_down_rejects(ps):
    adjusted = holm(ps)
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    for level in (0.01, 0.05, 0.2):
        rejected = set()
        for rank, index in enumerate(order):
            if ps[index] * (len(ps) - rank) > level:
                break
            rejected.add(index)
        assert rejected == {i for i, p in enumerate(adjusted) if p <= level}


def test_spearman_is_that_of_scipy_and_exact_for_few():
    draw = np.random.default_rng(1)
    for n in (8, 30):
        first = draw.normal(size=n)
        second = np.round(first + draw.normal(scale=2, size=n))  # ties
        value, p = spearman(first.tolist(), second.tolist())
        expected = scipy_stats.spearmanr(first, second)
        assert value == pytest.approx(expected.statistic)
        assert p == pytest.approx(expected.pvalue, abs=0.03)
    # Every order of three is as likely: a perfect one or its reverse has p = 1/3.
    assert spearman([1, 2, 3], [4, 5, 6]) == (pytest.approx(1), pytest.approx(1 / 3))
    with pytest.raises(ValueError, match="constant"):
        spearman([1, 1, 1], [1, 2, 3])
    with pytest.raises(ValueError, match="at least three"):
        spearman([1, 2], [1, 2])


# Families


def test_the_cluster_bootstrap_knows_that_families_differ():
    draw = np.random.default_rng(2)
    means = [0.3, -0.1, 0.0, 0.25, 0.1, -0.05]
    families = {str(i): draw.normal(mean, 0.01, 100).tolist() for i, mean in enumerate(means)}
    low, high = cluster_bootstrap(families)
    # Prompts are almost sure here: what is left is the spread of six families.
    se = np.std(means) / math.sqrt(6)
    assert (high - low) / (2 * 1.96 * se) == pytest.approx(1, abs=0.15)
    assert low < np.mean(means) < high
    same = {str(i): draw.normal(0.1, 1, 100).tolist() for i in range(6)}
    low, high = cluster_bootstrap(same)
    spread = np.sqrt(1 / 600 + np.var([np.mean(v) for v in same.values()]) / 6)
    assert (high - low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.25)
    assert cluster_bootstrap(same) == (low, high)
    with pytest.raises(ValueError, match="families"):
        cluster_bootstrap({"a": []})
