"""Distribution functions of the noise around a golden difference."""

from __future__ import annotations

import numpy as np
from scipy.special import expit, ndtr

from rmsweep.annotators import Array, Beta

LOGISTIC_SD = float(np.pi / np.sqrt(3))  # of the standard logistic distribution


def times(beta: Beta, x: float | Array) -> Array:
    """Product beta * x, but 0 where x is 0 though beta be infinite."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(np.equal(x, 0), 0.0, np.multiply(beta, x))


def logistic(difference: Array, beta: Beta) -> Array:
    """sigma(beta * d): P(d + e / beta > 0), e logistic."""
    return np.asarray(expit(times(beta, difference)))


def in_normal_sds(difference: Array, beta: Beta) -> Array:
    """Product beta * d in standard deviations of normal noise that is as wide as the logistic's."""
    return times(beta, difference) / LOGISTIC_SD


def normal(difference: Array, beta: Beta) -> Array:
    """Phi(beta * d * sqrt(3) / pi): P(d + e / beta > 0), e normal with the variance of the logistic."""
    return np.asarray(ndtr(in_normal_sds(difference, beta)))
