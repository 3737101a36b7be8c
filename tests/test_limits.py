"""Workers that die, hang or take too much memory: one bad cell takes nobody along, and its cause is named."""

import json
import time

import pyarrow.parquet as pq
import pytest
from fake_pipeline import fake_plan, fake_run

from rmsweep import causes, memory, schedule
from rmsweep.engines import Stop, local
from rmsweep.engines.local import Local
from rmsweep.store import Store


def fault(monkeypatch, **by_seed):
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({k.lstrip("s"): v for k, v in by_seed.items()}))


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    folder = tmp_path / "ledger"
    folder.mkdir()
    monkeypatch.setenv("FAKE_LEDGER", str(folder))


def rows(root, table="results"):
    found = pq.read_table(root / "sweeps" / "s" / f"{table}.parquet").to_pylist()
    return {row["seed"] if table == "results" else row["cell_id"]: row for row in found}


def test_a_hung_cell_is_ended(tmp_path, monkeypatch):
    """Catches a worker that waits for ever: ended twice, recorded as timeout; the others are done."""
    fault(monkeypatch, s2="hang")
    summary = fake_run(fake_plan(5), tmp_path, engine=Local(workers=2, cell_minutes=1.5 / 60))
    assert summary.counts["done"] == 4
    assert rows(tmp_path)[2]["cause"] == "timeout" and "engine.cell_minutes" in rows(tmp_path)[2]["reason"]


def test_a_slow_unit_of_quick_cells_is_not_hung(tmp_path, monkeypatch):
    """Catches a limit of the unit in place of the cell."""
    monkeypatch.setenv("FAKE_SECONDS", "0.2")
    summary = fake_run(fake_plan(20), tmp_path, engine=Local(workers=1, cell_minutes=1.5 / 60))
    assert summary.counts["done"] == 20


def test_a_hung_bank_is_ended(tmp_path, monkeypatch):
    """Catches a sweep that waits for ever for its first bank."""
    fault(monkeypatch, bank="hang")
    summary = fake_run(fake_plan(2), tmp_path, engine=Local(workers=1, bank_minutes=1 / 60))
    assert summary.counts["failed"] == 2 and {row["cause"] for row in rows(tmp_path).values()} == {"timeout"}


@pytest.mark.skipif(memory.used_by(1) is None and memory.available() is None, reason="no /proc")
def test_a_cell_that_takes_too_much_memory(tmp_path, monkeypatch):
    """Ended as oom, tried at the end with the memory of all, then failed; the others are done."""
    fault(monkeypatch, s1="hog")
    monkeypatch.setenv("FAKE_HOG", str(1 << 30))
    summary = fake_run(fake_plan(6), tmp_path, engine=Local(workers=2, memory_gib=0.4))
    assert summary.counts["done"] == 5
    assert rows(tmp_path)[1]["cause"] == "oom" and "memory_gib" in rows(tmp_path)[1]["reason"]


def test_the_last_memory_of_the_machine(tmp_path, monkeypatch, ledger):
    """Catches a machine whose kernel picks the victim: the largest worker goes, and has another try at the end."""
    fault(monkeypatch, s1="hog_once")
    monkeypatch.setenv("FAKE_HOG", str(1 << 29))
    limit = memory.available().left - (1 << 28)

    real = memory.available
    monkeypatch.setattr(memory, "available", lambda: now if (now := real()).left > limit else memory.Memory(0, 1 << 30))
    assert fake_run(fake_plan(6), tmp_path, engine=Local(workers=2)).counts["done"] == 6
    attempts = sorted(row["attempt"] for row in rows(tmp_path, "costs").values())
    assert attempts == [1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_error_has_one_more_try_at_the_end(tmp_path, monkeypatch, ledger, workers):
    """Catches MemoryError as a final failure, and a cell that is retried for ever."""
    fault(monkeypatch, s0="short_once", s1="short")
    summary = fake_run(fake_plan(4), tmp_path, workers=workers)
    assert summary.counts["done"] == 3 and rows(tmp_path)[1]["cause"] == "oom"
    attempts = {row["attempt"] for row in rows(tmp_path, "costs").values()}
    assert attempts == {1, 2}


@pytest.mark.parametrize(
    ("how", "cause"),
    [("raise", "bug"), ("data", "data"), ("diverge", "diverged"), ("segfault", "bug"), ("terminated", "preempted")],
)
def test_causes(tmp_path, monkeypatch, how, cause):
    """Each ending in its class; skipped and done cells have none."""
    fault(monkeypatch, s0=how, s1="skip")
    monkeypatch.setitem(schedule.MAX_DEATHS, "preempted", 2)
    fake_run(fake_plan(3), tmp_path, workers=1)
    found = {seed: row["cause"] for seed, row in rows(tmp_path).items()}
    assert found == {0: cause, 1: None, 2: None}
    states = Store(tmp_path).states(c.fingerprint for c in fake_plan(3).cells)
    assert sorted(str(s.cause) for s in states.values()) == sorted([cause, "None", "None"])


def test_sigkill_is_classed_by_what_the_kernel_says():
    """The kernel counts its kills; where it says nothing, memory is the likeliest."""
    assert causes.of_death(-9, None, True) == causes.of_death(-9, None, None) == "oom"
    assert causes.of_death(-9, None, False) == causes.of_death(143, None, None) == "preempted"
    assert causes.of_death(-9, "timeout", True) == "timeout" and causes.of_death(1, None, None) == "bug"


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("OutOfMemoryError", "CUDA", "oom"),
        ("RuntimeError", "[enforce fail] DefaultCPUAllocator: can't allocate memory", "oom"),
        ("LightGBMError", "std::bad_alloc", "oom"),
        ("RuntimeError", "shapes differ", "bug"),
    ],
)
def test_errors_of_libraries(name, text, cause):
    """Catches libraries' own words for a lack of memory classed as bugs."""
    assert causes.of_error(name, text) == cause


