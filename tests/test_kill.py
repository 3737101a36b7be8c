"""kill -9 at random moments, of workers, drivers or all at once: the same bytes in the end as without."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_pipeline import fake_plan, fake_run

from rmsweep.store import Store

SEEDS, BETAS, WORLDS = 10, (0.5, 1.0), (0, 1)
DRIVER = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from fake_pipeline import fake_plan, fake_run
if __name__ == "__main__":
    fake_run(fake_plan({SEEDS}, {BETAS}, worlds={WORLDS}), sys.argv[1], workers=2)
"""


def plan():
    return fake_plan(SEEDS, BETAS, worlds=WORLDS)


def tables(root):
    folder = Path(root) / "sweeps" / "s"
    return [(folder / f"{name}.parquet").read_bytes() for name in ("results", "prompts")]


def workers_of(pid):
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(p) for p in children if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    return []


def run_and_kill(root, script, rng):
    """One driver, killed somewhere (a worker, the driver, or the whole group); True when it got to its end first."""
    process = subprocess.Popen([sys.executable, str(script), str(root)], start_new_session=True, stderr=-3)
    try:
        process.wait(timeout=rng.uniform(0.6, 2.6))
        return True
    except subprocess.TimeoutExpired:
        pass
    kind, workers = rng.choice(["worker", "driver", "group"]), workers_of(process.pid)
    with contextlib.suppress(ProcessLookupError):
        if kind == "worker" and workers:
            os.kill(rng.choice(workers), signal.SIGKILL)
            time.sleep(rng.uniform(0, 0.5))
        if kind != "group":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return False


def hammer(tmp_path, monkeypatch, n_kills, seed):
    print("seed", seed)
    rng = random.Random(seed)
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    fake_run(plan(), tmp_path / "whole")
    ledger = tmp_path / "ledger"
    ledger.mkdir()
    monkeypatch.setenv("FAKE_LEDGER", str(ledger))
    monkeypatch.setenv("FAKE_SECONDS", "0.05")
    kills, round_ = 0, 0
    while kills < n_kills:
        root = tmp_path / f"root{round_}"
        while kills < n_kills and not run_and_kill(root, script, rng):
            kills += 1
        failed = frozenset(k for k, s in Store(root).done(c.fingerprint for c in plan().cells).items() if s == "failed")
        summary = fake_run(plan(), root, retry=failed)
        assert summary.counts["done"] == len(plan().cells) and summary.n_missing == 0, (seed, round_, summary)
        assert tables(root) == tables(tmp_path / "whole"), (seed, round_)
        assert not os.listdir(root / "store" / "quarantine"), (seed, round_)
        computed = len(os.listdir(ledger))
        assert fake_run(plan(), root).n_computed == 0 and len(os.listdir(ledger)) == computed
        round_ += 1
    print(f"{kills} kills over {round_} sweeps")


def test_random_kills(tmp_path, monkeypatch):
    """20 kills: nothing lost, nothing doubled, nothing damaged, nothing computed twice once it is stored."""
    hammer(tmp_path, monkeypatch, 20, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_more_random_kills(tmp_path, monkeypatch, seed):
    """100 more each."""
    hammer(tmp_path, monkeypatch, 100, seed)
