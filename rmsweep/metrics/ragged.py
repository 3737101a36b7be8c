"""Prompts with different numbers of responses: dense groups of prompts that have equally many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rmsweep.bank import Floats, Ints
from rmsweep.errors import DataError, Diverged


class Group(NamedTuple):
    """Prompts with m responses each: indices [G], scores in their own float type and golden rewards float64 [G, m]."""

    prompts: Ints
    score: NDArray[np.floating[Any]]
    golden: NDArray[np.float64]

    @property
    def m(self) -> int:
        """Responses per prompt."""
        return int(self.golden.shape[1])


def groups(score: Floats, golden: Floats) -> Iterator[Group]:
    """Dense groups of equal count, smallest count first; prompts without any response are left out.

    score, golden [Q, M]: golden is NaN where there is no such response, at the end of a row only. Raises
    DataError on unequal shapes, Diverged on a score of a response that is not finite.
    """
    score, golden = np.asarray(score), np.asarray(golden)
    score = score if score.dtype.kind == "f" else score.astype(np.float64)
    if score.shape != golden.shape or golden.ndim != 2:
        raise DataError(f"scores {score.shape} and golden rewards {golden.shape} must both be [prompts, responses]")
    valid = np.isfinite(golden)
    check_finite(score[valid])
    count = valid.sum(axis=1)
    for m in np.unique(count[count > 0]):
        prompts = np.flatnonzero(count == m)
        yield Group(prompts, score[prompts, :m], golden[prompts, :m].astype(np.float64))


def check_finite(score: Floats) -> None:
    """Raise Diverged when a score is NaN or infinite."""
    wrong = score.size - int(np.isfinite(score).sum())
    if wrong:
        raise Diverged(f"{wrong} of {score.size} scores are NaN or infinite")
