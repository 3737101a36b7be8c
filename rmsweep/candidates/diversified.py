"""Diversified candidates: a prompt's extremes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from rmsweep.bank import Ints, Split
from rmsweep.candidates import at_ranks, enough_for
from rmsweep.component import component


@component("candidates", version=1)
@dataclass(frozen=True)
class Diversified:
    """The extremes of each prompt: its ceil(k/2) worst and floor(k/2) best, ranks 0 and 9 of 10 (paper A, section 5.3).

    k: null for the smallest number that gives `pairs_per_prompt` pairs, 2 in the papers.
    """

    k: Annotated[int, Field(ge=2)] | None = None

    def size(self, count: Ints, pairs_per_prompt: int) -> Ints:
        """Candidates per prompt [P]."""
        return np.minimum(count, self.k or enough_for(pairs_per_prompt))

    def pick(self, split: Split, pairs_per_prompt: int, rng: np.random.Generator) -> Ints:
        """Response indices [P, k], -1 where a prompt has fewer; no chance involved."""
        size = self.size(split.count, pairs_per_prompt)[:, None]
        place = np.arange(size.max())
        low = place < (size + 1) // 2
        return at_ranks(split, np.where(low, place, split.count[:, None] - size + place), size)
