"""The driver of engine=slurm: submits slots, watches store and queue, submits again what is left, writes the tables.

It may leave at any moment and come back: slots work on, their jobs are found again by the sweep's record of them and by
their name in the queue. What is done is what the store holds; the queue only says whether anybody is at work.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from rmsweep import atomic, execute, fleet, runner
from rmsweep.causes import Cause
from rmsweep.claims import Claims
from rmsweep.engines import Signals, Stop, _queue, handlers
from rmsweep.engines._queue import Task
from rmsweep.engines._slot import Slot
from rmsweep.engines.slurm import Slurm, check_site, restore
from rmsweep.errors import ConfigError, RmsweepError, StoreError
from rmsweep.execute import Summary
from rmsweep.fingerprint import digest
from rmsweep.fleet import Fleet
from rmsweep.intake import Intake
from rmsweep.plan import Plan
from rmsweep.progress import Progress
from rmsweep.rounds import FRUITLESS, Rounds
from rmsweep.schedule import MAX_DEATHS
from rmsweep.slots import Job, Look, Note, Order, Slots
from rmsweep.store import Store
from rmsweep.todo import Todo

LOOK, SHARE = 5.0, 0.05  # seconds between two looks at the store; their share of the driver's time at most
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
    files = Slots(root, plan.name)
    check_site(files.folder)
    with execute.begun(plan, root) as (store, claims, folder, cells, notes):
        short = _short_of_memory([cell.fingerprint for cell in cells], store, engine, files)
        memory_gib = max(filter(None, (engine.memory_gib, *short.values())), default=None)
        todo = Todo(store, execute.pending_cells(cells, store, retry | short.keys(), plan.keep), plan.keep)
        stopped, n_left, told = None, 0, list[str]()
        if todo.cells:
            files.prepare()
            files.revive()
            with Progress(plan.name, len(todo.cells), folder, show=progress and not detach) as bar:
                driver = _Driver(plan, root, engine, claims, files, todo, bar, work, memory_gib)
                if detach:
                    driver.begin()
                    return None
                stopped, n_left = driver.watch(), len(driver.left())
            told = driver.notes if bar.shows else []
            notes += [] if bar.shows else driver.notes
        tables = execute.write_tables(plan.name, folder, store, claims)
        return execute.summarised(plan, store, tables, notes, todo.n_stored, n_left, stopped, told)


def _short_of_memory(keys: Collection[str], store: Store, engine: Slurm, files: Slots) -> dict[str, float]:
    """Cells that ran out of memory in slots -> what they can have now, where that is more.

    What a cell had: of jobs that were to run it again, the most of those in which it was tried; else the least of all.
    """
    states = store.states(keys) if engine.max_memory_gib else {}
    short = [key for key, state in states.items() if state.cause == "oom"]
    attempts, named, others = store.attempts(short), dict[str, float](), list[float]()
    for job in files.jobs().values() if short else ():
        given = files.given(job.retry)
        tried = [key for key in short if key in given and attempts.get(key, 0) > given[key]]
        named |= {key: max(named.get(key, 0.0), job.memory_gib or math.inf) for key in tried}
        others += [job.memory_gib or math.inf] * (not given)
    had = {key: named.get(key, min(others, default=math.inf)) for key in short}
    more = {key: engine.more_memory(memory_gib) for key, memory_gib in had.items()}
    return {key: memory_gib for key, memory_gib in more.items() if memory_gib is not None}


class _Driver:
    """Watches one sweep's slots. A step looks at the queue once and submits what is missing."""

    def __init__(
        self,
        plan: Plan,
        root: Path,
        engine: Slurm,
        claims: Claims,
        files: Slots,
        todo: Todo,
        bar: Progress,
        work: str,
        memory_gib: float | None,
    ) -> None:
        self.plan, self.root, self.engine, self.work = plan, root, engine, work
        self.claims, self.files, self.todo, self.bar = claims, files, todo, bar
        self.notes, self.is_over = list[str](), False
        self.n_live = self.n_missing = 0  # slots, after the last step
        self.signals, self.rounds = Signals(), Rounds()
        self._memory, self._order = memory_gib, Order()  # of the next slots; an order without a plan: not kept yet
        self._intake = Intake(self._submit_array, engine.most, self._say)
        self._ends, self._asked = dict[str, str](), Counter[str]()  # array tasks that have ended; sacct was asked of
        self._heard: set[tuple[str, int]] | None = None  # turns whose last words were dealt with; None: not looked yet
        self._pause = LOOK

    # -- watching ------------------------------------------------------------------------------------------

    def watch(self) -> int | None:
        """Until nothing is left or nothing helps; the signal that ended it."""
        due = time.monotonic()
        with handlers(self.signals), contextlib.suppress(Stop):
            while self._has_left() and not self.is_over:
                self.signals.check()  # one that came during a submission that failed
                if self.files.cancelled:
                    self._cancelled()
                elif time.monotonic() >= due:
                    self.step()
                    due = time.monotonic() + self.engine.poll_seconds
                if not self.is_over:
                    time.sleep(max(0.0, min(self._pause, due - time.monotonic())))
            if not self.files.cancelled:
                self._dismiss()
        if self.signals.received is not None:
            print(
                f"rmsweep: left while slots work on; the same command again watches them, `rmsweep status "
                f"{self.plan.name}` looks once, `rmsweep cancel {self.plan.name}` stops them",
                file=sys.stderr,
            )
        return self.signals.received

    def begin(self) -> None:
        """Submit what is not in the queue yet; RmsweepError where Slurm takes nothing for PATIENCE seconds."""
        deadline = time.monotonic() + PATIENCE
        with handlers(self.signals), contextlib.suppress(Stop):
            while self._has_left():
                self.step()
                if self.n_live or self.is_over or time.monotonic() >= deadline:
                    break
                self.signals.check()
                time.sleep(self.engine.poll_seconds)
        if self.signals.received is not None:
            raise SystemExit(128 + self.signals.received)
        if self.n_missing and self.n_live:
            self._say(f"{self.n_missing:,} slots more were not taken; the same command again submits them")
        if not self.n_live and self.left():
            said = "; ".join(self.notes) or "Slurm does not answer"
            raise RmsweepError(f"no slot is at work: {said}; the same command again tries again")
        for text in self.notes:
            print(f"rmsweep: {text}", file=sys.stderr)

    def left(self) -> set[str]:
        """Cells that are not stored yet."""
        left = self.todo.left()
        self.bar.stored(self.todo.stored.values())
        return left

    def _has_left(self) -> bool:
        """Whether any cell is left; the look is followed by a pause that keeps looks cheap, however large the sweep."""
        began = time.monotonic()
        left = self.left() or self._with_more_memory()
        self._pause = max(LOOK, (time.monotonic() - began) / SHARE)
        return bool(left)

    def _with_more_memory(self) -> set[str]:
        """Stored cells that ran out of memory, to be run again where slots can have more of it."""
        short = {} if self.is_over else _short_of_memory(self.todo.cells, self.todo.store, self.engine, self.files)
        if not short:
            return set()
        self._memory = max(self._memory or 0.0, *short.values())
        self._say(f"{len(short):,} cells ran out of memory; again with {self._memory:g} GiB to a slot")
        self.todo.run_again(short)
        self._order = self._order._replace(retry=self._retry())
        return self.left()

    def _retry(self) -> str:
        """Keep which recorded cells slots run again; the list's name, "" for none."""
        return self.files.write_retry(self.todo.again) if self.todo.again else ""

    def step(self) -> None:
        """Look at the queue once and do what follows; one driver of a sweep after the other."""
        with self.claims.held(f"slurm-{digest(self.plan.name)}"):
            left, now = self.left(), self._look()
            if now is None:
                self.bar.slots("Slurm does not answer")
                return
            self.bar.slots(str(now))
            self.n_live, self.n_missing = now.n_at_work, 0
            self.rounds.see(now)
            self._hear(now)
            self._bury(now, left)
            if not self.is_over:
                self._top_up(now, left)

    def _look(self) -> Fleet | None:
        """What the fleet is now, with jobs that only the queue knew on record; None where the queue does not answer."""
        if not self._order.plan:
            self._order = Order(self.files.snapshot(self.plan), self._retry())
        is_first = self._heard is None
        if (look := self.files.poll(0.0 if is_first else self.engine.poll_seconds)) is None:
            return None
        self._adopt(look.tasks)
        self._ends |= {name: task.state for name, task in look.tasks.items() if not task.is_live}
        now = fleet.assembled(self._order, self.files.jobs(), look, self.files.notes(), self._states)
        short = now.short_memory_gib
        more = None if short is None else self.engine.more_memory(short)
        self._memory = max(filter(None, (self._memory, now.live_memory_gib, more)), default=None)
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
            with atomic.disk_errors(self.files.folder):
                restore(self.files.folder, self._slot(), ids)
            numbers = [int(name.partition("_")[2] or 0) for name in ids]
            found = Job(job, 1 + max(numbers), self._memory, round=self.rounds.number, is_array="_" in ids[0])
            self.files.record_found(found)
            self._say(f"job {job} was submitted without an answer and has been found again")

    # -- submitting ----------------------------------------------------------------------------------------

    def _top_up(self, now: Fleet, left: set[str]) -> None:
        """Submit slots where none is at work, or in the place of those that were lost."""
        if now.n_live(now.is_foreign):
            self._say(f"slots of an earlier command are still there; `rmsweep cancel {self.plan.name}` ends all")
        if now.held:
            self._say(
                f"Slurm holds slots ({', '.join(sorted(now.held))}): `scontrol release` lets them go, or "
                f"`rmsweep cancel {self.plan.name}` and the same command again"
            )
        if not self.n_live and not self.rounds.may_begin(now, self.todo.n_stored):
            if self.rounds.is_hopeless:
                self._give_up(now)
            return
        missing, n_barren = self._missing(now, left), self.rounds.n_barren(now)
        if missing > 0 and self.n_live and n_barren >= FRUITLESS * self.engine.slots:
            self._say(f"{n_barren} slots ended without a cell: none is submitted while others work")
            return
        taken = self._take(missing)
        self.n_live, self.n_missing = self.n_live + taken, max(0, missing - taken)

    def _missing(self, now: Fleet, left: set[str]) -> int:
        """Slots to submit: enough for all that is left, and enough for what no slot at work is told to run again."""
        again = {key: n for key, n in self.todo.again.items() if key in left}
        lists = [self.files.given(order.retry) for order in now.orders_at_work] if again else []
        unknown = [key for key, n in again.items() if all(given.get(key, -1) < n for given in lists)]
        in_all = self.engine.slots_for(len(left)) - now.n_at_work - self.rounds.n_done(now)
        return max(in_all, self.engine.slots_for(len(unknown)))

    def _take(self, n_slots: int) -> int:
        """Submit slots; how many were taken. While others work, a refusal ends nothing."""
        try:
            return self._intake.take(n_slots)
        except ConfigError as error:
            if not self.n_live:
                raise
            self._say(str(error))
            return 0

    def _submit_array(self, size: int) -> bool:
        """Submit one array and put it on record, whatever signal comes meanwhile; whether others may follow."""
        self.signals.check()
        with self.signals.shield(), atomic.disk_errors(self.files.folder), self.files.submitting():
            job = self.engine.submit(self._slot(), self.files.name, self.files.folder, size, self._memory)
            self.files.record(Job(job, size, self._memory, *self._order, self.rounds.number))
        if self.files.cancelled:  # between our look at the queue and the submission
            self._cancelled()
        return not self.is_over

    def _slot(self) -> Slot:
        """What the next slots run: their shares begin where those of the slots before end."""
        engine, local = self.engine, self.engine.local()
        first = sum(job.n_slots for job in self.files.jobs().values() if job.plan == self._order.plan)
        words = [str(self.root), self.plan.name, "--plan", self._order.plan, "--work", self.work]
        words += ["--of", str(engine.slots), "--first", str(first)]
        words += [] if local.workers is None else ["--workers", str(local.workers)]
        for flag, minutes in (("cell", local.cell_minutes), ("bank", local.bank_minutes)):
            words += [f"--{flag}-minutes", "none" if minutes is None else str(minutes)]
        words += ["--retry", self._order.retry] if self._order.retry else []
        words += [word for path in self.plan.plugins for word in ("--plugin", str(path))]
        return Slot(
            tuple(words), str(self.files.notes_folder), engine.time_minutes * 60.0, float(engine.signal_seconds)
        )

    # -- ending --------------------------------------------------------------------------------------------

    def _dismiss(self) -> None:
        """Nothing is left, or nothing helps: slots that wait for a node need not come."""
        look = self.files.look()
        if look is not None and (waiting := Fleet(self._order, self.files.jobs(), look.tasks, ()).waiting):
            _queue.cancel(waiting, only_waiting=True)

    def _cancelled(self) -> None:
        """`rmsweep cancel` was here; what was submitted while it looked at the queue goes too."""
        self._stop("cancelled; what is stored stays, and the same command again continues")
        if (look := self.files.look()) is not None:
            _cancel(self.files, look)

    def _give_up(self, now: Fleet) -> None:
        self._stop(
            f"gave up: {FRUITLESS} rounds of slots, one after the other, have stored nothing; "
            f"their logs are {self.files.folder}/*_log.out{self._last_lines(now)}"
        )

    def _stop(self, why: str) -> None:
        self.is_over = True
        self._say(why)

    def _say(self, text: str) -> None:
        """Tell each thing once, and at once where anybody looks."""
        if text not in self.notes:
            self.notes.append(text)
            self.bar.say(text)

    # -- what became of slots ------------------------------------------------------------------------------

    def _hear(self, now: Fleet) -> None:
        """Deal with the last words of slots. What was over at the first look is an earlier driver's business."""
        over = {(note.task, note.restart): note for note in now.over}
        fresh = [] if self._heard is None else [note for key, note in over.items() if key not in self._heard]
        self._heard = over.keys() | (self._heard or set())
        for note in fresh:
            if note.end in ("refused", "store"):
                self._refusal(note, now)
            elif note.end == "given_up" and "done" not in self.todo.stored.values():
                self._stop(note.message)  # every cell fails alike, whichever slot has it
        for task in now.lost(self.rounds.number):
            self._say(f"slot {task.id} {_queue.ENDS.get(task.state, (None, task.state))[1]}")

    def _refusal(self, note: Note, now: Fleet) -> None:
        """A slot would not work. One bad node ends nothing: a full disk may be its own, other code if others run."""
        said = f"slot {note.task} on {note.host}: {note.message}"
        if now.n_running or (note.end == "store" and now.n_at_work):
            self._say(said)
            return
        self._dismiss()
        raise (StoreError if note.end == "store" else ConfigError)(said)

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
    return _cancel(files, look)


def _cancel(files: Slots, look: Look) -> tuple[int, str | None]:
    """Cancel the slots of a look, which is of no use afterwards."""
    live = [task for task in look.tasks.values() if task.is_live]
    files.forget_look()
    return len(live), _queue.cancel({task.job for task in live}) if live else None
