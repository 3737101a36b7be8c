"""Pairing strategies: candidates of prompts -> comparisons."""

from __future__ import annotations

from typing import Protocol

from rmsweep.bank import Ints
from rmsweep.preferences import Comparisons
from rmsweep.rng import Streams


class Pairing(Protocol):
    """A rule that makes comparisons out of the candidates of the prompts in their order of use."""

    def capacity(self, n_candidates: Ints) -> int:
        """How many comparisons prompts with `n_candidates` [P] can give at most."""
        ...

    def compare(self, candidates: Ints, order: Ints, n: int, pairs_per_prompt: int, streams: Streams) -> Comparisons:
        """N comparisons from candidates [P, k] (-1 pads), visiting prompts in `order` [P], `pairs_per_prompt` at each
        visit, then further rounds over all prompts. Draws from the streams ("pairing", ...).
        """
        ...
