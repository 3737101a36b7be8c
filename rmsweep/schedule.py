"""Pending units -> tasks, and what becomes of them: who is retried, together, alone or at the end, and who fails.

Every bank comes before its units. A unit is claimed before it runs, so that another run of the same cells takes
others; what is in other hands is looked at again until it is done there or its owner is dead. When a worker dies the
cell in flight goes on alone, so that it takes nobody along. What ran out of memory is tried once more at the end, with
nothing beside it.
"""

from __future__ import annotations

import heapq
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from rmsweep import causes, memory, runner, units
from rmsweep.causes import Cause
from rmsweep.cell import PlannedCell
from rmsweep.claims import Claims
from rmsweep.engines import Death, Event, Task
from rmsweep.errors import ConfigError, StoreError
from rmsweep.fingerprint import joined
from rmsweep.progress import Progress
from rmsweep.runner import BankTask, CellTask, Job, Reply, UnitTask
from rmsweep.store import Store
from rmsweep.units import Unit

MAX_DEATHS: dict[Cause, int] = {"oom": 2, "timeout": 2, "bug": 2, "preempted": 5}  # with the same cell in flight
MAX_IDLE_DEATHS: dict[Cause, int] = {**MAX_DEATHS, "bug": 5}  # with the same bank, or unit before a cell began
MAX_BANK_BUILDS = 3
MAX_SAME_FAILURES = 20  # without a single cell done: the fault is not the cells'
HELD_POLL = 2.0  # seconds
BANK = "bank: "  # so begins the reason of cells whose bank could not be built


class Limits(NamedTuple):
    """Seconds that one cell and one bank may take; None for ever."""

    cell: float | None = None
    bank: float | None = None


