"""Cells that a run on a cluster has slots compute, and which of them are stored: by whom does not matter."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rmsweep import runner
from rmsweep.causes import Cause
from rmsweep.cell import PlannedCell
from rmsweep.runner import CellTask
from rmsweep.store import Store
from rmsweep.units import unit_of


class Todo:
    """The cells: those without a record, and recorded ones that are run again."""

    def __init__(self, store: Store, cells: Sequence[PlannedCell], keep: str = "none") -> None:
        self.store, self.cells, self.keep = store, {cell.fingerprint: cell for cell in cells}, keep
        self.again = dict[str, int]()  # recorded cells that are run again -> their last attempt
        self.stored: dict[str, str] = {}  # cells of this run that have a record -> status
        self.run_again(store.done(self.cells))

    @property
    def n_stored(self) -> int:
        """Cells that were stored since this run began, by whichever slot."""
        return len(self.stored)

    def run_again(self, keys: Collection[str]) -> None:
        """Take cells that have a record for undone."""
        attempts = self.store.attempts(keys) if keys else {}
        self.again |= {key: attempts.get(key, 0) for key in keys}
        for key in keys:
            self.stored.pop(key, None)

    def left(self) -> set[str]:
        """Cells without a record of this run. What was stored is looked at again only when nothing else is left."""
        waiting = self.cells.keys() - self.stored.keys()
        self.stored |= self._recorded(waiting)
        if len(self.stored) == len(self.cells) and waiting != self.cells.keys():
            kept = self.store.done_and_kept(self.cells, self.keep)  # whoever had a cell may not have kept its scores,
            self.stored = {k: v for k, v in self._recorded(self.cells).items() if k in kept}  # or a part was damaged
        return self.cells.keys() - self.stored.keys()

    def _recorded(self, keys: Collection[str]) -> dict[str, str]:
        """Which of these cells have a record of this run, and their status."""
        again = self.again.keys() & keys
        attempts = self.store.attempts(again) if again else {}
        old = {key for key in again if attempts.get(key, 0) <= self.again[key]}
        return {key: state.status for key, state in self.store.states(keys).items() if key not in old}

    def fail(self, key: str, cause: Cause, reason: str) -> None:
        """Record a cell that no slot could finish."""
        cell, attempts = self.cells[key], self.store.attempts([key])
        task = CellTask(cell.cell_id, key, cell.labels, cell.config, attempts.get(key, 0) + 1, cell.code)
        unit = unit_of([cell]).unit_id
        done = runner.unfinished(unit, task, "failed", cause, reason)
        self.store.publish_part(unit, [done.record], [done.cost])
