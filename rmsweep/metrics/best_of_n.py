"""Best-of-N: the golden reward of the response that a reward model picks, exact over subsets."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rmsweep.bank import Floats
from rmsweep.metrics.ragged import Group, groups
from rmsweep.metrics.ties import average_ranks, tie_means


class Pick(NamedTuple):
    """The response of highest score of each prompt: golden reward [Q] and its mid-rank quantile [Q]."""

    golden: NDArray[np.float64]
    quantile: NDArray[np.float64]


def best_of_n(score: Floats, golden: Floats) -> NDArray[np.float64]:
    """As `best_of_n_of`: score, golden [Q, M], golden NaN where there is no response. Raises Diverged."""
    return best_of_n_of(list(groups(score, golden)))


def best_of_n_of(parts: Sequence[Group]) -> NDArray[np.float64]:
    """Expected golden reward of the highest score among N of a prompt's responses, for N = 1 ... M.

    ``sum_i w_i(N) g_(i)``,  w_i(N) = C(M - 1 - i, N - 1) / C(M, N),  g_(i) the golden reward at score rank i
    = 0, 1, ...

    from the best, averaged over tied scores: the subset is uniform, and each of its tied winners equally
    likely. Exact, nothing is resampled (the released evaluation averages 100 subsets). The value at N averages the
    prompts with at least N responses.
    """
    total, n_prompts = np.zeros((2, max((part.m for part in parts), default=0)))
    for part in parts:
        total[: part.m] += order_weights(part.m) @ _golden_by_score(part).sum(axis=0)[::-1]
        n_prompts[: part.m] += len(part.prompts)
    return np.asarray(total / n_prompts)


@functools.lru_cache(maxsize=512)
def order_weights(m: int) -> NDArray[np.float64]:
    """w[N - 1, i] = C(m - 1 - i, N - 1) / C(m, N): chance that rank i (0 = best) wins a random N-subset of m.

    By w_0 = N / m and w_(i+1) / w_i = (m - N - i) / (m - 1 - i): no binomial is formed, nothing overflows.
    """
    n, i = np.arange(1, m + 1)[:, None], np.arange(m - 1)
    ratio = np.maximum(m - n - i, 0) / (m - 1 - i)
    weights = np.cumprod(np.hstack([n / m, ratio]), axis=1)
    weights.setflags(write=False)
    return weights


def pick(score: Floats, golden: Floats) -> Pick:
    """As `pick_of`: score, golden [Q, M], golden NaN where there is no response. Raises Diverged."""
    return pick_of(list(groups(score, golden)), len(golden))


def pick_of(parts: Sequence[Group], n_prompts: int) -> Pick:
    """Golden reward and quantile of each prompt's highest score, averaged over tied scores; NaN: no response.

    quantile = (#less + 0.5 #equal) / M of the pick's golden reward among the prompt's responses, itself
    included: 1/2 for a random pick, 1 - 1/(2 M) for the best.
    """
    picked = Pick(*np.full((2, n_prompts), np.nan))
    for part in parts:
        first = part.score.argmax(axis=1)[:, None]
        golden = np.take_along_axis(part.golden, first, axis=1)
        less, equal = (part.golden < golden).sum(axis=1), (part.golden == golden).sum(axis=1)
        picked.golden[part.prompts] = golden[:, 0]
        picked.quantile[part.prompts] = (less + equal / 2) / part.m
        best = part.score == np.take_along_axis(part.score, first, axis=1)
        tied = np.flatnonzero(best.sum(axis=1) > 1)
        quantile = (average_ranks(part.golden[tied]) - 0.5) / part.m
        for result, values in zip(picked, (part.golden[tied], quantile), strict=True):
            result[part.prompts[tied]] = np.where(best[tied], values, 0).sum(axis=1) / best[tied].sum(axis=1)
    return picked


def _golden_by_score(part: Group) -> NDArray[np.float64]:
    """Golden rewards [G, m] from the lowest score to the highest, averaged over tied scores."""
    score = np.take_along_axis(part.score, part.score_order, axis=1)
    golden = np.take_along_axis(part.golden, part.score_order, axis=1)
    tied = np.flatnonzero((score[:, 1:] == score[:, :-1]).any(axis=1))
    down = np.argsort(-part.score[tied], axis=1, kind="stable")  # so that sums over ties have one order
    score = np.take_along_axis(part.score[tied], down, axis=1)
    golden[tied] = tie_means(score, np.take_along_axis(part.golden[tied], down, axis=1))[:, ::-1]
    return golden
