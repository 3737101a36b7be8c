"""Comparisons (unlabelled ordered pairs) and preferences (labelled ones)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rmsweep.bank import Ints, Split


@dataclass(frozen=True, eq=False)
class Comparisons:
    """C ordered pairs (a, b) of responses of one split: int64 arrays [C] of prompt and response indices."""

    prompt_a: Ints
    response_a: Ints
    prompt_b: Ints
    response_b: Ints

    def __len__(self) -> int:
        return len(self.prompt_a)

    def __repr__(self) -> str:
        return f"Comparisons({len(self)})"

    def rows_a(self, split: Split) -> Ints:
        """Flat bank rows of the a side, [C]."""
        return split.rows(self.prompt_a, self.response_a)

    def rows_b(self, split: Split) -> Ints:
        """Flat bank rows of the b side, [C]."""
        return split.rows(self.prompt_b, self.response_b)

    def golden_difference(self, split: Split) -> NDArray[np.float64]:
        """golden(a) - golden(b), float64 [C], in the bank's units."""
        return split.golden_of(self.rows_a(split)) - split.golden_of(self.rows_b(split))


@dataclass(frozen=True, eq=False)
class Preferences:
    """Labelled comparisons: `preference` [C] is the drawn label, p = P(a > b) in [0, 1] (1: a is chosen).

    `probability` [C] is the annotator's P(a > b) before the draw; `beta` the annotation quality that was used.
    """

    comparisons: Comparisons
    preference: NDArray[np.float32]
    probability: NDArray[np.float64]
    golden_difference: NDArray[np.float64]
    beta: float

    def __len__(self) -> int:
        return len(self.preference)

    def __repr__(self) -> str:
        return f"Preferences({len(self)} comparisons, beta={self.beta:g}, error rate {self.annotation_error_rate:.3f})"

    @property
    def annotation_error_rate(self) -> float:
        """Realised share of preferences against the golden order, over comparisons with different rewards."""
        untied = self.golden_difference != 0
        wrong = (self.preference > 0.5) != (self.golden_difference > 0)
        return float(np.mean(wrong[untied])) if untied.any() else float("nan")

    @property
    def golden_gap(self) -> float:
        """Mean |golden(a) - golden(b)| of the comparisons, in the bank's units."""
        return float(np.mean(np.abs(self.golden_difference)))
