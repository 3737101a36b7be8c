"""An annotator who favours long responses, or the one shown first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from rmsweep.annotators import Annotator, Array, Beta, Seen
from rmsweep.annotators._noise import logistic
from rmsweep.component import component

Bias = Annotated[float, Field(allow_inf_nan=False)]


@component("annotator", version=1)
@dataclass(frozen=True)
class Biased(Annotator):
    """P(a > b) = sigma(beta * (d + length_bias * l + position_bias)), biases in units of the scaled difference d.

    l: characters of a minus those of b, in standard deviations of the training responses' lengths (needs texts unless
    length_bias is 0). a is the response shown first. Negative biases favour the shorter or the second response.
    """

    length_bias: Bias = 0.5
    position_bias: Bias = 0.0

    @property
    def reads_lengths(self) -> bool:
        """Unless length_bias is 0."""
        return self.length_bias != 0

    @property
    def order_matters(self) -> bool:
        """Unless position_bias is 0."""
        return self.position_bias != 0

    def probability(self, difference: Array, beta: Beta) -> Array:
        """sigma(beta * d) [C]."""
        return logistic(difference, beta)

    def expected(self, seen: Seen, beta: Beta) -> Array:
        """P(a > b) [C] with both biases."""
        difference = seen.difference + self.position_bias
        if self.reads_lengths:
            assert seen.length_difference is not None, "the stage hands over lengths to who reads them"
            difference = difference + self.length_bias * seen.length_difference
        return self.probability(difference, beta)
