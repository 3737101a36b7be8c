"""A worker's side: one part per attempt, every ending of a cell, nothing lost when stopped."""

import contextlib
import errno
import os
import signal
import threading
import time

import pytest
from fake_pipeline import WORK, fake_plan
from waiting import wait_until

from rmsweep import runner
from rmsweep.engines import Channel, Signals, Stop
from rmsweep.errors import StoreError
from rmsweep.journals import Finished
from rmsweep.reward_models import Compute
from rmsweep.runner import BankTask, CellTask, Job, Part, UnitTask
from rmsweep.store import Store

OWNER = "host-0123abcd-1.0123456789ab"


class Quiet:
    """A channel that collects."""

    def __init__(self):
        self.sent = []

    def send(self, data):
        self.sent.append(data)

    def check(self):
        pass

    def shield(self):
        return contextlib.nullcontext()


def unit(root, n=4, keep="none"):
    plan = fake_plan(n)
    job = Job(root, root / "logs", OWNER, Compute(), keep, {}, "fake_pipeline:WORK")
    cells = tuple(CellTask(c.cell_id, c.fingerprint, c.labels, c.config, 1) for c in plan.cells)
    return UnitTask(job, "ab" * 12, plan.cells[0].bank_id, cells), plan


@pytest.fixture
def ready(tmp_path):
    store = Store(tmp_path, heal=True)
    store.prepare()
    task, plan = unit(tmp_path)
    assert runner.build_bank(BankTask(task.job, task.bank_id, plan.cells[0].config), Quiet()).end == "ok"
    return task, store


def test_every_ending_of_a_cell(ready, monkeypatch):
    """A failure is a recorded result; the others go on; what the table cannot hold fails its cell only."""
    task, store = ready
    monkeypatch.setenv("FAKE_FAULTS", '{"0": "raise", "1": "diverge", "2": "stray_column"}')
    channel = Quiet()
    assert runner.run_unit(task, channel).end == "ok"
    states = store.states(c.fingerprint for c in task.cells)
    found = [states[c.fingerprint] for c in task.cells]
    assert [s.status for s in found] == ["failed", "diverged", "failed", "done"]
    assert found[0].reason == "ValueError: seed 0 does not work" and found[1].reason == "loss is NaN"
    assert "no_such_column" in found[2].reason
    assert [m[0] for m in channel.sent] == ["start", "cell"] * 4
    costs = store.costs(c.fingerprint for c in task.cells).to_pylist()
    assert sum("Traceback" in (c["traceback"] or "") for c in costs) == 2
    table = store.records([task.cells[1].fingerprint]).to_pylist()[0]
    assert table["golden_improvement"] is None and table["bon_golden"] is None  # never 0
    log = (task.job.logs / f"{task.unit_id}.log").read_text()
    assert log.count("attempt 1") == 4 and "does not work" in log and '"seed": 3' in log


def test_an_undefined_metric_is_null(ready, monkeypatch):
    """NaN in a table would poison every mean and count as a number."""
    task, store = ready
    monkeypatch.setenv("FAKE_FAULTS", '{"0": "nan"}')
    assert runner.run_unit(task, Quiet()).end == "ok"
    (record,) = store.records([task.cells[0].fingerprint]).to_pylist()
    assert record["status"] == "done" and record["spearman"] is None


def test_one_part_per_attempt(ready):
    """Merged parts replace each other: files grow with units, not with publications."""
    task, store = ready
    with Part(store, task.unit_id, Quiet(), store.journal(OWNER, task.unit_id), seconds=1000) as part:
        for cell, run in runner._runs(task, runner._Opened(None, {})):
            part.add(runner.run_cell(task, cell, run))
            part.flush()
            assert len(os.listdir(store.folder / "results")) == len(os.listdir(store.folder / "costs")) == 1
            assert cell.fingerprint in store.done([cell.fingerprint])
    assert len(store.done(c.fingerprint for c in task.cells)) == 4


