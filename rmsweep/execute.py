"""The driver: plan -> tasks -> engine -> assembled tables.

It decides what is pending (the store says what is done), claims it, has it computed, and assembles the tables whatever
happened. It never loads torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rmsweep import results, runner, units
from rmsweep.cell import PlannedCell
from rmsweep.claims import Claims
from rmsweep.engines.local import Local
from rmsweep.errors import DataError
from rmsweep.fingerprint import file_sha256
from rmsweep.parts import again
from rmsweep.plan import Plan, sweep_folder
from rmsweep.progress import Progress
from rmsweep.runner import Job
from rmsweep.schedule import Limits, Schedule
from rmsweep.store import Store

WARM = "rmsweep.runner:warm"


@dataclass(frozen=True)
class Summary:
    """What a run leaves: rows of results.parquet by status, and what happened on the way.

    n_computed: cells computed by this run. n_missing: planned cells without a row. interrupted: the signal that
    stopped the run. notes: corrupt artefacts that were set aside, and anything else worth a warning.
    """

    name: str
    counts: dict[str, int]
    n_computed: int
    n_missing: int
    results: Path
    interrupted: int | None = None
    notes: tuple[str, ...] = ()


def run(
    plan: Plan,
    root: Path,
    engine: Local,
    *,
    progress: bool = True,
    retry: frozenset[str] = frozenset(),
    work: str = runner.PIPELINE,
) -> Summary:
    """Compute the cells of `plan` that have no record, and write the sweep's tables.

    retry: fingerprints of cells that are not done and are to be run again. A plan under a name that exists makes that
    sweep the union. Raises StoreError when the store cannot be written: before any work where that can be seen.
    """
    root = Path(root).resolve()
    folder = sweep_folder(root, plan.name)
    store = Store(root, heal=True)
    store.prepare()
    cells = [cell for cell in plan.cells if cell.reason is None]
    if not all(cell.fingerprint for cell in cells):
        raise DataError(plan.unknown or f"sweep {plan.name}: the data are not here, so nothing can be computed")
    with Claims(store.folder / "claims") as claims:  # first of all: who beats is alive
        notes = plan.write(folder)
        results.mark_last(root, plan.name)
        store.merge(cell.fingerprint for cell in cells)
        pending = _pending(cells, store, retry, plan.keep)
        bar = Progress(plan.name, len({cell.fingerprint for cell in pending}), folder, show=progress)
        todo = units.split(pending, max(1, engine.n_workers(len(pending))))
        job = Job(root, folder / "logs", plan.compute, plan.keep, _digests(plan.plugins), work)
        limits = Limits(engine.cell_seconds, engine.bank_seconds)
        schedule, stopped = Schedule(job, store, claims, todo, bar, limits), None
        if pending:
            with bar:
                stopped = engine.run(schedule, schedule.n_tasks, WARM if work == runner.PIPELINE else None)
        return _finished(root, plan, store, schedule, stopped, notes)


def _finished(
    root: Path, plan: Plan, store: Store, schedule: Schedule, stopped: int | None, notes: Sequence[str]
) -> Summary:
    """Assemble and write the tables of the whole sweep: this plan and what stood under its name."""
    folder = sweep_folder(root, plan.name)
    tables = results.current(folder, store) or assembled(folder, store)
    notes = [*notes, *schedule.notes, *store.corrupt]
    if tables.n_missing:
        notes.append(f"{tables.n_missing:,} cells of sweep {plan.name} have no result yet")
    if store.conflicts:
        notes.append(
            f"{len(store.conflicts)} cells have two different results, such as {min(store.conflicts)}: "
            "something is not deterministic"
        )
    for note in notes:
        print(f"rmsweep: {note}", file=sys.stderr)
    return Summary(
        plan.name, tables.counts, schedule.n_computed, tables.n_missing, tables.results, stopped, tuple(notes)
    )


def assembled(folder: Path, store: Store) -> results.Tables:
    """The tables of the plan in `folder`, made anew; many small parts are merged first."""
    cells = Plan.read(folder).cells
    store.merge(cell.fingerprint for cell in cells if cell.reason is None)
    sealed = again(lambda: results.seal(folder, store))
    return results.assemble(cells, store, folder, sealed)


def _pending(cells: Sequence[PlannedCell], store: Store, retry: frozenset[str], keep: str) -> list[PlannedCell]:
    """Cells without a record or without what `keep` asks for, and those to retry that are not done."""
    states = store.done_and_kept((cell.fingerprint for cell in cells), keep)
    again = {key for key in retry if states.get(key) not in (None, "done")}
    return [cell for cell in cells if cell.fingerprint not in states or cell.fingerprint in again]


def _digests(plugins: Iterable[str]) -> dict[str, str]:
    return {str(path): file_sha256(Path(path)) for path in plugins}
