"""Engine `slurm`: array tasks of a cluster, called slots; each works through the sweep on its node with engine `local`.

This file says what a slot asks the site for and hands arrays to sbatch, through submitit. What becomes of them is asked
of the queue (`_queue`); what a slot does there is `_slot`. Truth is what the store holds.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from rmsweep.component import component, silent
from rmsweep.engines import _queue
from rmsweep.engines._slot import Slot
from rmsweep.engines.local import Local
from rmsweep.errors import ConfigError, RmsweepError

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.,:=-]{0,127}$"
CONSTRAINT = r"^[A-Za-z0-9(\[][A-Za-z0-9_.,:=&|*()\[\]-]{0,255}$"
MAX_ARRAY = 1000  # where the site does not say: Slurm's own default
BUSY = (
    "timed out", "unable to contact", "temporarily", "zero bytes", "connection refused", "try again", "standby mode",
    "authentication", "munge", "unexpected message", "not responding", "transport endpoint",
)  # fmt: skip
TOO_MANY = ("maxsubmit", "submit limit", "max submit", "array specification", "maxarraysize", "maxjobcount")
OPTIONS = {  # of sbatch, as environment variables, which outweigh those of the script: what we say -> what undoes it
    None: ["JOB_NAME", "ARRAY_INX", "SIGNAL", "REQUEUE", "NO_REQUEUE", "OUTPUT", "ERROR", "TIMELIMIT", "OPEN_MODE",
           "CLUSTERS", "WAIT"],
    "partition": ["PARTITION"],
    "account": ["ACCOUNT"],
    "qos": ["QOS"],
    "constraint": ["CONSTRAINT"],
    "gpus_per_slot": ["GRES", "GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK"],
    "memory_gib": ["MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"],
}  # fmt: skip
# of a job that the driver runs in: its slots would take them for theirs
OUTER = re.compile(r"SLURM_(ARRAY_.*|RESTART_COUNT|JOB_START_TIME|JOB_END_TIME)")
# In the place of the batch shell, which would not outlive SIGTERM, and whose end is the end of the job
PYTHON = f"exec {shlex.quote(sys.executable)}"
UNREADABLE = re.compile(r"[%\\\x00-\x1f\x7f]")
SECONDS = 120.0  # for sbatch
THREAD = "rmsweep-sbatch"
ASKING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP}
T = TypeVar("T")


class Busy(Exception):
    """sbatch gave no clear answer: the jobs may have been taken or not."""


@component("engine", version=1)
@dataclass(frozen=True)
class Slurm:
    """Array tasks on a Slurm cluster, each working through the sweep on one node.

    partition, account, qos, constraint: as for sbatch; null for the site's own. slots: how many array tasks at most;
    array_parallelism: how many of an array may run at once. cpus_per_slot, gpus_per_slot, memory_gib, time_minutes:
    what each asks for; memory_gib null for the site's own. max_memory_gib: up to where memory is doubled for cells that
    ran out of it; null for never. signal_seconds: how long before its time limit a slot publishes and goes back to the
    queue. max_array: tasks to an array; null to ask the site. poll_seconds: between two looks at the queue. workers,
    cell_minutes, bank_minutes: of engine=local, within a slot; workers null for one per GPU, or CPU.
    """

    partition: Annotated[str, Field(pattern=NAME)] | None = silent(None)
    account: Annotated[str, Field(pattern=NAME)] | None = silent(None)
    qos: Annotated[str, Field(pattern=NAME)] | None = silent(None)
    constraint: Annotated[str, Field(pattern=CONSTRAINT)] | None = silent(None)
    slots: Annotated[int, Field(ge=1)] = silent(8)
    cpus_per_slot: Annotated[int, Field(ge=1)] = silent(8)
    gpus_per_slot: Annotated[int, Field(ge=0)] = silent(0)
    memory_gib: Annotated[float, Field(gt=0)] | None = silent(None)
    max_memory_gib: Annotated[float, Field(gt=0)] | None = silent(None)
    time_minutes: Annotated[int, Field(ge=1)] = silent(240)
    signal_seconds: Annotated[int, Field(ge=5)] = silent(120)
    array_parallelism: Annotated[int, Field(ge=1)] | None = silent(None)
    max_array: Annotated[int, Field(ge=1)] | None = silent(None)
    poll_seconds: Annotated[float, Field(ge=30)] = silent(30.0)
    workers: Annotated[int, Field(ge=1)] | None = silent(None)
    cell_minutes: Annotated[float, Field(gt=0)] | None = silent(240.0)
    bank_minutes: Annotated[float, Field(gt=0)] | None = silent(1440.0)

    def __post_init__(self) -> None:
        if self.signal_seconds >= self.time_minutes * 30:
            raise ConfigError(
                f"engine.signal_seconds={self.signal_seconds}: needs to be less than half of engine.time_minutes="
                f"{self.time_minutes}, or a slot has no time to work"
            )
        if self.max_memory_gib is not None and (self.memory_gib or math.inf) > self.max_memory_gib:
            raise ConfigError("engine.max_memory_gib: needs engine.memory_gib, and must not be below it")

    def local(self) -> Local:
        """What a slot runs the sweep with."""
        workers = self.workers or (None if self.gpus_per_slot else self.cpus_per_slot)
        return Local(workers=workers, cell_minutes=self.cell_minutes, bank_minutes=self.bank_minutes)

    @property
    def workers_per_slot(self) -> int:
        """Cells that one slot runs at once."""
        return self.workers or self.gpus_per_slot or self.cpus_per_slot

    def slots_for(self, n_cells: int) -> int:
        """Slots for so many cells: none without a cell for each of its workers' first turn."""
        return min(self.slots, -(-n_cells // self.workers_per_slot))

    def more_memory(self, memory_gib: float | None) -> float | None:
        """What the next try of cells that ran out of memory gets; None where there is no more to give."""
        if memory_gib is None or self.max_memory_gib is None or memory_gib >= self.max_memory_gib:
            return None
        return min(2 * memory_gib, self.max_memory_gib)

    def most(self) -> int:
        """Slots in one array, as the site allows."""
        return self.max_array or _queue.max_array() or MAX_ARRAY

    def parameters(self, name: str, memory_gib: float | None, n_slots: int) -> dict[str, Any]:
        """What submitit is told of an array."""
        wanted = {
            "job_name": name,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "time": self.time_minutes,
            "nodes": 1,
            "ntasks_per_node": 1,
            "cpus_per_task": self.cpus_per_slot,
            "gres": f"gpu:{self.gpus_per_slot}" if self.gpus_per_slot else None,
            "mem": None if memory_gib is None else f"{math.ceil(memory_gib * 1024)}M",
            "array_parallelism": min(n_slots, self.array_parallelism or n_slots),
            "stderr_to_stdout": True,
            "use_srun": False,  # told to leave, srun kills its step at once
            "additional_parameters": {"requeue": True, "signal": f"B:USR2@{self.signal_seconds}"},
        }
        return {key: value for key, value in wanted.items() if value is not None}

    def _undone(self) -> list[str]:
        """Environment variables that would undo what slots ask for, or pass for theirs."""
        fields = [name for name in OPTIONS if name is None or getattr(self, name)]
        options = {f"SBATCH_{option}" for name in fields for option in OPTIONS[name]}
        return [name for name in os.environ if name in options or OUTER.fullmatch(name)]

    def submit(self, slot: Slot, name: str, folder: Path, n_slots: int, memory_gib: float | None) -> str:
        """Submit one array of `n_slots` slots, with its files in `folder`; its job id.

        Raises Busy when no clear answer came, TooMany when the site wants fewer, ConfigError when sbatch refuses.
        """
        submitit = _submitit()
        try:
            executor = submitit.SlurmExecutor(folder, python=PYTHON)
        except RuntimeError as error:
            raise ConfigError(f"engine=slurm: {error}; run it on a login node of the cluster") from None
        executor.update_parameters(**self.parameters(name, memory_gib, n_slots))
        before = {path.name for path in folder.iterdir()}
        try:
            with _without(self._undone()):
                jobs = _aside(lambda: executor.submit_array([slot] * n_slots))
        except submitit.core.utils.FailedJobError as error:
            refusal = _refusal(str(error), n_slots)
            if not isinstance(refusal, Busy):
                _remove_prepared(folder, before)
            raise refusal from None
        except submitit.core.utils.FailedSubmissionError as error:
            raise Busy(str(error)) from None
        return str(jobs[0].job_id).partition("_")[0]


class TooMany(RmsweepError):
    """The site does not take so many tasks at once, or no more at present."""


def _aside(submit: Callable[[], T]) -> T:
    """What `submit` returns or raises; Busy where it takes longer than SECONDS.

    It runs in a thread in which signals wait, and so in the sbatch that it starts: Ctrl-C in a terminal goes to all its
    processes, and an sbatch killed half-way has perhaps submitted.
    """
    if any(thread.name == THREAD for thread in threading.enumerate()):
        raise Busy("an earlier sbatch has not ended yet")
    outcome: Future[T] = Future()

    def work() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
        try:
            outcome.set_result(submit())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name=THREAD, daemon=True).start()
    try:
        return outcome.result(SECONDS)
    except FutureTimeout:
        raise Busy(f"sbatch has not ended within {SECONDS:g} s") from None


def _remove_prepared(folder: Path, before: Collection[str]) -> None:
    """What submitit had prepared for every slot of an array that was refused."""
    for path in folder.iterdir():
        if path.name not in before and (path.suffix == ".pkl" or path.name.startswith(".submission_file")):
            path.unlink(missing_ok=True)


def _refusal(text: str, n_slots: int) -> Exception:
    """What sbatch meant by its error; one that says nothing was perhaps killed."""
    said = " ".join(text.split())
    if not said or any(words in said.lower() for words in BUSY):
        return Busy(said or "it ended without a word")
    if any(words in said.lower().replace(" ", "") for words in (w.replace(" ", "") for w in TOO_MANY)):
        return TooMany(f"sbatch takes no array of {n_slots}: {said}")
    return ConfigError(f"engine=slurm: sbatch refused: {said}")


@contextlib.contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """Environment variables put aside."""
    aside = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(aside)


def check_site(folder: Path) -> None:
    """Refuse a machine that cannot submit, and a path that a batch script or Slurm's file patterns read otherwise."""
    _submitit()
    if not _queue.is_here():
        raise ConfigError("engine=slurm: this machine has no squeue; run it on a login node of the cluster")
    if UNREADABLE.search(str(folder)):
        raise ConfigError(
            f"root: {str(folder)!r} holds %, a backslash or control characters, which a batch script cannot name"
        )


def restore(folder: Path, slot: Slot, ids: list[str]) -> None:
    """Give array tasks what they are to run, where the submission was cut short before it did."""
    delayed = _submitit().core.utils.DelayedSubmission(slot)
    for name in ids:
        path = folder / f"{name}_submitted.pkl"
        if not path.exists():
            temporary = folder / f".{name}_submitted.pkl.tmp"
            delayed.dump(temporary)
            temporary.replace(path)


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise ConfigError("engine=slurm needs the library submitit: pip install 'submitit>=1.5'") from None
    return submitit
