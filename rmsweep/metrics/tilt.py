"""Tilt: what a KL-regularised policy gets from the scores. Best-of-N cannot see their scale, it can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression

from rmsweep.bank import Floats
from rmsweep.metrics.ragged import check_finite, groups


class Tilt(NamedTuple):
    """Per temperature [T]: golden reward of the tilted policy and its KL from the uniform pick in nats."""

    golden: NDArray[np.float64]
    kl: NDArray[np.float64]


def tilt(score: Floats, golden: Floats, tau: Sequence[float]) -> Tilt:
    """Golden reward and KL of pi = softmax(score / tau) over a prompt's M responses, averaged over prompts.

    ``E_pi[g] = sum_i pi_i g_i``,   ``KL = sum_i pi_i log(M pi_i)``: 0 as tau grows, at most log M as it
    falls. pi is the optimum of E_pi[score] - tau KL(pi | uniform). score, golden [Q, M], golden NaN where
    there is no response; tau [T] in units of the score. Raises Diverged.
    """
    total, n_prompts = np.zeros((2, len(tau))), 0
    for part in groups(score, golden):
        below = part.score.astype(np.float64)
        below -= below.max(axis=1, keepdims=True)
        total += np.transpose([_moments(below / t, part.golden) for t in tau])
        n_prompts += len(part.prompts)
    return Tilt(*(total / n_prompts))


def recalibrated(score: Floats, score_calibration: Floats, golden_calibration: Floats) -> NDArray[np.float64]:
    """Scores [Q, M] in golden units: isotonic regression of golden on score, fitted on `..._calibration` [R].

    Scores outside the fitted range take the value at its end; what stands at padding is 0. Raises Diverged.
    """
    check_finite(score_calibration)
    curve = IsotonicRegression(increasing=True, out_of_bounds="clip")
    curve.fit(score_calibration.astype(np.float64), golden_calibration.astype(np.float64))
    flat = np.nan_to_num(score.astype(np.float64).reshape(-1), posinf=0.0, neginf=0.0)
    return np.asarray(curve.predict(flat), dtype=np.float64).reshape(score.shape)


def _moments(z: NDArray[np.float64], golden: NDArray[np.float64]) -> tuple[float, float]:
    """Sums over prompts of E_pi[g] and KL for pi = softmax(z); z [G, m] with maximum 0 in every row."""
    weight = np.exp(z)
    norm = weight.sum(axis=1)
    mean = np.einsum("gm,gm->g", weight, golden) / norm
    kl = np.einsum("gm,gm->g", weight, z) / norm - np.log(norm / z.shape[1])
    return float(mean.sum()), float(np.maximum(kl, 0).sum())
