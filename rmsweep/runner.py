"""A worker's side: build a bank, run one unit's cells, publish their records in parts."""

from __future__ import annotations

import importlib
import json
import math
import platform
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rmsweep.bank import Bank
from rmsweep.cell import PlannedCell, build_cell
from rmsweep.errors import DesignError, Diverged, RmsweepError, StoreError
from rmsweep.reward_models import Compute
from rmsweep.schemas import COSTS, RECORD, arrow
from rmsweep.store import Store

PIPELINE = "rmsweep.pipeline:run_cell"
PUBLISH_SECONDS = 60.0
LIBRARIES = ("rmsweep", "torch", "numpy", "scipy", "scikit-learn", "lightgbm", "pyarrow")


class Job(NamedTuple):
    """One task of an engine: build a bank (`cells` holds one cell that uses it) or run a unit's cells.

    after: the job that must be done first. attempts: fingerprint -> earlier attempts.
    """

    job_id: str
    kind: str
    bank_id: str
    cells: tuple[PlannedCell, ...]
    after: str | None = None
    attempts: dict[str, int] = {}  # noqa: RUF012  never changed


class Report(NamedTuple):
    """What a worker says: `started` and `finished` cells, `done` jobs, `error` (of the store or the data)."""

    what: str
    job_id: str
    fingerprint: str = ""
    text: str = ""


class Settings(NamedTuple):
    """What all jobs of a run share. `pipeline` is set by Python callers only, never by a config."""

    root: Path
    logs: Path
    compute: Compute
    keep: str = "none"
    plugins: tuple[str, ...] = ()
    pipeline: str = PIPELINE
    publish_seconds: float = PUBLISH_SECONDS


class Stop(BaseException):
    """The worker was asked to stop: publish what is finished and leave."""


class Stopper:
    """Turns SIGTERM into Stop at the next bytecode, but never inside `shielded` work."""

    def __init__(self) -> None:
        self._shields, self._asked = 0, False

    def install(self) -> Stopper:
        """Take SIGTERM; leave Ctrl-C to the driver."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_signal)
        return self

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Work that must not be cut off, such as publishing; a signal in it counts afterwards."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
            self.check()

    def check(self) -> None:
        """Raise Stop if a signal came while shielded."""
        if self._asked and not self._shields:
            self._asked = False
            raise Stop

    def _on_signal(self, *_: object) -> None:
        self._asked = True
        self.check()


@dataclass
class Worker:
    """Runs jobs one after the other; `send` hands reports to the driver."""

    settings: Settings
    send: Callable[[Report], None]
    stopper: Stopper = field(default_factory=Stopper)
    _bank: tuple[str, Bank, dict[Any, Any]] | None = None

    def run(self, job: Job) -> None:
        """Run one job to its end; a StoreError or DataError ends the sweep, a failing cell does not."""
        try:
            if job.kind == "bank":
                self._ensure_bank(job)
            else:
                self._run_unit(job)
            self.send(Report("done", job.job_id))
        except RmsweepError as error:
            self.send(Report("error", job.job_id, text=json.dumps([type(error).__name__, str(error)])))

    def _ensure_bank(self, job: Job) -> tuple[Bank, dict[Any, Any]]:
        """The job's bank, built where it is missing or damaged, and the cache of its pure functions."""
        if self._bank is None or self._bank[0] != job.bank_id:
            store, spec = Store(self.settings.root), build_cell(job.cells[0].config)

            def generate(folder: Path) -> None:
                spec.dataset.generate(spec.base_llm, spec.size, spec.embedder, folder)

            bank = store.open_bank(job.bank_id) if store.has_bank(job.bank_id) else None
            if bank is None:
                store.publish_bank(job.bank_id, generate)
                bank = store.open_bank(job.bank_id)
            if bank is None:
                raise StoreError(f"bank {job.bank_id} is damaged as soon as it is written: check the disk")
            self._bank = (job.bank_id, bank, {})
        return self._bank[1], self._bank[2]

    def _run_unit(self, job: Job) -> None:
        module, _, name = self.settings.pipeline.partition(":")
        run_cell = getattr(importlib.import_module(module), name)
        bank, cache = self._ensure_bank(job)
        part = Part(self.settings, job)
        with open(self.settings.logs / f"{job.job_id}.log", "a", encoding="utf-8") as log:
            try:
                for cell in job.cells:
                    self.send(Report("started", job.job_id, cell.fingerprint))
                    row, cost, kept = attempt(cell, job, bank, cache, run_cell, self.settings)
                    with self.stopper.shielded():
                        part.add(row, cost, kept)
                        print(log_line(row, cost), file=log, flush=True)
                        self.send(Report("finished", job.job_id, cell.fingerprint, row["status"]))
                        part.publish_if_due()
            finally:
                with self.stopper.shielded():
                    part.publish()


