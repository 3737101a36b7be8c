"""An annotator whose preferences are in part not transitive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from rmsweep.annotators import Annotator, Array, Beta, Labels, Seen, choices
from rmsweep.annotators._noise import logistic
from rmsweep.component import component
from rmsweep.rng import Streams


@component("annotator", version=1)
@dataclass(frozen=True)
class Cyclic(Annotator):
    """Bradley-Terry, but a `share` of the comparisons is decided by positions on a circle, whatever the rewards.

    Every response has a place on the circle, uniform and fixed; a beats b iff b is less than half a turn behind. Of
    three responses that are compared so, one in four triples is a cycle. P(a > b) = (1 - share) sigma(beta d) +
    share / 2 over places.
    """

    share: Annotated[float, Field(ge=0, le=1)] = 0.2

    def probability(self, difference: Array, beta: Beta) -> Array:
        """(1 - share) sigma(beta * d) + share / 2 [C]."""
        return (1 - self.share) * logistic(difference, beta) + self.share / 2

    def label(self, seen: Seen, beta: Beta, chance: Streams) -> Labels:
        """Which comparisons go round from the stream "annotation/cyclic", places from "annotation/place"."""
        wins = chance("annotation").random(len(seen)) < logistic(seen.difference, beta)
        place = chance("annotation", "place").random(seen.n_rows)
        ahead = (place[seen.row_a] - place[seen.row_b]) % 1 < 0.5
        return choices(np.where(chance("annotation", "cyclic").random(len(seen)) < self.share, ahead, wins))
