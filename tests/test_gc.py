"""gc: takes what the dead left and nothing else, beside runs and kills too."""

import contextlib
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_pipeline import fake_plan, fake_run
from waiting import wait_until

from rmsweep import atomic, collect
from rmsweep.claims import Claims
from rmsweep.cli import main
from rmsweep.cli.complete import candidates
from rmsweep.cli.verbs import FLAGS
from rmsweep.errors import ConfigError, StoreError
from rmsweep.progress import STATUS_FILE
from rmsweep.store import Store

ELSEWHERE = "otherhost-01234567-4242"
LEASE = 30.0


@pytest.fixture
def root(tmp_path):
    fake_run(fake_plan(4), tmp_path)
    return tmp_path


@pytest.fixture
def dead():
    """A process of this machine that has ended, as owners are named."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return f"{atomic.machine()}-{process.pid}"


def temporary(folder, owner, key=""):
    """A temporary name as this owner would give."""
    name = atomic.temporary_name(key).replace(atomic.owner(), owner)
    assert atomic.TEMPORARY.fullmatch(name)
    return folder / name


def listing(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


class Clock:
    """A clock that only sleeping moves; `during` happens at every step."""

    def __init__(self, during=lambda: None):
        self.now, self.during = 0.0, during

    def sleep(self, seconds):
        self.now += seconds
        self.during()


def watch(root, clock=None):
    clock = clock or Clock()
    return collect.Watch(root / "store" / "claims", LEASE, lambda: clock.now, clock.sleep)


def gc(root, clock=None, **options):
    return collect.collect(root, watch=watch(root, clock), **options)


# -- orphans -----------------------------------------------------------------------------------------------


def test_orphans_of_the_dead_are_removed_and_only_they(root, dead):
    """Files, half a bank and a link, in every folder; catches one folder left out, or a living owner's file taken."""
    before = listing(root)
    folders = [root / "store" / name for name in ("banks", "results", "costs", "kept", "quarantine", "claims")]
    for folder in [*folders, root / "store", root / "sweeps", root / "sweeps" / "s"]:
        folder.mkdir(exist_ok=True)
        temporary(folder, dead).write_bytes(b"half")
    bank = temporary(root / "store" / "banks", dead, "ab" * 12)
    bank.mkdir()
    (bank / "golden.npy").write_bytes(bytes(1000))
    temporary(root / "store" / "claims", dead).symlink_to(dead)
    mine = temporary(root / "store" / "results", atomic.owner())
    mine.touch()
    found = gc(root)
    assert len(found.removed[collect.ORPHANS]) == 11 and not found.left
    assert sum(item.size for item in found.removed[collect.ORPHANS]) >= 1000 + 9 * 4
    mine.unlink()
    assert set(listing(root)) - {"store/claims"} == set(before) - {"store/claims"}


def test_a_dry_run_changes_nothing(root, dead):
    """And says the same."""
    temporary(root / "store" / "results", dead).write_bytes(b"half")
    (root / "store" / "claims").mkdir(exist_ok=True)
    (root / "store" / "claims" / ("ab" * 12)).symlink_to(f"{dead}.abc")
    (root / "store" / "quarantine" / "x").touch()
    before = listing(root)
    dry = gc(root, dry_run=True, quarantine=True, unreferenced=True)
    assert listing(root) == before
    assert dry.removed == gc(root, quarantine=True, unreferenced=True).removed and len(dry.removed) == 3
    assert listing(root) != before


def test_age_decides_nothing(root):
    """A file of 1970 whose owner lives stays; catches a rule by mtime."""
    path = temporary(root / "store" / "results", atomic.owner())
    path.touch()
    os.utime(path, (0, 0))
    gc(root)
    assert path.exists()


def test_other_machines_without_a_beat(root):
    """Nobody beats: nobody is alive; no time passes."""
    path, clock = temporary(root / "store" / "results", ELSEWHERE), Clock()
    path.touch()
    gc(root, clock)
    assert not path.exists() and clock.now == 0


