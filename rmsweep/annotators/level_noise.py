"""Likert labels of which a share is any other level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rmsweep.annotators import Array
from rmsweep.annotators._corrupted import Corrupted
from rmsweep.component import component
from rmsweep.preferences import Levels


@component("annotator", version=1)
@dataclass(frozen=True)
class LevelNoise(Corrupted):
    """A `share` of the levels is replaced by one of the others, all equally likely (paper B's random noise)."""

    def replacement(self, levels: Levels) -> Array:
        """1 / (L - 1) off the diagonal."""
        n = len(levels.strengths)
        return (1 - np.eye(n)) / (n - 1)
