"""Pending cells -> units: cells that share a bank and run together, in the plan's order."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rmsweep.cell import PlannedCell
from rmsweep.fingerprint import digest

MAX_CELLS = 60
UNITS_PER_WORKER = 4


@dataclass(frozen=True)
class Unit:
    """Cells of one bank; `unit_id` is a digest of their fingerprints."""

    unit_id: str
    bank_id: str
    cells: tuple[PlannedCell, ...]

    @staticmethod
    def of(bank_id: str, cells: Iterable[PlannedCell]) -> Unit:
        """The unit of these cells."""
        cells = tuple(cells)
        return Unit(digest([c.fingerprint for c in cells])[:16], bank_id, cells)


def make_units(pending: Iterable[PlannedCell], workers: int) -> list[Unit]:
    """Units of at most MAX_CELLS cells, small enough that every worker gets several. Numbers never depend on them."""
    banks: dict[str, dict[str, PlannedCell]] = {}
    for cell in pending:
        banks.setdefault(cell.bank_id, {}).setdefault(cell.fingerprint, cell)
    total = sum(len(cells) for cells in banks.values())
    size = max(1, min(MAX_CELLS, math.ceil(total / max(1, workers * UNITS_PER_WORKER))))
    units = []
    for bank_id, cells in banks.items():
        values = list(cells.values())
        units += [Unit.of(bank_id, values[i : i + size]) for i in range(0, len(values), size)]
    return units
