"""rmsweep log CELL: state, last attempt, what the logs say of the cell and no other, and who has it in hand."""

import json

import pytest
from conftest import PRESETS
from fake_pipeline import fake_plan, fake_run

from rmsweep import history
from rmsweep.cli import main
from rmsweep.cli.complete import candidates
from rmsweep.diary import Diary
from rmsweep.engines import _queue
from rmsweep.engines._queue import Task
from rmsweep.grid import describe
from rmsweep.planner import make
from rmsweep.slots import Look, Note, Slots


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Three cells, of which the second raises."""
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"1": "raise"}))
    fake_run(fake_plan(3), tmp_path)
    return tmp_path


def told(root, capsys, cell):
    assert main(["log", cell.cell_id[:12], f"root={root}"]) == 0
    return capsys.readouterr().out


def test_a_failed_cell(root, capsys):
    """Catches a traceback that nobody finds, and the lines of other cells of the unit."""
    good, bad, _ = fake_plan(3).cells
    text = told(root, capsys, bad)
    assert text.startswith(f"cell {bad.cell_id}: failed (bug): ValueError: seed 1 does not work")
    assert "seed=1" in text and "attempt 1 on " in text and str(root / "sweeps/s/logs") in text
    assert "Traceback" in text and "host " in text and good.cell_id not in text
    assert "Traceback" not in told(root, capsys, good) and f"cell {good.cell_id}: done" in told(root, capsys, good)


def test_every_attempt_is_shown(root, capsys, monkeypatch):
    """Catches a history that forgets what went before a retry."""
    monkeypatch.setenv("FAKE_FAULTS", "{}")
    bad = fake_plan(3).cells[1]
    fake_run(fake_plan(3), root, retry=frozenset([bad.fingerprint]))
    text = told(root, capsys, bad)
    assert ": done\n" in text and "failed (" in text and "attempt 1 " in text and "attempt 2 " in text


def test_a_cell_in_the_hands_of_a_slot(tmp_path, monkeypatch):
    """Where it is now, and the end of what that slot printed, with nothing that could drive a terminal."""
    monkeypatch.setattr(_queue, "is_here", lambda: False)
    plan = fake_plan(2)
    plan.write(tmp_path / "sweeps" / "s")
    files = Slots(tmp_path, "s")
    files.prepare()
    cell = plan.cells[0]
    with Diary(files.notes_folder, "101_3", 1) as diary:
        diary.told([cell.fingerprint])
        diary._write({})
        files.log("101_3").write_text("".join(f"line {i}\n" for i in range(30)) + "\x1b[2Jend\n")
        text = history.tell(plan, tmp_path, cell)
        diary.ended("stopped")
    assert f"cell {cell.cell_id}: not computed yet" in text
    assert "slot 101_3 on " in text and "turn 2, had it in hand when last heard of" in text
    assert "line 29" in text and "line 9\n" not in text and "\x1b" not in text
    assert "had it in hand when it ended (stopped)" in history.tell(plan, tmp_path, cell)


@pytest.mark.parametrize(("state", "how"), [("RUNNING", "has it"), ("NODE_FAIL", "had it in hand when it was killed")])
def test_whether_the_slot_lives(state, how):
    """Catches a slot that was killed without a word and is said to be at work."""
    note = Note("7_0", 0, "n1", 0, {"a": 0.1}, None, "")
    assert history._how(note, Look({"7_0": Task("7_0", state, "n1")}, frozenset())).startswith(how)
    assert history._how(note, Look({}, frozenset())) == "had it in hand when it was killed"


def test_a_skipped_cell(tmp_path):
    """It says why it is not computed, and looks for no log."""
    node = {"name": "s", "set": {"size": "tiny"}, "axes": {"n_annotations": [100, 10**9]}}
    plan = make(describe(node), PRESETS)
    (skipped,) = (cell for cell in plan.cells if cell.reason is not None)
    assert history.tell(plan, tmp_path, skipped).startswith(f"cell {skipped.cell_id}: not planned to be computed: ")


@pytest.mark.parametrize(
    ("words", "says"), [(["log"], "first digits of a cell_id"), (["log", "zzz"], "is no cell of this plan")]
)
def test_a_cell_that_is_not_there(root, capsys, words, says):
    """One line with the fix, exit code 1."""
    assert main([*words, f"root={root}"]) == 1
    assert says in capsys.readouterr().err


def test_status_points_there(root, capsys):
    """Catches a failure whose log nobody knows how to find."""
    assert main(["status", f"root={root}"]) == 0
    assert "`rmsweep log CELL`" in capsys.readouterr().out
    assert "log" in candidates(["l"]) and "s" in candidates(["log", f"root={root}", ""])