def test_one_bad_cell_that_kills_between_cells(tmp_path, monkeypatch, ledger):
    """Many cells in one unit and several killers: every other cell is done, none is computed more than thrice."""
    fault(monkeypatch, **{f"s{i}": "segfault" for i in (3, 4, 11)})
    summary = fake_run(fake_plan(16), tmp_path, workers=1)
    assert summary.counts["done"] == 13 and summary.counts["failed"] == 3
    assert all(rows(tmp_path)[i]["status"] == "done" for i in range(16) if i not in (3, 4, 11))


@pytest.mark.parametrize(("times", "failed"), [(1, 0), (2, 1), (99, 6)])
def test_a_unit_that_fails_as_a_whole(tmp_path, monkeypatch, times, failed):
    """Its cells are tried one by one: catches a trouble of one cell, or of a moment, that takes all."""
    monkeypatch.setattr("fake_pipeline.OPENED", [])
    monkeypatch.setattr("rmsweep.units.UNITS_PER_WORKER", 1)
    fault(monkeypatch, open=times)
    counts = fake_run(fake_plan(6), tmp_path).counts
    assert (counts["done"], counts["failed"]) == (6 - failed, failed)
    assert all("no such bank" in row["reason"] for row in rows(tmp_path).values() if row["status"] == "failed")


def test_an_interrupted_lack_of_memory_is_no_failure(tmp_path, monkeypatch, ledger):
    """Catches a provisional record: the second try was due, Ctrl-C came first, and the same command has to give it."""
    fault(monkeypatch, s1="short_once")
    finished = schedule.Schedule._finished

    def interrupted(self, *rest):
        finished(self, *rest)
        if self._last:
            raise Stop(2)

    with monkeypatch.context() as patch:
        patch.setattr(schedule.Schedule, "_finished", interrupted)
        stopped = fake_run(fake_plan(4), tmp_path)
        assert stopped.counts["failed"] == 0 and stopped.n_left == stopped.n_missing == 4 - stopped.counts["done"]
    assert fake_run(fake_plan(4), tmp_path).counts["done"] == 4


def test_every_cell_at_the_end_has_its_turn(tmp_path, monkeypatch, ledger):
    """Catches a queue that ends where one of its cells was done by somebody else meanwhile."""
    fault(monkeypatch, **{f"s{i}": "short_once" for i in range(3)})
    plan, at_the_end = fake_plan(3), schedule.Schedule._at_the_end

    def meanwhile(self, cells):
        at_the_end(self, cells)
        if len(self._last) == 3:
            self.store.publish_part("ab" * 12, *records_of(other, plan.cells[0].fingerprint))

    fake_run(plan, tmp_path / "other")
    other = Store(tmp_path / "other")
    for path in (tmp_path / "ledger").glob("died-*"):
        path.unlink()
    monkeypatch.setattr(schedule.Schedule, "_at_the_end", meanwhile)
    summary = fake_run(plan, tmp_path / "root")
    assert summary.counts["done"] == 3 and summary.n_computed == 5 and summary.n_left == 0


def records_of(store, key):
    """Record and cost row of a cell, as publish_part takes them."""
    return [
        [r for r in table.to_pylist() if r["fingerprint"] == key]
        for table in (store.records([key]), store.costs([key]))
    ]


@pytest.mark.parametrize("how", ["preempted", "bank"])
def test_what_failed_for_no_fault_of_its_own_is_taken_up_again(tmp_path, monkeypatch, how):
    """Catches cells that stay failed because of one bad moment of the machine or of their bank."""
    fault(monkeypatch, **({"bank": "raise"} if how == "bank" else {"s1": "terminated"}))
    assert fake_run(fake_plan(3), tmp_path, workers=1).counts["failed"] == (3 if how == "bank" else 1)
    fault(monkeypatch, s0="raise")
    assert fake_run(fake_plan(3), tmp_path, workers=1).counts["done"] == (2 if how == "bank" else 3)
    fault(monkeypatch)
    assert fake_run(fake_plan(3), tmp_path).n_computed == 0  # a bug stays until it is asked for


