"""What an array task runs: a child process that works through the sweep, and this parent, which hears the signals.

Slurm's warning before the time limit, SIGTERM (preemption, scancel, the limit itself) and the slot's own clock all
interrupt the child as Ctrl-C would: it publishes what is finished. Then a slot whose time is over goes back to the
queue; one that was told to leave sleeps until it is killed, because a job that exits by itself is never requeued.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rmsweep.engines import _queue

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
TELL = {"time": signal.SIGINT, "leave": signal.SIGHUP}  # why -> what the child hears
LEFT = 75  # exit code of a child that was interrupted with work left
POLL, GRACE = 0.2, 60.0  # seconds; the child's time to publish
PATIENCE = 600.0  # seconds that a slot which was told to leave waits to be killed
MOMENT = 5.0  # seconds in which whoever killed the child may kill us too
LAG = 5.0  # seconds between a job's start and ours, about


@dataclass(frozen=True)
class Slot:
    """Called by submitit inside an array task. arguments: of `python -m rmsweep.cli.slot`; folder: of the slots'
    notes; seconds: after which it is to stop by itself, where Slurm does not tell the job's limits.
    """

    arguments: tuple[str, ...]
    folder: str
    seconds: float
    signal_seconds: float

    def __call__(self) -> str:
        """Work until nothing is left, or until told to stop."""
        return _Supervisor(self).run()


class _Supervisor:
    def __init__(self, slot: Slot) -> None:
        self.slot, self.why, self.began = slot, "", time.monotonic()
        self.killed = False  # the child did not leave: the slot is out of time
        limit = _job_seconds() or slot.seconds
        self.seconds = max(0.0, limit - slot.signal_seconds - LAG)

    def run(self) -> str:
        name, n = task_name(), restarts()
        with self._handlers():
            child = self._start(name, n)
            while child.poll() is None and not self.why:
                if time.monotonic() - self.began > self.seconds:
                    self.why = "time"
                time.sleep(POLL)
            code = self._ended(child)
            if code == -signal.SIGKILL:
                time.sleep(MOMENT)  # a job is killed process by process: let Slurm say why, instead of "failed"
            if self.why == "leave" or self.killed:
                _sleep_until_killed()
            if self.why == "time" and code == LEFT and self._is_worth_it(name, n):
                self._requeue(name)
        if code not in (0, LEFT):
            raise RuntimeError(f"slot {name} ended with exit code {code}; the lines above say why")
        return "done" if code == 0 else "left"

    def _start(self, name: str, n: int) -> subprocess.Popen[bytes]:
        """The child. Slurm's signals go to every process of the job: it hears them from us only, and once."""
        command = [sys.executable, "-m", "rmsweep.cli.slot", *self.slot.arguments, "--task", name, "--restart", str(n)]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (*WARNINGS, signal.SIGTERM))
        try:
            return subprocess.Popen(command)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _ended(self, child: subprocess.Popen[bytes]) -> int:
        """The child's exit code; interrupted first where that is due."""
        if self.why and child.poll() is None:
            child.send_signal(TELL[self.why])
        try:
            return child.wait(GRACE if self.why else None)
        except subprocess.TimeoutExpired:
            child.kill()
            self.killed = True
            return child.wait()

    @contextlib.contextmanager
    def _handlers(self) -> Iterator[None]:
        """Signals only leave a word; a request to leave outweighs a warning."""
        handlers = {**dict.fromkeys(WARNINGS, "time"), signal.SIGTERM: "leave", signal.SIGCONT: ""}
        before = {
            number: signal.signal(number, lambda *_, why=why: self._note(why)) for number, why in handlers.items()
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, why: str) -> None:
        if self.why != "leave":
            self.why = why or self.why

    def _is_worth_it(self, name: str, n: int) -> bool:
        """Whether another turn would get further than this one: it finished a cell, and nobody has cancelled."""
        folder = Path(self.slot.folder)
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            note = json.loads((folder / f"{name}.{n}.json").read_text())
            return bool(note["computed"]) and not (folder.parent / CANCELLED).exists()
        return False

    def _requeue(self, name: str) -> None:
        if _queue.requeue(name):
            print(f"rmsweep: slot {name}: its time is over and it goes back to the queue", flush=True)
            _sleep_until_killed()
        print(f"rmsweep: slot {name}: its time is over; the site does not requeue it", flush=True)


CANCELLED = "cancelled.json"


def task_name() -> str:
    """The present array task as squeue names it."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID", "0")


def restarts() -> int:
    """How often this task has been requeued."""
    return _number("SLURM_RESTART_COUNT") or 0


def _job_seconds() -> int | None:
    """How long the job may take; None where Slurm does not tell."""
    start, end = _number("SLURM_JOB_START_TIME"), _number("SLURM_JOB_END_TIME")
    return end - start if start and end and end > start else None


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else None


def _sleep_until_killed() -> None:
    """Exit code 0 would make the job COMPLETED, which is never requeued."""
    deadline, parent = time.monotonic() + PATIENCE, os.getppid()
    while time.monotonic() < deadline and os.getppid() == parent:
        time.sleep(1)
    raise RuntimeError("the slot waited to be ended, and nobody has ended it")
