"""Ranks of rows with ties."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from rmsweep.bank import Ints

Scalar = TypeVar("Scalar", bound=np.generic)


class Runs(NamedTuple):
    """Runs of equal values in the rows of a sorted [G, m] array: flat start index and length of each."""

    start: Ints
    size: Ints

    @property
    def pairs(self) -> int:
        """Number of unordered pairs of equal values: sum over runs of t (t - 1) / 2."""
        return int((self.size * (self.size - 1) // 2).sum())


def runs(ordered: NDArray[np.generic]) -> Runs:
    """Runs of an array [G, m] whose rows are sorted."""
    new = np.ones(ordered.shape, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    start = np.flatnonzero(new)
    return Runs(start, np.diff(start, append=ordered.size))


def dense_ranks(values: NDArray[np.generic], order: Ints | None = None) -> Ints:
    """Ranks 0, 1, ... of the distinct values of each row [G, m]; equal values share one. order: rows sorted by it."""
    order = np.argsort(values, axis=1) if order is None else order
    ordered = np.take_along_axis(values, order, axis=1)
    rank = np.zeros(values.shape, dtype=np.int64)
    np.cumsum(ordered[:, 1:] != ordered[:, :-1], axis=1, out=rank[:, 1:])
    return _back(rank, order)


def average_ranks(values: NDArray[np.generic], order: Ints | None = None) -> NDArray[np.float64]:
    """Ranks 1 ... m within each row [G, m]; equal values get the mean of the ranks that they span. order: as above."""
    m = values.shape[1]
    order = np.argsort(values, axis=1) if order is None else order
    same = runs(np.take_along_axis(values, order, axis=1))
    rank = np.repeat(same.start % m + (same.size + 1) / 2, same.size)
    return _back(rank.reshape(values.shape), order)


def tie_means(ordered: NDArray[np.generic], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`values` [G, m] with each replaced by its mean over the run of equal `ordered` [G, m] (rows sorted)."""
    same = runs(ordered)
    if len(same.start) == values.size:
        return values
    mean = np.add.reduceat(values.reshape(-1), same.start) / same.size
    return np.repeat(mean, same.size).reshape(values.shape)


def _back(ordered: NDArray[Scalar], order: Ints) -> NDArray[Scalar]:
    """Undo the sorting `order` of each row."""
    result = np.empty_like(ordered)
    np.put_along_axis(result, order, ordered, axis=1)
    return result
