"""Random candidates: the papers' default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from rmsweep.bank import Ints, Split
from rmsweep.component import component


@component("candidates", version=1)
@dataclass(frozen=True)
class Random:
    """k of a prompt's responses, uniformly without replacement, drawn once per prompt (paper A, section 5; step 5).

    k: a number, "all", or null: 2 for one pair per prompt as in the papers, every response for more (the released
    scripts' re-draw within a prompt).
    """

    k: Annotated[int, Field(ge=2)] | Literal["all"] | None = None

    def size(self, count: Ints, pairs_per_prompt: int) -> Ints:
        """Candidates per prompt [P]."""
        every = self.k == "all" or (self.k is None and pairs_per_prompt > 1)
        return np.asarray(count) if every else np.minimum(count, self.k or 2)

    def pick(self, split: Split, pairs_per_prompt: int, rng: np.random.Generator) -> Ints:
        """Response indices [P, k], -1 where a prompt has fewer."""
        key = np.where(np.isfinite(split.golden), rng.random(split.golden.shape), np.inf)
        size = self.size(split.count, pairs_per_prompt)
        order = np.argsort(key, axis=1)[:, : size.max()]
        return np.where(np.arange(order.shape[1]) < size[:, None], order, -1)
