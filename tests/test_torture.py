"""What a crash, a power cut, a full disk, a damaged file and a wrong clock leave of a sweep; and tests of these tests.

The harnesses are in tests/torture; scripts/torture.py runs them at full counts.
"""

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torture import clock, corruption, crash_points, disk, mutants, power_loss, runners, scene

REPOSITORY = Path(__file__).resolve().parents[1]
STORE_CODE = (
    "atomic", "store", "parts", "plan", "planner", "results", "execute", "units", "claims", "schedule", "runner",
    "collect", "verify", "recompute", "memory", "progress",
    *(f"engines/{path.stem}" for path in sorted((REPOSITORY / "rmsweep" / "engines").glob("*.py"))),
)  # fmt: skip
CLOCKS = (
    r".*(?:time\.time(?:_ns)?\b|from time import|import time as|st_[mac]time|get[mac]time|clock_gettime|datetime).*"
)
SEED = 1


@pytest.fixture
def base():
    with scene.workplace() as folder:
        yield folder


def test_every_crash_point(base):
    """Catches a step whose half is taken for the whole, a cell computed twice, a point that nothing reaches."""
    report = crash_points.run(base, SEED, every=False)
    report.assert_sound()
    done, _, registered = report.counts["points"].partition(" of ")
    assert done == registered and report.counts["kills"] >= int(done)


@pytest.mark.slow
def test_every_crash_point_three_times_and_again(base):
    """First, second and last time at every point; then cleanly on, or into another crash."""
    crash_points.run(base, SEED).assert_sound()


def test_power_loss(base):
    """Catches a name that comes to the disk before its bytes, and what is said to be stored before it is."""
    report = power_loss.run(base, SEED, 40)
    report.assert_sound()
    assert report.cases == 40


@pytest.mark.slow
def test_more_power_loss(base):
    """300 states more."""
    power_loss.run(base, SEED + 1, 300).assert_sound()


def test_refused_calls(base):
    """Catches an error of the disk that is passed over, goes unnamed, or leaves something that is not removed."""
    report = disk.run(base, SEED, n=3)
    report.assert_sound()
    assert set(disk.KINDS) & set(report.counts["calls"]) >= {"open", "write", "fsync", "fsync_dir", "link", "replace"}


@pytest.mark.slow
def test_more_refused_calls(base):
    """25 of every kind of call."""
    disk.run(base, SEED + 1, n=25).assert_sound()


def test_damaged_files(base):
    """Catches damage that is served, not set aside, or never made good, in every kind of file."""
    report = corruption.run(base, SEED, 50)
    report.assert_sound()
    assert set(report.counts) == set(corruption.KINDS)


@pytest.mark.slow
def test_more_damaged_files(base):
    """200 more."""
    corruption.run(base, SEED + 1, 200).assert_sound()


def test_clocks_and_dates(base):
    """Catches a decision by wall clock or by the dates of files."""
    clock.run(base, SEED).assert_sound()


@pytest.mark.parametrize("name", STORE_CODE)
def test_store_code_reads_no_clock(name):
    """Wall clock and file dates are not consulted; a planner may know its input files again by theirs."""
    found = re.findall(CLOCKS, (REPOSITORY / "rmsweep" / f"{name}.py").read_text())
    allowed = [line for line in found if name == "planner" and 'key = ("sha256"' in line]
    assert found == allowed, found


def test_what_counts_as_a_clock():
    """The rule above on one offence each; and engines, which are found by looking, are there."""
    lines = "time.time()|time.time_ns()|from time import time|state.st_mtime_ns|s.st_ctime|os.path.getmtime(p)|datetime"
    assert all(re.findall(CLOCKS, line) for line in lines.split("|"))
    assert not re.findall(CLOCKS, "time.monotonic() - time.perf_counter(); time.sleep(1); timeout")
    assert {"engines/local", "engines/_worker"} <= set(STORE_CODE)


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_mutants_are_caught(base, name):
    """A harness that does not see this mistake proves nothing about its absence."""
    found = mutants.caught(base, name).violations
    assert found, f"{name}: survived"
    assert not any("going on failed" in v["problem"] and "TypeError" in v["problem"] for v in found), found


