"""Units: every pending cell once, banks apart, small enough that all workers have work."""

import pytest

from rmsweep.cell import PlannedCell
from rmsweep.fingerprint import digest
from rmsweep.units import MAX_CELLS, UNITS_PER_WORKER, split


def cells(n, n_banks=1):
    return [PlannedCell(digest(i), digest(["f", i]), digest(i % n_banks), {}, {}) for i in range(n)]


@pytest.mark.parametrize("n", [0, 1, 7, 8, 54, 61, 1000])
@pytest.mark.parametrize("workers", [1, 2, 16])
@pytest.mark.parametrize("n_banks", [1, 3])
def test_units(n, workers, n_banks):
    """Catches lost or doubled cells, mixed banks, order, units too large or too few."""
    planned = cells(n, n_banks)
    units = split(planned, workers)
    assert sorted(c.cell_id for u in units for c in u.cells) == sorted(c.cell_id for c in planned)
    assert all({c.bank_id for c in u.cells} == {u.bank_id} and len(u.cells) <= MAX_CELLS for u in units)
    assert len({u.unit_id for u in units}) == len(units) >= min(n, workers * UNITS_PER_WORKER)
    for bank in {c.bank_id for c in planned}:
        assert [c for u in units if u.bank_id == bank for c in u.cells] == [c for c in planned if c.bank_id == bank]


def test_banks_in_order_of_their_first_cell():
    """The first bank must be the first to be built."""
    planned = cells(9, 3)
    seen = dict.fromkeys(u.bank_id for u in split(planned, 1))
    assert list(seen) == list(dict.fromkeys(c.bank_id for c in planned))


def test_equal_cells_are_computed_once():
    """Two rows of one identity (two spellings of one option) are one computation."""
    (cell,) = cells(1)
    assert [len(u.cells) for u in split([cell, cell._replace(labels={"x": 1})], 2)] == [1]
