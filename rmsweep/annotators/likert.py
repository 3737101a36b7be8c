"""A graded annotator: ordered logit, the Bradley-Terry annotator who also says how much better."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import brentq
from scipy.special import expit

from rmsweep.annotators import Annotator, Array, Beta, Labels, Seen
from rmsweep.annotators._noise import logistic
from rmsweep.component import component
from rmsweep.errors import ConfigError
from rmsweep.preferences import Levels
from rmsweep.rng import Streams

Quantile = Annotated[float, Field(gt=0, lt=1)]


@component("annotator", version=1)
@dataclass(frozen=True)
class Likert(Annotator):
    """The level of the noisy difference y = d + e / beta, e logistic, between fixed symmetric thresholds (paper B).

    levels: K on each side. tie: whether there is a level 0 between -zeta_1 and zeta_1; without it the middle cut point
    is 0. e = -logit(u) with the u of `bradley_terry`: the sign of a strength is the binary label of the same seed, beta
    and pair, ties apart. Thresholds belong to the bank: quantiles of |y| over all its same-prompt training pairs at
    reference_beta, whatever the cell's beta, pairs and seed. quantiles: ascending, one for each threshold (K with ties,
    K - 1 without); null fills all levels equally at reference_beta.
    """

    levels: Annotated[int, Field(ge=1, le=100)] = 3
    tie: bool = False
    quantiles: tuple[Quantile, ...] | None = None
    reference_beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    graded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        n = self.levels if self.tie else self.levels - 1
        given = self.quantiles
        if given is not None and (len(given) != n or any(a >= b for a, b in itertools.pairwise(given))):
            raise ConfigError(
                f"annotator.quantiles={list(given)}: needs {n} ascending numbers between 0 and 1 for "
                f"annotator.levels={self.levels}, annotator.tie={str(self.tie).lower()}; null for equally filled levels"
            )

    def find_levels(self, difference: Array, weight: Array) -> Levels:
        """Thresholds zeta_k with P(|y| < zeta_k) = quantile k over the reference pairs."""
        bound = float(np.abs(difference).max()) + 50 / self.reference_beta

        def share_below(size: float) -> float:
            inside = expit(self.reference_beta * (size - difference)) - expit(
                self.reference_beta * (-size - difference)
            )
            return float(np.average(inside, weights=weight))

        found = [brentq(lambda size, q=q: share_below(size) - q, 0.0, bound, xtol=1e-12) for q in self._quantiles()]
        return Levels(self.levels, self.tie, tuple(float(t) for t in found))

    def _quantiles(self) -> tuple[float, ...]:
        k = self.levels
        equal = [(2 * i - 1) / (2 * k + 1) for i in range(1, k + 1)] if self.tie else [i / k for i in range(1, k)]
        return tuple(equal) if self.quantiles is None else self.quantiles

    def probability(self, difference: Array, beta: Beta) -> Array:
        """P(y > 0) = sigma(beta * d) [C]: that of the sign before levels, thresholds unknown."""
        return logistic(difference, beta)

    def level_probabilities(self, seen: Seen, beta: Beta) -> Array:
        """P(level) [C, L] in the order of `seen.levels.strengths`, corruption included."""
        levels = _levels(seen)
        above = [logistic(seen.difference - cut, beta) for cut in levels.cut_points]
        clean = -np.diff([np.ones(len(seen)), *above, np.zeros(len(seen))], axis=0).T
        return np.asarray(clean @ self.transition(levels))

    def transition(self, levels: Levels) -> Array:
        """P(said | meant) of two levels [L, L]: the identity, except for those who corrupt."""
        return np.eye(len(levels.strengths))

    def expected(self, seen: Seen, beta: Beta) -> Array:
        """P(a > b) [C]: that of positive levels plus half that of a tie."""
        return self._mean_of((np.sign(_levels(seen).strengths) + 1) / 2, seen, beta)

    def tie_probability(self, seen: Seen, beta: Beta) -> Array:
        """P(level 0) [C]."""
        return self._mean_of((_levels(seen).strengths == 0).astype(np.float64), seen, beta)

    def _mean_of(self, value: Array, seen: Seen, beta: Beta) -> Array:
        """Expectation [C] of a value [L] per level said, through P(y > cut point) only where it matters."""
        levels = _levels(seen)
        meant = self.transition(levels) @ value
        mean = np.full(len(seen), meant[0])
        for cut, step in zip(levels.cut_points, np.diff(meant), strict=True):
            if step:
                mean += step * logistic(seen.difference - cut, beta)
        return mean

    def label(self, seen: Seen, beta: Beta, chance: Streams) -> Labels:
        """The number of cut points t with y > t, that is u < sigma(beta (d - t)), then what is made of it."""
        levels, u = _levels(seen), chance("annotation").random(len(seen))
        index = np.zeros(len(seen), dtype=np.int64)
        for cut in levels.cut_points:
            index += u < logistic(seen.difference - cut, beta)
        strength = levels.strengths[self.said(index, levels, chance)]
        return Labels(((np.sign(strength) + 1) / 2).astype(np.float32), strength)

    def said(self, index: NDArray[np.int64], levels: Levels, chance: Streams) -> NDArray[np.int64]:
        """The classes [C] that are said where classes `index` [C] are meant: the same."""
        return index


def _levels(seen: Seen) -> Levels:
    assert seen.levels is not None, "the stage hands over the levels that find_levels gave"
    return seen.levels
