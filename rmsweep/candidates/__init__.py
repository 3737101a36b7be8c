"""Candidates: which of a prompt's responses may be compared."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from rmsweep.bank import Ints, Split


class Candidates(Protocol):
    """A rule that picks k responses of every prompt."""

    def size(self, count: Ints, pairs_per_prompt: int) -> Ints:
        """Number of candidates k [P] of prompts with `count` [P] responses; known before any data are read."""
        ...

    def pick(self, split: Split, pairs_per_prompt: int, rng: np.random.Generator) -> Ints:
        """Response indices [P, max k] int64; -1 pads prompts with fewer candidates. `rng`: stream "candidates"."""
        ...


def enough_for(pairs_per_prompt: int) -> int:
    """The smallest k with C(k, 2) >= pairs_per_prompt: 2 for the papers' single pair."""
    k = max(2, (math.isqrt(8 * pairs_per_prompt + 1) + 1) // 2)
    return k if k * (k - 1) // 2 >= pairs_per_prompt else k + 1


def at_ranks(split: Split, rank: Ints, size: Ints) -> Ints:
    """Response indices [P, k] at golden ranks [P, k] (0: worst); -1 from place `size` [P, 1] on."""
    order = np.argsort(split.golden, axis=1, kind="stable")  # NaN sorts last
    picked = np.take_along_axis(order, np.clip(rank, 0, split.n_responses - 1), axis=1)
    return np.where(np.arange(rank.shape[1]) < size, picked, -1)
