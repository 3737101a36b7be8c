"""A Likert annotator of whose levels a share is replaced."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rmsweep.annotators import Array
from rmsweep.annotators.likert import Likert
from rmsweep.preferences import Levels
from rmsweep.rng import Streams


@dataclass(frozen=True)
class Corrupted(Likert):
    """A `share` of the levels, independent of all else, is replaced as `replacement` says.

    The uncorrupted levels are those of `likert` with the same fields, seed and beta; what a smaller share replaces, a
    larger one replaces too, by the same level.
    """

    share: Annotated[float, Field(ge=0, le=1)] = 0.25

    @abc.abstractmethod
    def replacement(self, levels: Levels) -> Array:
        """P(said | meant) of replaced levels [L, L]."""

    def transition(self, levels: Levels) -> Array:
        """(1 - share) * identity + share * replacement."""
        return (1 - self.share) * np.eye(len(levels.strengths)) + self.share * self.replacement(levels)

    def said(self, index: NDArray[np.int64], levels: Levels, chance: Streams) -> NDArray[np.int64]:
        """Two uniforms per comparison from the stream "annotation/corruption": whether, and by what."""
        whether, what = chance("annotation", "corruption").random((len(index), 2)).T
        bounds = np.cumsum(self.replacement(levels), axis=1)[:, :-1]
        replaced = (what[:, None] >= bounds[index]).sum(axis=1)
        return np.where(whether < self.share, replaced, index)
