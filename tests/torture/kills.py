"""SIGKILL at random moments, of a worker, the driver or all at once: the same bytes in the end as without.

Drivers are forked from one process that has imported everything. Their workers are processes of their own: forked
from the driver too (quick), or spawned as in a real run.
"""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from rmsweep.plan import Plan
from torture import scene

CELL = "0.005"  # seconds
WORKERS = 2
WINDOW = {"fork": (0.01, 0.3), "spawn": (0.3, 1.6)}  # seconds from a driver's start to the kill
ORPHANS = 20.0  # seconds that workers may outlive their driver


def run(
    base: Path, seed: int, n: int, *, start: str = "fork", show: Callable[[list[Any]], Iterable[Any]] = iter
) -> scene.Report:
    """`n` kills in sweeps that are run again until they end. start: of workers, fork or spawn."""
    rng, report = random.Random(seed), scene.Report("kills", seed)
    with scene.quick(), mock.patch.dict(os.environ, FAKE_SECONDS=CELL):
        plan = scene.small(5)
        with mock.patch.dict(os.environ, FAKE_SECONDS="0"):
            truth = scene.truth_of(plan, base / "truth")
        root, sweeps, groups = base / "sweep0", 0, list[int]()
        (computed := base / "computed").mkdir()
        for _ in show(list(range(n))):
            while (killed := _driven(root, plan, rng, start, groups, computed)) is None:
                sweeps += 1
                report.add({"sweep": sweeps}, _end(root, truth, groups, computed))
                root = base / f"sweep{sweeps}"
            report.counts[killed] = report.counts.get(killed, 0) + 1
        report.add({"sweep": sweeps + 1}, _end(root, truth, groups, computed))
        report.counts["sweeps"] = sweeps + 1
    return report


def _end(root: Path, truth: scene.Truth, groups: list[int], computed: Path) -> list[str]:
    """Go on to the end by the same command; cells that lost their workers too often are taken up by it again."""
    _await_orphans(groups)
    in_flight = WORKERS * len(groups)
    groups.clear()
    with mock.patch.dict(os.environ, FAKE_SECONDS="0"):
        problems = scene.settle(root, truth, before=scene.taken_from(computed), in_flight=in_flight)
    shutil.rmtree(root)
    return problems


def _driven(root: Path, plan: Plan, rng: random.Random, start: str, groups: list[int], computed: Path) -> str | None:
    """One driver with two workers: what was killed (worker, driver, all), or None when it came to its end first."""
    with mock.patch.dict(os.environ, FAKE_LEDGER=str(computed)):
        pid = _driver(root, plan, start)
    groups.append(pid)
    deadline = time.monotonic() + rng.uniform(*WINDOW[start])
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return None
        time.sleep(0.002)
    kind, workers = rng.choice(["worker", "driver", "all"]), _workers(pid)
    if kind == "worker" and workers:
        _kill(rng.choice(workers))
        time.sleep(rng.uniform(0, 0.1))
    kind = "driver" if kind == "worker" and not workers else kind
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL) if kind == "all" else os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return kind


def _driver(root: Path, plan: Plan, start: str) -> int:
    """Fork a driver that leads a process group of its own."""
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # it may have done so itself, or be gone
            os.setpgid(pid, pid)
        return pid
    try:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        with _workers_by(start):
            scene.run(plan, root, workers=WORKERS)
        os._exit(0)
    except BaseException:
        os._exit(scene.TRACED)


@contextlib.contextmanager
def _workers_by(start: str) -> Iterator[None]:
    """Workers start as children of this warm process where `start` is fork."""
    if start == "spawn":
        yield
        return
    context = multiprocessing.get_context("fork")
    with mock.patch.object(multiprocessing, "get_context", lambda method: context):
        yield


def _workers(pid: int) -> list[int]:
    """The worker processes of a driver."""
    found = []
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _await_orphans(groups: Iterable[int]) -> None:
    """Wait until the workers of killed drivers have left: they may still publish, and the count must be exact."""
    deadline = time.monotonic() + ORPHANS
    while time.monotonic() < deadline and any(map(_is_alive, groups)):
        time.sleep(0.02)


def _is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
