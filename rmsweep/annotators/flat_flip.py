"""An annotator who errs at one rate, however close the two responses are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rmsweep.annotators import Annotator, Array, Beta
from rmsweep.annotators._noise import logistic
from rmsweep.component import component


@component("annotator", version=1)
@dataclass(frozen=True)
class FlatFlip(Annotator):
    """The golden order, flipped at the rate q = sigma(-beta): as often as Bradley-Terry at a difference of one.

    Give `error_rate` to choose q itself. Equal rewards give one half.
    """

    def probability(self, difference: Array, beta: Beta) -> Array:
        """sigma(beta * sign(d)) [C]."""
        return logistic(np.sign(difference), beta)
