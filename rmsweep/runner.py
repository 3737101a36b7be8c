"""A worker's side: build one bank, or run the cells of one unit and publish what they give.

A cell's record is a pure function of its config and its bank; times, memory, host and tracebacks go to its cost row.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rmsweep import causes, hardware, plugins, provenance
from rmsweep.causes import Cause
from rmsweep.cell import bank_inputs, build_cell, generate_bank
from rmsweep.engines._slot import task_name
from rmsweep.errors import ConfigError, DataError, DesignError, Diverged, StoreError
from rmsweep.fingerprint import file_sha256
from rmsweep.journals import Finished, Journal
from rmsweep.parts import table_of
from rmsweep.reward_models import Compute
from rmsweep.schemas import RECORD
from rmsweep.store import KEPT_BYTES, Store
from rmsweep.text import printable
from rmsweep.versions import STAGES

PIPELINE = "rmsweep.runner:pipeline"
FLUSH_SECONDS = 60.0


class Work(Protocol):
    """What is run: the real pipeline, or a cheap stand-in of the tests."""

    def build(self, config: Mapping[str, Any], folder: Path, inputs: Mapping[str, str]) -> None:
        """Write the bank of a cell's config into `folder`; `inputs`: sha256 of every file it is made from, by name."""
        ...

    def open(self, folder: Path) -> Any:
        """The bank in `folder`."""
        ...

    def run(self, config: Mapping[str, Any], bank: Any, compute: Compute, cache: dict[Any, Any], keep: str) -> Any:
        """A cell's pipeline.Outcome."""
        ...

    def run_cells(
        self, configs: Sequence[Mapping[str, Any]], bank: Any, compute: Compute, cache: dict[Any, Any], keep: str
    ) -> Iterator[tuple[int, Callable[[], Any]]]:
        """On a GPU: every cell's index with what computes its Outcome, to be called in this order."""
        ...


class Channel(Protocol):
    """What the engine offers a task."""

    def send(self, data: Any) -> None:
        """Tell the driver something."""
        ...

    def check(self) -> None:
        """Stop here if that was asked for."""
        ...

    def shield(self) -> contextlib.AbstractContextManager[None]:
        """Do not stop inside."""
        ...


class Job(NamedTuple):
    """What all tasks of a run share. owner: of its claims; plugins: path -> sha256; work: import path of a Work; logs:
    a folder.
    """

    root: Path
    logs: Path
    owner: str
    compute: Compute
    keep: str
    plugins: dict[str, str]
    work: str = PIPELINE


class BankTask(NamedTuple):
    """A bank to build out of any of its cells' configs; inputs: sha256 of every file it is made from, by name.

    code: as in schemas.COSTS.
    """

    job: Job
    bank_id: str
    config: dict[str, Any]
    inputs: dict[str, str] = {}  # noqa: RUF012  never changed
    code: str | None = None


class CellTask(NamedTuple):
    """One cell of a unit; attempt counts from 1. code, identity: as in schemas.COSTS."""

    cell_id: str
    fingerprint: str
    labels: dict[str, Any]
    config: dict[str, Any]
    attempt: int
    code: str | None = None
    identity: str | None = None


class UnitTask(NamedTuple):
    """A unit to run. last_try: a lack of memory is final; otherwise it is reported but not recorded."""

    job: Job
    unit_id: str
    bank_id: str
    cells: tuple[CellTask, ...]
    last_try: bool = False


class Reply(NamedTuple):
    """How a task ended: ok; no_bank: the bank is absent or was corrupt; fatal: the store cannot be written;
    refused: this machine or a plug-in is not what the sweep is pinned to. `notes`: corrupt artefacts that were found.
    """

    end: str
    error: str | None = None
    notes: tuple[str, ...] = ()