def test_the_last_failure_counts(tmp_path, monkeypatch):
    """Catches a table that shows the first failure after a retry failed otherwise."""
    plan = fake_plan(2)
    fault(monkeypatch, s0="raise")
    fake_run(plan, tmp_path)
    fault(monkeypatch, s0="data")
    fake_run(plan, tmp_path, retry=frozenset(c.fingerprint for c in plan.cells))
    assert rows(tmp_path)[0]["cause"] == "data" and rows(tmp_path, "costs")[plan.cells[0].cell_id]["attempt"] == 2


@pytest.mark.parametrize(("how", "workers"), [("raise", 0), ("segfault", 1)])
def test_failures_alike_stop_early_whatever_their_message(tmp_path, monkeypatch, how, workers):
    """Catches 12,960 failures whose messages name the cell, or that kill their workers."""
    monkeypatch.setattr(schedule, "MAX_SAME_FAILURES", 3)
    monkeypatch.setattr("rmsweep.units.UNITS_PER_WORKER", 8)
    fault(monkeypatch, **{f"s{i}": how for i in range(16)})
    summary = fake_run(fake_plan(16), tmp_path, workers=workers)
    assert summary.n_left > 0 and any("stopped early" in note for note in summary.notes)


def test_many_small_workers_share_the_blame(monkeypatch):
    """Catches a guard that waits for one large worker where many equal ones fill the machine."""

    class Small:
        def memory(self):
            return 8 << 30

    monkeypatch.setattr(memory, "available", lambda: memory.Memory(1 << 30, 512 << 30))
    workers = [Small() for _ in range(62)]
    assert local._too_large(workers) in workers and local._too_large(workers[:2]) is None


def test_a_limit_below_what_a_worker_needs_to_start(tmp_path):
    """Catches advice about __main__ for a limit that ends every worker before its first cell."""
    summary = fake_run(fake_plan(1), tmp_path, engine=Local(workers=1, memory_gib=0.0001))
    assert summary.counts["failed"] == 1 and "engine.memory_gib" in rows(tmp_path)[0]["reason"]


def test_memory_of_control_groups(tmp_path, monkeypatch):
    """Catches a container's or a job's limit that is not seen, in its own group or one above, version 1 or 2; and a
    mapped bank of many GB, which the kernel can drop, counted as memory that is gone."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 900 kB\n")
    monkeypatch.setattr(memory, "PROC", proc)
    monkeypatch.setattr(memory, "CGROUPS", groups)
    (proc / "self/cgroup").write_text("0::/job/step\n")
    (groups / "job/step").mkdir(parents=True)
    (groups / "job/step/memory.max").write_text("max\n")
    assert memory.available() == (900 * 1024, 1000 * 1024)
    (groups / "job/memory.max").write_text("500000\n")
    (groups / "job/memory.current").write_text("300000\n")
    (groups / "job/memory.stat").write_text("anon 1\nactive_file 60000\ninactive_file 40000\n")
    assert memory.available() == (300000, 500000)
    (proc / "self/cgroup").write_text("4:memory:/a\n1:cpu:/\n")
    (groups / "memory/a").mkdir(parents=True)
    (groups / "memory/a/memory.limit_in_bytes").write_text("400000")
    (groups / "memory/a/memory.usage_in_bytes").write_text("390000")
    assert memory.available() == (10000, 400000)
    (proc / "meminfo").unlink()
    assert memory.available() is None and memory.n_kills() is None and memory.used_by(1) is None


def test_a_stopped_driver_blames_nobody(tmp_path, monkeypatch):
    """Ctrl-Z for longer than cell_minutes, then fg: catches cells timed out for the time that nobody ran."""
    fault(monkeypatch)
    monkeypatch.setenv("FAKE_SECONDS", "0.6")
    monkeypatch.setattr(local, "PAUSE", 0.5)
    wait, slept = local._Pool._wait, []

    def wait_(self, source, timeout):
        wait(self, source, timeout)
        if not slept and any(w.ready and w.task for w in self.workers):
            slept.append(1)
            self.workers[0]._heard -= 60  # as if a minute had gone by for both
            self.enforced -= 60

    monkeypatch.setattr(local._Pool, "_wait", wait_)
    began = time.monotonic()
    summary = fake_run(fake_plan(3), tmp_path, engine=Local(workers=1, cell_minutes=0.5))
    assert summary.counts["done"] == 3 and slept and time.monotonic() - began < 30
    assert {row["attempt"] for row in rows(tmp_path, "costs").values()} == {1}
