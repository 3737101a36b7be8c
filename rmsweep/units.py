"""Pending cells -> units: cells that share a bank and run together in one worker.

Results never depend on the unit; its size only balances bookkeeping against what others can share.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rmsweep.cell import PlannedCell
from rmsweep.fingerprint import digest

MAX_CELLS = 60
UNITS_PER_WORKER = 4


class Unit(NamedTuple):
    """Cells of one bank in plan order; unit_id is the digest of their fingerprints."""

    unit_id: str
    bank_id: str
    cells: tuple[PlannedCell, ...]


def unit_of(cells: Sequence[PlannedCell]) -> Unit:
    """The unit of cells that share a bank."""
    return Unit(digest([cell.fingerprint for cell in cells]), cells[0].bank_id, tuple(cells))


def split(cells: Iterable[PlannedCell], n_workers: int) -> list[Unit]:
    """Units of at most MAX_CELLS cells, at least UNITS_PER_WORKER for each worker where the cells suffice.

    Banks come in the order of their first cell. Cells with the same fingerprint are computed once.
    """
    unique: dict[str, PlannedCell] = {}
    for cell in cells:
        unique.setdefault(cell.fingerprint, cell)
    banks: dict[str, list[PlannedCell]] = {}
    for cell in unique.values():
        banks.setdefault(cell.bank_id, []).append(cell)
    size = max(1, min(MAX_CELLS, len(unique) // (UNITS_PER_WORKER * max(1, n_workers))))
    return [unit_of(part) for bank in banks.values() for part in _even(bank, size)]


def _even(cells: list[PlannedCell], size: int) -> Iterable[list[PlannedCell]]:
    """Parts of nearly equal length, none longer than `size`."""
    n_parts = math.ceil(len(cells) / size)
    bounds = [len(cells) * i // n_parts for i in range(n_parts + 1)]
    return [cells[a:b] for a, b in itertools.pairwise(bounds)]
