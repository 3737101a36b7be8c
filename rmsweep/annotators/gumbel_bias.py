"""Consistent annotators whose fixed biases make Bradley-Terry of them in the aggregate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from rmsweep.annotators import Annotator, Array, Beta, Labels, Seen, choices
from rmsweep.annotators._bias import bias_difference
from rmsweep.annotators._noise import logistic, times
from rmsweep.component import component
from rmsweep.rng import Streams


@component("annotator", version=1)
@dataclass(frozen=True)
class GumbelBias(Annotator):
    """Annotator A prefers a iff d + b(a, A) - b(b, A) > 0, b ~ Gumbel / beta fixed (paper A, assumptions 1 to 3).

    Over annotators P(a > b) = sigma(beta d): the same error rate as Bradley-Terry, but an annotator who meets a pair
    again says the same, and a response that one of them overrates wins all of that annotator's comparisons.
    """

    n_annotators: Annotated[int, Field(ge=1, le=1000)] = 10

    def probability(self, difference: Array, beta: Beta) -> Array:
        """sigma(beta * d) [C]."""
        return logistic(difference, beta)

    def label(self, seen: Seen, beta: Beta, chance: Streams) -> Labels:
        """Biases: `_bias.bias_difference`; the stream "annotation" is not used."""
        bias = bias_difference(seen, self.n_annotators, lambda rng, n: rng.gumbel(size=n), chance)
        return choices(times(beta, seen.difference) + bias > 0)
