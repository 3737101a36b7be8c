"""Thurstone's annotator: normal noise instead of logistic."""

from __future__ import annotations

from dataclasses import dataclass

from rmsweep.annotators import Annotator, Array, Beta
from rmsweep.annotators._noise import normal
from rmsweep.component import component


@component("annotator", version=1)
@dataclass(frozen=True)
class Thurstone(Annotator):
    """P(a > b) = Phi(beta * d * sqrt(3) / pi): the noise has the variance of Bradley-Terry's at the same beta.

    (Thurstone 1927; paper A, assumption 4.) Its tails are lighter: fewer errors at large differences.
    """

    def probability(self, difference: Array, beta: Beta) -> Array:
        """Phi(beta * d * sqrt(3) / pi) [C]."""
        return normal(difference, beta)
