"""A slot's own note of what it has in hand, for the driver and for `rmsweep status`."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rmsweep import atomic
from rmsweep.errors import StoreError
from rmsweep.slots import Note, Order

TICK = 1.0  # seconds
QUIET = 30.0  # seconds after which a note in which nothing changed is written again


class Diary:
    """A slot's own note, written at most once a second while it works; a context. It may fail without harm."""

    def __init__(self, folder: Path, task: str, restart: int, order: Order = Order()) -> None:  # noqa: B008
        self._order = order
        self._path, self._task, self._restart = folder / f"{task}.{restart}.json", task, restart
        self._began, self._since = time.monotonic(), dict[str, float]()
        self._changed, self._over = True, threading.Event()
        self._written, self._end = 0.0, dict[str, Any]()
        self._lock, self._thread = threading.Lock(), threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Diary:
        self._write({})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def told(self, cells: Collection[str]) -> None:
        """Fingerprints of the cells in flight."""
        now = time.monotonic()
        with self._lock:
            self._since = {cell: self._since.get(cell, now) for cell in cells}
            self._changed = True

    def ended(self, end: str, computed: int = 0, message: str = "") -> None:
        """How the slot ended, with what it leaves in flight."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(TICK)
        self._write({"end": end, "computed": computed, "message": message})

    def _tick(self) -> None:
        while not self._over.wait(TICK):
            if self._changed or (self._since and time.monotonic() - self._written > QUIET):
                self._write({})

    def _write(self, more: Mapping[str, Any]) -> None:
        """Write the note; what was said of the end stays, however long a write before it took."""
        with self._lock:
            self._end |= more
            now, self._changed = time.monotonic(), False
            self._written = now
            whole = max(now - self._began, 1e-9)
            shares = {cell: round((now - since) / whole, 3) for cell, since in self._since.items()}
            note = Note(self._task, self._restart, socket.gethostname(), 0, shares, None, "", *self._order)
            with contextlib.suppress(OSError, StoreError):
                atomic.note(self._path, json.dumps(note._replace(**self._end)._asdict()).encode())
