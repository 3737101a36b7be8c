"""The driver: nothing twice, nothing lost, one bad cell or worker takes nobody along."""

import json
import os
import pty
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fake_pipeline import fake_plan, fake_run
from waiting import wait_until

from rmsweep import execute, status
from rmsweep.engines.local import Local
from rmsweep.errors import RmsweepError, StoreError
from rmsweep.store import Store


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """Counts computed cells and built banks, over all processes."""
    folder = tmp_path / "ledger"
    folder.mkdir()
    monkeypatch.setenv("FAKE_LEDGER", str(folder))
    return lambda what: sum(name.startswith(what) for name in os.listdir(folder))


def table(root, name="s"):
    return (Path(root) / "sweeps" / name / "results.parquet").read_bytes()


def states(root, name="s"):
    rows = pq.read_table(Path(root) / "sweeps" / name / "results.parquet").to_pylist()
    return {row["seed"]: (row["status"], row["reason"]) for row in rows}


def fault(monkeypatch, **by_seed):
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({k.lstrip("s"): v for k, v in by_seed.items()}))


def test_the_same_bytes_with_any_workers(tmp_path, ledger):
    """Inside the process, one worker, two workers; each bank and cell once."""
    plan = fake_plan(5, (0.5, 1.0), worlds=(0, 1))
    for workers in (0, 1, 2):
        summary = fake_run(plan, tmp_path / str(workers), workers)
        assert summary.counts == {"done": 20, "failed": 0, "diverged": 0, "skipped": 0} and summary.n_computed == 20
    assert table(tmp_path / "0") == table(tmp_path / "1") == table(tmp_path / "2")
    assert ledger("cell") == 60 and ledger("bank") == 6


def test_a_second_run_computes_nothing(tmp_path, ledger):
    """And another sweep reuses what it shares; the same table again."""
    fake_run(fake_plan(4), tmp_path)
    first = table(tmp_path)
    again = fake_run(fake_plan(4), tmp_path, workers=2)
    assert again.n_computed == 0 and ledger("cell") == 4 and table(tmp_path) == first
    assert fake_run(fake_plan(6, name="other"), tmp_path).n_computed == 2 and ledger("bank") == 1


def test_one_name_is_the_union(tmp_path):
    """The table of a name that was used before holds both grids."""
    fake_run(fake_plan(2), tmp_path)
    assert fake_run(fake_plan(2, (3.0,)), tmp_path).counts["done"] == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_failures_are_results(tmp_path, monkeypatch, workers):
    """Each ending with its reason; the others go on; failed ones are not run again until asked."""
    fault(monkeypatch, s0="raise", s1="diverge", s2="skip")
    summary = fake_run(fake_plan(5), tmp_path, workers)
    assert summary.counts == {"done": 2, "failed": 1, "diverged": 1, "skipped": 1}
    assert states(tmp_path)[0] == ("failed", "ValueError: seed 0 does not work")
    monkeypatch.setenv("FAKE_FAULTS", "{}")
    assert fake_run(fake_plan(5), tmp_path, workers).n_computed == 0


def test_retry(tmp_path, monkeypatch):
    """A new record replaces the failed one; a cell that fails again shows its last attempt; done cells stay."""
    plan = fake_plan(4)
    fault(monkeypatch, s0="raise", s1="raise")
    fake_run(plan, tmp_path)
    fault(monkeypatch, s1="raise")
    summary = fake_run(plan, tmp_path, retry=frozenset(c.fingerprint for c in plan.cells))
    assert summary.n_computed == 2 and [states(tmp_path)[s][0] for s in (0, 1)] == ["done", "failed"]
    costs = {r["cell_id"]: r["attempt"] for r in pq.read_table(tmp_path / "sweeps" / "s" / "costs.parquet").to_pylist()}
    assert [costs[c.cell_id] for c in plan.cells] == [2, 2, 1, 1]


def test_retry_survives_a_dead_worker(tmp_path, monkeypatch, ledger):
    """Catches a retried cell that counts as stored because of its old failed record."""
    plan = fake_plan(4)
    fault(monkeypatch, s1="raise", s2="raise")
    fake_run(plan, tmp_path, workers=1)
    fault(monkeypatch, s1="die_once")
    fake_run(plan, tmp_path, workers=1, retry=frozenset(c.fingerprint for c in plan.cells))
    assert {s for s, _ in states(tmp_path).values()} == {"done"}


def test_a_cell_that_kills_its_worker(tmp_path, monkeypatch):
    """Tried again, recorded with the cause; all others are done."""
    fault(monkeypatch, s2="segfault")
    summary = fake_run(fake_plan(6), tmp_path, workers=2)
    assert summary.counts["done"] == 5
    assert states(tmp_path)[2] == ("failed", "worker killed by signal 11, 2 times with this cell")


