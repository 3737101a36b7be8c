"""The local engine: worker processes on this machine, one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Annotated, Any

from pydantic import Field

from rmsweep.component import component
from rmsweep.runner import Job, Report, Settings, Stop, Worker

THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
GRACE_SECONDS = 3.0


@component("engine", version=1)
@dataclass(frozen=True)
class Local:
    """Worker processes here. workers: how many, null for one per core, 0 to run in this process."""

    workers: Annotated[int, Field(ge=0)] | None = None

    def n_workers(self, n_jobs: int) -> int:
        """Processes for so many jobs."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores if self.workers is None else self.workers, n_jobs)

    def run(
        self,
        jobs: Sequence[Job],
        settings: Settings,
        stopping: Callable[[], bool],
        on_death: Callable[[Job, str, int], Job | None],
    ) -> Iterator[Report]:
        """Reports of all jobs as they come. `on_death(job, cell in flight, signal)` says how a dead worker's job goes on."""
        if self.workers == 0:
            yield from _inline(jobs, settings, stopping)
        elif jobs:
            yield from _Pool(self.n_workers(len(jobs)), settings).run(jobs, stopping, on_death)


def _inline(jobs: Sequence[Job], settings: Settings, stopping: Callable[[], bool]) -> Iterator[Report]:
    """All jobs in this process; reports come after each job, cells' own progress through the logs."""
    reports: list[Report] = []
    worker = Worker(settings, reports.append)
    for job in jobs:
        if stopping():
            return
        worker.run(job)
        yield from reports
        reports.clear()


class _Process:
    """One worker process, the job it has, and the cell it last said to have started."""

    def __init__(self, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, settings, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.in_flight = ""

    def give(self, job: Job) -> None:
        self.job, self.in_flight = job, ""
        try:
            self.connection.send(job)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died: its sentinel says so

    def reports(self) -> Iterator[Report]:
        """What it has said; ends at the end of its pipe."""
        try:
            while self.connection.poll():
                report: Report = self.connection.recv()
                if report.what in ("started", "finished"):
                    self.in_flight = report.fingerprint if report.what == "started" else ""
                if report.what in ("done", "error"):
                    self.job = None
                yield report
        except (EOFError, ConnectionResetError):
            return

    def end(self) -> None:
        self.connection.close()
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


class _Pool:
    """Workers that pull jobs; a dead one is replaced and never takes the others along."""

    def __init__(self, n: int, settings: Settings) -> None:
        self.settings = settings
        with _one_thread():
            self.workers = [_Process(settings) for _ in range(n)]
        self.done: set[str] = set()

    def run(
        self, jobs: Sequence[Job], stopping: Callable[[], bool], on_death: Callable[[Job, str, int], Job | None]
    ) -> Iterator[Report]:
        waiting = list(jobs)
        try:
            while waiting or any(w.job for w in self.workers):
                if stopping():
                    yield from self._stop()
                    return
                self._hand_out(waiting)
                yield from self._listen()
                yield from self._replace_dead(waiting, on_death)
        finally:
            for worker in self.workers:
                worker.end()

    def _hand_out(self, waiting: list[Job]) -> None:
        for worker in self.workers:
            ready = next((j for j in waiting if j.after is None or j.after in self.done), None)
            if worker.job is None and ready is not None and worker.process.is_alive():
                waiting.remove(ready)
                worker.give(ready)

    def _listen(self) -> Iterator[Report]:
        wait([w.connection for w in self.workers] + [w.process.sentinel for w in self.workers], timeout=0.2)
        for worker in self.workers:
            yield from self._heard(worker)

    def _heard(self, worker: _Process) -> Iterator[Report]:
        for report in worker.reports():
            if report.what == "done":
                self.done.add(report.job_id)
            yield report

    def _replace_dead(self, waiting: list[Job], on_death: Callable[[Job, str, int], Job | None]) -> Iterator[Report]:
        for i, worker in enumerate(self.workers):
            if worker.process.is_alive():
                continue
            yield from self._heard(worker)  # its last words may still be in the pipe
            if worker.job is not None:
                again = on_death(worker.job, worker.in_flight, -(worker.process.exitcode or 0))
                waiting[:0] = [again] if again is not None else []
            worker.end()
            if waiting:
                with _one_thread():
                    self.workers[i] = _Process(self.settings)
            else:
                worker.job = None

    def _stop(self) -> Iterator[Report]:
        """Ask all workers to publish and leave; what does not within seconds is killed."""
        for worker in self.workers:
            worker.process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        while any(w.process.is_alive() for w in self.workers) and time.monotonic() < deadline:
            yield from self._listen()
            time.sleep(0.02)


def _serve(connection: Connection, settings: Settings, driver: int) -> None:
    """A worker process: take jobs until the driver is gone or asks to stop."""
    worker = Worker(settings, connection.send)
    try:
        worker.stopper.install()
        _follow(driver)
        _prepare(settings)
        while True:
            worker.run(connection.recv())
            worker.stopper.check()
    except (Stop, EOFError, BrokenPipeError, ConnectionResetError):
        return


def _follow(driver: int) -> None:
    """Stop as if asked to, once the driver is no longer there."""

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _prepare(settings: Settings) -> None:
    """One thread, and the run's plug-ins."""
    from rmsweep import plugins
    from rmsweep.runner import one_thread

    one_thread(settings)
    for file in settings.plugins:
        plugins.load(file)


class _one_thread:
    """The environment in which workers start: numeric libraries read their thread counts when they are loaded."""

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in THREADS}
        os.environ.update(dict.fromkeys(THREADS, "1"))

    def __exit__(self, *_: Any) -> None:
        for name, value in self._before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
