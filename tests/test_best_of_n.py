"""Best-of-N against enumeration of every subset."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from rmsweep.errors import DataError, Diverged
from rmsweep.metrics.best_of_n import best_of_n, order_weights, pick

SCORES = {
    "distinct": lambda rng: rng.permutation(7).astype(float),
    "ties": lambda rng: rng.integers(0, 3, 7).astype(float),
    "all tied": lambda rng: np.zeros(7),
    "extreme": lambda rng: rng.permutation([-3e38, -1.0, 0.0, 1e-30, 2e-30, 3e37, 3e38]),
}


def enumerated(score, golden):
    """Expected golden reward of the argmax over every subset of every size, each tied winner equally likely."""
    curve = []
    for n in range(1, len(score) + 1):
        values = []
        for subset in map(list, combinations(range(len(score)), n)):
            winners = score[subset] == score[subset].max()
            values.append(golden[subset][winners].mean())
        curve.append(np.mean(values))
    return np.array(curve)


@pytest.mark.parametrize("kind", SCORES)
def test_equals_enumeration_of_all_subsets(kind):
    """Catches wrong order statistics, ties given to one of the tied, and averages over N that are off by one."""
    rng = np.random.default_rng(0)
    score = np.stack([SCORES[kind](rng) for _ in range(4)])
    golden = rng.standard_normal((4, 7))
    golden[0, :3] = golden[0, 3]
    expected = np.mean([enumerated(s, g) for s, g in zip(score, golden, strict=True)], axis=0)
    np.testing.assert_allclose(best_of_n(score, golden), expected, rtol=0, atol=1e-12)


def test_ragged_prompts_count_where_they_have_enough_responses():
    """Catches padding that takes part in a subset and prompts that are averaged in beyond their own M."""
    rng = np.random.default_rng(1)
    count, golden, score = [2, 5, 5, 1, 4], rng.standard_normal((5, 6)), rng.integers(0, 3, (5, 6)).astype(float)
    golden[np.arange(6) >= np.array(count)[:, None]] = np.nan
    score[np.isnan(golden)] = 99.0
    curves = [enumerated(s[:c], g[:c]) for s, g, c in zip(score, golden, count, strict=True)]
    expected = [np.mean([c[n] for c in curves if len(c) > n]) for n in range(5)]
    np.testing.assert_allclose(best_of_n(score, golden), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("m", [1, 2, 17, 500])
def test_weights_are_exact_binomial_ratios(m):
    """Catches overflow or loss of digits of C(M, N) at M = 500; integers of any size are exact in Python."""
    weights = order_weights(m)
    for n in {1, 2, m // 2 + 1, m}:
        n = min(n, m)
        exact = [comb(m - 1 - i, n - 1) / comb(m, n) for i in range(m)]
        np.testing.assert_allclose(weights[n - 1], exact, rtol=1e-11, atol=1e-300)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)


def test_ends_of_the_curve():
    """N = 1 is the mean golden reward, N = M the golden reward of the pick."""
    rng = np.random.default_rng(2)
    score, golden = rng.standard_normal((2, 30, 40))
    curve = best_of_n(score, golden)
    np.testing.assert_allclose(curve[0], golden.mean(), atol=1e-12)
    np.testing.assert_allclose(curve[-1], golden[np.arange(30), score.argmax(axis=1)].mean(), atol=1e-12)


def test_pick_averages_over_tied_scores():
    """Golden reward and quantile of the pick by hand: one tie of two, one constant score, one single response."""
    nan = np.nan
    golden = np.array([[1.0, 2.0, 2.0, 5.0], [3.0, 4.0, nan, nan], [7.0, nan, nan, nan]])
    score = np.array([[0.0, 9.0, 1.0, 9.0], [1.0, 1.0, 5.0, nan], [0.0, 8.0, nan, nan]])
    picked = pick(score, golden)
    np.testing.assert_allclose(picked.golden, [(2 + 5) / 2, 3.5, 7])
    middle_of_twos, best = (1 + 0.5 * 2) / 4, (3 + 0.5) / 4
    np.testing.assert_allclose(picked.quantile, [(middle_of_twos + best) / 2, 0.5, 0.5])


def test_quantile_of_a_random_pick_is_one_half():
    """Whatever the ties among golden rewards: the mean mid-rank over all responses is M / 2."""
    golden = np.random.default_rng(3).integers(0, 4, (20, 9)).astype(float)
    np.testing.assert_allclose(pick(np.zeros((20, 9)), golden).quantile, 0.5, atol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_diverge(value):
    """Catches a diverged model that is reported with a number; at padding anything may stand."""
    golden = np.array([[1.0, 2.0], [3.0, np.nan]])
    with pytest.raises(Diverged):
        best_of_n(np.array([[0.0, value], [0.0, 0.0]]), golden)
    assert np.isfinite(best_of_n(np.array([[0.0, 1.0], [0.0, value]]), golden)).all()


def test_shapes_must_agree():
    """Catches broadcasting of one prompt's scores over all prompts."""
    with pytest.raises(DataError, match="both be"):
        best_of_n(np.zeros((1, 3)), np.zeros((2, 3)))


def test_scores_of_any_number_type():
    """Unsigned and boolean scores have an order too; catches a negation that wraps around."""
    golden = np.array([[0.0, 1.0, 2.0]])
    for kind in (np.uint8, np.int64, np.float32):
        np.testing.assert_allclose(best_of_n(np.array([[0, 1, 2]], kind), golden), [1, 5 / 3, 2])
    np.testing.assert_allclose(best_of_n(np.array([[False, False, True]]), golden)[-1], 2)
