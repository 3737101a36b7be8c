"""Similar candidates: responses of nearly the same golden reward."""

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
class Similar:
    """The k middle-ranked responses of each prompt: ranks 4 and 5 of 10 (paper A, section 5.3; step 5).

    Of n responses ranked from 0 (worst): ranks floor((n - k) / 2) ... + k - 1. k: null for the smallest number that
    gives `pairs_per_prompt` pairs, 2 in the papers.
    """

    k: Annotated[int, Field(ge=2)] | None = None

    def size(self, count: Ints, pairs_per_prompt: int) -> Ints:
        """Candidates per prompt [P]."""
        return np.minimum(count, self.k or enough_for(pairs_per_prompt))

    def pick(self, split: Split, pairs_per_prompt: int, rng: np.random.Generator) -> Ints:
        """Response indices [P, k], -1 where a prompt has fewer; no chance involved."""
        size = self.size(split.count, pairs_per_prompt)[:, None]
        return at_ranks(split, (split.count[:, None] - size) // 2 + np.arange(size.max()), size)