def test_a_long_cell_does_not_hold_back_the_others(ready, monkeypatch):
    """Published by the clock while the next cell still runs."""
    task, store = ready
    monkeypatch.setattr(runner, "FLUSH_SECONDS", 0.05)
    seen = []
    run = WORK.run

    def slow(config, *rest):
        if config["seed"] == 3:
            wait_until(lambda: len(store.done(c.fingerprint for c in task.cells)) >= 3, 10)
            seen.append(len(store.done(c.fingerprint for c in task.cells)))
        return run(config, *rest)

    monkeypatch.setattr(type(WORK), "run", lambda self, *args: slow(*args))
    runner.run_unit(task, Quiet())
    assert seen == [3]


def test_a_full_disk_is_fatal_and_loses_nothing_before(ready, monkeypatch):
    """The reply says so; what was published stays."""
    task, store = ready

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        reply = runner.run_unit(task, Quiet())
    assert reply.end == "fatal" and "No space" in reply.error and store.done([task.cells[0].fingerprint]) == {}
    assert runner.run_unit(task, Quiet()).end == "ok"


def test_the_publishing_thread_reports_trouble(ready, monkeypatch):
    """Catches an error that dies with its thread."""
    task, store = ready

    def refuse(*_, **__):
        raise StoreError("full")

    finished = Finished({"fingerprint": "f", "cell_id": "c", "status": "done"}, {"traceback": None}, {})
    with (
        pytest.raises(StoreError, match="full"),
        Part(store, task.unit_id, Quiet(), store.journal(OWNER, task.unit_id), seconds=0.01) as part,
    ):
        monkeypatch.setattr(store, "publish_part", refuse)
        part.add(finished)
        wait_until(lambda: part._error is not None, 10)
        part.add(finished)


def test_a_damaged_bank_is_asked_for(ready, tmp_path):
    """The unit does not run on it: the driver has it built again."""
    task, _ = ready
    runner._store.cache_clear()
    path = tmp_path / "store" / "banks" / task.bank_id / "golden.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    reply = runner.run_unit(task, Quiet())
    assert reply.end == "no_bank" and "quarantine" in reply.notes[0]


def test_stopped_in_a_cell_publishes_those_before(ready, monkeypatch):
    """SIGTERM in the third cell: two cells are stored, and the worker leaves."""
    task, store = ready
    signals = Signals()
    before = signal.signal(signal.SIGTERM, signals.handle)
    run = WORK.run

    def stopping(config, *rest):
        if config["seed"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return run(config, *rest)

    monkeypatch.setattr(type(WORK), "run", lambda self, *args: stopping(*args))
    try:
        with pytest.raises(Stop):
            runner.run_unit(task, Channel(lambda data: None, signals))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert set(store.done(c.fingerprint for c in task.cells)) == {c.fingerprint for c in task.cells[:2]}


def test_signals_wait_for_shields():
    """Catches a publication cut in two; the signal is not lost, and comes once."""
    signals = Signals()
    with pytest.raises(Stop), signals.shield():
        with signals.shield():
            signals.handle(15, None)
        assert signals.received == 15
    with signals.shield():
        pass


def test_a_driver_that_is_gone_stops_the_task():
    """A broken pipe must not be recorded as the cell's failure."""

    def gone(data):
        raise BrokenPipeError

    with pytest.raises(Stop):
        Channel(gone, Signals()).send(1)


def test_kept_arrays_are_stored(tmp_path):
    """keep=scores: one file per part, arrays by cell."""
    store = Store(tmp_path, heal=True)
    store.prepare()
    task, plan = unit(tmp_path, keep="scores")
    runner.build_bank(BankTask(task.job, task.bank_id, plan.cells[0].config), Quiet())
    runner.run_unit(task, Quiet())
    assert all(store.kept(c.fingerprint)["scores"].shape == (2, 3) for c in task.cells)
    assert len(os.listdir(store.folder / "kept")) == 1


def test_one_thread_is_restored():
    """A notebook keeps its threads."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    with runner.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before and threading.active_count() >= 1
