"""Prompts with different numbers of responses: dense groups of prompts that have equally many."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rmsweep.bank import Floats, Ints
from rmsweep.errors import DataError, Diverged


@dataclass(frozen=True, eq=False)
class Group:
    """Prompts with m responses each: indices [G], scores in their own float type and golden rewards float64 [G, m].

    Every metric sorts by the same two orders, each found once; `golden_orders`, m -> order, lasts longer than the
    group where a bank's groups are made again and again.
    """

    prompts: Ints
    score: NDArray[np.floating[Any]]
    golden: NDArray[np.float64]
    golden_orders: dict[int, Ints] = field(default_factory=dict)

    @property
    def m(self) -> int:
        """Responses per prompt."""
        return int(self.golden.shape[1])

    @functools.cached_property
    def score_order(self) -> Ints:
        """Responses of each prompt from the lowest score to the highest [G, m]; tied ones in any order."""
        return np.argsort(self.score, axis=1)

    @property
    def golden_order(self) -> Ints:
        """The same by golden reward."""
        if self.m not in self.golden_orders:
            self.golden_orders[self.m] = np.argsort(self.golden, axis=1)
        return self.golden_orders[self.m]


def groups(score: Floats, golden: Floats, golden_orders: dict[int, Ints] | None = None) -> Iterator[Group]:
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
    count, orders = valid.sum(axis=1), {} if golden_orders is None else golden_orders
    for m in np.unique(count[count > 0]):
        prompts = np.flatnonzero(count == m)
        yield Group(prompts, score[prompts, :m], golden[prompts, :m].astype(np.float64), orders)


def check_finite(score: Floats) -> None:
    """Raise Diverged when a score is NaN or infinite."""
    wrong = score.size - int(np.isfinite(score).sum())
    if wrong:
        raise Diverged(f"{wrong} of {score.size} scores are NaN or infinite")