@pytest.mark.parametrize("point", ["bank", "costs", "results", "table"])
def test_the_harness_of_mutants_passes_sound_code(base, point):
    """Catches checks that report a violation of whatever they are shown."""
    mutants.crashes(base, f"{point}:half_written:1").assert_sound()


@pytest.mark.parametrize("harness", [mutants.losses, lambda base: mutants.damage(base, "bank", "kept")])
def test_sound_code_passes_the_others_too(base, harness):
    """The same for power loss and damage."""
    harness(base).assert_sound()


def test_two_crashes_of_sound_code(base):
    """The same for journals."""
    mutants.killed_twice(base, "costs:half_written:1", "costs:half_written:1").assert_sound()


def test_cells_computed_twice_by_two_runs():
    """Catches claims that share nothing, which the tables cannot show."""
    assert runners.too_often(1000, 11, 0) and not runners.too_often(1000, 10, 0) and not runners.too_often(9, 9, 1)


# -- real full disks ---------------------------------------------------------------------------------------

SCRIPT = f"""
import sys
sys.path[:0] = [{str(REPOSITORY / "tests")!r}, {str(REPOSITORY)!r}]
from pathlib import Path
from rmsweep.errors import StoreError
from torture import scene
try:
    scene.run(scene.small(), Path(sys.argv[1]))
except StoreError as error:
    print(error)
    sys.exit(3)
"""


def fake_sweep(root, limit=None):
    """The small sweep in a process of its own, with no file over `limit` bytes."""

    def bound():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-c", SCRIPT, str(root)]
    return subprocess.run(command, text=True, capture_output=True, preexec_fn=bound if limit else None, timeout=300)


def test_files_too_large(base):
    """A limit on file sizes says EFBIG, not ENOSPC: Catches a disk error that is known by one number only."""
    (base / "root").mkdir()
    found = fake_sweep(base / "root", 3000)
    assert found.returncode == 3, found.stderr[-2000:]
    assert os.strerror(errno.EFBIG) in found.stdout and str(base / "root") in found.stdout
    assert not list((base / "root").rglob("*.tmp"))
    truth = scene.truth_of(scene.small(), base / "truth")
    assert not scene.settle(base / "root", truth)


FULL_DISK = """
set -u
mount -t tmpfs -o size=96k none "$1" || exit 99
"$2" -c "$3" "$1/root"; echo "rc $?"
find "$1" -name '*.tmp' | sed 's/^/stays /'
mount -o remount,size=64m "$1" || exit 99
"$2" -c "$3" "$1/root"; echo "rc $?"
cp "$1"/root/sweeps/s/*.parquet "$4"
"""


def test_disk_is_full(base):
    """A file system that fills up: exit code 3 and no temporary file; with space again, the same tables."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here (unshare -Urm is not allowed)")
    for name in ("disk", "tables"):
        (base / name).mkdir()
    arguments = [str(base / "disk"), sys.executable, SCRIPT, str(base / "tables")]
    command = ["unshare", "-Urm", "bash", "-c", FULL_DISK, "bash", *arguments]
    found = subprocess.run(command, text=True, capture_output=True, timeout=300)
    assert found.returncode != 99, found.stderr
    assert re.findall(r"rc \d+", found.stdout) == ["rc 3", "rc 0"], found.stdout + found.stderr[-2000:]
    assert os.strerror(errno.ENOSPC) in found.stdout and "stays" not in found.stdout
    truth = scene.truth_of(scene.small(), base / "truth")
    assert {name: (base / "tables" / f"{name}.parquet").read_bytes() for name in scene.TABLES} == truth.tables
