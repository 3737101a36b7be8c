"""Same-prompt pairing: two responses to one prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rmsweep.bank import Ints
from rmsweep.component import component
from rmsweep.errors import DesignError
from rmsweep.preferences import Comparisons
from rmsweep.rng import Streams


@component("pairing", version=1)
@dataclass(frozen=True)
class SamePrompt:
    """Distinct unordered pairs of a prompt's candidates, in random order and orientation (paper A, section 5.2).

    A visit of a prompt gives `pairs_per_prompt` of its pairs; after all prompts, further rounds. n comparisons are a
    prefix of any larger number under the same seed. Capacity: sum over prompts of C(k, 2).
    """

    def capacity(self, n_candidates: Ints) -> int:
        """sum_p C(k_p, 2)."""
        return int((n_candidates * (n_candidates - 1) // 2).sum())

    def compare(self, candidates: Ints, order: Ints, n: int, pairs_per_prompt: int, streams: Streams) -> Comparisons:
        """N comparisons; see Pairing."""
        size = (candidates >= 0).sum(axis=1)
        prompt, which = _visits(size * (size - 1) // 2, order, n, pairs_per_prompt)
        first, second = _pairs(size, prompt, which, streams("pairing", "pairs"))
        swap = streams("pairing", "orientation").random(n) < 0.5
        a = candidates[prompt, np.where(swap, second, first)]
        b = candidates[prompt, np.where(swap, first, second)]
        return Comparisons(prompt, a, prompt, b)


def _visits(available: Ints, order: Ints, n: int, per_visit: int) -> tuple[Ints, Ints]:
    """Prompt [n] and number of its pair [n], visiting prompts in `order`, `per_visit` pairs each, in rounds."""
    prompts, pairs, found, done = [], [], 0, 0
    while found < n:
        take = np.clip(available[order] - done, 0, per_visit)
        if not take.any():
            raise DesignError(f"n_annotations={n} but this design gives at most {int(available.sum())} comparisons")
        prompts.append(np.repeat(order, take))
        pairs.append(done + np.arange(take.sum()) - np.repeat(np.cumsum(take) - take, take))
        found, done = found + int(take.sum()), done + per_visit
    return np.concatenate(prompts)[:n], np.concatenate(pairs)[:n]


def _pairs(size: Ints, prompt: Ints, which: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Positions (i < j) among the candidates of the `which`-th pair of each prompt's own random order of pairs."""
    first, second = np.tril_indices(int(size.max()), -1)[::-1]  # pairs of the first k candidates come first
    if len(first) == 1:
        return np.zeros_like(prompt), np.ones_like(prompt)
    key = rng.random((len(size), len(first)), dtype=np.float32)
    key[np.arange(len(first)) >= (size * (size - 1) // 2)[:, None]] = np.inf
    pair = np.argsort(key, axis=1, kind="stable")[prompt, which]
    return first[pair], second[pair]
