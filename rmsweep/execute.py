"""The driver: plan -> tasks -> engine -> assembled tables.

It decides what is pending (the store says what is done), builds every bank once before the units that need it, gives
the cells of a dead worker another try, records what cannot be computed, and assembles the tables whatever happened.
It never loads torch.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import platform
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmsweep import atomic, results, runner, units
from rmsweep.cell import PlannedCell
from rmsweep.engines.local import Event, Local, Task
from rmsweep.errors import ConfigError, DataError, StoreError
from rmsweep.fingerprint import file_sha256
from rmsweep.parts import again
from rmsweep.plan import Plan, sweep_folder
from rmsweep.runner import BankTask, CellTask, Job, Reply, UnitTask
from rmsweep.store import Store
from rmsweep.units import Unit

MAX_DEATHS = 2  # of workers, with one and the same cell in flight
MAX_IDLE_DEATHS = 5  # of workers, with the same unit or bank but no cell in flight
MAX_BANK_BUILDS = 3
MAX_SAME_TRACEBACK = 20  # without a single cell done: the fault is not the cells'
STATUS_FILE = "running.json"
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
    plan.write(folder)
    results.mark_last(root, plan.name)
    store.merge(cell.fingerprint for cell in cells)
    pending = _pending(cells, store, retry, plan.keep)
    job = Job(root, folder / "logs", plan.compute, plan.keep, _digests(plan.plugins), work)
    bar = Progress(plan.name, len({cell.fingerprint for cell in pending}), folder, show=progress)
    schedule = Schedule(job, store, units.split(pending, max(1, engine.n_workers(len(pending)))), bar)
    stopped = None
    if pending:
        with bar:
            stopped = engine.run(schedule, schedule.n_tasks, WARM if work == runner.PIPELINE else None)
    return _finish(root, plan, store, schedule, stopped)


def _finish(root: Path, plan: Plan, store: Store, schedule: Schedule, stopped: int | None) -> Summary:
    """Assemble and write the tables of the whole sweep: this plan and what stood under its name."""
    folder = sweep_folder(root, plan.name)
    tables = results.current(folder, store) or assembled(folder, store)
    notes = [*schedule.notes, *store.corrupt]
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
    tables = results.assemble(cells, store, folder)
    results.write_seal(folder, tables, sealed)
    return tables


def _pending(cells: Sequence[PlannedCell], store: Store, retry: frozenset[str], keep: str) -> list[PlannedCell]:
    """Cells without a record or without what `keep` asks for, and those to retry that are not done."""
    states = store.done_and_kept((cell.fingerprint for cell in cells), keep)
    again = {key for key in retry if states.get(key) not in (None, "done")}
    return [cell for cell in cells if cell.fingerprint not in states or cell.fingerprint in again]


def _digests(plugins: Iterable[str]) -> dict[str, str]:
    return {str(path): file_sha256(Path(path)) for path in plugins}


class Schedule:
    """The source of an engine's tasks: every bank before its units, in plan order; and what becomes of events."""

    def __init__(self, job: Job, store: Store, todo: Sequence[Unit], bar: Progress) -> None:
        self.job, self.store, self.bar = job, store, bar
        self.notes: list[str] = []
        self.n_computed = 0
        self.n_tasks = len(todo) + len({unit.bank_id for unit in todo})
        self._ready: list[tuple[int, int, Unit | str]] = []  # heap of (order, tie, unit or bank to build)
        self._waiting: dict[str, list[Unit]] = {}  # bank -> units that wait for it
        self._running: dict[str, Unit | str] = {}
        self._order: dict[str, int] = {}  # bank -> place
        self._builds: Counter[str] = Counter()
        self._in_flight: dict[str, str] = {}  # task -> fingerprint
        self._reported: dict[str, dict[str, str]] = {}  # task -> fingerprint -> status
        self._deaths: Counter[str] = Counter()
        self._same: Counter[str] = Counter()
        keys = [cell.fingerprint for unit in todo for cell in unit.cells]
        self._attempts, self._retried = self._earlier_attempts(keys), set(store.done(keys))
        self._n, self._given_up = 0, False
        for unit in todo:
            self._submit(unit)

    # -- tasks out -----------------------------------------------------------------------------------------

    def next(self) -> Task | None:
        """The next bank to build or unit to run."""
        if not self._ready or self._given_up:
            return None
        item = heapq.heappop(self._ready)[2]
        task = self._bank_task(item) if isinstance(item, str) else self._unit_task(item)
        self._running[task.id] = item
        return task

    def _submit(self, unit: Unit) -> None:
        """Queue a unit, behind its bank where that is not published."""
        place = self._order.setdefault(unit.bank_id, len(self._order))
        if unit.bank_id in self._waiting:
            self._waiting[unit.bank_id].append(unit)
        elif self.store.has_bank(unit.bank_id):
            self._push(place, unit)
        else:
            self._build(unit.bank_id, [unit])

    def _build(self, bank_id: str, waiting: list[Unit]) -> None:
        self._waiting[bank_id] = waiting
        self._builds[bank_id] += 1
        if self._builds[bank_id] > MAX_BANK_BUILDS:
            raise StoreError(
                f"bank {bank_id} was damaged {MAX_BANK_BUILDS} times after it was built; is the disk sound?"
            )
        self.bar.banks(+1)
        self._push(self._order[bank_id], bank_id)

    def _push(self, place: int, item: Unit | str) -> None:
        self._n += 1
        heapq.heappush(self._ready, (place, self._n, item))

    def _bank_task(self, bank_id: str) -> Task:
        config = self._waiting[bank_id][0].cells[0].config
        return Task(f"bank-{bank_id}", "rmsweep.runner:build_bank", BankTask(self.job, bank_id, config))

    def _unit_task(self, unit: Unit) -> Task:
        cells = tuple(self._cell_task(cell) for cell in unit.cells)
        return Task(unit.unit_id, "rmsweep.runner:run_unit", UnitTask(self.job, unit.unit_id, unit.bank_id, cells))

    def _cell_task(self, cell: PlannedCell) -> CellTask:
        attempt = self._attempts[cell.fingerprint] + 1
        return CellTask(cell.cell_id, cell.fingerprint, cell.labels, cell.config, attempt)

    def _earlier_attempts(self, fingerprints: Sequence[str]) -> Counter[str]:
        return Counter(self.store.attempts(fingerprints))

    # -- events in -----------------------------------------------------------------------------------------

    def handle(self, event: Event) -> None:
        """Take note of what a worker reports."""
        if event.kind == "message":
            self._message(event.task_id, *event.data)
            return
        item = self._running.pop(event.task_id)
        if event.kind == "finished":
            self._finished(event.task_id, item, event.data)
        elif event.kind == "raised":
            name, text, trace = event.data
            self._raised(item, name, text, trace)
        else:
            self._died(event.task_id, item, _how_it_died(event.data))
        self._in_flight.pop(event.task_id, None)
        self._reported.pop(event.task_id, None)

    def _message(self, task_id: str, kind: str, fingerprint: str, *rest: Any) -> None:
        if kind == "start":
            self._in_flight[task_id] = fingerprint
            return
        status, trace = rest
        self._in_flight.pop(task_id, None)
        self._reported.setdefault(task_id, {})[fingerprint] = status
        self.n_computed += 1
        self.bar.cell(status)
        if trace is not None:
            self._count_traceback(trace)

    def _count_traceback(self, trace: str) -> None:
        """Begin nothing new when everything fails the same way: the user would rather know now."""
        self._same[trace] += 1
        if self._same[trace] == MAX_SAME_TRACEBACK and not self.bar.counts["done"]:
            self._given_up = True
            self.notes.append(
                f"stopped early: the first {self._same[trace]} cells failed alike and none is done; "
                f"logs are in {self.job.logs}\n{trace}"
            )

    def _finished(self, task_id: str, item: Unit | str, reply: Reply) -> None:
        self.notes += reply.notes
        if reply.end == "fatal":
            raise StoreError(reply.error or "the store cannot be written")
        if reply.end == "refused":
            raise ConfigError(reply.error)
        if isinstance(item, str):
            for unit in self._built(item):
                self._push(self._order[item], unit)
        elif reply.end == "no_bank":
            self._rebuild(item)

    def _rebuild(self, unit: Unit) -> None:
        """The unit found its bank absent or corrupt."""
        if unit.bank_id in self._waiting:
            self._waiting[unit.bank_id].append(unit)
        else:
            self._build(unit.bank_id, [unit])

    def _built(self, bank_id: str) -> list[Unit]:
        """The units that waited for a bank; it is no longer to be built."""
        self.bar.banks(-1)
        return self._waiting.pop(bank_id)

    def _raised(self, item: Unit | str, name: str, text: str, trace: str) -> None:
        """A bank that cannot be built, or a defect of ours: its cells fail with that reason."""
        if isinstance(item, str):
            cells = [cell for unit in self._built(item) for cell in unit.cells]
            self._fail(self._not_stored(cells), f"bank: {name}: {text}", trace)
        else:
            self._fail(self._not_stored(item.cells), f"{name}: {text}", trace)

    def _died(self, task_id: str, item: Unit | str, how: str) -> None:
        """Try again what is not stored; a cell in flight goes on alone, so that it takes nobody along."""
        if isinstance(item, str):
            self._bank_died(task_id, item, how)
            return
        left, suspect = self._not_stored(item.cells), self._in_flight.get(task_id)
        self._forget(task_id, left)
        alone = [cell for cell in left if cell.fingerprint == suspect]
        rest = [cell for cell in left if cell.fingerprint != suspect]
        for cell in alone:
            self._attempts[cell.fingerprint] += 1
        key, limit = (alone[0].fingerprint, MAX_DEATHS) if alone else (task_id, MAX_IDLE_DEATHS)
        if self._is_hopeless(key, limit):
            times = "twice" if alone else f"{limit} times before a cell began"
            self._fail(alone or rest, f"worker {how} {times}{_guess(how)}", None)
            alone, rest = [], rest if alone else []
        for cells in (rest, alone):
            if cells:
                self._submit(units.unit_of(cells))

    def _bank_died(self, task_id: str, bank_id: str, how: str) -> None:
        if not self._is_hopeless(task_id, MAX_IDLE_DEATHS):
            self._push(self._order[bank_id], bank_id)
            return
        cells = [cell for unit in self._built(bank_id) for cell in unit.cells]
        self._fail(self._not_stored(cells), f"bank: worker {how} {MAX_IDLE_DEATHS} times{_guess(how)}", None)

    def _is_hopeless(self, key: str, limit: int) -> bool:
        """Count one more death; whether there were too many."""
        self._deaths[key] += 1
        return self._deaths[key] >= limit

    def _not_stored(self, cells: Iterable[PlannedCell]) -> list[PlannedCell]:
        """Cells without a record of this run."""
        cells = list(cells)
        keys = [cell.fingerprint for cell in cells]
        records, attempts = self.store.done(keys), self.store.attempts(keys)
        stale = {k for k in self._retried if attempts.get(k, 0) <= self._attempts[k]}
        return [cell for cell in cells if cell.fingerprint not in records or cell.fingerprint in stale]

    def _forget(self, task_id: str, left: Iterable[PlannedCell]) -> None:
        """Cells that were reported and died with their worker before they were published."""
        reported = self._reported.get(task_id, {})
        for cell in left:
            if cell.fingerprint in reported:
                self.bar.cell(reported[cell.fingerprint], -1)

    def _fail(self, cells: Sequence[PlannedCell], reason: str, trace: str | None) -> None:
        """Record cells that could not be computed."""
        if not cells:
            return
        unit = units.unit_of(cells)
        done = [runner.unfinished(unit.unit_id, self._cell_task(cell), "failed", reason, trace) for cell in cells]
        self.store.publish_part(unit.unit_id, [d.record for d in done], [d.cost for d in done])
        for _ in cells:
            self.bar.cell("failed")


