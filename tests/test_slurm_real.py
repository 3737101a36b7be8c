"""A real Slurm on this machine, two emulated nodes: a sweep survives what a cluster does to it, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fake_pipeline import fake_plan, fake_run
from waiting import wait_until

from rmsweep.engines import _queue
from rmsweep.slots import Slots

TESTS = Path(__file__).parent
N_CELLS = 200
PATIENCE = (120.0, 0.2)  # seconds to wait for anything, and between two looks
DRIVER = f"""
import dataclasses, json, sys
sys.path.insert(0, {str(TESTS)!r})
from fake_pipeline import fake_plan
from rmsweep import cluster
from rmsweep.engines.slurm import Slurm
from rmsweep.reward_models import Compute
if __name__ == "__main__":
    cluster.LOOK = 1.0
    root, n_cells, device, fields = sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    engine = dataclasses.replace(Slurm(partition="main", slots=2, **fields), poll_seconds=2.0)
    plan = dataclasses.replace(fake_plan(n_cells), compute=Compute(device))
    summary = cluster.run(plan, root, engine, work="fake_pipeline:WORK")
    print(summary.n_left, *summary.notes, sep="\\n")
"""
SHORT = {"cpus_per_slot": 2, "time_minutes": 1, "signal_seconds": 15}


@pytest.fixture(scope="module")
def slurm(shared):
    """A Slurm of two nodes; skips where it cannot be started."""
    script = shared / "slurm" / "start-slurm.sh"
    if os.geteuid() != 0 or shutil.which("apt-get") is None or not script.is_file():
        pytest.skip("a Slurm of our own needs root, apt and ../shared/slurm/start-slurm.sh")
    env = {**os.environ, "SLURM_NODES": "2", "SLURM_CPUS": "2", "SLURM_GPUS": "2"}
    began = subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=False)
    if began.returncode != 0:
        pytest.skip(f"Slurm does not start here: {(began.stdout + began.stderr)[-300:]}")
    yield
    subprocess.run(["bash", script, "stop"], env=env, capture_output=True, check=False)


class Sweep:
    """The sweep under test and what can be done to it."""

    def __init__(self, root, ledger):
        self.root, self.ledger, self.files = root, ledger, Slots(root, "s")
        self._drivers = []
        ledger.mkdir()

    def drive(self, n_cells=N_CELLS, device="cpu", seconds=1.2, **fields):
        """Start a driver, beside those that are there."""
        env = {**os.environ, "FAKE_SECONDS": str(seconds), "FAKE_LEDGER": str(self.ledger)}
        env["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        command = [sys.executable, "-c", DRIVER, str(self.root), str(n_cells), device, json.dumps(fields or SHORT)]
        driver = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._drivers.append(driver)

    def n_computed(self):
        return sum(name.startswith("cell") for name in os.listdir(self.ledger))

    def advance(self, n=8):
        """Until `n` more cells are computed."""
        goal = self.n_computed() + n
        wait_until(lambda: self.n_computed() >= goal, *PATIENCE)

    def running(self):
        """Array tasks on a node, as the queue has them."""
        view = _queue.poll(self.files.name) or {}
        return sorted(task.id for task in view.values() if task.state == "RUNNING")

    def kill_the_driver(self):
        driver = self._drivers.pop()
        driver.kill()
        driver.communicate()

    def kill_a_worker(self):
        found = [pid for pid in pids() if b"spawn_main" in cmdline(pid) and str(self.root).encode() in environ(pid)]
        os.kill(found[0], signal.SIGKILL)

    def cancel_a_slot(self):
        wait_until(self.running, *PATIENCE)
        command("scancel", self.running()[0])

    def preempt(self):
        """A job of a higher partition that wants both nodes for itself."""
        wait_until(self.running, *PATIENCE)
        command("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
        wait_until(lambda: not self.running(), *PATIENCE)

    def come_again(self):
        """Until a slot that was stopped, and put back into the queue, has cells in flight."""

        def has_begun():
            notes = self.files.notes()
            after = {(note.task, note.restart + 1) for note in notes if note.end == "stopped"}
            return any(note.in_flight for note in notes if (note.task, note.restart) in after)

        wait_until(has_begun, *PATIENCE)

    def freeze_a_slot(self):
        """It hears nothing any more, does not leave, and runs into its time limit."""
        wait_until(self.running, *PATIENCE)
        job, _, index = self.running()[-1].partition("_")
        marks = {f"SLURM_ARRAY_JOB_ID={job}".encode(), f"SLURM_ARRAY_TASK_ID={index}".encode()}
        if not index:
            marks = {f"SLURM_JOB_ID={job}".encode()}
        for pid in pids():
            if marks <= set(environ(pid).split(b"\0")) and b"python" in cmdline(pid):
                os.kill(pid, signal.SIGSTOP)

    def warn_a_slot(self):
        """What Slurm sends before the time limit."""
        wait_until(self.running, *PATIENCE)
        command("scancel", "--batch", "--signal=USR2", self.running()[0])

    def end(self):
        """What the drivers said, once all have ended."""
        return [driver.communicate(timeout=240)[0] for driver in self._drivers]


@pytest.mark.slow
def test_two_hundred_cells(slurm, tmp_path):
    """One slot cancelled, a worker killed, slots preempted and requeued, warned, at their time limit, one over it, the
    driver killed and then two of them: the tables of engine=local, bit for bit, and little computed twice."""
    sweep = Sweep(tmp_path / "root", tmp_path / "ledger")
    sweep.drive()
    sweep.advance()
    sweep.kill_a_worker()
    sweep.advance()
    sweep.cancel_a_slot()
    sweep.advance()
    sweep.kill_the_driver()
    sweep.preempt()
    n_before = sum(job.n_slots for job in sweep.files.jobs().values())
    sweep.drive()
    sweep.drive()
    sweep.come_again()
    sweep.advance()
    sweep.warn_a_slot()
    sweep.advance()
    sweep.freeze_a_slot()
    outs = sweep.end()
    assert all("\n0\n" in f"\n{out}\n" for out in outs), outs
    assert _queue.poll(sweep.files.name) is not None
    wait_until(lambda: not sweep.running(), *PATIENCE)
    notes = sweep.files.notes()
    ends = Counter(note.end for note in notes)
    assert ends["time"] >= 2 and ends["stopped"] >= 1, (ends, outs)
    n_slots = sum(job.n_slots for job in sweep.files.jobs().values())
    assert n_slots <= n_before + 3, (
        "more came than in the place of slots that were cancelled, frozen, or left work behind"
    )
    states = command("sacct", "--noheader", "--duplicates", "--parsable2", "--allocations", "--format=State")
    assert {"CANCELLED", "PREEMPTED", "TIMEOUT"} <= {line.split()[0] for line in states.splitlines()}, states
    fake_run(fake_plan(N_CELLS), tmp_path / "alone")
    for name in ("results", "prompts"):
        path = Path("sweeps/s") / f"{name}.parquet"
        assert (tmp_path / "root" / path).read_bytes() == (tmp_path / "alone" / path).read_bytes()
    rows = pq.read_table(tmp_path / "root/sweeps/s/results.parquet", columns=["status"]).to_pylist()
    assert Counter(row["status"] for row in rows) == {"done": N_CELLS}
    assert sweep.n_computed() <= N_CELLS + 6, "more was computed twice than was in flight"


@pytest.mark.slow
def test_one_worker_per_gpu_of_each_slot(slurm, tmp_path, monkeypatch):
    """gres: two slots of two (stand-in) GPUs each; every worker sees one, and none sees another's."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'GPU 0: a stand-in (UUID: GPU-0)'; echo 'GPU 1: a stand-in (UUID: GPU-1)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}{os.pathsep}{os.environ['PATH']}")
    sweep = Sweep(tmp_path / "root", tmp_path / "ledger")
    sweep.drive(24, "cuda", 0.5, cpus_per_slot=2, gpus_per_slot=2, time_minutes=5)
    (out,) = sweep.end()
    assert "\n0\n" in f"\n{out}\n", out
    seen = Counter(path.read_text() for path in sweep.ledger.glob("cell*"))
    assert set(seen) == {"0", "1"} and sum(seen.values()) == 24, seen
    assert max(len(note.in_flight) for note in sweep.files.notes()) <= 2