def test_other_machines_that_beat(root):
    """Alive as long as the beat moves, dead after a lease without; catches a decision at first sight."""
    claims, path = root / "store" / "claims", temporary(root / "store" / "banks", ELSEWHERE)
    claims.mkdir(exist_ok=True)
    path.touch()
    beat, claim = claims / f"{ELSEWHERE}.abc.beat", claims / ("ab" * 12)
    beat.write_text("0.0")
    claim.symlink_to(f"{ELSEWHERE}.abc")
    found = gc(root, clock := Clock(lambda: beat.write_text(str(clock.now // 10))))
    assert path.exists() and beat.exists() and claim.is_symlink() and 10 <= clock.now < LEASE
    assert not found.removed and "1 temporary files were left" in found.notes[0]
    still = Clock()
    gc(root, still)
    assert not path.exists() and not beat.exists() and not claim.is_symlink() and LEASE < still.now < LEASE + 3


def test_what_comes_while_we_watch_stays(root):
    """A run that begins on another machine during the watch: its files and its claims were not looked at."""
    claims = root / "store" / "claims"
    claims.mkdir(exist_ok=True)
    (claims / f"{ELSEWHERE}.abc.beat").write_text("1")
    key, late = claims / ("ab" * 12), temporary(root / "store" / "banks", "third-01234567-1")
    key.symlink_to(f"{ELSEWHERE}.abc")

    def begin():
        late.touch()
        key.unlink()
        key.symlink_to("third-01234567-1.abc")

    gc(root, Clock(begin))
    assert late.exists() and os.readlink(key).startswith("third")


def test_a_living_claim_stays(root):
    """Of this very process, which beats."""
    claims = root / "store" / "claims"
    claims.mkdir(exist_ok=True)
    with Claims(claims, beat=0.01) as mine:
        mine.take(["ab" * 12])
        gc(root, Clock(lambda: time.sleep(0.05)))
        assert (claims / ("ab" * 12)).is_symlink()


def test_what_got_its_name_meanwhile_was_not_removed(root):
    """A bank that its owner finished while it was watched, before it ended: catches a removal that was none."""
    claims, bank = root / "store" / "claims", temporary(root / "store" / "banks", ELSEWHERE, "ab" * 12)
    claims.mkdir(exist_ok=True)
    (claims / f"{ELSEWHERE}.abc.beat").write_text("1")
    bank.mkdir()
    final = bank.with_name("ab" * 12)
    found = gc(root, Clock(lambda: bank.exists() and bank.rename(final)))
    assert collect.ORPHANS not in found.removed and collect.CLAIMS in found.removed and final.exists()


def test_status_files(root, dead):
    """That of a dead driver goes; those of a living one, of another host, and of nobody knows whom stay."""
    path = root / "sweeps" / "s" / STATUS_FILE

    def left(**state):
        path.write_text(json.dumps(state))
        gc(root)
        return path.exists()

    assert left(host=platform.node(), pid=os.getpid()) and left(host="elsewhere", pid=1) and left(pid="x")
    assert not left(host=platform.node(), pid=int(dead.rpartition("-")[2]))


def test_links_out_of_the_root_are_not_followed(tmp_path, dead):
    """Folders of the store, of a sweep, and within an orphan."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    fake_run(fake_plan(2), root)
    outside.mkdir()
    treasure = temporary(outside, dead)
    treasure.touch()
    (root / "store" / "kept").rmdir()
    (root / "store" / "kept").symlink_to(outside)
    (root / "sweeps" / "linked").symlink_to(outside)
    (outside / STATUS_FILE).write_text(json.dumps({"host": platform.node(), "pid": int(dead.rpartition("-")[2])}))
    orphan = temporary(root / "store" / "banks", dead)
    orphan.mkdir()
    (orphan / "link").symlink_to(outside)
    bank = root / "store" / "banks" / ("cd" * 12)
    bank.symlink_to(outside)
    gc(root, quarantine=True, unreferenced=True)
    assert treasure.exists() and (outside / STATUS_FILE).exists()
    assert not orphan.exists() and not bank.is_symlink()


# -- what nobody refers to ---------------------------------------------------------------------------------


def add_unreferenced(root):
    """A sweep whose plan is gone: its bank and its parts."""
    before = set(listing(root))
    fake_run(fake_plan(3, name="old", worlds=(7,), keep="scores"), root)
    for path in (root / "sweeps" / "old").glob("*"):
        if path.is_file():
            path.unlink()
    return {root / path for path in set(listing(root)) - before if path.count("/") == 2 and path.startswith("store")}


def test_unreferenced_artefacts_are_reported_and_removed_on_demand(root):
    """Catches results thrown away by default, a referenced artefact taken, a kind left out."""
    unused, needed = add_unreferenced(root), Store(root).records(c.fingerprint for c in fake_plan(4).cells)
    assert {path.parent.name for path in unused} == {"banks", "results", "costs", "kept"}
    found = gc(root)
    assert {item.path for item in found.left[collect.UNREFERENCED]} == unused and not found.removed
    assert all(path.exists() for path in unused)
    found = gc(root, unreferenced=True)
    assert {item.path for item in found.removed[collect.UNREFERENCED]} == unused
    assert not any(path.exists() for path in unused)
    assert Store(root).records(c.fingerprint for c in fake_plan(4).cells).equals(needed)
    assert fake_run(fake_plan(4), root).n_computed == 0


def test_a_part_with_one_needed_cell_stays(root):
    """Parts are shared between sweeps: one planned cell keeps all of it."""
    fake_run(fake_plan(9, name="larger"), root)
    for path in (root / "sweeps" / "larger").glob("*.*"):
        path.unlink()
    store = Store(root)
    keys = [cell.fingerprint for cell in fake_plan(9).cells]
    store.merge(keys)
    rows, costs = store.records(keys).to_pylist(), store.costs(keys).to_pylist()
    for path in [*store.record_parts.folder.iterdir(), *store.cost_parts.folder.iterdir()]:
        path.unlink()
    store.publish_part("ab" * 12, rows, costs)
    assert not gc(root, unreferenced=True).left and len(Store(root).done(keys)) == 9


def test_a_damaged_part_is_not_unreferenced(root):
    """What it held is not known."""
    part = next((root / "store" / "results").iterdir())
    part.write_bytes(b"")
    gc(root, unreferenced=True)
    assert part.exists()


def test_refused_without_every_plan(root):
    """A plan that cannot be read, or is gone from beside its tables, may refer to anything."""
    unused = add_unreferenced(root)
    fake_run(fake_plan(1, name="third"), root)
    for name, change in (("plan.json", lambda p: p.write_text("{")), ("plan.json", Path.unlink)):
        change(root / "sweeps" / "third" / name)
        with pytest.raises(StoreError, match="third"):
            gc(root, unreferenced=True)
        assert "not known" in gc(root).notes[0] and all(path.exists() for path in unused)


def test_refused_while_a_run_is_alive(root, dead):
    """By its beat or by its status file; nothing at all is removed then."""
    unused = add_unreferenced(root)
    orphan = temporary(root / "store" / "results", dead)
    orphan.touch()
    status = root / "sweeps" / "s" / STATUS_FILE
    status.write_text(json.dumps({"host": platform.node(), "pid": os.getpid()}))
    with pytest.raises(ConfigError, match="sweep s"):
        gc(root, unreferenced=True)
    status.unlink()
    (root / "store" / "claims").mkdir(exist_ok=True)
    with Claims(root / "store" / "claims", beat=0.01) as mine, pytest.raises(ConfigError, match=mine.owner):
        gc(root, Clock(lambda: time.sleep(0.05)), unreferenced=True)
    assert orphan.exists() and all(path.exists() for path in unused)


def test_a_bank_goes_whole(root, monkeypatch):
    """Killed while it removes a bank, gc leaves an orphan for the next gc, never half a bank under its name."""
    unused = [path for path in add_unreferenced(root) if path.parent.name == "banks"]
    monkeypatch.setattr(atomic, "remove_folder", lambda path: None)
    gc(root, unreferenced=True)
    left = [path for path in (root / "store" / "banks").iterdir() if atomic.TEMPORARY.fullmatch(path.name)]
    assert not unused[0].exists() and len(left) == 1


# -- beside a run, with kills ------------------------------------------------------------------------------

DRIVER = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from fake_pipeline import fake_plan, fake_run
if __name__ == "__main__":
    fake_run(fake_plan(10, (0.5, 1.0), worlds=(0, 1)), sys.argv[1], workers=2)
"""


def start(root, script, **environment):
    return subprocess.Popen(
        [sys.executable, str(script), str(root)],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


def kill(process):
    """Kill a driver and its workers, and wait until none of them is left."""
    group = _group(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in group))


def orphans(root):
    return [path for path in root.rglob("*.tmp") if atomic.TEMPORARY.fullmatch(path.name)]


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "driver.py"
    path.write_text(DRIVER)
    return path


@pytest.mark.parametrize("where", ["bank:half_written:1", "results:fsynced:1"])
def test_what_a_kill_leaves_is_collected(tmp_path, script, where):
    """Killed between open and publication: catches an orphan that gc does not know, and a loss by collecting it."""
    root = tmp_path / "root"
    process = start(root, script, RMSWEEP_CRASH_AT=f"{where}:stop")
    wait_until(lambda: any(_stopped(pid) for pid in _group(process.pid)))
    assert orphans(root)
    collect.collect(root, watch=collect.Watch(root / "store" / "claims", lease=0.5))
    assert orphans(root), "a stopped process is alive: its file must stay"
    kill(process)
    collect.collect(root, watch=collect.Watch(root / "store" / "claims"))
    assert not orphans(root) and not list((root / "store" / "claims").iterdir())
    assert fake_run(fake_plan(10, (0.5, 1.0), worlds=(0, 1)), root).counts["done"] == 40


def _group(leader):
    """Processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == leader:
                found.append(int(path.parent.name))
    return found


def _stopped(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def test_beside_a_run_and_kills(tmp_path, script, monkeypatch):
    """gc all the time, with everything it may remove: nothing that is done is lost, and the same tables in the end."""
    plan, root, rng = fake_plan(10, (0.5, 1.0), worlds=(0, 1)), tmp_path / "root", random.Random(5)
    fake_run(plan, tmp_path / "whole")
    monkeypatch.setenv("FAKE_SECONDS", "0.1")
    keys, done = [cell.fingerprint for cell in plan.cells], set()
    for _ in range(3):
        process = start(root, script)
        wait_until(lambda: (root / "sweeps/s" / STATUS_FILE).exists() or process.poll() is not None)  # noqa: B023
        until = time.monotonic() + rng.uniform(0.5, 2.5)
        while time.monotonic() < until:
            collect.collect(root, quarantine=True, watch=collect.Watch(root / "store" / "claims", lease=0.5))
        kill(process)
        collect.collect(root, unreferenced=True, watch=collect.Watch(root / "store" / "claims"))
        assert not orphans(root)
        now = set(Store(root).done(keys))
        assert done <= now
        done = now
    fake_run(plan, root)
    for name in ("results", "prompts"):
        files = [folder / "sweeps" / "s" / f"{name}.parquet" for folder in (root, tmp_path / "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()


# -- the command line --------------------------------------------------------------------------------------


def test_help_and_completion_know_every_flag(root, capsys):
    """Catches a flag that --help or the Tab key hides, and a sweep's name that Tab does not offer."""
    for verb, given in FLAGS.items():
        assert main([verb, "--help"]) == 0
        text, flags = capsys.readouterr().out, {flag.split()[-1] for flag in given}
        assert flags - {"--multirun"} <= {*candidates([verb, "--"])}, verb
        assert all(re.search(rf"{flag}\b", text) for flag in flags), verb
    assert candidates(["verify", f"root={root}", ""]) == ["s", "root="] and candidates(["gc", ""]) == ["root="]


def test_the_command(root, dead, capsys):
    """Sizes and paths, and the words for the rest; 1 for a root without a store or a word too many."""
    orphan = temporary(root / "store" / "results", dead)
    orphan.write_bytes(bytes(1500))
    unused = add_unreferenced(root)
    assert main(["gc", "--dry-run", f"root={root}"]) == 0
    out = capsys.readouterr().out
    assert f"would remove {collect.ORPHANS}: 1, 1.5 kB" in out and str(orphan) in out and orphan.exists()
    assert "(--unreferenced removes them)" in out and all(str(path) in out for path in unused)
    assert main(["gc", "--unreferenced", f"root={root}"]) == 0
    assert f"removed {collect.UNREFERENCED}: {len(unused)}" in capsys.readouterr().out
    assert main(["gc", f"root={root}"]) == 0 and "nothing to remove" in capsys.readouterr().out
    assert main(["gc", "s", f"root={root}"]) == 1 and "whole root" in capsys.readouterr().err
    assert main(["gc", f"root={root / 'no'}"]) == 1 and "no store there" in capsys.readouterr().err
    assert not (root / "no").exists()
