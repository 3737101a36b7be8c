"""The driver of engine=slurm: submits slots, watches store and queue, submits again what is left, writes the tables.

It may leave at any moment and come back: slots work on, their jobs are found again by the sweep's record of them and by
their name in the queue. What is done is what the store holds; the queue only says whether anybody is at work.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rmsweep import execute, fleet, results, runner
from rmsweep.causes import Cause
from rmsweep.cell import PlannedCell
from rmsweep.claims import Claims
from rmsweep.engines import Signals, Stop, _queue, handlers
from rmsweep.engines._queue import Task
from rmsweep.engines._slot import Slot
from rmsweep.engines.slurm import Slurm, check_folder, restore
from rmsweep.errors import ConfigError, DataError, RmsweepError, StoreError
from rmsweep.execute import Summary
from rmsweep.fingerprint import digest
from rmsweep.fleet import Fleet
from rmsweep.intake import Intake
from rmsweep.plan import Plan, sweep_folder
from rmsweep.progress import Progress
from rmsweep.runner import CellTask
from rmsweep.schedule import MAX_DEATHS
from rmsweep.slots import Job, Look, Note, Order, Slots
from rmsweep.store import Store
from rmsweep.units import unit_of

LOOK, SHARE = 5.0, 0.05  # seconds between two looks at the store; their share of the driver's time at most
FRUITLESS = 3  # rounds of slots, one after the other, that stored nothing
PATIENCE = 300.0  # seconds in which a detached driver tries to submit anything
ASK, LOG_LINES = 3, 5


def run(
    plan: Plan,
    root: Path,
    engine: Slurm,
    *,
    progress: bool = True,
    retry: frozenset[str] = frozenset(),
    detach: bool = False,
    work: str = runner.PIPELINE,
) -> Summary | None:
    """Have slots compute the cells of `plan` that have no record, and write the sweep's tables.

    retry, work: as in execute.run. detach: submit and return None; the last slot that ends writes the tables. Raises
    ConfigError when sbatch or a slot refuses, StoreError when the store cannot be written.
    """
    root = Path(root).resolve()
    store, files = Store(root, heal=True), Slots(root, plan.name)
    check_folder(files.folder)
    store.prepare()
    cells = [cell for cell in plan.cells if cell.reason is None]
    if not all(cell.fingerprint for cell in cells):
        raise DataError(plan.unknown or f"sweep {plan.name}: the data are not here, so nothing can be computed")
    with Claims(store.folder / "claims") as claims:
        folder = sweep_folder(root, plan.name)
        notes = execute.write_plan(plan, folder, claims)
        results.mark_last(root, plan.name)
        store.merge(cell.fingerprint for cell in cells)
        todo = _Todo(store, execute.pending_cells(cells, store, retry, plan.keep))
        stopped, n_left = None, 0
        if todo.cells:
            files.prepare()
            files.revive()
            with Progress(plan.name, len(todo.cells), folder, show=progress and not detach) as bar:
                driver = _Driver(plan, root, engine, claims, files, todo, bar, work)
                if detach:
                    driver.begin()
                    return None
                stopped, n_left = driver.watch(), len(driver.left())
            notes = [*notes, *driver.notes]
        tables = execute.write_tables(plan.name, folder, store, claims)
        return execute.summarised(plan, store, tables, notes, todo.n_stored, n_left, stopped)


class _Todo:
    """Cells that a run has slots compute: those without a record, and recorded ones that are run again."""

    def __init__(self, store: Store, cells: Sequence[PlannedCell]) -> None:
        self.store, self.cells = store, {cell.fingerprint: cell for cell in cells}
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
            self.stored = self._recorded(self.cells)  # a damaged part may have been set aside meanwhile
        return self.cells.keys() - self.stored.keys()

    def _recorded(self, keys: Collection[str]) -> dict[str, str]:
        """Which of these cells have a record of this run, and their status."""
        again = self.again.keys() & keys
        attempts = self.store.attempts(again) if again else {}
        old = {key for key in again if attempts.get(key, 0) <= self.again[key]}
        return {key: state.status for key, state in self.store.states(keys).items() if key not in old}

    def out_of_memory(self) -> set[str]:
        """Stored cells that ran out of memory."""
        states = self.store.states(self.stored)
        return {key for key, state in states.items() if state.cause == "oom"}

    def fail(self, key: str, cause: Cause, reason: str) -> None:
        """Record a cell that no slot could finish."""
        cell, attempts = self.cells[key], self.store.attempts([key])
        task = CellTask(cell.cell_id, key, cell.labels, cell.config, attempts.get(key, 0) + 1, cell.code)
        unit = unit_of([cell]).unit_id
        done = runner.unfinished(unit, task, "failed", cause, reason)
        self.store.publish_part(unit, [done.record], [done.cost])


class _Driver:
    """Watches one sweep's slots. A step looks at the queue once and submits what is missing."""

    def __init__(
        self,
        plan: Plan,
        root: Path,
        engine: Slurm,
        claims: Claims,
        files: Slots,
        todo: _Todo,
        bar: Progress,
        work: str,
    ) -> None:
        self.plan, self.root, self.engine, self.work = plan, root, engine, work
        self.claims, self.files, self.todo, self.bar = claims, files, todo, bar
        self.notes = list[str]()
        self.is_over = False
        self.n_live = self.n_missing = 0  # slots, after the last step
        self._snapshot, self._order = "", Order()
        self._memory, self._first = engine.memory_gib, 0
        self._intake = Intake(self._submit_array, engine.most, self._say)
        self._ends, self._asked = dict[str, str](), Counter[str]()  # array tasks that have ended; sacct was asked of
        self._heard: set[tuple[str, int]] | None = None  # turns whose last words were dealt with; None: not looked yet
        self._round, self._fruitless, self._idle = 1, 0, False
        self._barren_before = self._stored_before = 0
        self._pause = LOOK

    # -- watching ------------------------------------------------------------------------------------------

    def watch(self) -> int | None:
        """Until nothing is left or nothing helps; the signal that ended it."""
        signals, due = Signals(), time.monotonic()
        with handlers(signals), contextlib.suppress(Stop):
            while self._has_left() and not self.is_over:
                if self.files.cancelled:
                    self._stop("cancelled; what is stored stays, and the same command again continues")
                    if (look := self.files.look()) is not None:  # with what was submitted while `rmsweep cancel` looked
                        _cancel(look)
                    break
                if time.monotonic() >= due:
                    with signals.shield():
                        self.step()
                    due = time.monotonic() + self.engine.poll_seconds
                time.sleep(max(0.0, min(self._pause, due - time.monotonic())))
            else:
                self._dismiss()
        if signals.received is not None:
            print(
                f"rmsweep: left while slots work on; the same command again watches them, `rmsweep status "
                f"{self.plan.name}` looks once, `rmsweep cancel {self.plan.name}` stops them",
                file=sys.stderr,
            )
        return signals.received

    def _has_left(self) -> bool:
        """Whether any cell is left; the look is followed by a pause that keeps looks cheap, however large the sweep."""
        began = time.monotonic()
        left = self.left()
        self._pause = max(LOOK, (time.monotonic() - began) / SHARE)
        return bool(left)

    def begin(self) -> None:
        """Submit what is not in the queue yet; RmsweepError where Slurm takes nothing for PATIENCE seconds."""
        deadline = time.monotonic() + PATIENCE
        self.step()
        while not self.n_live and time.monotonic() < deadline:
            time.sleep(self.engine.poll_seconds)
            self.step()
        if not self.n_live:
            said = "; ".join(self.notes) or "Slurm does not answer"
            raise RmsweepError(f"no slot could be submitted: {said}; the same command again tries again")
        if self.n_missing:
            self._say(f"{self.n_missing:,} slots more were not taken; the same command again submits them")
        for text in self.notes:
            print(f"rmsweep: {text}", file=sys.stderr)

    def left(self) -> set[str]:
        """Cells that are not stored yet. Those that ran out of memory are, unless slots can have more of it."""
        left = self.todo.left()
        more = None if left or self.is_over else self.engine.more_memory(self._memory)
        if more is not None and (short := self.todo.out_of_memory()):
            self.notes.append(f"{len(short):,} cells ran out of memory; again with {more:g} GiB to a slot")
            self._memory = more
            self.todo.run_again(short)
            left = self.todo.left()
        self.bar.stored(self.todo.stored.values())
        return left

    def step(self) -> None:
        """Look at the queue once and do what follows; one driver of a sweep after the other."""
        with self.claims.held(f"slurm-{digest(self.plan.name)}"):
            left, now = self.left(), self._look()
            if now is None:
                self.bar.slots("Slurm does not answer")
                return
            self.bar.slots(str(now))
            self._hear(now)
            self._bury(now, left)
            self.n_live, self.n_missing = now.n_live(now.is_ours) + now.n_live(now.is_akin), 0
            if not self.is_over:
                self._top_up(now, left)

    def _look(self) -> Fleet | None:
        """The fleet as it is now; None where the queue does not answer."""
        self._snapshot = self._snapshot or self.files.snapshot(self.plan)
        self._order = Order(self._snapshot, self.files.write_retry(self.todo.again) if self.todo.again else "")
        if (look := self.files.poll(self.engine.poll_seconds)) is None:
            return None
        self._adopt(look.tasks)
        self._ends |= {name: task.state for name, task in look.tasks.items() if not task.is_live}
        now = fleet.assembled(self._order, self.files.jobs(), look, self.files.notes(), self._states)
        short = now.short_memory_gib
        more = None if short is None else self.engine.more_memory(short)
        self._memory = max(filter(None, (self._memory, now.live_memory_gib, more)), default=None)
        self._first = sum(job.n_slots for job in now.jobs.values() if job.plan in ("", self._snapshot))
        self._round = max(self._round, now.round)
        return now

    def _states(self, forgotten: Collection[str]) -> Mapping[str, str]:
        """How array tasks ended: as the queue said while it knew them, else as accounting says, asked a few times."""
        unknown = [name for name in forgotten if name not in self._ends and self._asked[name] < ASK]
        self._asked.update(unknown)
        self._ends |= _queue.ends(unknown) if unknown else {}
        return self._ends

    def _adopt(self, tasks: Mapping[str, Task]) -> None:
        """Jobs of this sweep's name that no record has: their submission was cut short."""
        known, lost = self.files.jobs(), dict[str, list[str]]()
        for task in tasks.values():
            if task.job not in known and task.is_live:
                lost.setdefault(task.job, []).append(task.id)
        for job, ids in lost.items():
            restore(self.files.folder, self._slot(), ids)
            n_slots = 1 + max(int(name.partition("_")[2] or 0) for name in ids)
            self.files.record_found(Job(job, n_slots, self._memory, round=self._round))
            self.notes.append(f"job {job} was submitted without an answer and has been found again")

    # -- submitting ----------------------------------------------------------------------------------------

    def _top_up(self, now: Fleet, left: set[str]) -> None:
        """Submit slots where none is at work, or in the place of those that were lost."""
        if now.n_live(now.is_foreign):
            self._say(f"slots of an earlier command are still there; `rmsweep cancel {self.plan.name}` ends all")
        if not self.n_live and not self._begins_round(now):
            return
        self._idle = False
        missing = self._missing(now, left)
        n_barren = now.n_barren(self._round) - self._barren_before
        if missing > 0 and self.n_live and n_barren >= FRUITLESS * self.engine.slots:
            self._say(f"{n_barren} slots ended without a cell: none is submitted while others work")
            return
        taken = self._intake.take(missing)
        self.n_live, self.n_missing = self.n_live + taken, max(0, missing - taken)

    def _begins_round(self, now: Fleet) -> bool:
        """No slot is at work: whether others are to come."""
        if now.has_round(self._round):
            if now.has_ended_well(self._round) and not self._idle:
                self._idle = True  # what they stored a moment ago may not be seen yet
                return False
            self._fruitless = 0 if self.todo.n_stored > self._stored_before else self._fruitless + 1
            self._round, self._barren_before = self._round + 1, 0
        if self._fruitless >= FRUITLESS:
            self._stop(
                f"gave up: {FRUITLESS} rounds of slots, one after the other, have stored nothing; "
                f"their logs are {self.files.folder}/*_log.out{self._last_lines(now)}"
            )
            return False
        self._stored_before = self.todo.n_stored
        return True

    def _missing(self, now: Fleet, left: set[str]) -> int:
        """Slots to submit: enough for all that is left, and enough of this order for what only they may run.

        One that found nothing to claim is not replaced while others hold what is left.
        """
        again = left & self.todo.again.keys()
        wanted = max(self._wanted(len(left)) - now.n_live(now.is_akin), self._wanted(len(again)))
        return wanted - now.n_live(now.is_ours) - now.n_done(self._round)

    def _wanted(self, n_cells: int) -> int:
        """Slots for so many cells: none without a cell for each of its workers' first turn."""
        return min(self.engine.slots, -(-n_cells // self.engine.workers_per_slot))

    def _submit_array(self, size: int) -> None:
        """Submit one array and put it on record."""
        with self.files.submitting():
            job = self.engine.submit(self._slot(), self.files.name, self.files.folder, size, self._memory)
            self.files.record(Job(job, size, self._memory, *self._order, self._round))
        self._first += size
        if self.files.cancelled:  # between our look at the queue and the submission
            _queue.cancel({job})

    def _slot(self) -> Slot:
        """What the next slots run."""
        engine, local = self.engine, self.engine.local()
        words = [str(self.root), self.plan.name, "--plan", self._order.plan, "--work", self.work]
        words += ["--of", str(engine.slots), "--first", str(self._first)]
        words += [] if local.workers is None else ["--workers", str(local.workers)]
        for flag, minutes in (("cell", local.cell_minutes), ("bank", local.bank_minutes)):
            words += [f"--{flag}-minutes", "none" if minutes is None else str(minutes)]
        words += ["--retry", self._order.retry] if self._order.retry else []
        words += [word for path in self.plan.plugins for word in ("--plugin", str(path))]
        return Slot(
            tuple(words), str(self.files.notes_folder), engine.time_minutes * 60.0, float(engine.signal_seconds)
        )

    def _dismiss(self) -> None:
        """Nothing is left: slots that wait for a node need not come."""
        look = self.files.look()
        if look is not None and (waiting := Fleet(self._order, self.files.jobs(), look.tasks, ()).waiting):
            _queue.cancel(waiting, only_waiting=True)

    # -- what became of slots ------------------------------------------------------------------------------

    def _hear(self, now: Fleet) -> None:
        """Deal with the last words of slots. What was over at the first look is an earlier driver's business."""
        over = {(note.task, note.restart): note for note in now.over}
        if self._heard is None:
            self._heard, self._barren_before = set(over), now.n_barren(self._round)
            if not now.n_live(now.is_ours) + now.n_live(now.is_akin) and now.has_round(self._round):
                self._round += 1
        fresh = [note for key, note in over.items() if key not in self._heard]
        self._heard |= over.keys()
        for note in fresh:
            if note.end in ("refused", "store"):
                self._refusal(note, alone=not now.n_running)
            elif note.end == "given_up":
                self._stop(note.message)
        for task in now.lost(self._round):
            self._say(f"slot {task.id} {_queue.ENDS.get(task.state, (None, task.state))[1]}")

    def _refusal(self, note: Note, *, alone: bool) -> None:
        """A slot would not work; an error unless others do: one bad node ends nothing."""
        said = f"slot {note.task} on {note.host}: {note.message}"
        if alone:
            raise (StoreError if note.end == "store" else ConfigError)(said)
        self._say(said)

    def _bury(self, now: Fleet, left: set[str]) -> None:
        """Give up cells that were in flight whenever their slot ended; they leave `left`.

        Memory that ran out counts only where there is no more to be had.
        """
        deaths: dict[str, Counter[Cause]] = {}
        for death in now.deaths():
            is_last = death.cause != "oom" or self.engine.more_memory(death.memory_gib) is None
            if death.cell not in left or not is_last:
                continue
            counts = deaths.setdefault(death.cell, Counter())
            counts[death.cause] += 1
            if counts[death.cause] == MAX_DEATHS[death.cause]:
                self.todo.fail(death.cell, death.cause, f"{death.how}, {counts[death.cause]} times with this cell")
                left.discard(death.cell)

    def _stop(self, why: str) -> None:
        self.is_over = True
        self.notes.append(why)

    def _say(self, text: str) -> None:
        """Tell each thing once."""
        if text not in self.notes:
            self.notes.append(text)

    def _last_lines(self, now: Fleet) -> str:
        """The end of the newest slot's log."""
        for name in sorted(now.tasks, key=lambda name: [int(part) for part in name.split("_")], reverse=True):
            with contextlib.suppress(OSError):
                lines = self.files.log(name).read_text(errors="replace").splitlines()[-LOG_LINES:]
                return f"; the last one says\n{chr(10).join(lines)}"
        return ""


def cancel(root: Path, name: str) -> tuple[int, str | None]:
    """Cancel a sweep's slots; how many there were, and what Slurm said against it.

    Raises RmsweepError when the queue does not answer.
    """
    files = Slots(Path(root).resolve(), name)
    if not files.exist:
        return 0, None
    files.cancel()
    if (look := files.look(fresh=True)) is None:
        raise RmsweepError("Slurm does not answer (squeue); nothing more will be submitted, but slots may run on")
    return _cancel(look)


def _cancel(look: Look) -> tuple[int, str | None]:
    """Cancel the slots of a look."""
    live = [task for task in look.tasks.values() if task.is_live]
    return len(live), _queue.cancel({task.job for task in live}) if live else None