@pytest.mark.slow
def test_the_command_line(slurm, tmp_path):
    """Submit and go, look, cancel slots at work, and the same command again to the end: the tables of engine=local."""
    words = ["size=tiny", "reward_model=bt_linear,bt_mlp", "beta=0.5,1", "seed=range(0,10)", "sweep.name=s"]
    on_slurm = [*words, "engine=slurm", "engine.partition=main", "engine.slots=2", "engine.cpus_per_slot=1"]
    root = f"root={tmp_path / 'a'}"
    rmsweep("run", *on_slurm, root, "--detach")
    wait_until(lambda: "done" in rmsweep("status", "s", root).splitlines()[0], *PATIENCE)
    assert "slots: " in rmsweep("status", "s", root)
    assert "slots cancelled" in rmsweep("cancel", "s", root)
    files = Slots(tmp_path / "a", "s")
    wait_until(lambda: not any(task.is_live for task in _queue.poll(files.name).values()), *PATIENCE)
    assert "cells" in rmsweep("run", *on_slurm, root)
    assert "40 done" in rmsweep("status", "s", root)
    rmsweep("run", *words, f"root={tmp_path / 'b'}")
    for name in ("results", "prompts"):
        a, b = (tmp_path / part / f"sweeps/s/{name}.parquet" for part in "ab")
        assert a.read_bytes() == b.read_bytes()
    rmsweep("gc", root)
    assert not list(files.leftovers())


# -- small things ------------------------------------------------------------------------------------------


def rmsweep(*words):
    """What the command line prints; it must succeed."""
    env = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [sys.executable, "-m", "rmsweep", *words], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return made.stdout


def command(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


def pids():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def cmdline(pid):
    return _of(pid, "cmdline")


def environ(pid):
    return _of(pid, "environ")


def _of(pid, what):
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""
