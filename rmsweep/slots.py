"""The folder sweeps/NAME/slurm: which jobs were submitted for a sweep, what its slots and the queue say.

name.json              what the sweep's jobs are called in the queue
plans/<digest>/        the plan as it was when slots were submitted: what they run, and with which code
retry-<digest>.json    recorded cells that slots run again
jobs/<id>.json         one submitted array each, checksummed
slots/<task>.<n>.json  what the n-th turn of an array task had in hand, and how it ended
cancelled.json         `rmsweep cancel` was here: nothing is submitted or requeued until the next `rmsweep run`
queue-<machine>.json   the last look at the queue from that machine
<task>_..._log.out     what a slot printed; and submitit's own files
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rmsweep import atomic
from rmsweep.engines import _queue
from rmsweep.engines._queue import Task
from rmsweep.engines._slot import CANCELLED
from rmsweep.errors import StoreError
from rmsweep.fingerprint import digest, sealed, unsealed
from rmsweep.plan import Plan, sweep_folder

LOOK = 30.0  # seconds between two looks at the queue from one machine
STAGE = "plan"  # of crash.POINTS


class Order(NamedTuple):
    """What slots are told to run: a snapshot of the plan, and a list of recorded cells to run again; "" for none."""

    plan: str = ""
    retry: str = ""


class Job(NamedTuple):
    """A submitted array: how many slots, with how much memory each, for what order, in which round of submissions.

    An order without a plan is not known: the job was found in the queue.
    """

    id: str
    n_slots: int
    memory_gib: float | None
    plan: str = ""
    retry: str = ""
    round: int = 0
    is_array: bool = False

    @property
    def order(self) -> Order:
        """What its slots run."""
        return Order(self.plan, self.retry)

    @property
    def tasks(self) -> list[str]:
        """Its array tasks, as squeue names them."""
        is_array = self.is_array or self.n_slots > 1  # submitit submits one slot by itself
        return [f"{self.id}_{i}" for i in range(self.n_slots)] if is_array else [self.id]


class Note(NamedTuple):
    """One turn of a slot. in_flight: fingerprint -> share of the slot's time that the cell had taken; end: None where
    it was killed, else done, time (its limit), stopped, given_up, refused, store or bug; plan, retry: its order.
    """

    task: str
    restart: int
    host: str
    computed: int
    in_flight: dict[str, float]
    end: str | None
    message: str
    plan: str = ""
    retry: str = ""


class Look(NamedTuple):
    """What the queue said. jobs: those that were on record when it was asked, so that it had to know them."""

    tasks: dict[str, Task]
    jobs: frozenset[str]


class Slots:
    """The files of a sweep's slots."""

    def __init__(self, root: Path, sweep: str) -> None:
        self.folder = sweep_folder(root, sweep) / "slurm"
        self.notes_folder = self.folder / "slots"
        self._path = digest([str(root.resolve()), sweep])
        self._made = f"rmsweep-{sweep[:40]}-{self._path[:8]}"
        self._queue = self.folder / f"queue-{atomic.machine()}.json"

    @property
    def name(self) -> str:
        """Of all its jobs in the queue: as it was first made, also where the root is mounted elsewhere.

        A copy of the root has another path and another inode, and goes by a name of its own.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            said = unsealed(atomic.read(self.folder / "name.json"))
            if said["path"] == self._path or said["inode"] == os.stat(self.folder).st_ino:
                return str(said["name"])
        return self._made

    @property
    def exist(self) -> bool:
        """Whether slots were ever submitted for this sweep."""
        return (self.folder / "jobs").is_dir()

    def prepare(self) -> None:
        """Make the folders; StoreError where they cannot be written."""
        for folder in (self.folder, self.folder / "jobs", self.notes_folder):
            atomic.probe(folder)
        if self.name == self._made:
            said = {"name": self._made, "path": self._path, "inode": os.stat(self.folder).st_ino}
            atomic.replace(self.folder / "name.json", sealed(said), STAGE)

    def snapshot(self, plan: Plan) -> str:
        """Keep the plan as it is now; its name among the snapshots."""
        name = digest([plan.keep, plan.reuse, [[c.fingerprint, c.code] for c in plan.cells if c.reason is None]])
        folder = self.folder / "plans" / name
        with atomic.disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        plan.write(folder)
        return name

    def write_retry(self, attempts: Mapping[str, int]) -> str:
        """Keep which cells are to be run again, with their last attempts; its name."""
        name = f"retry-{digest(attempts)}.json"
        atomic.replace(self.folder / name, sealed({"attempts": dict(attempts)}), STAGE)
        return name

    def given(self, name: str) -> dict[str, int]:
        """As `read_retry`; nothing where there is no list or it cannot be read."""
        with contextlib.suppress(StoreError):
            return self.read_retry(name) if name else {}
        return {}

    def read_retry(self, name: str) -> dict[str, int]:
        """What `write_retry` was given; StoreError where that cannot be read."""
        try:
            found = unsealed(atomic.read(self.folder / name))["attempts"]
            return {str(key): int(n) for key, n in found.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise StoreError(f"{self.folder / name}: cannot be read ({error}); run `rmsweep run` again") from None

    # -- jobs ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def submitting(self) -> Iterator[None]:
        """Around a submission and its record: no driver decides on what the queue said before them."""
        self._keep({**self._said(), "is_drivers": False})
        yield  # after an error it stays so: jobs may have been taken
        self._keep({**self._said(), "is_drivers": True})

    def record(self, job: Job) -> None:
        """Remember a submitted array, for `look` too."""
        atomic.replace(self.folder / "jobs" / f"{job.id}.json", sealed(job._asdict()), STAGE)
        said = self._said()
        fresh = [Task(name, "PENDING", "just submitted") for name in job.tasks]
        self._keep({**said, "tasks": [*fresh, *(said.get("tasks") or [])], "jobs": [job.id, *said.get("jobs", [])]})

    def record_found(self, job: Job) -> None:
        """Remember an array that the queue has, unless whoever submitted it has meanwhile."""
        with atomic.Draft(self.folder / "jobs" / f"{job.id}.json", STAGE) as draft:
            draft.write(sealed(job._asdict()))
            if not draft.seal().link() and job.id not in self.jobs():
                draft.replace()  # what stands there is damaged

    def jobs(self) -> dict[str, Job]:
        """All arrays that were submitted, by id; a damaged record is passed over: the queue has the name too."""
        found = {}
        for path in sorted((self.folder / "jobs").glob("[0-9]*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
                job = Job(**unsealed(atomic.read(path)))
                found[job.id] = job
        return found

    def cancel(self) -> None:
        """Let nothing more be submitted or requeued."""
        atomic.replace(self.folder / CANCELLED, sealed({"cancelled": True}), STAGE)

    def revive(self) -> None:
        """Take `cancel` back."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.folder / CANCELLED)

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called since."""
        with contextlib.suppress(OSError):
            return (self.folder / CANCELLED).exists()
        return False

    # -- the queue -----------------------------------------------------------------------------------------

    def poll(self, seconds: float = LOOK) -> Look | None:
        """What the queue says, for a driver: asked anew unless one of this machine has within `seconds`, and nothing
        was submitted since; None where it does not answer. The caller holds the sweep's claim: nobody else submits.
        """
        said = self._said()
        if said.get("is_drivers") and (age := self._age(said)) is not None and age < seconds:
            return _read(said)
        return self._ask(is_drivers=True)

    def look(self, *, fresh: bool = False) -> Look | None:
        """What the queue said, asked again where no process of this machine has within LOOK seconds, or if fresh."""
        said = self._said()
        if not fresh and self._age(said) is not None:
            return _read(said)
        return self._ask(is_drivers=False) if _queue.is_here() else None

    def forget_look(self) -> None:
        """What the queue said is of no use any more."""
        with contextlib.suppress(OSError):
            os.unlink(self._queue)

    def _ask(self, *, is_drivers: bool) -> Look | None:
        jobs, tasks = sorted(self.jobs()), _queue.poll(self.name)
        said = None if tasks is None else list(tasks.values())
        self._keep({"at": time.monotonic(), "is_drivers": is_drivers, "jobs": jobs, "tasks": said})
        return None if tasks is None else Look(tasks, frozenset(jobs))

    def _said(self) -> dict[str, Any]:
        """What this machine's file says."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            said = json.loads(atomic.read(self._queue))
            return said if isinstance(said, dict) else {}
        return {}

    def _keep(self, said: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):
            atomic.note(self._queue, json.dumps(said).encode())

    @staticmethod
    def _age(said: Mapping[str, Any]) -> float | None:
        """Seconds since the queue was asked; None for never, or too long ago to count."""
        at = said.get("at")
        age = time.monotonic() - at if isinstance(at, int | float) else -1.0
        return age if 0 <= age < LOOK else None

    # -- what slots say ------------------------------------------------------------------------------------

    def notes(self) -> list[Note]:
        """What every turn of every slot last said, the turns of a slot in order; what is no note is passed over."""
        found = []
        for path in self.notes_folder.glob("*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
                note = Note(**json.loads(atomic.read(path)))
                shares = {str(cell): float(share) for cell, share in note.in_flight.items()}
                found.append(note._replace(task=_task(note.task), restart=int(note.restart), in_flight=shares))
        return sorted(found, key=lambda note: (note.task, note.restart))

    def log(self, task: str) -> Path:
        """What a slot printed."""
        return self.folder / f"{task}_0_log.out"

    def leftovers(self) -> Iterator[Path]:
        """Files of jobs that were submitted; what slots printed is not among them."""
        patterns = ("jobs/*.json", "slots/*.json", "plans/*", "retry-*.json", "queue-*.json", "*.pkl")
        for pattern in (*patterns, "*_submission.sh", ".submission_file*"):
            yield from self.folder.glob(pattern)


def _task(name: str) -> str:
    """The name of an array task; ValueError for anything else."""
    if not _queue.TASK.fullmatch(name):
        raise ValueError(name)
    return name


def _read(said: Mapping[str, Any]) -> Look | None:
    """A look as it was written; None where the queue did not answer, or the file says something else."""
    with contextlib.suppress(TypeError, KeyError, ValueError, AttributeError):
        if said["tasks"] is not None:
            return Look({task.id: task for task in (Task(*words) for words in said["tasks"])}, frozenset(said["jobs"]))
    return None
