"""Several runs of the same cells share the work; a dead owner's claims are taken over; claims decide nothing else."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_pipeline import fake_plan, fake_run
from torture import runners
from waiting import wait_until

from rmsweep import atomic, results
from rmsweep.claims import Claims, Lives
from rmsweep.plan import Plan
from rmsweep.store import Store

KEYS = ["ab" * 12, "cd" * 12]


class Clock:
    """A monotonic clock that a test turns."""

    now = 0.0

    def __call__(self):
        return self.now


def foreign(folder, key, owner="elsewhere-00000000-1.aa", beat=None):
    """A claim of a process of another machine."""
    os.symlink(owner, folder / key)
    if beat is not None:
        (folder / f"{owner}.beat").write_text(beat)
    return owner


def test_one_owner_at_a_time(tmp_path):
    """Catches a claim that two hold, one that is not given back, and files that stay."""
    with Claims(tmp_path) as one, Claims(tmp_path) as two:
        assert one.take(KEYS) == set(KEYS) == one.take(KEYS) and two.take(KEYS) == set()
        two.release(KEYS)
        assert two.take(KEYS) == set()
        one.release(KEYS[:1])
        assert two.take(KEYS) == {KEYS[0]}
    assert os.listdir(tmp_path) == []


def test_a_dead_process_of_this_machine_has_no_claims(tmp_path):
    """Catches a stale lock that somebody must remove by hand."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    foreign(tmp_path, KEYS[0], f"{atomic.machine()}-{child.pid}.aa", beat="7")
    with Claims(tmp_path) as claims:
        assert claims.take(KEYS) == set(KEYS)


def test_a_silent_owner_elsewhere_loses_its_claims_after_the_lease(tmp_path):
    """The observer's own clock counts; a beat in between begins it anew; no beat file at all is silence too."""
    clock = Clock()
    claims = Claims(tmp_path, lease=10, now=clock)
    owner = foreign(tmp_path, KEYS[0], beat="1")
    assert claims.take(KEYS) == {KEYS[1]}
    clock.now = 9
    assert claims.take(KEYS) == {KEYS[1]}
    (tmp_path / f"{owner}.beat").write_text("2")
    clock.now = 15
    assert claims.take(KEYS) == {KEYS[1]}
    clock.now = 24
    assert claims.take(KEYS) == {KEYS[1]}
    clock.now = 26
    assert claims.take(KEYS) == set(KEYS) and os.readlink(tmp_path / KEYS[0]) == claims.owner
    late = Claims(tmp_path / "x", lease=10, now=clock)
    (tmp_path / "x").mkdir()
    foreign(tmp_path / "x", KEYS[0])
    assert late.take(KEYS[:1]) == set()
    clock.now = 40
    assert late.take(KEYS[:1]) == set(KEYS[:1])


def test_who_was_robbed_gives_nothing_away(tmp_path):
    """An owner that was thought dead comes back: it must not remove the claim of who took over."""
    clock = Clock()
    one, two = Claims(tmp_path), Claims(tmp_path, lease=1, now=clock)
    one.take(KEYS)
    assert two.take(KEYS) == set()
    clock.now = 5
    assert two.take(KEYS) == set(KEYS)
    one.release(KEYS)
    assert {os.readlink(tmp_path / key) for key in KEYS} == {two.owner}