def _how_it_died(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    return f"killed by signal {-code}"


def _guess(how: str) -> str:
    return " (out of memory?)" if how.endswith(f" {int(signal.SIGKILL)}") else ""


class Progress:
    """Cells done, failed, left and banks being built: a bar on a terminal, few plain lines elsewhere.

    Also keeps running.json in the sweep's folder for `rmsweep status`.
    """

    def __init__(self, name: str, total: int, folder: Path, *, show: bool) -> None:
        self.counts: Counter[str] = Counter()
        self._name, self._total, self._file, self._show = name, total, folder / STATUS_FILE, show
        self._n_banks = 0
        self._bar: Any = None
        self._start = self._last_line = self._last_file = time.monotonic()
        self._last_n = 0

    def __enter__(self) -> Progress:
        if self._show and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, desc=self._name, unit="cell", dynamic_ncols=True, smoothing=0.05)
        self._save()
        self._refresh(force=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._refresh(force=True)
        if self._bar is not None:
            self._bar.close()
        with contextlib.suppress(OSError):
            os.unlink(self._file)

    def banks(self, change: int) -> None:
        """Banks that wait or are being built: one more, one less."""
        self._n_banks += change
        self._refresh()

    def cell(self, status: str, change: int = 1) -> None:
        """A cell ended with `status`; change = -1 takes that back."""
        self.counts[status] += change
        if self._bar is not None:
            self._bar.update(change)
        self._refresh()

    @property
    def _n(self) -> int:
        return sum(self.counts.values())

    def _refresh(self, force: bool = False) -> None:
        now = time.monotonic()
        if now - self._last_file > 5:
            self._last_file = now
            self._save()
        text = ", ".join(f"{n} {status}" for status, n in self.counts.items() if n)
        if self._n_banks:
            text = ", ".join(filter(None, [text, f"{self._n_banks} bank{'s' * (self._n_banks > 1)} to build"]))
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif self._show and (force or (now - self._last_line > 10 and self._n - self._last_n >= self._total / 20)):
            self._last_line, self._last_n = now, self._n
            eta = self.seconds_left()
            left = "" if eta is None or not eta else f", about {eta:.0f} s left"
            print(f"{self._name}: {self._n} of {self._total} cells ({text or 'starting'}){left}", file=sys.stderr)

    def seconds_left(self) -> float | None:
        """Seconds to go at the mean speed so far; None before the first cell."""
        elapsed = time.monotonic() - self._start
        return elapsed * (self._total - self._n) / self._n if self._n else None

    def _save(self) -> None:
        state = {
            "host": platform.node(),
            "pid": os.getpid(),
            "total": self._total,
            "computed": self._n,
            "eta_seconds": self.seconds_left(),
        }
        with contextlib.suppress(StoreError):  # a convenience; a full disk shows where it matters
            atomic.replace(self._file, json.dumps(state).encode())
