"""Clocks that stand still or jump, and files of 1970 and 2100: the same tables, and nothing is computed again."""

import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

from torture import scene

HOUR, YEAR_2100 = 3600.0, 4102444800.0
REAL = time.time
CLOCKS: dict[str, Callable[[], float]] = {
    "frozen": lambda: 1.7e9,
    "an hour back": lambda: REAL() - HOUR,
    "an hour on": lambda: REAL() + HOUR,
    "back and forth": lambda: REAL() + HOUR * (-1) ** time.perf_counter_ns(),
    "1970": lambda: 0.0,
}
STAMPS = {"now": None, "1970": 0.0, "2100": YEAR_2100}


def run(base: Path, seed: int, *, show: Callable[[list[Any]], Iterable[Any]] = iter) -> scene.Report:
    """Every clock with every date of the files: a new sweep, and half a sweep that is gone on with."""
    report = scene.Report("clock", seed)
    with scene.quick():
        plan, half = scene.small(), scene.small(1)
        truth = scene.truth_of(plan, base / "truth")
        scene.run(half, base / "half")
        cases = [(clock, stamp, start) for clock in CLOCKS for stamp in STAMPS for start in ("half", "truth")]
        for i, (clock, stamp, start) in enumerate(show(cases)):
            folder = base / f"case{i}"
            folder.mkdir()
            root = scene.copied(base / start, folder / "root")
            if (when := STAMPS[stamp]) is not None:
                _date(root, when)
            with mock.patch.object(time, "time", CLOCKS[clock]):
                report.add({"clock": clock, "files": stamp, "start": start}, scene.settle(root, truth))
            shutil.rmtree(folder)
    return report


def _date(root: Path, when: float) -> None:
    for path in [root, *root.rglob("*")]:
        os.utime(path, (when, when), follow_symlinks=False)