def test_a_cell_that_kills_its_worker_once(tmp_path, monkeypatch, ledger):
    """The second try counts."""
    fault(monkeypatch, s2="die_once")
    assert fake_run(fake_plan(6), tmp_path, workers=1).counts["done"] == 6
    costs = pq.read_table(tmp_path / "sweeps" / "s" / "costs.parquet").to_pylist()
    assert sorted(row["attempt"] for row in costs) == [1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("how", "reason"), [("raise", "bank: RuntimeError: no such world"), ("die", "bank: worker killed by signal 9")]
)
def test_a_bank_that_cannot_be_built(tmp_path, monkeypatch, how, reason):
    """Its cells fail with the bank's reason; the sweep ends."""
    fault(monkeypatch, bank=how)
    summary = fake_run(fake_plan(3), tmp_path, workers=1)
    assert summary.counts["failed"] == 3 and all(r.startswith(reason) for _, r in states(tmp_path).values())


def test_a_damaged_bank_is_built_again(tmp_path, ledger):
    """Found by a worker in the middle of a run: set aside, built once, reported."""
    fake_run(fake_plan(2), tmp_path, workers=1)
    path = next((tmp_path / "store" / "banks").glob("*/golden.npy"))
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    summary = fake_run(fake_plan(8), tmp_path, workers=2)
    assert summary.counts["done"] == 8 and ledger("bank") == 2 and any("quarantine" in n for n in summary.notes)


def test_a_damaged_part_is_computed_again(tmp_path, ledger):
    """The same bytes in the end, and a note."""
    fake_run(fake_plan(4), tmp_path)
    good = table(tmp_path)
    for path in (tmp_path / "store" / "results").iterdir():
        path.write_bytes(path.read_bytes()[:-3])
    summary = fake_run(fake_plan(4), tmp_path)
    assert summary.n_computed == 4 and table(tmp_path) == good and any("quarantine" in n for n in summary.notes)


def test_everything_failing_alike_stops_early(tmp_path, monkeypatch):
    """One systematic mistake must not cost a night."""
    monkeypatch.setattr(execute.units, "MAX_CELLS", 5)
    monkeypatch.setattr("fake_pipeline.apply", lambda fault, seed: 1 / 0)
    summary = fake_run(fake_plan(60), tmp_path)
    assert (
        20 <= summary.counts["failed"] < 60 and summary.n_missing and any("stopped early" in n for n in summary.notes)
    )


def test_workers_that_cannot_start(tmp_path, monkeypatch):
    """Catches an endless respawning."""
    monkeypatch.setattr("rmsweep.engines._worker._work", _dies)
    with pytest.raises(RmsweepError, match="__main__"):
        fake_run(fake_plan(2), tmp_path, workers=1)


def _dies(*_):
    os._exit(1)


def test_an_idle_worker_may_die(tmp_path, monkeypatch):
    """Killed while another still runs the last unit: the driver goes on."""
    monkeypatch.setenv("FAKE_SECONDS", "3")
    before = set(children())
    killed = []

    def kill_one():
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not killed:
            time.sleep(0.1)
            ready = [p for p in set(children()) - before if b"spawn_main" in cmdline(p)]
            if len(ready) == 2:
                time.sleep(1.0)
                for pid in ready:
                    os.kill(pid, signal.SIGKILL)  # both: the busy one and the idle one
                killed.extend(ready)

    thread = threading.Thread(target=kill_one)
    thread.start()
    assert fake_run(fake_plan(2), tmp_path, workers=2).counts["done"] == 2 and len(killed) == 2
    thread.join()


def children():
    return [int(p) for p in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]


def cmdline(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


DRIVER = """
import sys
sys.path.insert(0, {tests!r})
from fake_pipeline import fake_plan, fake_run
if __name__ == "__main__":
    summary = fake_run(fake_plan({n}), {root!r}, workers={workers})
    print("interrupted", summary.interrupted, "done", summary.counts["done"], flush=True)
"""


def start(tmp_path, n=40, workers=2, seconds="0.2", ignore=None):
    script = tmp_path / "driver.py"
    script.write_text(
        DRIVER.format(tests=str(Path(__file__).parent), n=n, root=str(tmp_path / "root"), workers=workers)
    )
    env = {**os.environ, "FAKE_SECONDS": seconds}
    command = [sys.executable, str(script)]
    # inherited: ignored as from nohup, or not, even where the tests themselves run under nohup
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL if ignore is None else signal.SIG_IGN)
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    signal.signal(signal.SIGHUP, before)
    wait_until(lambda: list((tmp_path / "root").glob("sweeps/s/logs/[0-9a-f]*.log")))
    return process


def wait_for_a_cell(tmp_path):
    """Until some unit's log tells of a finished cell."""
    logs = tmp_path / "root/sweeps/s/logs"
    wait_until(lambda: any("done cell" in log.read_text() for log in logs.glob("[0-9a-f]*.log")))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(tmp_path, number, workers):
    """Ends within seconds with tables of what is finished; the same command continues to the same bytes."""
    process = start(tmp_path, workers=workers)
    wait_for_a_cell(tmp_path)
    began = time.monotonic()
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert time.monotonic() - began < 10 and process.returncode == 0  # 3.5 s where the machine is idle
    word, signum, _, done = out.split()
    assert (word, int(signum)) == ("interrupted", number) and 0 < int(done) < 40
    assert fake_run(fake_plan(40), tmp_path / "root").n_computed == 40 - int(done)
    fake_run(fake_plan(40), tmp_path / "whole")
    assert table(tmp_path / "root") == table(tmp_path / "whole")


