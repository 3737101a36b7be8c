"""What a run says while it works: a bar on a terminal, few plain lines elsewhere, running.json for `rmsweep status`."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rmsweep import atomic

STATUS_FILE = "running.json"
SLOTS = 60.0  # seconds between two lines that say nothing but what slots do


class Progress:
    """Cells done, failed, left and banks being built: a bar on a terminal, few plain lines elsewhere.

    Also keeps running.json in the sweep's folder for `rmsweep status`, unless the folder is None.
    """

    def __init__(self, name: str, total: int, folder: Path | None, *, show: bool) -> None:
        self.counts: Counter[str] = Counter()
        self._name, self._total, self._show = name, total, show
        self._file = None if folder is None else folder / STATUS_FILE
        self._n_banks = self._n_elsewhere = 0
        self._slots = ""
        self._bar: Any = None
        self._start = self._last_file = time.monotonic()
        self._last_line = float("-inf")
        self._last_n = 0

    def __enter__(self) -> Progress:
        if self._show and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, desc=self._name, unit="cell", dynamic_ncols=True, smoothing=0.05)
        self._save()
        self._refresh(force=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._refresh(force=True)
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.close()
        with contextlib.suppress(OSError):
            if self._file is not None:
                os.unlink(self._file)

    def banks(self, change: int) -> None:
        """Banks that wait or are being built: one more, one less."""
        self._n_banks += change
        self._refresh()

    def elsewhere(self, n_cells: int) -> None:
        """How many cells wait for another run that computes them."""
        if n_cells != self._n_elsewhere:
            self._n_elsewhere = n_cells
            self._refresh(force=True)

    def slots(self, text: str) -> None:
        """What the cluster's slots are doing, in a few words."""
        if text != self._slots:
            self._slots = text
            self._refresh(force=self._bar is not None or time.monotonic() - self._last_line > SLOTS)

    def cell(self, status: str, change: int = 1) -> None:
        """A cell ended with `status`; change = -1 takes that back."""
        self.counts[status] += change
        self._refresh(change)

    @property
    def shows(self) -> bool:
        """Whether anybody is told anything."""
        return self._show

    def say(self, text: str) -> None:
        """Tell something at once, above the bar where there is one."""
        if not self._show:
            return
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.write(f"rmsweep: {text}", file=sys.stderr)
            else:
                print(f"rmsweep: {text}", file=sys.stderr)

    def stored(self, statuses: Iterable[str]) -> None:
        """How all cells ended that have a record so far."""
        before, self.counts = self._n, Counter(statuses)
        self._refresh(self._n - before)

    @property
    def _n(self) -> int:
        return sum(self.counts.values())

    def _refresh(self, change: int = 0, force: bool = False) -> None:
        now = time.monotonic()
        if now - self._last_file > 5:
            self._last_file = now
            self._save()
        try:
            self._say(now, self._text(), change, force)
        except OSError:  # the terminal is closed: nobody is left to tell, and the work goes on
            if self._bar is not None:
                self._bar.disable = True
            self._bar, self._show = None, False

    def _text(self) -> str:
        parts = [f"{n} {status}" for status, n in self.counts.items() if n]
        if self._n_banks:
            parts.append(f"{self._n_banks} bank{'s' * (self._n_banks > 1)} to build")
        if self._n_elsewhere:
            parts.append(f"{self._n_elsewhere} in the hands of another run")
        return ", ".join([*parts, *filter(None, [self._slots])])

    def _say(self, now: float, text: str, change: int, force: bool) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(change)
            if not change:
                self._bar.refresh()
        elif self._show and (force or (now - self._last_line > 10 and self._n - self._last_n >= self._total / 20)):
            self._last_line, self._last_n = now, self._n
            eta = self.seconds_left()
            left = "" if eta is None or not eta else f", about {eta:.0f} s left"
            print(f"{self._name}: {self._n} of {self._total} cells ({text or 'starting'}){left}", file=sys.stderr)

    def seconds_left(self) -> float | None:
        """Seconds to go at the mean speed so far; None before the first cell."""
        elapsed = time.monotonic() - self._start
        return elapsed * (self._total - self._n) / self._n if self._n else None

    def _save(self) -> None:
        if self._file is None:
            return
        state = {
            "host": platform.node(),
            "pid": os.getpid(),
            "total": self._total,
            "computed": self._n,
            "eta_seconds": self.seconds_left(),
        }
        with contextlib.suppress(OSError):  # a convenience; a full disk shows where it matters
            atomic.note(self._file, json.dumps(state).encode())
