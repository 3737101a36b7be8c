"""Likert labels of which a share is one level off, always in the same direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rmsweep.annotators import Array
from rmsweep.annotators._corrupted import Corrupted
from rmsweep.component import component
from rmsweep.preferences import Levels


@component("annotator", version=1)
@dataclass(frozen=True)
class LevelShift(Corrupted):
    """A `share` of the levels moves by one (paper B's systematic shift, which a reward model may absorb).

    direction: `up`, to the next level in favour of a, `down`, in favour of b: across the middle too, so a -1 turns into
    a tie or, where there are none, into a 1; `stronger`, away from the middle, `weaker`, towards it: both keep the
    sign, 1 stays 1 under `weaker`, and ties stay. A level at the end stays where it would leave the scale.
    """

    direction: Literal["up", "down", "stronger", "weaker"] = "up"

    @property
    def order_matters(self) -> bool:
        """In the directions that favour a or b."""
        return self.direction in ("up", "down")

    def replacement(self, levels: Levels) -> Array:
        """One level on, for certain."""
        strengths = levels.strengths.astype(np.int64)
        last = len(strengths) - 1
        sign = np.sign(strengths)
        if self.direction in ("up", "down"):
            target = np.clip(np.arange(last + 1) + (1 if self.direction == "up" else -1), 0, last)
        else:
            size = np.clip(np.abs(strengths) + (1 if self.direction == "stronger" else -1), 1, levels.per_side)
            target = levels.index((sign * size).astype(np.int8))
        return np.eye(last + 1)[target]
