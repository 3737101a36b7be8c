"""Why a cell has no metrics, in one word that `rmsweep retry --cause` and the table share."""

from __future__ import annotations

import signal
from typing import Literal

Cause = Literal["oom", "timeout", "diverged", "data", "bug", "preempted"]
CAUSES: dict[Cause, str] = {
    "oom": "memory ran out",
    "timeout": "a cell or bank took longer than engine.cell_minutes or engine.bank_minutes",
    "diverged": "training gave NaN or infinity",
    "data": "the data must not be used",
    "bug": "any other error, with its traceback in costs.parquet",
    "preempted": "the worker was stopped from outside",
}
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory", "bad_alloc")
ASKED_TO_LEAVE = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def of_error(name: str, text: str) -> Cause:
    """The cause of an exception, given the name of its type and its message."""
    if name in ("MemoryError", "OutOfMemoryError") or any(words in text.lower() for words in OUT_OF_MEMORY):
        return "oom"
    return "data" if name == "DataError" else "bug"


def of_death(code: int | None, why: Literal["timeout", "oom"] | None, kernel_killed: bool | None) -> Cause:
    """The cause of a worker's death.

    code: exit code, -9 for SIGKILL; why: why we ended it, if we did. kernel_killed: whether the kernel has ended
    a process for want of memory since; None where it does not tell.
    """
    if why is not None:
        return why
    number = -code if code is not None and code < 0 else (code or 0) - 128
    if number == signal.SIGKILL:
        return "preempted" if kernel_killed is False else "oom"
    return "preempted" if number in ASKED_TO_LEAVE else "bug"


def describe_death(code: int | None, why: Literal["timeout", "oom"] | None) -> str:
    """How a worker ended, for a reason."""
    if why == "timeout":
        return "stopped, having been at it for longer than engine.cell_minutes or engine.bank_minutes allow"
    if why == "oom":
        return "stopped, holding more than engine.memory_gib, or the machine's last memory"
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    return f"killed by signal {-code}"
