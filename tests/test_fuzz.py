"""Hostile configs and data sets at random: zero tracebacks, zero files outside the folder, zero executions."""

import os
import subprocess
import sys

import pytest
from hypothesis import strategies as st
from torture import fuzz, hostile
from torture.watch import CANARY, watch

SEED = 20_241_104


@pytest.fixture(autouse=True)
def short_messages(monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")


def test_configs(tmp_path):
    """Catches a config that ends in a traceback, writes beside its root, executes, or drives the terminal."""
    report = fuzz.fuzz_configs(200, SEED, tmp_path)
    print(report, dict(report.ends))
    assert not report.broken, "\n\n".join(report.broken[:5])
    assert report.n >= 200 and report.refused > 100 and report.accepted > 5
    assert {"plan 1", "run 0", "status 3", "retry 3"} <= set(report.ends)  # every kind of input was reached


def test_data_sets(tmp_path):
    """Catches data that end in a traceback, in a failed cell or in NaN, and a refusal that names no file."""
    report = fuzz.fuzz_data(50, SEED, tmp_path)
    print(report, dict(report.ends))
    assert not report.broken, "\n\n".join(report.broken[:5])
    assert report.n >= 50 and report.refused > 10 and report.accepted > 10


def test_the_watch_sees(tmp_path):
    """The hook itself: a write elsewhere, a program, input that is executed; and none of them inside the folder."""
    inside, outside, guard = tmp_path / "inside", tmp_path / "outside", watch()
    inside.mkdir()
    outside.mkdir()
    guard.escapes.clear()
    guard.executions.clear()
    with guard.armed(inside):
        (inside / "a").write_text("x")
        os.rename(inside / "a", inside / "b")
        (inside / "b").read_text()
    assert guard.escapes == guard.executions == []
    with guard.armed(inside):
        (outside / "a").write_text("x")
        os.rename(outside / "a", outside / "b")
        os.mkdir(outside / "c")
        descriptor = os.open(outside, os.O_RDONLY)
        os.unlink("b", dir_fd=descriptor)
        os.close(descriptor)
        (inside / "way").symlink_to(outside)
        (inside / "way" / "d").write_text("x")
        subprocess.run([sys.executable, "-c", ""], check=True)
        exec(f"{CANARY} = 1")
    assert [text.split()[0] for text in guard.escapes] == [
        "open",
        "os.rename",
        "os.rename",
        "os.mkdir",
        "os.remove",
        "open",
    ]
    assert any("Popen" in text for text in guard.executions) and any("exec " in text for text in guard.executions)
    guard.escapes.clear()
    guard.executions.clear()


def test_the_fuzzers_see(tmp_path, monkeypatch):
    """A command line that fails in each of the ways is reported and its example saved."""
    monkeypatch.setattr(fuzz, "_quiet", lambda words: 0)

    def bad(words):
        print("\x1b[2J")
        (tmp_path / "elsewhere").write_text("x")
        raise KeyError("x")

    monkeypatch.setattr(fuzz, "main", bad)
    configs = st.integers().map(lambda i: hostile.Config([f"beta={i}"], {}))
    example = "plan ends with None"
    monkeypatch.setattr(hostile, "configs", lambda: configs)
    report = fuzz.fuzz_configs(3, SEED, tmp_path / "folder")
    assert report.n == 3 and len(report.tracebacks) == len(report.escapes) == 6
    assert sum(example in text for text in report.tracebacks) == 3
    assert len(list((tmp_path / "folder").glob("found-*.txt"))) == 3
