"""Cells -> plan: which cells a sweep has, their identities, and why some are skipped."""

from __future__ import annotations

from dataclasses import dataclass

from rmsweep.cell import PlannedCell
from rmsweep.reward_models import Compute


@dataclass(frozen=True)
class Plan:
    """A sweep, resolved: its name, every cell in grid order, and what was resolved once for all of them."""

    name: str
    cells: list[PlannedCell]
    compute: Compute
    keep: str = "none"
    plugins: tuple[str, ...] = ()
