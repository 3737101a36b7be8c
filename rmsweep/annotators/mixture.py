"""Several annotators of different quality, each comparison labelled by one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from rmsweep.annotators import Annotator, Array, Beta, Labels, Seen, choices
from rmsweep.annotators._noise import logistic, times
from rmsweep.component import component
from rmsweep.errors import ConfigError
from rmsweep.rng import Streams

Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@component("annotator", version=1)
@dataclass(frozen=True)
class Mixture(Annotator):
    """Bradley-Terry annotators with beta_k = beta_factors[k] * beta; P(a > b) = sum_k share_k sigma(beta_k d).

    shares: of the comparisons that each of them labels, up to a common factor. A factor of 0 flips a coin.
    """

    beta_factors: Annotated[tuple[Factor, ...], Field(min_length=1)] = (0.25, 1.0, 4.0)
    shares: Annotated[tuple[Share, ...], Field(min_length=1)] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.beta_factors):
            raise ConfigError(
                f"annotator.shares={list(self.shares)}: needs one share for each of "
                f"annotator.beta_factors={list(self.beta_factors)}; set both"
            )
        if not any(self.beta_factors):
            raise ConfigError("annotator.beta_factors: at least one must be above 0")

    def probability(self, difference: Array, beta: Beta) -> Array:
        """sum_k share_k sigma(beta_k d) [C]."""
        parts = [logistic(difference, times(beta, factor)) for factor in self.beta_factors]
        return np.asarray(np.average(parts, axis=0, weights=self.shares))

    def label(self, seen: Seen, beta: Beta, chance: Streams) -> Labels:
        """Who labels, from the stream "annotation/annotator"; then a iff u < sigma(beta_k d)."""
        bounds = np.cumsum(self.shares) / np.sum(self.shares)
        who = np.searchsorted(bounds[:-1], chance("annotation", "annotator").random(len(seen)), side="right")
        own = times(beta, np.asarray(self.beta_factors)[who])
        return choices(chance("annotation").random(len(seen)) < logistic(seen.difference, own))
