"""Two hosts on one shared folder that each sees late: what a network file system does, with bindfs and namespaces.

Every host has a mount of its own, whose kernel keeps names, missing names and attributes for LATE seconds without
asking, as NFS clients do; a host name of its own; and process numbers that mean nothing to the other.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fake_slurm
import pyarrow.parquet as pq
import pytest
from fake_pipeline import fake_plan, fake_run
from waiting import wait_until

TESTS = Path(__file__).parent
LATE, LEASE, BEAT = 10, 30.0, 3.0  # seconds; the ratios of NFS's 60 and our 120 and 10
N_CELLS = 80
RUNNER = f"""
import dataclasses, sys
sys.path.insert(0, {str(TESTS)!r})
from fake_pipeline import fake_plan, fake_run
from rmsweep import claims, cluster
from rmsweep.engines.slurm import Slurm
if __name__ == "__main__":
    claims.LEASE = {LEASE}
    claims.Claims.__init__.__defaults__ = (None, {BEAT}, *claims.Claims.__init__.__defaults__[2:])
    root, engine = sys.argv[1:]
    plan = fake_plan({N_CELLS})
    if engine == "local":
        summary = fake_run(plan, root, workers=2)
    else:
        cluster.LOOK = 1.0
        slurm = dataclasses.replace(Slurm(slots=2, cpus_per_slot=1), poll_seconds=2.0)
        summary = cluster.run(plan, root, slurm, progress=False, work="fake_pipeline:WORK")
    print("left", summary.n_left, summary.counts, *summary.notes)
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def views(tmp_path):
    """Two mounts of one folder, each with a cache of its own; skips where they cannot be made."""
    if os.geteuid() == 0 and shutil.which("bindfs") is None and shutil.which("apt-get"):
        subprocess.run(["apt-get", "install", "-y", "-q", "bindfs"], capture_output=True, check=False)
    if os.geteuid() != 0 or not all(map(shutil.which, ("bindfs", "unshare", "fusermount3"))):
        pytest.skip("two views of one folder need root, bindfs (apt-get install bindfs) and unshare")
    shared = tmp_path / "shared"
    shared.mkdir()
    made = []
    cached = ",".join(f"{what}_timeout={LATE}" for what in ("attr", "entry", "negative"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        done = subprocess.run(
            ["bindfs", "-o", cached, shared, tmp_path / name], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            pytest.skip(f"bindfs: {done.stderr.strip()}")
        made.append(tmp_path / name)
    yield made
    for path in made:
        subprocess.run(["fusermount3", "-uz", path], capture_output=True, check=False)


class Host:
    """A process with a host name and process numbers of its own, on its own view of the folder."""

    def __init__(self, name, root, ledger, engine="local", seconds=0.3):
        env = {**os.environ, "FAKE_LEDGER": str(ledger), "FAKE_SECONDS": str(seconds)}
        env["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        apart = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        named = ["sh", "-c", f'hostname {name}; exec "$@"', "sh"]
        command = [*apart, *named, sys.executable, "-c", RUNNER, str(root), engine]
        self.process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def kill(self):
        """As a power cut does: all of its processes at once, without a word."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def end(self):
        out, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0 and "left 0" in out, out
        return out


def computed(ledger):
    return Counter(path.name.rpartition("-")[0] for path in ledger.glob("cell*"))


def same_tables(root, alone):
    fake_run(fake_plan(N_CELLS), alone)
    for name in ("results", "prompts"):
        path = Path("sweeps/s") / f"{name}.parquet"
        assert (root / path).read_bytes() == (alone / path).read_bytes(), name
    rows = pq.read_table(root / "sweeps/s/results.parquet", columns=["status"]).to_pylist()
    assert Counter(row["status"] for row in rows) == {"done": N_CELLS}


def test_the_views_are_late(views):
    """Catches a test that proves nothing: what a host looked for in vain it does not see when the other makes it."""
    a, b = views
    assert not (a / "new").exists() and not (b / "new").exists()
    (a / "new").write_text("here")
    assert not (b / "new").exists() and "new" in os.listdir(b)


def test_two_hosts_share_a_sweep(views, tmp_path):
    """Catches claims, parts or tables that only hold where every host sees the others at once."""
    ledger = tmp_path / "ledger"
    ledger.mkdir()
    hosts = [Host(name, view / "root", ledger) for name, view in zip(("one", "two"), views, strict=True)]
    outs = [host.end() for host in hosts]
    assert not any("different results" in out or "corrupt" in out for out in outs), outs
    same_tables(tmp_path / "shared" / "root", tmp_path / "alone")
    twice = sum(computed(ledger).values()) - N_CELLS
    assert twice <= N_CELLS // 4, f"{twice} cells were computed twice"


def test_a_host_dies(views, tmp_path):
    """Catches cells of a host without power that nobody takes over, since nobody can ask for its processes."""
    ledger = tmp_path / "ledger"
    ledger.mkdir()
    dead, alive = (Host(name, view / "root", ledger) for name, view in zip(("one", "two"), views, strict=True))
    wait_until(lambda: len(computed(ledger)) >= N_CELLS // 4, 120)
    dead.kill()
    alive.end()
    assert sum(computed(ledger).values()) <= N_CELLS + 2, "finished cells of the dead host were computed again"
    same_tables(tmp_path / "shared" / "root", tmp_path / "alone")


def test_drivers_on_two_login_nodes(views, tmp_path, monkeypatch):
    """Catches two drivers that both submit, since neither sees the other's records yet."""
    for name, value in fake_slurm.install(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FAKE_SLURM_RUN", "1")
    ledger = tmp_path / "ledger"
    ledger.mkdir()
    hosts = [Host(name, view / "root", ledger, "slurm", 0.2) for name, view in zip(("one", "two"), views, strict=True)]
    for host in hosts:
        host.end()
    jobs = fake_slurm.jobs()
    assert sum(len(job["tasks"]) for job in jobs.values()) == 2, json.dumps({k: j["tasks"] for k, j in jobs.items()})
    same_tables(tmp_path / "shared" / "root", tmp_path / "alone")
