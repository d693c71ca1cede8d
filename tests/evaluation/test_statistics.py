import numpy as np
import pytest

from safemerge_recipes.errors import CheckError
from safemerge_recipes.evaluation.scores import Metric, Scores, TaskScores
from safemerge_recipes.evaluation.statistics import compare

scipy_stats = pytest.importorskip("scipy.stats")


def scores(outcomes, better=True, **settings):
    n = len(outcomes)
    metric = Metric(sum(outcomes.values()) / n, None, n, better, outcomes)
    return Scores("m", {"task": TaskScores("1.0", {"refusal": metric})}, settings, 1.0)


def rows(*ones, n):
    """Outcomes of n prompts, 1 on those numbered in `ones`."""
    return {f"p{i}": float(i in ones) for i in range(n)}


def test_compare_pairs_by_prompt_whatever_the_order():
    first = rows(*range(10), n=100)
    second = dict(reversed(list(rows(*range(60), n=100).items())))
    result = compare({"merged": scores(second), "finetuned": scores(first)}, "finetuned")
    d = result.of("merged", "task", "refusal")
    assert (d.n, d.value, d.reference_value, d.difference) == (100, 0.6, 0.1, pytest.approx(0.5))
    assert d.p == pytest.approx(scipy_stats.binomtest(0, 50).pvalue)
    assert d.low < 0.5 < d.high
    assert d.verdict.startswith("higher, which is better (60.0 % against 10.0 %, n=100, difference +50.0 points")
    assert result.cautions == ()


def test_the_verdict_follows_the_direction_that_is_better():
    none, every = rows(n=50), rows(*range(50), n=50)
    worse = compare({"b": scores(every, better=False), "a": scores(none, better=False)}, "a")
    assert worse.differences[0].verdict.startswith("higher, which is worse")
    unknown = compare({"b": scores(every, better=None), "a": scores(none, better=None)}, "a")
    assert unknown.differences[0].verdict.startswith("higher (")
    lower = compare({"b": scores(none), "a": scores(every)}, "a")
    assert lower.differences[0].verdict.startswith("lower, which is worse")


def test_a_small_difference_is_not_called_equality():
    first, second = rows(*range(30), n=64), rows(*range(33), n=64)
    d = compare({"a": scores(first), "b": scores(second)}, "a").differences[0]
    assert not d.detected
    assert d.verdict.startswith("no difference detected (51.6 % against 46.9 %, n=64")
    assert "95 % CI" in d.verdict


def test_the_correction_counts_every_model():
    # p = 0.03125 alone; among five such models none is detected.
    first, better = rows(n=40), rows(*range(6), n=40)
    one = compare({"a": scores(first), "b": scores(better)}, "a").differences[0]
    assert one.p == one.p_holm == 0.03125
    assert one.detected
    five = compare({"a": scores(first), **{f"b{i}": scores(better) for i in range(5)}}, "a")
    assert [d.p_holm for d in five.differences] == [5 * 0.03125] * 5
    assert not any(d.detected for d in five.differences)


def test_scores_between_0_and_1_use_a_permutation_test():
    rng = np.random.default_rng(0)
    first = {f"p{i}": float(x) for i, x in enumerate(rng.uniform(0, 1, 40))}
    second = {key: value + 0.1 * float(rng.normal(0.15)) for key, value in first.items()}
    d = compare({"a": scores(first), "b": scores(second)}, "a").differences[0]
    expected = scipy_stats.permutation_test(
        ([second[k] for k in first], list(first.values())),
        lambda x, y: np.mean(x - y),
        permutation_type="samples",
        vectorized=False,
        rng=np.random.default_rng(0),
    ).pvalue
    assert 0.001 < expected < 0.9
    assert d.p == pytest.approx(expected, abs=0.015)


def test_what_cannot_be_compared_is_said():
    first = scores(rows(n=10), dtype="float32", chat_template_sha256="x")
    second = scores({f"p{i}": 0.0 for i in range(5, 15)}, dtype="bfloat16", chat_template_sha256=None)
    result = compare({"a": first, "b": second}, "a")
    assert result.differences[0].n == 5
    assert result.cautions == (
        "b and a were scored with a different chat template",
        "b and a were scored with a different dtype",
        "b: task is compared on the 5 prompts both answered",
    )
    with pytest.raises(CheckError, match="no scores named 'z'; there are a, b"):
        compare({"a": first, "b": second}, "z")


def test_identical_models_differ_in_nothing():
    same = scores(rows(*range(0, 20, 2), n=20))
    d = compare({"a": same, "b": same}, "a").differences[0]
    assert (d.difference, d.p, d.value) == (0, 1, 0.5)
    # No pair differs: of twenty that bounds the difference, and does not make it zero.
    assert d.high == -d.low == pytest.approx(1.96**2 / (20 + 1.96**2), abs=1e-4)
