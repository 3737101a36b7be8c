"""Several runs of one sweep at once, with and without kills: shared, never doubled in the tables, always finished."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
from fake_pipeline import fake_plan, fake_run

TESTS = Path(__file__).resolve().parents[1]
SCRIPT = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from fake_pipeline import fake_plan, fake_run
if __name__ == "__main__":
    from rmsweep import schedule
    schedule.HELD_POLL = 0.2
    summary = fake_run(fake_plan(int(sys.argv[2])), sys.argv[1])
    sys.exit(summary.n_missing > 0)
"""


MAX_TWICE = 0.01  # of the cells, where nothing is killed


class Report(NamedTuple):
    """n_computed: cells computed by all runs together; twice: those above the number of cells."""

    n_cells: int
    n_computed: int
    twice: int
    kills: int
    violations: list[str]


def start(root: Path, n_cells: int, seconds: float = 0.0, crash: str | None = None, ledger: Path | None = None):
    """One run of the sweep in a process group of its own."""
    env = {**os.environ, "FAKE_SECONDS": str(seconds)}
    if crash:
        env["RMSWEEP_CRASH_AT"] = crash
    if ledger:
        env["FAKE_LEDGER"] = str(ledger)
    command = [sys.executable, "-c", SCRIPT, str(root), str(n_cells)]
    return subprocess.Popen(command, env=env, start_new_session=True, stderr=subprocess.DEVNULL)


def is_stopped(pid: int) -> bool:
    """Whether a process lies in SIGSTOP."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def share(root: Path, n_cells: int, n_runners: int, n_kills: int, seed: int) -> Report:
    """`n_runners` runs of `n_cells` cells at once; a killed one is started again; then a run alone to compare with."""
    rng, ledger = random.Random(seed), root / "ledger"
    ledger.mkdir(parents=True)
    runs = [start(root / "many", n_cells, 0.02, ledger=ledger) for _ in range(n_runners)]
    kills = 0
    while any(run.poll() is None for run in runs):
        time.sleep(rng.uniform(0.3, 1.0) if kills < n_kills else 0.1)
        i = rng.randrange(n_runners)
        if kills < n_kills and runs[i].poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(runs[i].pid, signal.SIGKILL)
            runs[i].wait()
            kills += 1
            runs[i] = start(root / "many", n_cells, 0.02, ledger=ledger)
    violations = [f"run {i} ended with exit code {run.returncode}" for i, run in enumerate(runs) if run.returncode]
    computed = Counter(name.rpartition("-")[0] for name in os.listdir(ledger) if name.startswith("cell"))
    fake_run(fake_plan(n_cells), root / "alone")
    violations += _differences(root / "many", root / "alone", n_cells)
    if len(computed) != n_cells:
        violations.append(f"{len(computed)} of {n_cells} cells were computed")
    twice = sum(computed.values()) - len(computed)
    violations += too_often(n_cells, twice, kills)
    return Report(n_cells, sum(computed.values()), twice, kills, violations)


def too_often(n_cells: int, twice: int, kills: int) -> list[str]:
    """What is wrong with the number of cells that were computed twice; a killed run loses what it had in hand."""
    return [f"{twice} of {n_cells} cells were computed twice"] if not kills and twice > MAX_TWICE * n_cells else []


def _differences(root: Path, alone: Path, n_cells: int) -> list[str]:
    """What is wrong with the tables of `root`: other bytes than those of a run alone, lost or doubled rows."""
    found = []
    for name in ("results", "prompts"):
        path = Path("sweeps/s") / f"{name}.parquet"
        if (root / path).read_bytes() != (alone / path).read_bytes():
            found.append(f"{name}.parquet differs from that of one run alone")
        ids = pq.read_table(root / path)["cell_id"].to_pylist()
        if not len(ids) == len(set(ids)) == n_cells:
            found.append(f"{name}.parquet: {len(ids)} rows, {len(set(ids))} cells, {n_cells} expected")
    if any((root / "store/quarantine").iterdir()):
        found.append("something was set aside")
    return found
