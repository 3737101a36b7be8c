"""What Slurm's commands say of jobs: one squeue for all of them, sacct where there is accounting, scancel, scontrol.

Every command has a time limit, and an answer that does not come is None: no decision is made on it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from rmsweep.causes import Cause

SECONDS = 60.0
FILTERS = ("SQUEUE_", "SACCT_", "SCANCEL_")  # environment variables that stand for options
RUNNING = {"RUNNING", "COMPLETING", "STOPPED", "SUSPENDED", "SIGNALING", "STAGE_OUT"}
ENDS: dict[str, tuple[Cause | None, str]] = {  # state -> cause of what was in flight, and in words
    "COMPLETED": (None, "ended"),
    "CANCELLED": ("preempted", "was cancelled"),
    "PREEMPTED": ("preempted", "was preempted"),
    "REVOKED": ("preempted", "was revoked"),
    "NODE_FAIL": ("preempted", "lost its node (node failure)"),
    "BOOT_FAIL": ("preempted", "lost its node (boot failure)"),
    "TIMEOUT": ("timeout", "ran into its time limit"),
    "DEADLINE": ("timeout", "ran into its deadline"),
    "OUT_OF_MEMORY": ("oom", "was killed for its memory (OUT_OF_MEMORY)"),
    "FAILED": ("bug", "failed"),
}
GONE = "GONE"  # no longer in the queue, and nobody knows how it ended
TASK = re.compile(r"[0-9]+(_[0-9]+)?")


class Task(NamedTuple):
    """One array task. id: <job>_<index>; where: its node, or why it waits."""

    id: str
    state: str
    where: str

    @property
    def job(self) -> str:
        """The array's id."""
        return self.id.partition("_")[0]

    @property
    def is_live(self) -> bool:
        """Whether it runs or may run yet; states that nobody knows count as live."""
        return self.state not in ENDS and self.state != GONE

    @property
    def is_running(self) -> bool:
        """Whether it is on a node."""
        return self.state in RUNNING


def poll(name: str) -> dict[str, Task] | None:
    """All array tasks of this job name that Slurm still knows, also ended ones; None when it does not answer."""
    said = _answer("squeue", "--noheader", "--array", "--states=all", f"--name={name}", "--format=%i|%T|%N|%r")
    if said is None:
        return None
    found: dict[str, Task] = {}
    for line in said.splitlines():
        name_, state, node, reason = (*(word.strip() for word in line.split("|")), "", "", "", "")[:4]
        if TASK.fullmatch(name_):
            task = Task(name_, _state(state), node or reason)
            if name_ not in found or task.is_live:  # listed twice, as while it is requeued: it lives
                found[name_] = task
    return found


def ends(ids: Collection[str]) -> dict[str, str]:
    """Array task -> the state it ended in, of those whose end accounting knows."""
    jobs = sorted({name.partition("_")[0] for name in ids})
    said = _answer(
        "sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", f"--jobs={','.join(jobs)}"
    )
    found = {}
    for line in (said or "").splitlines():
        name, _, state = line.partition("|")
        if name in ids and _state(state) in ENDS:  # accounting lags behind: RUNNING is no end
            found[name] = _state(state)
    return found


def cancel(jobs: Iterable[str], *, only_waiting: bool = False) -> str | None:
    """Cancel jobs, or only their tasks that have not begun; why that failed, or None."""
    done = _run(["scancel", *(["--state=PENDING"] if only_waiting else []), *sorted(jobs)])
    return None if done is not None and done.returncode == 0 else (done.stderr.strip() if done else "no answer")


def requeue(name: str) -> bool:
    """Put the array task `name` back into the queue."""
    done = _run(["scontrol", "requeue", name])
    return done is not None and done.returncode == 0


def max_array() -> int | None:
    """How many tasks an array may have on this site; None where it does not say."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", _answer("scontrol", "show", "config") or "")
    return int(found[1]) if found and int(found[1]) > 0 else None


def is_here() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("squeue") is not None


def _state(text: str) -> str:
    """`CANCELLED by 0`, `RUNNING+` -> the bare state."""
    words = text.replace("+", " ").split()
    return words[0].upper() if words else "UNKNOWN"


def _answer(*command: str) -> str | None:
    done = _run(command)
    return done.stdout if done is not None and done.returncode == 0 else None


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str] | None:
    """Run a command without the user's own defaults for it: filters would hide slots."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(FILTERS)}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, check=False, errors="replace", env=env
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