class _Pipeline:
    """The real thing; imports torch only when used."""

    def build(self, config: Mapping[str, Any], folder: Path, inputs: Mapping[str, str]) -> None:
        spec = build_cell(config)
        generate_bank(spec, folder)
        files = bank_inputs(spec)
        for name, sha in inputs.items():  # after reading them: what was planned is what was read
            if file_sha256(files[name]) != sha:
                raise DataError(f"{files[name]}: has changed since the sweep was planned; run the same command again")

    def open(self, folder: Path) -> Any:
        from rmsweep.bank import Bank

        warm()  # so that one_thread finds torch
        return Bank.read(folder)

    def run(self, config: Mapping[str, Any], bank: Any, compute: Compute, cache: dict[Any, Any], keep: str) -> Any:
        from rmsweep.pipeline import run_cell

        return run_cell(build_cell(config), bank, compute, cache, keep)

    def run_cells(
        self, configs: Sequence[Mapping[str, Any]], bank: Any, compute: Compute, cache: dict[Any, Any], keep: str
    ) -> Iterator[tuple[int, Callable[[], Any]]]:
        from rmsweep.pipeline import run_cells

        return run_cells([build_cell(config) for config in configs], bank, compute, cache, keep)


pipeline = _Pipeline()


def warm() -> None:
    """Import what every cell needs, while another worker builds the first bank."""
    import rmsweep.pipeline  # noqa: F401


def build_bank(task: BankTask, channel: Channel) -> Reply:
    """Build one bank unless a sound one is there."""
    store, work = _store(task.job.root), _load(task.job.work)
    log = Log(task.job.logs / f"bank-{task.bank_id}.log")
    try:
        _check_job(task.job)
        _check_code(task.job, [(task.code, task.config)], ("generate",))
        start = time.perf_counter()
        with one_thread():
            store.build_bank(task.bank_id, lambda folder: work.build(task.config, folder, task.inputs))
        log.line(f"bank {task.bank_id} ready after {time.perf_counter() - start:.2f} s")
    except StoreError as error:
        return Reply("fatal", str(error), _notes(store))
    except _Refused as error:
        return Reply("refused", str(error), _notes(store))
    except Exception:
        log.line(traceback.format_exc())
        raise
    return Reply("ok", notes=_notes(store))


def run_unit(task: UnitTask, channel: Channel) -> Reply:
    """Run a unit's cells; a part is published at the end, when stopped, and at least every 60 s."""
    store = _store(task.job.root)
    log = Log(task.job.logs / f"{task.unit_id}.log")
    try:
        _check_job(task.job)
        _check_code(task.job, {cell.code: (cell.code, cell.config) for cell in task.cells}.values())
        opened = _open_bank(task.job, task.bank_id)
        if opened is None:
            return Reply("no_bank", notes=_notes(store))
        log.line(f"unit {task.unit_id}: {len(task.cells)} cells on bank {task.bank_id}; {_whereabouts()}")
        with one_thread(), Part(store, task.unit_id, channel, store.journal(task.job.owner, task.unit_id)) as part:
            for cell, run in _runs(task, opened):
                channel.check()
                channel.send(("start", cell.fingerprint))
                finished = run_cell(task, cell, run)
                if finished.record["cause"] != "oom" or task.last_try:
                    part.add(finished)
                log.cell(cell, finished)
                record, trace = finished.record, finished.cost["traceback"]
                channel.send(("cell", cell.fingerprint, record["status"], record["cause"], trace))
    except StoreError as error:
        return Reply("fatal", str(error), _notes(store))
    except _Refused as error:
        return Reply("refused", str(error), _notes(store))
    return Reply("ok", notes=_notes(store))


def _whereabouts() -> str:
    """Where this process runs, as those who look for its other words need it."""
    slot = f", slot {task_name()}" if "SLURM_JOB_ID" in os.environ else ""
    return f"host {socket.gethostname()}, process {os.getpid()}{slot}"


class _Opened(NamedTuple):
    bank: Any
    cache: dict[Any, Any]


def _runs(task: UnitTask, opened: _Opened) -> Iterator[tuple[CellTask, Callable[[], Any]]]:
    """Every cell with what computes its outcome: one by one, or on a GPU in stacks that their first cell fits."""
    job, work = task.job, _load(task.job.work)
    if job.compute.device == "cpu":
        for cell in task.cells:
            yield cell, functools.partial(work.run, cell.config, opened.bank, job.compute, opened.cache, job.keep)
        return
    configs = [cell.config for cell in task.cells]
    for i, run in work.run_cells(configs, opened.bank, job.compute, opened.cache, job.keep):
        yield task.cells[i], run


