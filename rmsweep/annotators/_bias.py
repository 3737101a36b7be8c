"""Biases that belong to an annotator and a response: the same whenever the two meet again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rmsweep.annotators import Array, Seen
from rmsweep.rng import Streams


def bias_difference(
    seen: Seen, n_annotators: int, draw: Callable[[np.random.Generator, int], Array], chance: Streams
) -> Array:
    """b(a, A) - b(b, A) [C] for the annotator A of each comparison, uniform among n_annotators.

    draw(rng, n): n independent biases. Each annotator has a stream of its own, "annotation/bias/A", with a bias for
    every row of the bank, so that no bias depends on which comparisons are made.
    """
    who = (chance("annotation", "annotator").random(len(seen)) * n_annotators).astype(np.int64)
    difference = np.empty(len(seen))
    for annotator in np.unique(who).tolist():
        own = np.flatnonzero(who == annotator)
        bias = draw(chance("annotation", "bias", annotator), seen.n_rows)
        difference[own] = bias[seen.row_a[own]] - bias[seen.row_b[own]]
    return difference
