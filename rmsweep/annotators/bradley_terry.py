"""The annotator of both papers: Bradley-Terry noise around the golden reward."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from rmsweep.component import component


@component("annotator", version=1)
@dataclass(frozen=True)
class BradleyTerry:
    """P(a > b) = sigma(beta * d), d the scaled golden difference (paper A, section 4.1; released step 5).

    beta = 0 is a coin flip, beta = inf the golden order; equal rewards give one half at every beta.
    """

    def probability(self, difference: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
        """P(a > b) [C] for scaled differences [C]; beta >= 0, inf allowed."""
        if np.isinf(beta):
            return (np.sign(difference) + 1) / 2
        return np.asarray(expit(beta * difference))