def run_cell(task: UnitTask, cell: CellTask, run: Callable[[], Any]) -> Finished:
    """Run one cell and say how it ended; only a signal or trouble with the store gets out of here."""
    try:
        outcome = run()
        metrics = {name: None if _is_nan(value) else value for name, value in outcome.metrics.items()}
        record = {**_record(cell, "done", None, None), **metrics}
        record["golden_picked"] = np.asarray(outcome.golden_picked, dtype=np.float32)
        table_of([record], RECORD)  # what the table cannot hold fails this cell, not its unit
    except StoreError:
        raise
    except Diverged as error:
        return unfinished(task.unit_id, cell, "diverged", "diverged", str(error))
    except DesignError as error:
        return unfinished(task.unit_id, cell, "skipped", None, str(error))
    except Exception as error:
        name, text = type(error).__name__, str(error)
        cause = causes.of_error(name, text)
        return unfinished(task.unit_id, cell, "failed", cause, f"{name}: {text}", traceback.format_exc())
    cost = {**_cost(task.unit_id, cell), **{f"seconds_{k}": v for k, v in outcome.seconds.items()}}
    nothing = {"nothing": np.zeros(0)} if task.job.keep != "none" else {}  # a model without a safe format
    return Finished(record, cost, outcome.kept or nothing)


def unfinished(
    unit_id: str, cell: CellTask, status: str, cause: Cause | None, reason: str, trace: str | None = None
) -> Finished:
    """A cell that gave no metrics; the reason on one line."""
    cost = {**_cost(unit_id, cell), "traceback": trace and printable(trace)}  # UTF-8 cannot hold everything
    return Finished(_record(cell, status, printable(" ".join(reason.split())), cause), cost, {})


def _is_nan(value: Any) -> bool:
    return isinstance(value, float | np.floating) and bool(np.isnan(value))


def _record(cell: CellTask, status: str, reason: str | None, cause: Cause | None) -> dict[str, Any]:
    return {
        "fingerprint": cell.fingerprint,
        "cell_id": cell.cell_id,
        "status": status,
        "reason": reason,
        "cause": cause,
        "attempt": None if status == "done" else cell.attempt,  # equal numbers are equal records
    }


def _cost(unit_id: str, cell: CellTask) -> dict[str, Any]:
    return {
        "cell_id": cell.cell_id,
        "fingerprint": cell.fingerprint,
        "unit": unit_id,
        "peak_memory_mib": _peak_memory_mib(),
        "attempt": cell.attempt,
        "host": socket.gethostname(),
        "versions": provenance.versions(),
        "code": cell.code,
        "identity": cell.identity,
        "traceback": None,
    }


def _peak_memory_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class Part:
    """The finished cells of one attempt at a unit, kept in one published part, and in a journal until then.

    Leaving the context publishes what is not published yet, also when the worker is stopped. A thread publishes every
    60 s, so that others see them, and a power cut takes no more; what is not safe in the journal is published at once.
    Every publication holds all cells so far; the part before goes only after it.
    """

    def __init__(
        self, store: Store, unit_id: str, channel: Channel, journal: Journal, seconds: float | None = None
    ) -> None:
        self._store, self._unit_id, self._channel, self._journal = store, unit_id, channel, journal
        self._seconds = FLUSH_SECONDS if seconds is None else seconds
        self._cells: list[Finished] = []
        self._kept: dict[str, NDArray[Any]] = {}
        self._published, self._files = 0, list[Path]()
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def add(self, cell: Finished) -> None:
        """Take a finished cell; raises what the publishing thread met."""
        with self._channel.shield(), self._lock:
            self._cells.append(cell)
            self._kept.update({f"{cell.record['fingerprint']}/{k}": v for k, v in cell.kept.items()})
            is_safe = self._journal.add(cell)
            if self._error is not None:
                raise self._error
            if not is_safe:
                self._publish()

    def flush(self) -> None:
        """Publish all cells so far as one part, then remove the part that it replaces."""
        with self._lock:
            self._publish()

    def _publish(self) -> None:
        if self._published == len(self._cells):
            return
        records, costs = [c.record for c in self._cells], [c.cost for c in self._cells]
        files = self._store.publish_part(self._unit_id, records, costs, self._kept)
        self._store.discard(path for path in self._files if path not in files)
        self._files, self._published = files, len(self._cells)
        self._journal.drop()
        if sum(array.nbytes for array in self._kept.values()) > KEPT_BYTES:
            self._files = [path for path in files if path.parent.name != "kept"]
            self._kept = {}

    def _tick(self) -> None:
        while not self._closed.wait(self._seconds):
            try:
                self.flush()
            except BaseException as error:
                self._error = error
                return

    def __enter__(self) -> Part:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._closed.set()
        with self._channel.shield():
            try:
                if not isinstance(error, StoreError):
                    self.flush()
            finally:
                with self._lock:
                    self._journal.close()


