"""The tilted policy against its definition, and recalibration of scores."""

import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from rmsweep.errors import Diverged
from rmsweep.metrics.best_of_n import pick
from rmsweep.metrics.tilt import recalibrated, tilt


def by_definition(score, golden, tau):
    policy = softmax(score / tau)
    return policy @ golden, rel_entr(policy, np.full(len(score), 1 / len(score))).sum()


def test_equals_definition_on_ragged_prompts():
    """Catches padding with policy mass, a KL against the wrong M, a temperature that multiplies."""
    rng = np.random.default_rng(0)
    count, (score, golden) = [3, 6, 6, 1], rng.standard_normal((2, 4, 6))
    golden[np.arange(6) >= np.array(count)[:, None]] = np.nan
    taus = (0.1, 1.0, 7.0)
    found = tilt(score, golden, taus)
    for k, tau in enumerate(taus):
        each = [by_definition(s[:c], g[:c], tau) for s, g, c in zip(score, golden, count, strict=True)]
        np.testing.assert_allclose([found.golden[k], found.kl[k]], np.mean(each, axis=0), rtol=1e-12)


def test_limits_of_temperature():
    """tau -> inf is the uniform pick at KL 0, tau -> 0 the pick of the highest score at KL log M."""
    rng = np.random.default_rng(1)
    score, golden = rng.standard_normal((2, 20, 8))
    found = tilt(score, golden, (1e-6, 1e9))
    np.testing.assert_allclose(found.golden, [pick(score, golden).golden.mean(), golden.mean()], atol=1e-8)
    np.testing.assert_allclose(found.kl, [np.log(8), 0], atol=1e-8)
    assert found.kl.min() >= 0


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30, 3e38])
def test_stable_for_extreme_scores(scale):
    """Catches overflow of exp and 0 * inf; float32 scores can be this large."""
    score = (scale * np.array([[1.0, -1.0, 1.0, 0.5]])).astype(np.float32)
    golden = np.array([[1.0, 2.0, 3.0, 4.0]])
    found = tilt(score, golden, (0.0625, 1.0))
    expected = (2.0, np.log(2)) if scale > 1 else (2.5, 0.0)  # the two tied best share the mass
    np.testing.assert_allclose([found.golden[0], found.kl[0]], expected, atol=1e-8)


def test_raw_score_sees_scale_and_offset_per_prompt_cancels():
    """What best-of-N cannot see: doubling the score halves the temperature; a prompt's offset does nothing."""
    rng = np.random.default_rng(2)
    score, golden = rng.standard_normal((2, 10, 5))
    np.testing.assert_allclose(tilt(2 * score, golden, [1.0]).golden, tilt(score, golden, [0.5]).golden, rtol=1e-12)
    shifted = score + rng.standard_normal((10, 1))
    np.testing.assert_allclose(tilt(shifted, golden, [1.0]).kl, tilt(score, golden, [1.0]).kl, rtol=1e-9)


def test_recalibration_undoes_any_monotone_distortion():
    """Scores that are an increasing function of the golden reward come back in golden units, ends clipped."""
    rng = np.random.default_rng(3)
    train, test = rng.uniform(-1, 1, 4000), rng.uniform(-1, 1, (5, 6))
    found = recalibrated(np.exp(5 * test), np.exp(5 * train), train)
    np.testing.assert_allclose(found, test, atol=0.02)
    outside = recalibrated(np.array([[-1e9, 1e9]]), np.exp(5 * train), train)
    np.testing.assert_allclose(outside, [[train.min(), train.max()]])


def test_recalibration_of_useless_scores_is_flat():
    """Constant or reversed scores say nothing: every response gets the mean golden reward."""
    golden = np.linspace(0, 1, 50)
    for useless in (np.zeros(50), -golden):
        np.testing.assert_allclose(recalibrated(np.array([[-2.0, 0.3]]), useless, golden), 0.5, atol=1e-12)


def test_diverged_scores_raise():
    """On the test split and on the calibration rows; padding of the test split may hold anything."""
    with pytest.raises(Diverged):
        tilt(np.array([[np.nan, 1.0]]), np.ones((1, 2)), [1.0])
    with pytest.raises(Diverged):
        recalibrated(np.zeros((1, 2)), np.array([1.0, np.inf]), np.ones(2))
    assert np.isfinite(recalibrated(np.array([[0.0, np.nan, np.inf]]), np.arange(2.0), np.arange(2.0))).all()