def test_workers_without_a_driver_leave(tmp_path, monkeypatch):
    """kill -9 of the driver in the middle of long cells: workers publish those before, and go by themselves."""
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"1": "slow", "6": "slow"}))  # the second cell of each first unit
    process = start(tmp_path)
    time.sleep(1.5)
    workers = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    workers = [p for p in workers if b"spawn_main" in cmdline(p)]
    process.kill()
    deadline = time.monotonic() + 8
    while any(cmdline(p) for p in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [p for p in workers if cmdline(p)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert workers and not left
    monkeypatch.delenv("FAKE_FAULTS")
    assert fake_run(fake_plan(40), tmp_path / "root").n_computed == 38


def test_second_ctrl_c_exits_hard(tmp_path):
    """Catches a driver that cannot be stopped."""
    process = start(tmp_path, n=4, seconds="0.2")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    process.communicate(timeout=10)
    assert process.returncode in (0, 128 + signal.SIGINT, -signal.SIGINT)


def test_nohup_goes_on(tmp_path):
    """Catches a run that was told to outlive its terminal and does not."""
    process = start(tmp_path, n=8, seconds="0.1", ignore=signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and out.split()[-1] == "8"


def test_a_closed_terminal(tmp_path):
    """SIGHUP, and nobody to write to: ends by itself, with nothing lost and no traceback in the way."""
    pid, terminal = pty.fork()
    if pid == 0:
        script = tmp_path / "driver.py"
        text = DRIVER.format(tests=str(Path(__file__).parent), n=40, root=str(tmp_path / "root"), workers=2)
        script.write_text(text.replace("workers=2", "workers=2, progress=True"))
        os.environ["FAKE_SECONDS"] = "0.1"
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, str(script)])
    wait_for_a_cell(tmp_path)
    os.close(terminal)
    wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0], 10)
    done = Store(tmp_path / "root").done(c.fingerprint for c in fake_plan(40).cells)
    assert 0 < len(done) < 40 and not list((tmp_path / "root/store/claims").iterdir())
    assert fake_run(fake_plan(40), tmp_path / "root").n_computed == 40 - len(done)


def test_few_file_descriptors(tmp_path):
    """Catches descriptors that leak with cells or parts."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, limit[1]))
    try:
        assert fake_run(fake_plan(200), tmp_path, workers=2).counts["done"] == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert len(os.listdir("/proc/self/fd")) <= used + 1


def test_the_store_must_be_writable(tmp_path):
    """Exit code 3 naming the path, before any work."""
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StoreError, match="store") as info:
        fake_run(fake_plan(1), tmp_path)
    assert info.value.exit_code == 3 and not (tmp_path / "sweeps").exists()


def test_the_driver_never_loads_torch():
    """plan, status and results stay quick."""
    modules = "rmsweep.execute, rmsweep.status, rmsweep.results, rmsweep.store, rmsweep.engines.local"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_progress_is_few_lines_where_nobody_watches(tmp_path, capfd):
    """Catches thousands of lines in a batch log."""
    execute.run(fake_plan(50), tmp_path, Local(workers=0), work="fake_pipeline:WORK")
    assert 1 <= len(capfd.readouterr().err.splitlines()) <= 10


def test_status(tmp_path, monkeypatch):
    """Counts, axes, reasons; JSON-able; changes nothing, even where a part is damaged."""
    fault(monkeypatch, s1="raise", s2="raise")
    fake_run(fake_plan(5), tmp_path)
    fake_plan(6).write(tmp_path / "sweeps" / "s")
    summary = json.loads(json.dumps(status.summarise(tmp_path, "s")))
    assert summary["counts"] == {"done": 3, "failed": 2, "diverged": 0, "skipped": 0, "pending": 1}
    assert summary["axes"]["seed"]["5"]["pending"] == 1 and summary["running"] is None
    assert sorted(f["reason"] for f in summary["failures"]) == [f"ValueError: seed {s} does not work" for s in (1, 2)]
    assert "3 done, 2 failed, 1 pending" in status.render(summary)
    for path in (tmp_path / "store" / "results").iterdir():
        path.write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    assert status.summarise(tmp_path, "s")["corrupt"] and sorted(tmp_path.rglob("*")) == before


def test_status_sees_a_running_sweep(tmp_path):
    """A driver at work is seen with its time left, a killed one is not."""
    process = start(tmp_path)
    running = status.summarise(tmp_path / "root", "s")["running"]
    process.kill()
    process.communicate()
    assert running["total"] == 40 and "left" in status.render(
        status.summarise(tmp_path / "root", "s") | {"running": running}
    )
    assert status.summarise(tmp_path / "root", "s")["running"] is None
