"""The driver: plan -> jobs -> engine -> tables. It never computes a cell itself."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from rmsweep import errors, results
from rmsweep.cell import PlannedCell
from rmsweep.engines.local import Local
from rmsweep.errors import RmsweepError, StoreError
from rmsweep.plan import Plan
from rmsweep.runner import PIPELINE, PUBLISH_SECONDS, Job, Report, Settings, cost_table, failed_row, record_table
from rmsweep.store import Store
from rmsweep.units import Unit, make_units

MAX_DEATHS = 2


class Summary(NamedTuple):
    """What a run gave: cells of the sweep per status, cells computed now, results.parquet, the signal that ended it."""

    counts: dict[str, int]
    n_computed: int
    results: Path
    interrupted: int | None = None


def run(
    plan: Plan,
    root: Path,
    engine: Local,
    *,
    progress: bool = True,
    retry: frozenset[str] = frozenset(),
    pipeline: str = PIPELINE,
    publish_seconds: float = PUBLISH_SECONDS,
) -> Summary:
    """Run the cells of `plan` that have no result yet (and those of `retry`), then write the sweep's tables.

    Raises StoreError when the store cannot be written, DataError when a bank cannot be built.
    """
    store, folder = Store(root), results.sweep_folder(root, plan.name)
    store.check_writable()
    logs = results.make_sweep_folder(root, plan.name)
    plan.write(folder)
    settings = Settings(root, logs, plan.compute, plan.keep, plan.plugins, pipeline, publish_seconds)
    pending = pending_cells(plan, store, retry)
    units = make_units(pending, engine.n_workers(len(pending)))
    attempts = results.attempts(store, retry)
    drive = _Drive(store, settings, attempts)
    with _signals() as caught, _bar(progress, len(pending), len(plan.cells)) as bar:
        for report in engine.run(drive.jobs(units), settings, lambda: caught.signal is not None, drive.on_death):
            drive.take(report, bar)
    counts = results.assemble(Plan.read(folder), store, folder)
    results.mark_last(root, plan.name)
    return Summary(counts, drive.n_computed, folder / "results.parquet", caught.signal)


def pending_cells(plan: Plan, store: Store, retry: frozenset[str] = frozenset()) -> list[PlannedCell]:
    """The plan's runnable cells that the store does not hold, and those to run again."""
    runnable = [cell for cell in plan.cells if cell.reason is None]
    known = store.done(cell.fingerprint for cell in runnable)
    return [cell for cell in runnable if cell.fingerprint not in known or cell.fingerprint in retry]


@dataclass
class _Drive:
    """Turns units into jobs and reports into progress; decides how a dead worker's job goes on."""

    store: Store
    settings: Settings
    attempts: Mapping[str, int]
    n_computed: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)

    def jobs(self, units: list[Unit]) -> list[Job]:
        """A job per bank that is not there yet, then one per unit."""
        first = {unit.bank_id: unit.cells[:1] for unit in units if not self.store.has_bank(unit.bank_id)}
        banks = [Job(f"bank-{bank}", "bank", bank, cells) for bank, cells in first.items()]
        after = {job.bank_id: job.job_id for job in banks}
        work = [
            Job(
                unit.unit_id, "unit", unit.bank_id, unit.cells, after.get(unit.bank_id),
                {c.fingerprint: self.attempts[c.fingerprint] for c in unit.cells if c.fingerprint in self.attempts},
            )
            for unit in units
        ]  # fmt: skip
        return [*banks, *work]

    def take(self, report: Report, bar: Any) -> None:
        """Count a report; an error of the store or the data ends the run."""
        if report.what == "finished":
            self.n_computed += 1
            if report.text != "done":
                self.bad[report.text] += 1
                bar.set_postfix(dict(self.bad), refresh=False)
            bar.update()
        elif report.what == "error":
            name, text = json.loads(report.text)
            raise getattr(errors, name, RmsweepError)(text)

    def on_death(self, job: Job, in_flight: str, number: int) -> Job | None:
        """The rest of a dead worker's job; a cell that was in flight at two deaths is recorded as failed."""
        key = in_flight or job.job_id
        self.deaths[key] += 1
        if self.deaths[key] >= MAX_DEATHS:
            reason = f"its worker was killed {MAX_DEATHS} times ({_cause(number)})"
            if not in_flight:
                raise StoreError(f"job {job.job_id}: {reason}; see its log in {self.settings.logs}")
            cell = next(c for c in job.cells if c.fingerprint == in_flight)
            cost = {"cell_id": cell.cell_id, "fingerprint": in_flight, "unit": job.job_id, "attempt": MAX_DEATHS}
            self.store.publish_part(job.job_id, record_table([failed_row(cell, reason)]), cost_table([cost]))
        if job.kind == "bank":
            return job
        stored = self.store.done(c.fingerprint for c in job.cells)
        rest = tuple(c for c in job.cells if c.fingerprint not in stored)
        return job._replace(cells=rest, after=None) if rest else None


def _cause(number: int) -> str:
    """What killed a worker, from its exit code (negative: a signal)."""
    if number == signal.SIGKILL:
        return "signal 9, as the kernel does when memory runs out"
    return signal.Signals(number).name if number > 0 else f"exit code {-number}"


@dataclass
class _Caught:
    signal: int | None = None


@contextmanager
def _signals() -> Iterator[_Caught]:
    """Note the first Ctrl-C or SIGTERM; a second one ends the process at once."""
    caught, before = _Caught(), dict[int, Any]()

    def handler(number: int, _: object) -> None:
        if caught.signal is not None:
            os._exit(128 + number)
        caught.signal = number
        print("\nrmsweep: stopping; finished cells are being published", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            before[number] = signal.signal(number, handler)
        except ValueError:  # not the main thread of a notebook server: its own handling stays
            break
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _bar(progress: bool, pending: int, cells: int) -> tqdm[Any]:
    """Progress over the cells to compute; a line every half minute where nobody watches."""
    watched = sys.stderr.isatty()
    return tqdm(
        total=pending,
        desc=f"{pending} of {cells} cells",
        unit="cell",
        disable=not progress or not pending,
        mininterval=0.2 if watched else 30,
        smoothing=0.05,
        dynamic_ncols=watched,
    )