class Schedule:
    """The source of an engine's tasks: every bank before its units, in plan order; and what becomes of events.

    patience: seconds that it waits for units that another run holds when nothing else is left; None: for ever. told:
    hears the fingerprints of the cells in flight whenever they change.
    """

    def __init__(
        self,
        job: Job,
        store: Store,
        claims: Claims,
        todo: Sequence[Unit],
        bar: Progress,
        limits: Limits = Limits(),  # noqa: B008
        patience: float | None = None,
        told: Callable[[Collection[str]], object] = lambda cells: None,
    ) -> None:
        self._patience, self._told, self._busy = patience, told, time.monotonic()
        self.job, self.store, self.claims, self.bar, self.limits = job, store, claims, bar, limits
        self.notes: list[str] = []
        self.n_computed = 0
        self.n_tasks = len(todo) + len({unit.bank_id for unit in todo})
        self._ready: list[tuple[int, int, Unit | str]] = []  # heap of (order, tie, unit or bank to build)
        self._held: list[Unit | str] = []  # in the hands of another run
        self._last: list[PlannedCell] = []  # to be run alone, at the end
        self._had_all: set[str] = set()  # fingerprints of cells that have run alone
        self._waiting: dict[str, list[Unit]] = {}  # bank -> units that wait for it
        self._running: dict[str, Unit | str] = {}
        self._order: dict[str, int] = {}  # bank -> place
        self._builds: Counter[str] = Counter()
        self._in_flight: dict[str, str] = {}  # task -> fingerprint
        self._reported: dict[str, dict[str, str]] = {}  # task -> fingerprint -> status
        self._short: dict[str, set[str]] = {}  # task -> fingerprints of cells that ran out of memory
        self._deaths: Counter[str] = Counter()
        self._together: Counter[str] = Counter()  # fingerprint -> deaths of workers that had it in their unit
        self._same: Counter[str] = Counter()
        self._todo = [cell for unit in todo for cell in unit.cells]
        keys = _keys(self._todo)
        self._attempts, self._retried = Counter(store.attempts(keys)), set(store.done(keys))
        self._n, self.given_up = 0, False
        self._looked, self._n_kills = time.monotonic(), memory.n_kills()
        for unit in todo:
            self._submit(unit)

    def n_left(self) -> int:
        """How many cells have not been computed, by this run or another one."""
        return len(self._not_stored(self._todo))

    # -- tasks out -----------------------------------------------------------------------------------------

    def next(self) -> Task | None:
        """The next bank to build or unit to run."""
        if self.given_up:
            return None
        self._look_again()
        while self._ready:
            if (task := self._claimed(heapq.heappop(self._ready)[2])) is not None:
                self._busy = time.monotonic()
                return task
        while self._last and not self._running:
            cell = self._last.pop(0)
            self._had_all.add(cell.fingerprint)
            if (task := self._claimed(units.unit_of([cell]))) is not None:
                return task
        return None

    def waiting(self) -> bool:
        """Whether another run holds what this one wants."""
        patient = self._patience is None or time.monotonic() - self._busy < self._patience
        patient = patient or any(isinstance(item, str) for item in self._held)  # work comes with the bank
        return bool((self._held and patient) or self._last) and not self.given_up

    def _look_again(self) -> None:
        """Now and then, see what has become of what another run holds."""
        if self._held and time.monotonic() - self._looked > HELD_POLL:
            self._looked, held = time.monotonic(), self._held
            self._held = []
            for item in held:
                self._push(self._place(item), item)

    def _claimed(self, item: Unit | str) -> Task | None:
        """The task of a bank or unit, as far as it is ours and not done meanwhile; None where nothing is left."""
        left = self._claimed_bank(item) if isinstance(item, str) else self._claimed_unit(item)
        waiting = [self._waiting[held] if isinstance(held, str) else [held] for held in self._held]
        self.bar.elsewhere(sum(len(unit.cells) for some in waiting for unit in some))
        if left is None:
            return None
        task = self._bank_task(left) if isinstance(left, str) else self._unit_task(left)
        self._running[task.id] = left
        return task

    def _claimed_bank(self, bank_id: str) -> str | None:
        mine = self.claims.take([_bank_key(bank_id)])
        if self.store.has_bank(bank_id):  # looked at after claiming: who had the claim before has published
            self.claims.release(mine)
            self._bank_is_there(bank_id)
            return None
        if not mine:
            self._held.append(bank_id)
            return None
        return bank_id

    def _claimed_unit(self, unit: Unit) -> Unit | None:
        mine = self.claims.take(_keys(unit.cells))
        ours = [cell for cell in unit.cells if cell.fingerprint in mine]
        left = self._not_stored(ours)  # looked at after claiming: who had a claim before has published
        elsewhere = mine.difference(_keys(left))
        self.claims.release(elsewhere)
        for status in self.store.done(elsewhere).values():
            self.bar.cell(status)
        if held := [cell for cell in unit.cells if cell.fingerprint not in mine]:
            self._held.append(units.unit_of(held))
        return units.unit_of(left) if left else None

    def _submit(self, unit: Unit) -> None:
        """Queue a unit, behind its bank where that is not published."""
        place = self._place(unit)
        if unit.bank_id in self._waiting:
            self._waiting[unit.bank_id].append(unit)
        elif self.store.has_bank(unit.bank_id):
            self._push(place, unit)
        else:
            self._build(unit.bank_id, [unit])

    def _place(self, item: Unit | str) -> int:
        bank_id = item if isinstance(item, str) else item.bank_id
        return self._order.setdefault(bank_id, len(self._order))

    def _build(self, bank_id: str, waiting: list[Unit]) -> None:
        self._waiting[bank_id] = waiting
        self._builds[bank_id] += 1
        if self._builds[bank_id] > MAX_BANK_BUILDS:
            raise StoreError(
                f"bank {bank_id} was damaged {MAX_BANK_BUILDS} times after it was built; is the disk sound?"
            )
        self.bar.banks(+1)
        self._push(self._place(bank_id), bank_id)

    def _push(self, place: int, item: Unit | str) -> None:
        self._n += 1
        heapq.heappush(self._ready, (place, self._n, item))

    def _bank_task(self, bank_id: str) -> Task:
        cell = self._waiting[bank_id][0].cells[0]
        inputs = json.loads(cell.identity["bank"])["inputs"] if cell.identity else {}
        payload = BankTask(self.job, bank_id, cell.config, inputs, cell.code)
        return Task(f"bank-{bank_id}", "rmsweep.runner:build_bank", payload, self.limits.bank)

    def _unit_task(self, unit: Unit) -> Task:
        cells = tuple(self._cell_task(cell) for cell in unit.cells)
        alone = self._had_all.issuperset(_keys(unit.cells))
        payload = UnitTask(self.job, unit.unit_id, unit.bank_id, cells, alone)
        return Task(unit.unit_id, "rmsweep.runner:run_unit", payload, self.limits.cell, alone)

    def _cell_task(self, cell: PlannedCell) -> CellTask:
        attempt = self._attempts[cell.fingerprint] + 1
        identity = None if cell.identity is None else joined(cell.identity)
        return CellTask(cell.cell_id, cell.fingerprint, cell.labels, cell.config, attempt, cell.code, identity)

    # -- events in -----------------------------------------------------------------------------------------

    def handle(self, event: Event) -> None:
        """Take note of what a worker reports."""
        if event.kind == "message":
            self._message(event.task_id, *event.data)
            return
        item, self._busy = self._running.pop(event.task_id), time.monotonic()
        if event.kind != "finished" and not isinstance(item, str):  # before others may claim what it had finished
            self.store.recover(lambda owner, unit: (owner, unit) == (self.claims.owner, event.task_id))
        self.claims.release([_bank_key(item)] if isinstance(item, str) else _keys(item.cells))
        if event.kind == "finished":
            self._finished(event.task_id, item, event.data)
        elif event.kind == "raised":
            self._raised(item, *event.data)
        else:
            self._died(event.task_id, item, event.data)
        for of_task in (self._in_flight, self._reported, self._short):
            of_task.pop(event.task_id, None)
        self._told(self._in_flight.values())

    def _message(self, task_id: str, kind: str, fingerprint: str, *rest: Any) -> None:
        if kind == "start":
            self._in_flight[task_id] = fingerprint
            self._told(self._in_flight.values())
            return
        status, cause, trace = rest
        self._in_flight.pop(task_id, None)
        self._told(self._in_flight.values())
        self.n_computed += 1
        if cause == "oom" and fingerprint not in self._had_all:
            self._short.setdefault(task_id, set()).add(fingerprint)
            return
        self._reported.setdefault(task_id, {})[fingerprint] = status
        self.bar.cell(status)
        if trace is not None:
            self._count_failure(trace)

    def _count_failure(self, what: str) -> None:
        """Begin nothing new when everything fails the same way: the user would rather know now. what: its traceback."""
        key = _alike(what)
        self._same[key] += 1
        if self._same[key] == MAX_SAME_FAILURES and not self.bar.counts["done"]:
            self.given_up = True
            self.notes.append(
                f"stopped early: the first {self._same[key]} cells failed alike and none is done; "
                f"logs are in {self.job.logs}\n{what}"
            )

    def _finished(self, task_id: str, item: Unit | str, reply: Reply) -> None:
        self.notes += reply.notes
        if reply.end == "fatal":
            raise StoreError(reply.error or "the store cannot be written")
        if reply.end == "refused":
            raise ConfigError(reply.error)
        if isinstance(item, str):
            self._bank_is_there(item)
            return
        if reply.end == "no_bank":
            self._rebuild(item)
        self._short_of_memory(task_id, item)

    def _rebuild(self, unit: Unit) -> None:
        """The unit found its bank absent or corrupt."""
        if unit.bank_id in self._waiting:
            self._waiting[unit.bank_id].append(unit)
        else:
            self._build(unit.bank_id, [unit])

    def _bank_is_there(self, bank_id: str) -> None:
        for unit in self._built(bank_id):
            self._push(self._place(unit), unit)

    def _built(self, bank_id: str) -> list[Unit]:
        """The units that waited for a bank; it is no longer to be built."""
        self.bar.banks(-1)
        return self._waiting.pop(bank_id)

    def _raised(self, item: Unit | str, name: str, text: str, trace: str) -> None:
        """A bank that cannot be built fails its cells; a unit that fails as a whole goes on cell by cell."""
        left = self._not_stored(self._concerned(item))
        if not isinstance(item, str) and len(left) > 1:
            for cell in left:
                self._submit(units.unit_of([cell]))
            return
        what = BANK if isinstance(item, str) else ""
        self._fail(left, causes.of_error(name, text), f"{what}{name}: {text}", trace)
        if left:
            self._count_failure(trace)

    def _died(self, task_id: str, item: Unit | str, death: Death) -> None:
        """Try again what is not stored."""
        cause = causes.of_death(*death, self._kernel_killed())
        how = causes.describe_death(*death)
        if isinstance(item, str):
            if not self._is_hopeless(task_id, MAX_IDLE_DEATHS[cause]):
                self._push(self._place(item), item)
                return
            reason = f"{BANK}worker {how}, {MAX_IDLE_DEATHS[cause]} times{_guess(cause, death)}"
            self._fail(self._not_stored(self._concerned(item)), cause, reason, None)
            return
        short = self._short_of_memory(task_id, item)
        left = self._not_stored(cell for cell in item.cells if cell.fingerprint not in short)
        suspect = self._in_flight.get(task_id)
        self._correct(task_id, item, left)
        rest = [cell for cell in left if cell.fingerprint != suspect]
        for cell in (cell for cell in left if cell.fingerprint == suspect):
            self._suspect(cell, cause, f"worker {how}", _guess(cause, death))
        if suspect is None and self._is_hopeless(task_id, MAX_IDLE_DEATHS[cause]):
            reason = f"worker {how}, {MAX_IDLE_DEATHS[cause]} times before a cell began{_guess(cause, death)}"
            self._fail(rest, cause, reason, None)
        elif rest:
            self._again(rest, cause)

    def _suspect(self, cell: PlannedCell, cause: Cause, how: str, guess: str) -> None:
        """A worker died with this cell in flight: it goes on alone, a few times."""
        limit = MAX_DEATHS[cause]
        if self._is_hopeless(cell.fingerprint, limit):
            self._fail([cell], cause, f"{how}, {limit} times with this cell{guess}", None)
            self._count_failure(how)
        elif cause == "oom":
            self._at_the_end([cell])
        else:
            self._attempts[cell.fingerprint] += 1
            self._submit(units.unit_of([cell]))

    def _again(self, cells: Sequence[PlannedCell], cause: Cause) -> None:
        """The other cells of a dead worker: together once, then one by one, so that none takes the others along."""
        suspicious = cause != "preempted" and any(self._together[cell.fingerprint] for cell in cells)
        for part in [[cell] for cell in cells] if suspicious else [cells]:
            self._submit(units.unit_of(part))
        if cause != "preempted":
            self._together.update(_keys(cells))

    def _short_of_memory(self, task_id: str, unit: Unit) -> set[str]:
        """Fingerprints of a unit's cells that ran out of memory; they go to the end."""
        short = self._short.get(task_id, set())
        self._at_the_end(cell for cell in unit.cells if cell.fingerprint in short)
        return short

    def _at_the_end(self, cells: Iterable[PlannedCell]) -> None:
        """Cells that ran out of memory: once more, with nothing beside them."""
        for cell in cells:
            self._attempts[cell.fingerprint] += 1
            self._retried.add(cell.fingerprint)
            self._last.append(cell)

    def _kernel_killed(self) -> bool | None:
        """Whether the kernel has killed for memory since this was last asked."""
        before, self._n_kills = self._n_kills, memory.n_kills()
        return None if before is None or self._n_kills is None else self._n_kills > before

    def _is_hopeless(self, key: str, limit: int) -> bool:
        """Count one more death; whether there were too many."""
        self._deaths[key] += 1
        return self._deaths[key] >= limit

    def _concerned(self, item: Unit | str) -> list[PlannedCell]:
        """Cells of a unit, or of all units that wait for a bank, which is then no longer to be built."""
        return [cell for unit in self._built(item) for cell in unit.cells] if isinstance(item, str) else [*item.cells]

    def _not_stored(self, cells: Iterable[PlannedCell]) -> list[PlannedCell]:
        """Cells without a record of this run."""
        cells = list(cells)
        keys = _keys(cells)
        records, attempts = self.store.done_and_kept(keys, self.job.keep), self.store.attempts(keys)
        stale = {k for k in self._retried if attempts.get(k, 0) <= self._attempts[k]}
        return [cell for cell in cells if cell.fingerprint not in records or cell.fingerprint in stale]

    def _correct(self, task_id: str, unit: Unit, left: Iterable[PlannedCell]) -> None:
        """Count what a dead worker finished and did not report any more; not what it reported and nothing holds."""
        reported, lost = self._reported.get(task_id, {}), set(_keys(left))
        for key in lost & reported.keys():
            self.bar.cell(reported[key], -1)
        unheard = set(_keys(unit.cells)) - lost - reported.keys() - self._short.get(task_id, set())
        for status in self.store.done(unheard).values():
            self.n_computed += 1
            self.bar.cell(status)

    def _fail(self, cells: Sequence[PlannedCell], cause: Cause, reason: str, trace: str | None) -> None:
        """Record cells that could not be computed."""
        if not cells:
            return
        unit = units.unit_of(cells)
        done = [runner.unfinished(unit.unit_id, self._cell_task(c), "failed", cause, reason, trace) for c in cells]
        self.store.publish_part(unit.unit_id, [d.record for d in done], [d.cost for d in done])
        for _ in cells:
            self.bar.cell("failed")


def _alike(trace: str) -> str:
    """A traceback without its message, which may name the cell: the places it went through, and the type."""
    places = re.findall(r'File ".*", line \d+', trace)
    return "\n".join([*places, trace.strip().rpartition("\n")[2].partition(":")[0]])


def _keys(cells: Iterable[PlannedCell]) -> list[str]:
    return [cell.fingerprint for cell in cells]


def _bank_key(bank_id: str) -> str:
    return f"bank-{bank_id}"


def _guess(cause: Cause, death: Death) -> str:
    return " (out of memory?)" if cause == "oom" and death.why is None else ""
