"""Annotators with fixed normal biases, part or all of what makes Thurstone's noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field
from scipy.special import ndtr

from rmsweep.annotators import Annotator, Array, Beta, Labels, Seen, choices
from rmsweep.annotators._bias import bias_difference
from rmsweep.annotators._noise import in_normal_sds, normal
from rmsweep.component import component
from rmsweep.rng import Streams


@component("annotator", version=1)
@dataclass(frozen=True)
class FixedBias(Annotator):
    """Annotator A prefers a iff d + b(a, A) - b(b, A) + e > 0, all normal (paper A, assumptions 1, 2 and 4).

    The noise has Thurstone's variance, pi^2 / (3 beta^2); `fixed_share` of it are the annotators' fixed biases, the
    rest is drawn anew for each comparison. So P(a > b) over annotators is Thurstone's whatever the share, and what
    differs is only how consistent they are: 1 always says the same of a pair, 0 is `thurstone`.
    """

    n_annotators: Annotated[int, Field(ge=1, le=1000)] = 10
    fixed_share: Annotated[float, Field(ge=0, le=1)] = 1.0

    def probability(self, difference: Array, beta: Beta) -> Array:
        """Phi(beta * d * sqrt(3) / pi) [C]."""
        return normal(difference, beta)

    def label(self, seen: Seen, beta: Beta, chance: Streams) -> Labels:
        """Biases: `_bias.bias_difference`; u from the stream "annotation" where the share is below 1."""
        bias = bias_difference(seen, self.n_annotators, lambda rng, n: rng.standard_normal(n), chance)
        biased = in_normal_sds(seen.difference, beta) + np.sqrt(self.fixed_share / 2) * bias
        if self.fixed_share == 1:
            return choices(biased > 0)
        return choices(chance("annotation").random(len(seen)) < ndtr(biased / np.sqrt(1 - self.fixed_share)))
