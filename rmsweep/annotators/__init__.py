"""Annotators: simulated labellers, P(a is preferred over b) as a function of the scaled golden difference."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Annotator(Protocol):
    """Pure, no chance of its own: the stage draws u < P(a > b) from the stream "annotation"."""

    def probability(self, difference: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
        """P(a > b) [C] from (golden(a) - golden(b)) / reward scale [C] and annotation quality beta in [0, inf]."""
        ...
