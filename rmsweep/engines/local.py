"""Engine `local`: worker processes on this machine, one task at a time each.

The engine knows no cells. It asks a source for tasks (a function named by import path, and its payload), runs each in
a worker and hands back what happened: messages, a result, an exception, or the death of the worker. What that means
is the source's business; truth is what the store holds.

Workers are spawned with one thread each and ignore Ctrl-C. SIGTERM raises Stop in them at the next bytecode, so that
a task can publish what it has. They stop the same way by themselves when their driver is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import Field

from rmsweep.component import component, silent
from rmsweep.errors import RmsweepError

THREADS = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS", "BLIS_NUM_THREADS",
)  # fmt: skip
SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 3.0  # seconds between SIGTERM and SIGKILL
ORPHAN_POLL, ORPHAN_GRACE = 0.5, 10.0
MAX_EARLY_DEATHS = 5


class Task(NamedTuple):
    """Work for one worker: `function` ("package.module:name") is called as function(payload, channel)."""

    id: str
    function: str
    payload: Any


class Event(NamedTuple):
    """What happened to a task.

    kind: message (data: what the task sent), finished (its result), raised (type name, message, traceback), or died
    (the worker's exit code, -9 for SIGKILL).
    """

    task_id: str
    kind: Literal["message", "finished", "raised", "died"]
    data: Any


class Source(Protocol):
    """Where tasks come from and events go; None from `next` means: nothing to do at present."""

    def next(self) -> Task | None:
        """The next task for a free worker."""
        ...

    def handle(self, event: Event) -> None:
        """Take note of an event; may make further tasks available."""
        ...


class Stop(BaseException):
    """A signal asked this process to stop."""


class Signals:
    """Turns the first signal into Stop in the main thread, held back inside `shield`; later ones call `again`."""

    def __init__(self, again: Callable[[int], None] = lambda signum: None) -> None:
        self.received: int | None = None
        self._depth, self._raised, self._again = 0, False, again

    def handle(self, signum: int, frame: object) -> None:
        """The signal handler."""
        if self.received is not None:
            self._again(signum)
            return
        self.received = signum
        self.check()

    def check(self) -> None:
        """Raise Stop if a signal has come and was not raised yet."""
        if self.received is not None and not self._depth and not self._raised:
            self._raised = True
            raise Stop(self.received)

    @contextlib.contextmanager
    def shield(self) -> Iterator[None]:
        """No Stop inside, for what must not be cut in two; it is raised on the way out."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        self.check()


class Channel:
    """What a task may use of its engine."""

    def __init__(self, send: Callable[[Any], None], signals: Signals) -> None:
        self._send, self._signals = send, signals

    def send(self, data: Any) -> None:
        """Tell the source something; stops the task when nobody listens any more."""
        with self._signals.shield():  # half a message would garble all later ones
            try:
                self._send(data)
            except OSError:
                raise Stop(signal.SIGTERM) from None

    def check(self) -> None:
        """Raise Stop if a signal has come, even where foreign code swallowed the first one."""
        if self._signals.received is not None:
            raise Stop(self._signals.received)

    def shield(self) -> contextlib.AbstractContextManager[None]:
        """See Signals.shield."""
        return self._signals.shield()


@component("engine", version=1)
@dataclass(frozen=True)
class Local:
    """Worker processes on this machine.

    workers: how many; null for one per CPU (at most one per task), 0 to run inside this process.
    """

    workers: Annotated[int, Field(ge=0)] | None = silent(None)

    def n_workers(self, n_tasks: int) -> int:
        """Workers for `n_tasks` tasks; 0 means inside this process."""
        if self.workers == 0:
            return 0
        return max(1, min(self.workers or n_cpus(), n_tasks))

    def run(self, source: Source, n_tasks: int, warm: str | None = None) -> int | None:
        """Run tasks until the source has none and none runs; the number of the signal that stopped it, or None.

        n_tasks: how many tasks there may be at once. warm: a function that workers call before their first task.
        """
        n_workers = self.n_workers(n_tasks)
        if n_workers == 0:
            return _run_here(source)
        return _Pool(n_workers, warm).run(source)


def n_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load(path: str) -> Any:
    """The object that "package.module:name" names; only Python callers name one, configs never do."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


# -- inside this process -----------------------------------------------------------------------------------


def _run_here(source: Source) -> int | None:
    signals = Signals(again=_exit_hard)
    with _handlers(signals):
        try:
            while (task := source.next()) is not None:
                channel = Channel(lambda data, key=task.id: source.handle(Event(key, "message", data)), signals)  # type: ignore[misc]
                source.handle(_outcome(task, channel))
                channel.check()
        except Stop:
            pass
    return signals.received


def _outcome(task: Task, channel: Channel) -> Event:
    try:
        return Event(task.id, "finished", load(task.function)(task.payload, channel))
    except Exception as error:
        return Event(task.id, "raised", (type(error).__name__, str(error), traceback.format_exc()))


@contextlib.contextmanager
def _handlers(signals: Signals) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to `signals`; Python allows that in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signals.handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _exit_hard(signum: int) -> None:
    os._exit(128 + signum)


# -- the driver's side of worker processes -----------------------------------------------------------------


class _Worker:
    """One worker process and the task it runs."""

    def __init__(self, warm: str | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.task: Task | None = None
        self.ready = False
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, os.getpid(), warm), daemon=True)
        with _one_thread(), _blocked():
            process.start()
        theirs.close()  # so that the pipe ends when the worker does
        self.process: BaseProcess = process

    def assign(self, task: Task) -> bool:
        """Give the idle worker a task; False when it is dead already."""
        try:
            self.connection.send(task)
        except OSError:
            return False
        self.task = task
        return True

    def kill(self) -> None:
        """End the process now."""
        self.process.kill()
        self.process.join()
        self.connection.close()

    def receive(self) -> Iterator[tuple[str, Any]]:
        """Everything the worker has sent; ends with ("died", exit code) when it is gone."""
        try:
            while self.connection.poll():  # also True at the end of the pipe, where recv raises
                yield self.connection.recv()
            if self.process.is_alive():
                return
            while self.connection.poll():  # sent between the two looks
                yield self.connection.recv()
        except (EOFError, OSError):
            pass
        self.process.join(GRACE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()
        yield "died", self.process.exitcode


class _Pool:
    """Up to `size` workers, replaced when they die."""

    def __init__(self, size: int, warm: str | None) -> None:
        self.size, self.warm = size, warm
        self.workers: list[_Worker] = []
        self.early_deaths, self.stopping = 0, False
        self.signals = Signals(again=self._exit_hard)

    def run(self, source: Source) -> int | None:
        with _handlers(self.signals), contextlib.suppress(Stop), self.signals.shield():
            try:
                while self.signals.received is None and self._assign(source):
                    self._wait(source, 0.25)
                if self.signals.received is None:
                    self._dismiss()
            finally:
                self._stop(source)
        return self.signals.received

    def _assign(self, source: Source) -> bool:
        """Give tasks to idle workers; False when nothing runs and nothing is left."""
        while self._n_running() < self.size and (task := source.next()) is not None:
            while not (worker := self._idle()).assign(task):  # it died while it was idle
                worker.kill()
                self._bury(worker)
        while self._n_running() and len(self.workers) < self.size:
            self._spawn()  # ready when the next tasks are
        return self._n_running() > 0

    def _n_running(self) -> int:
        return sum(worker.task is not None for worker in self.workers)

    def _idle(self) -> _Worker:
        """A worker without a task: one that is ready, one that soon will be, or a new one."""
        idle = sorted((w for w in self.workers if w.task is None), key=lambda w: not w.ready)
        return idle[0] if idle else self._spawn()

    def _spawn(self) -> _Worker:
        worker = _Worker(self.warm)
        self.workers.append(worker)
        return worker

    def _wait(self, source: Source, timeout: float) -> None:
        """Wait for something to happen and tell the source."""
        ends: dict[Any, _Worker] = {}
        for worker in self.workers:
            ends[worker.connection] = ends[worker.process.sentinel] = worker
        for worker in {id(ends[end]): ends[end] for end in wait(list(ends), timeout)}.values():
            for kind, data in worker.receive():
                self._pass_on(source, worker, kind, data)

    def _pass_on(self, source: Source, worker: _Worker, kind: str, data: Any) -> None:
        task = worker.task
        if kind == "ready":
            worker.ready, self.early_deaths = True, 0
            return
        if kind == "died":
            self._bury(worker)
        if kind != "message":
            worker.task = None
        if task is not None and not (kind == "died" and self.stopping):
            source.handle(Event(task.id, kind, data))  # type: ignore[arg-type]

    def _bury(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        self.early_deaths += not worker.ready
        if self.early_deaths >= MAX_EARLY_DEATHS and not self.stopping:
            raise RmsweepError(
                f"{self.early_deaths} worker processes in a row died before their first task (exit code "
                f"{worker.process.exitcode}). In a script, call rmsweep below `if __name__ == '__main__':`; "
                "else see the messages above, or use workers=0 to run inside this process"
            )

    def _dismiss(self) -> None:
        """The normal end: workers leave by themselves."""
        for worker in self.workers:
            if not worker.ready:  # still importing
                worker.process.terminate()
            with contextlib.suppress(OSError):
                worker.connection.send(None)
        deadline = time.monotonic() + GRACE
        for worker in self.workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))

    def _stop(self, source: Source) -> None:
        """SIGTERM to all workers, then SIGKILL to those that do not leave within GRACE."""
        self.stopping = True
        for worker in self.workers:
            worker.process.terminate()
        deadline = time.monotonic() + GRACE
        while self.workers and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(Exception):  # on the way out: the first error is the one to report
                self._wait(source, left)
        for worker in self.workers:
            worker.kill()
        self.workers.clear()

    def _exit_hard(self, signum: int) -> None:
        for worker in self.workers:
            worker.process.kill()
        os._exit(128 + signum)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Environment in which numerical libraries of a new process start one thread."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Signals wait: a process started here has them pending until it has its handlers."""
    resource_tracker.ensure_running()  # its first start would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# -- the worker's side -------------------------------------------------------------------------------------


def _work(connection: Connection, driver: int, warm: str | None) -> None:
    """A worker process: run tasks until told to leave, stopped, or left alone."""
    signals = Signals()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the driver decides
    signal.signal(signal.SIGTERM, signals.handle)
    threading.Thread(target=_watch, args=(driver,), daemon=True).start()
    channel = Channel(lambda data: connection.send(("message", data)), signals)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if warm is not None:
            with contextlib.suppress(Exception):  # a task that needs it will say why it cannot be had
                load(warm)()
        with signals.shield():
            connection.send(("ready", None))
        while (task := connection.recv()) is not None:
            event = _outcome(task, channel)
            with signals.shield():
                connection.send((event.kind, event.data))
            channel.check()
    except Stop:
        raise SystemExit(128 + signal.SIGTERM) from None
    except (EOFError, OSError):
        pass  # the driver is gone


def _watch(driver: int) -> None:
    """Stop this worker when its driver is gone: politely, then for good."""
    while os.getppid() == driver:
        time.sleep(ORPHAN_POLL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE)
    os._exit(128 + signal.SIGTERM)