class Log:
    """One unit's log: which cells ran, how long, and what went wrong. A log that cannot be written stops nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def line(self, text: str) -> None:
        """Append a line."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8", errors="backslashreplace") as handle:
                handle.write(printable(text.rstrip("\n")) + "\n")

    def cell(self, cell: CellTask, finished: Finished) -> None:
        """One finished cell."""
        record, cost = finished.record, finished.cost
        spent = " ".join(f"{k[8:]} {v:.2f} s" for k, v in cost.items() if k.startswith("seconds_") and v is not None)
        reason = f" ({record['reason']})" if record["reason"] else ""
        labels = json.dumps(cell.labels, sort_keys=True, default=str)
        self.line(f"{record['status']}{reason} cell {cell.cell_id} attempt {cell.attempt} {spent} {labels}")
        if cost["traceback"]:
            self.line(cost["traceback"])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Numerical libraries use one thread inside: the bits of a sum depend on how it is split."""
    import threadpoolctl

    with threadpoolctl.threadpool_limits(limits=1):
        torch = sys.modules.get("torch")
        if torch is None:
            yield
            return
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@functools.cache
def _store(root: Path) -> Store:
    """The store of this process: a bank is verified once per process."""
    return Store(root, heal=True)


def _notes(store: Store) -> tuple[str, ...]:
    """What was found corrupt since the last reply."""
    notes = tuple(store.corrupt)
    store.corrupt.clear()
    return notes


def _load(path: str) -> Any:
    from rmsweep.engines import load

    return load(path)


class _Refused(Exception):
    """What the sweep is pinned to, a plug-in or the hardware, is not here: no cell can be run."""


def _check_job(job: Job) -> None:
    """Import the plug-ins; refuse one that is no longer the file of the fingerprints, and unfit hardware."""
    if trouble := hardware.problem(*job.compute):
        raise _Refused(f"{socket.gethostname()}: {trouble}; a sweep never mixes arithmetics")
    for path, sha in job.plugins.items():
        try:
            same = plugins.load(path) == sha
        except ConfigError as error:
            raise _Refused(str(error)) from error
        if not same:
            raise _Refused(f"--plugin {path} has changed since this run began; start the run again")


def _check_code(
    job: Job, planned: Iterable[tuple[str | None, Mapping[str, Any]]], stages: Sequence[str] = tuple(STAGES)
) -> None:
    """Refuse where the code on disk is not that of the plan: a worker that starts later would import it.

    planned: column `code` and config of cells.
    """
    for code, config in planned:
        if code is None or job.work != PIPELINE:
            continue
        now, then = provenance.code_of(build_cell(config)), json.loads(code)
        if changed := [stage for stage in stages if now[stage] != then[stage]]:
            raise _Refused(
                f"rmsweep's code of {', '.join(changed)} has changed since this run began; start the run again, which "
                "plans it anew"
            )


_LAST: dict[tuple[Path, str, str], _Opened] = {}


def _open_bank(job: Job, bank_id: str) -> _Opened | None:
    """The bank and what is cached of it; one bank at a time, so that memory is bounded."""
    key = (job.root, bank_id, job.work)
    folder = _store(job.root).bank(bank_id)
    if folder is None:
        _LAST.pop(key, None)
        return None
    if key not in _LAST:
        _LAST.clear()
        _LAST[key] = _Opened(_load(job.work).open(folder), {})
    return _LAST[key]
