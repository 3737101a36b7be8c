"""The annotator of both papers: Bradley-Terry noise around the golden reward."""

from __future__ import annotations

from dataclasses import dataclass

from rmsweep.annotators import Annotator, Array, Beta
from rmsweep.annotators._noise import logistic
from rmsweep.component import component


@component("annotator", version=1)
@dataclass(frozen=True)
class BradleyTerry(Annotator):
    """P(a > b) = sigma(beta * d), d the scaled golden difference (paper A, section 4.1; released step 5).

    beta = 0 is a coin flip, beta = inf the golden order; equal rewards give one half at every beta.
    """

    def probability(self, difference: Array, beta: Beta) -> Array:
        """sigma(beta * d) [C]."""
        return logistic(difference, beta)
