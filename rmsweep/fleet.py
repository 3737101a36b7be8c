"""What a sweep's slots are at: their jobs, what queue and accounting say of them, and what they noted themselves.

A `Fleet` asks nothing and decides nothing. It is made anew at every look, from the disk and the queue alone, so that a
driver which comes back knows what the one before it knew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from rmsweep.causes import Cause
from rmsweep.engines import _queue
from rmsweep.engines._queue import GONE, Task
from rmsweep.slots import Job, Look, Note, Order

WHOLE = 0.8  # a cell that took this share of a slot's time did not fit into it
WELL = ("done", "given_up")  # ends after which nobody has to come in a slot's place
NOT_COMPUTING = (*WELL, "refused", "store")


class Death(NamedTuple):
    """A turn of a slot that ended with a cell in flight; memory_gib: what the slot had."""

    cell: str
    cause: Cause
    how: str
    memory_gib: float | None


@dataclass(frozen=True)
class Fleet:
    """Slots of a sweep as one driver sees them. order: what that driver has slots run; tasks: array tasks by id."""

    order: Order
    jobs: Mapping[str, Job]
    tasks: Mapping[str, Task]
    notes: Sequence[Note]

    # -- who is at work ------------------------------------------------------------------------------------

    def n_live(self, of: Callable[[Order], bool]) -> int:
        """Slots at work or waiting whose order is such."""
        return sum(of(self._order_of(task)) for task in self.tasks.values() if task.is_live)

    def is_ours(self, order: Order) -> bool:
        """The present order, or one that nobody knows: it counts for every cell."""
        return order == self.order or not order.plan

    def is_akin(self, order: Order) -> bool:
        """The same plan with another list of cells to run again: it counts for cells without a record."""
        return order.plan == self.order.plan and not self.is_ours(order)

    def is_foreign(self, order: Order) -> bool:
        """Another plan: it counts for none, since its slots may know nothing of this one's cells."""
        return not self.is_ours(order) and not self.is_akin(order)

    @property
    def n_at_work(self) -> int:
        """Slots of the present plan at work or waiting."""
        return self.n_live(lambda order: not self.is_foreign(order))

    @property
    def orders_at_work(self) -> set[Order]:
        """What slots of the present plan are told that are at work or waiting."""
        orders = {self._order_of(task) for task in self.tasks.values() if task.is_live}
        return {self.order if self.is_ours(order) else order for order in orders if not self.is_foreign(order)}

    @property
    def held(self) -> set[str]:
        """Jobs of the present plan that begin only when somebody releases them."""
        held = (task for task in self._waiting if "HOLD" in task.state or "held" in task.where.lower())
        return {task.job for task in held if not self.is_foreign(self._order_of(task))}

    @property
    def n_running(self) -> int:
        """Slots on a node, whatever they run."""
        return sum(task.is_running for task in self.tasks.values())

    @property
    def waiting(self) -> set[str]:
        """Jobs of the present order with a slot that has not begun."""
        return {task.job for task in self._waiting if self.is_ours(self._order_of(task))}

    @property
    def _waiting(self) -> list[Task]:
        """Slots that are not on a node, whatever they run."""
        return [task for task in self.tasks.values() if task.is_live and not task.is_running]

    def __str__(self) -> str:
        """`2 slots running, 3 waiting (Priority)`."""
        why = Counter(task.where for task in self._waiting).most_common(1)
        waiting = f", {len(self._waiting)} waiting ({why[0][0] or 'no reason given'})" if why else ""
        return f"{self.n_running} slots running{waiting}"

    # -- who has ended -------------------------------------------------------------------------------------

    @property
    def round(self) -> int:
        """Of the present order's jobs, the last round."""
        return max((job.round for job in self.jobs.values() if self.is_ours(job.order)), default=0)

    def has_round(self, number: int) -> bool:
        """Whether Slurm took a job in this round."""
        return any(job.round == number for job in self.jobs.values() if self.is_ours(job.order))

    def has_ended_well(self, number: int) -> bool:
        """Whether in nobody's place of a round another has to come, as far as the slots' own words go."""
        ended = self._ended(number)
        return bool(ended) and all(map(self._is_well, ended))

    def n_done(self, number: int) -> int:
        """Slots of a round in whose place nobody has to come."""
        return sum(self._is_well(task) for task in self._ended(number))

    def n_barren(self, number: int) -> int:
        """Slots of a round that ended badly without a cell, less its turns that computed some."""
        bad = sum(not self._is_well(task) and not self._has_computed(task) for task in self._ended(number))
        jobs = {name for name, job in self.jobs.items() if job.round == number}
        return bad - sum(note.computed > 0 and note.task.partition("_")[0] in jobs for note in self.notes)

    def lost(self, number: int) -> list[Task]:
        """Slots of a round that ended otherwise than by themselves."""
        return [t for t in self._ended(number) if not self._is_well(t) and t.state not in ("COMPLETED", GONE)]

    @property
    def short_memory_gib(self) -> float | None:
        """The most memory that a slot had which ran out of it; None where none did."""
        short = [task for task in self._all_ended() if task.state == "OUT_OF_MEMORY" and not self._is_well(task)]
        return max(filter(None, (self.jobs[task.job].memory_gib for task in short)), default=None)

    @property
    def live_memory_gib(self) -> float | None:
        """The most memory that a slot at work has."""
        jobs = {task.job for task in self.tasks.values() if task.is_live and self.is_ours(self._order_of(task))}
        return max(filter(None, (self.jobs[job].memory_gib for job in jobs if job in self.jobs)), default=None)

    def _all_ended(self) -> Iterator[Task]:
        for task in self.tasks.values():
            if task.job in self.jobs and not task.is_live and self.is_ours(self.jobs[task.job].order):
                yield task

    def _ended(self, number: int) -> list[Task]:
        return [task for task in self._all_ended() if self.jobs[task.job].round == number]

    def _is_well(self, task: Task) -> bool:
        """Whether a slot that ended had no reason to go on. One that Slurm has forgotten needs its note to say so."""
        end = self._last[task.id].end if task.id in self._last else None
        return end in WELL or (task.state == "COMPLETED" and end not in ("time", "stopped"))

    def _has_computed(self, task: Task) -> bool:
        return task.id in self._last and self._last[task.id].computed > 0

    def _order_of(self, task: Task) -> Order:
        return self.jobs[task.job].order if task.job in self.jobs else Order()

    # -- turns ---------------------------------------------------------------------------------------------

    @cached_property
    def _last(self) -> dict[str, Note]:
        """Of each slot, the last turn that it noted."""
        return {note.task: note for note in self.notes}

    @property
    def over(self) -> list[Note]:
        """Turns that have ended."""
        return [note for note in self.notes if note.end is not None or not self._goes_on(note)]

    @property
    def n_cut(self) -> int:
        """Turns that ended before their work was done: what they had claimed may be left to others."""
        return sum(note.end not in WELL for note in self.over)

    def _goes_on(self, note: Note) -> bool:
        return note is self._last[note.task] and note.task in self.tasks and self.tasks[note.task].is_live

    def deaths(self) -> Iterator[Death]:
        """Cells in flight when a turn ended; over the time limit only those that had most of the slot's time."""
        for note in self.over:
            if note.end in NOT_COMPUTING or self._state(note) == "CANCELLED":  # by a human, for no fault of a cell
                continue
            cause, words = self._cause(note)
            job = self.jobs.get(note.task.partition("_")[0])
            for cell, share in note.in_flight.items():
                if cause != "timeout" or share >= WHOLE:
                    yield Death(cell, cause, f"slot {note.task} on {note.host} {words}", job and job.memory_gib)

    def _state(self, note: Note) -> str:
        """The state in which a turn ended; that of a slot's earlier turns is not known."""
        known = note is self._last[note.task] and note.task in self.tasks
        return self.tasks[note.task].state if known else GONE

    def _cause(self, note: Note) -> tuple[Cause, str]:
        """Why a turn ended, and in words; that of a slot which lives on was put back into the queue."""
        if note.end == "time":
            return "timeout", "ran into its time limit"
        cause, words = _queue.ENDS.get(self._state(note), ("preempted", "was taken off its node"))
        if note.end == "stopped" and cause != "timeout":
            return "preempted", words if cause == "preempted" else "was told to leave"
        return cause or "bug", words


def assembled(
    order: Order,
    jobs: Mapping[str, Job],
    look: Look,
    notes: Sequence[Note],
    ends: Callable[[Collection[str]], Mapping[str, str]],
) -> Fleet:
    """The fleet of one look. ends: array tasks that Slurm has forgotten -> their state, as far as accounting knows it.

    What was submitted since the look counts as waiting.
    """
    tasks, forgotten = dict(look.tasks), list[str]()
    known = Fleet(order, jobs, look.tasks, ())
    seen = {task.job for task in look.tasks.values()}
    for job in jobs.values():
        if not known.is_ours(job.order):
            continue
        if job.id not in look.jobs:
            tasks |= {name: Task(name, "PENDING", "just submitted") for name in job.tasks if name not in tasks}
        elif len(job.tasks) > 1 or job.id not in seen:
            forgotten += [name for name in job.tasks if name not in tasks]
    states = ends(forgotten) if forgotten else {}
    tasks |= {name: Task(name, states.get(name, GONE), "") for name in forgotten}
    mine = [note for note in notes if known.is_ours(Order(note.plan, note.retry))]
    return Fleet(order, jobs, tasks, mine)