def attempt(
    cell: PlannedCell,
    job: Job,
    bank: Bank,
    cache: dict[Any, Any],
    run_cell: Callable[..., Any],
    settings: Settings,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Run a cell: its record, its cost row, what is kept. Any failure is a recorded result."""
    row: dict[str, Any] = {"fingerprint": cell.fingerprint, "cell_id": cell.cell_id, "reason": None}
    cost = _cost(cell, job)
    try:
        outcome = run_cell(build_cell(cell.config), bank, settings.compute, cache, settings.keep)
    except (StoreError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        status = {Diverged: "diverged", DesignError: "skipped"}.get(type(error), "failed")
        prefix = "" if isinstance(error, RmsweepError) else f"{type(error).__name__}: "
        row |= {"status": status, "reason": f"{prefix}{error}"}
        cost["traceback"] = traceback.format_exc() if status == "failed" else None
        return row, cost, {}
    row |= {"status": "done", "golden_picked": outcome.golden_picked, **outcome.metrics}
    cost |= {f"seconds_{stage}": seconds for stage, seconds in outcome.seconds.items()}
    cost["peak_memory_mib"] = peak_memory_mib()
    return row, cost, {f"{cell.fingerprint}/{name}": array for name, array in outcome.kept.items()}


class Part:
    """The records of a unit so far; publishing replaces this attempt's earlier part, the new one first."""

    def __init__(self, settings: Settings, job: Job) -> None:
        self._store, self._unit, self._every = Store(settings.root), job.job_id, settings.publish_seconds
        self._rows: list[dict[str, Any]] = []
        self._costs: list[dict[str, Any]] = []
        self._kept: dict[str, Any] = {}
        self._published: list[Path] = []
        self._written, self._since = 0, time.monotonic()

    def add(self, row: dict[str, Any], cost: dict[str, Any], kept: dict[str, Any]) -> None:
        """Take one cell's result."""
        self._rows.append(row)
        self._costs.append(cost)
        self._kept |= kept

    def publish_if_due(self) -> None:
        """Publish when the last part is older than a minute."""
        if time.monotonic() - self._since >= self._every:
            self.publish()

    def publish(self) -> None:
        """Commit all results so far as one part, then remove the part it contains."""
        if self._written == len(self._rows):
            return
        fresh = self._store.publish_part(
            self._unit, record_table(self._rows), cost_table(self._costs), kept_bytes(self._kept)
        )
        for old in set(self._published) - set(fresh):
            old.unlink(missing_ok=True)
        self._published, self._written, self._since = fresh, len(self._rows), time.monotonic()


def record_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Records as a table; NaN and infinity are null."""
    return pa.Table.from_pylist([{k: _finite(v) for k, v in row.items()} for row in rows], schema=RECORD)


def cost_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Cost rows as a table."""
    return pa.Table.from_pylist(rows, schema=arrow(COSTS))


def kept_bytes(arrays: dict[str, Any]) -> bytes | None:
    """What `keep` asked for as one safetensors file."""
    if not arrays:
        return None
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def one_thread(settings: Settings) -> None:
    """Torch takes its thread count from a call, not only from the environment; fakes need no torch."""
    if settings.pipeline == PIPELINE:
        import torch

        torch.set_num_threads(1)


def failed_row(cell: PlannedCell, reason: str) -> dict[str, Any]:
    """The record of a cell that never came back."""
    return {"fingerprint": cell.fingerprint, "cell_id": cell.cell_id, "status": "failed", "reason": reason}


def _cost(cell: PlannedCell, job: Job) -> dict[str, Any]:
    return {
        "cell_id": cell.cell_id,
        "fingerprint": cell.fingerprint,
        "unit": job.job_id,
        "attempt": 1 + job.attempts.get(cell.fingerprint, 0),
        "host": platform.node(),
        "versions": json.dumps({"python": platform.python_version(), **library_versions()}),
    }


def library_versions() -> dict[str, str]:
    """Versions of the libraries that make the numbers: provenance, never part of a key."""
    if not _VERSIONS:
        _VERSIONS.update({name: version(name) for name in LIBRARIES})
    return _VERSIONS


_VERSIONS: dict[str, str] = {}


def peak_memory_mib() -> float:
    """Peak resident memory of this process in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def log_line(row: dict[str, Any], cost: dict[str, Any]) -> str:
    """One line of a unit's log per cell, with the traceback of a failed one."""
    seconds = sum(v for k, v in cost.items() if k.startswith("seconds_"))
    line = f"{row['cell_id']} {row['status']} {seconds:.2f}s {row['reason'] or ''}".rstrip()
    return line + (f"\n{cost['traceback']}" if cost.get("traceback") else "")


def _finite(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [_finite(v) for v in value] if isinstance(value, list) else value