def test_a_claim_renewed_while_it_was_taken_for_dead(tmp_path, monkeypatch):
    """Catches the claim of a third run removed by one that looked before."""
    clock = Clock()
    owner, slow = foreign(tmp_path, KEYS[0]), Claims(tmp_path, lease=1, now=clock)
    slow.take(KEYS[:1])
    clock.now = 5
    rename = os.rename

    def meanwhile(source, target):
        monkeypatch.setattr(os, "rename", rename)
        os.unlink(source)
        os.symlink("third-00000000-1.bb", source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", meanwhile)
    assert slow.take(KEYS[:1]) == set() and os.readlink(tmp_path / KEYS[0]) == "third-00000000-1.bb" != owner


def test_without_symbolic_links_everybody_computes(tmp_path, monkeypatch):
    """A file system that has none: no claims, right results."""

    def refuse(*_):
        raise OSError(95, "not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    assert Claims(tmp_path).take(KEYS) == set(KEYS)
    assert fake_run(fake_plan(4), tmp_path).counts["done"] == 4


def test_a_lost_reply_of_nfs(tmp_path, monkeypatch):
    """EEXIST for the link that we made ourselves: ours."""
    link = os.symlink

    def twice(*args):
        link(*args)
        raise FileExistsError(17, "exists")

    monkeypatch.setattr(os, "symlink", twice)
    assert Claims(tmp_path).take(KEYS) == set(KEYS)


def test_owners_alive(tmp_path):
    """Catches a live run that gc does not see, and a dead one that it waits for."""
    lives = Lives(tmp_path / "none")
    assert lives.owners() == []
    with Claims(tmp_path) as claims:
        assert Lives(tmp_path).owners() == [claims.owner]
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (tmp_path / f"{atomic.machine()}-{child.pid}.aa.beat").write_text("1")
    assert Lives(tmp_path).owners() == []


def test_two_runners_share_a_sweep(tmp_path):
    """Catches work done twice, and a run that ends before its cells in other hands are done."""
    report = runners.share(tmp_path, n_cells=200, n_runners=2, n_kills=0, seed=1)
    assert report.violations == [] and report.twice == 0, report


def test_three_runners_of_which_some_are_killed(tmp_path):
    """Catches cells that a dead run holds for ever, and duplicates in the table."""
    report = runners.share(tmp_path, n_cells=120, n_runners=3, n_kills=4, seed=2)
    assert report.violations == [], report


def test_a_run_that_sleeps_past_its_lease(tmp_path, monkeypatch):
    """SIGSTOP at a worker's commit: another run takes over; the sleeper wakes, publishes the same, and ends well."""
    monkeypatch.setattr("rmsweep.claims.LEASE", 0.5)
    monkeypatch.setattr("rmsweep.schedule.HELD_POLL", 0.1)
    sleeper = runners.start(tmp_path, n_cells=8, crash="results:fsynced:1:stop")
    wait_until(lambda: runners.is_stopped(sleeper.pid))
    summary = fake_run(fake_plan(8), tmp_path)
    assert summary.counts["done"] == 8 and summary.n_computed > 0
    before = (tmp_path / "sweeps/s/results.parquet").read_bytes()
    os.kill(sleeper.pid, signal.SIGCONT)
    assert sleeper.wait(60) == 0
    assert (tmp_path / "sweeps/s/results.parquet").read_bytes() == before and not Store(tmp_path).conflicts


@pytest.mark.slow
@pytest.mark.parametrize(("n_runners", "n_kills"), [(2, 0), (4, 10)])
def test_a_thousand_cells(tmp_path, n_runners, n_kills):
    """Two runs without a cell computed twice; four with kills."""
    report = runners.share(tmp_path, n_cells=1000, n_runners=n_runners, n_kills=n_kills, seed=3)
    assert report.violations == [] and (n_kills or report.twice <= 10), report


def test_sigkill_leaves_claims_that_the_next_run_takes(tmp_path):
    """The driver is killed while its workers are: the same command again waits for nobody."""
    run = runners.start(tmp_path, n_cells=40, seconds=0.2)
    wait_until(lambda: any((tmp_path / "store/claims").glob("[0-9a-f]*")))
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert list((tmp_path / "store/claims").iterdir())
    began = time.monotonic()
    assert fake_run(fake_plan(40), tmp_path).counts["done"] == 40 and time.monotonic() - began < 20
    assert Path(tmp_path / "store/claims").is_dir()


@pytest.mark.parametrize("crash", ["plan:pre_tmp:1:stop", "plan:fsynced:2:stop", "seal:dirsynced:1:stop"])
def test_two_grids_of_one_name(tmp_path, monkeypatch, crash):
    """One driver sleeps while it writes plan or tables, the other does all its work: catches a grid that is lost from
    the plan, and tables that do not fit their checksums."""
    monkeypatch.setattr("rmsweep.claims.LEASE", 0.5)
    sleeper = runners.start(tmp_path, n_cells=4, crash=crash)
    wait_until(lambda: runners.is_stopped(sleeper.pid))
    bigger = fake_plan(3, betas=(0.5,))
    assert fake_run(bigger, tmp_path).counts["done"] >= 3
    os.kill(sleeper.pid, signal.SIGCONT)
    assert sleeper.wait(60) == 0
    assert len(Plan.read(tmp_path / "sweeps" / "s").cells) == 7
    assert set(results.load(tmp_path)["status"]) == {"done"} and len(results.load(tmp_path)) == 7
