"""Named crash points of the commit protocol, for tests: RMSWEEP_CRASH_AT=stage:point:n[:action].

At the n-th time (in one process) that `stage` comes to `point`, the action happens: kill (SIGKILL, the default), exit
(without cleaning up), stop (SIGSTOP), or enospc, edquot, eio, erofs (that OSError, as if the disk had refused).
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from rmsweep.errors import ConfigError, unknown

VARIABLE = "RMSWEEP_CRASH_AT"
FILE = ("pre_tmp", "tmp_opened", "half_written", "written", "fsynced", "published", "dirsynced")
POINTS: dict[str, tuple[str, ...]] = {
    "plan": FILE,  # plan.parquet and plan.json of a sweep
    "claim": ("pre_claim", "claimed", "released"),
    "journal": ("pre_open", "opened", "half_written", "written", "pre_take", "taken"),  # cells that no part holds yet
    "bank": (*FILE, "indexed"),  # indexed: after its manifest, before its name
    "costs": FILE,
    "kept": FILE,
    "results": FILE,  # parts of records: publication is the commit
    "discard": ("pre_remove", "removed"),  # parts that a published one replaced
    "quarantine": ("pre_move", "moved"),
    "table": FILE,  # results, prompts and costs.parquet of a sweep
    "seal": FILE,  # tables.json
}
ACTIONS = ("kill", "exit", "stop", "enospc", "edquot", "eio", "erofs")


class Crash(NamedTuple):
    """Where to crash, and how."""

    stage: str
    point: str
    n: int
    action: str


reached: Counter[tuple[str, str]] = Counter()


def parse(text: str) -> Crash:
    """`stage:point:n[:action]`; raises ConfigError naming the valid choices."""
    stage, point, n, action = (*text.split(":"), *("", "", "1", "kill")[text.count(":") + 1 :])[:4]
    choices: list[tuple[str, str, Iterable[str]]] = [("stage", stage, POINTS), ("point", point, POINTS.get(stage, ()))]
    for what, name, valid in [*choices, ("action", action, ACTIONS)]:
        if name not in valid:
            raise unknown(f"{what} of {VARIABLE}", name, valid)
    if not n.isdigit() or int(n) < 1:
        raise ConfigError(f"{VARIABLE}={text}: n must be a whole number from 1")
    return Crash(stage, point, int(n), action)


def arm(text: str | None) -> None:
    """Crash there from now on, counting anew; None: nowhere."""
    global _armed
    reached.clear()
    _armed = parse(text) if text else None


def at(stage: str, point: str) -> None:
    """Say that `stage` has come to `point`."""
    reached[stage, point] += 1
    if _armed is not None and (stage, point, reached[stage, point]) == _armed[:3]:
        _act(_armed.action)


def _act(action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "exit":
        os._exit(137)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        code = getattr(errno, action.upper())
        raise OSError(code, os.strerror(code))


_armed: Crash | None = None
arm(os.environ.get(VARIABLE))
