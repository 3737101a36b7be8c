"""Cross-prompt pairing: responses to two prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rmsweep.bank import Ints
from rmsweep.component import component
from rmsweep.errors import DesignError
from rmsweep.preferences import Comparisons
from rmsweep.rng import Streams

ATTEMPTS = 200


@component("pairing", version=1)
@dataclass(frozen=True)
class CrossPrompt:
    """One candidate of each prompt in turn against one of a prompt drawn uniformly (paper A, section 5.2; step 5).

    Prompts in use are the first ceil(n / pairs_per_prompt) of the order; side a visits each in turn, side b is uniform
    over them (with replacement, the prompt itself included, as published). A response is never compared with itself
    and no pair stands twice: both are redrawn. A uniform b over the prompts in use cannot be a prefix when n grows;
    it is drawn as the last record of a random sequence, so that a share n/n' of the b sides stays, the most possible.
    """

    def capacity(self, n_candidates: Ints) -> int:
        """Half of all pairs of candidates, K (K - 1) / 4: beyond it hardly any pair is left to redraw."""
        total = int(n_candidates.sum())
        return total * (total - 1) // 4

    def compare(self, candidates: Ints, order: Ints, n: int, pairs_per_prompt: int, streams: Streams) -> Comparisons:
        """N comparisons; see Pairing."""
        size = (candidates >= 0).sum(axis=1)
        in_use = min(len(order), -(-n // pairs_per_prompt))
        prompt_a = order[(np.arange(n) // pairs_per_prompt) % len(order)]
        a, prompt_b, b = np.zeros((3, n), dtype=np.int64)
        redraw = np.ones(n, dtype=bool)
        for attempt in range(ATTEMPTS):
            place_b = uniform_places(n, in_use, streams, attempt)
            u_a, u_b = (streams("pairing", side, attempt).random(n) for side in ("a", "b"))
            prompt_b = np.where(redraw, order[place_b], prompt_b)
            a = np.where(redraw, (u_a * size[prompt_a]).astype(np.int64), a)
            b = np.where(redraw, (u_b * size[prompt_b]).astype(np.int64), b)
            pairs = Comparisons(prompt_a, candidates[prompt_a, a], prompt_b, candidates[prompt_b, b])
            redraw = _impossible(pairs, int(candidates.max()) + 1)
            if not redraw.any():
                return pairs
        given = int(size[order[:in_use]].sum())
        raise DesignError(
            f"n_annotations={n}: {in_use} prompts with {given} candidates give too few distinct cross-prompt "
            "comparisons; lower n_annotations or pairs_per_prompt, or take more candidates"
        )


def uniform_places(n: int, in_use: int, streams: Streams, attempt: int) -> Ints:
    """N independent uniform draws from 0..in_use-1 that agree as much as possible between values of `in_use`.

    In a random sequence item j is a new minimum with probability 1/(j+1); the last minimum before `in_use` is uniform.
    After minimum c the next one comes at ceil((c + 1) / u) - 1, u uniform.
    """
    place, following = np.zeros((2, n), dtype=np.int64)
    step = 0
    while (active := following < in_use).any():
        place[active] = following[active]
        u = 1.0 - streams("pairing", "partner", attempt, step).random(n)
        following = np.where(active, np.minimum(np.ceil((place + 1) / u) - 1, 2.0**62).astype(np.int64), following)
        following = np.where(active, np.maximum(following, place + 1), following)
        step += 1
    return place


def _impossible(pairs: Comparisons, width: int) -> np.ndarray:
    """Comparisons of a response with itself, and all but the first of equal unordered pairs, bool [n]."""
    rows = np.sort([pairs.prompt_a * width + pairs.response_a, pairs.prompt_b * width + pairs.response_b], axis=0)
    _, first = np.unique(rows, axis=1, return_index=True)
    repeated = np.ones(len(pairs), dtype=bool)
    repeated[first] = False
    return np.asarray(repeated | (rows[0] == rows[1]))
