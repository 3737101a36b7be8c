"""kill -9 at random moments, of workers and of the driver: the tables end up as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from running import digests, fake_plan, run

TESTS = Path(__file__).parent
SEEDS = 12


def start(root, workers, seconds="0.03"):
    """The fake sweep in a process group of its own."""
    command = [sys.executable, str(TESTS / "fake_work.py"), str(root), str(SEEDS), str(workers)]
    env = {**os.environ, "FAKE_SECONDS": seconds, "PYTHONPATH": str(TESTS)}
    return subprocess.Popen(command, env=env, start_new_session=True, stderr=subprocess.DEVNULL)


def children(pid):
    """Process ids of a process's children."""
    tasks = Path(f"/proc/{pid}/task")
    return [int(c) for t in tasks.glob("*/children") for c in t.read_text().split()] if tasks.exists() else []


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Digests of the uninterrupted sweep."""
    root = tmp_path_factory.mktemp("whole")
    run(fake_plan(SEEDS), root)
    return digests(root)


def kill_and_resume(root, rng, kills):
    """Kill the whole group, one worker, or only the driver, `kills` times; then let it finish."""
    for _ in range(kills):
        process = start(root, workers=2)
        time.sleep(rng.uniform(0.3, 3.0))
        what = rng.choice(["group", "worker", "driver"])
        try:
            if what == "group":
                os.killpg(process.pid, signal.SIGKILL)
            elif what == "driver":
                process.kill()
            else:
                os.kill(rng.choice(children(process.pid) or [process.pid]), signal.SIGKILL)
                process.wait(timeout=60)
        except ProcessLookupError:
            pass  # it had finished before the kill
        process.wait(timeout=60)
    assert start(root, workers=2).wait(timeout=120) == 0


def check(root, expected):
    assert digests(root) == expected
    costs = pq.read_table(root / "sweeps" / "fake" / "costs.parquet")
    assert costs.num_rows == 2 * SEEDS
    for part in (root / "store" / "results").glob("[!.]*"):
        pq.read_table(part, page_checksum_verification=True)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc to find the workers")
def test_random_kills_leave_the_same_tables(tmp_path, expected, seed):
    """Bit-identical tables, no cell lost, no manual step."""
    print("seed", seed)
    kill_and_resume(tmp_path, random.Random(seed), kills=3)
    check(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc to find the workers")
def test_many_random_kills_leave_the_same_tables(tmp_path, expected):
    """The same at a larger count, every sweep killed again and again."""
    for seed in range(10, 22):
        print("seed", seed)
        kill_and_resume(tmp_path / str(seed), random.Random(seed), kills=5)
        check(tmp_path / str(seed), expected)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_publishes_and_resumes(tmp_path, expected, number, code):
    """Ctrl-C or SIGTERM: finished cells are kept, the exit code says so, the same command continues."""
    process = start(tmp_path, workers=2, seconds="0.4")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob("sweeps/fake/logs/*.log")):
        time.sleep(0.05)
    time.sleep(1.0)
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=30) == code and time.monotonic() - began < 10
    kept = pq.read_table(tmp_path / "sweeps" / "fake" / "results.parquet").num_rows
    assert 0 < kept < 2 * SEEDS
    assert start(tmp_path, workers=2).wait(timeout=120) == 0
    check(tmp_path, expected)


def test_workers_leave_when_their_driver_is_gone(tmp_path):
    """No orphans that keep computing after kill -9 of the driver."""
    process = start(tmp_path, workers=2, seconds="0.5")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob("sweeps/fake/logs/*.log")):
        time.sleep(0.05)
    workers = children(process.pid)
    assert workers
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(Path(f"/proc/{w}").exists() for w in workers):
        time.sleep(0.1)
    assert not any(Path(f"/proc/{w}").exists() for w in workers)
