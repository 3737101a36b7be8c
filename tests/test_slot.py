"""Inside a slot: what it runs, what it hears, what it notes, and when it leaves; and one worker per GPU."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import PRESETS
from fake_pipeline import fake_plan, fake_run
from waiting import wait_until

from rmsweep import claims, execute, hardware
from rmsweep.claims import Claims
from rmsweep.cli import slot
from rmsweep.diary import Diary
from rmsweep.engines import Event, Task, _queue, _slot
from rmsweep.engines.local import Local
from rmsweep.plan import sweep_folder
from rmsweep.slots import Note, Order, Slots
from rmsweep.store import Store

WORK = "fake_pipeline:WORK"


SLOW = """
import os, signal, sys, pathlib, time
sys.path.insert(0, {tests!r})
from rmsweep.cli import slot
def stall(*_):
    pathlib.Path(os.environ["FAKE_LEDGER"], "../stalled").resolve().touch()
    time.sleep(60)
if "SLOT_STALL" in os.environ:
    slot._work = stall
sys.exit(slot.main({arguments!r}))
"""


def _slot_arguments(root, plan, **changed):
    """Of `python -m rmsweep.cli.slot` for a plan whose snapshot is made here."""
    files = Slots(root, plan.name)
    files.prepare()
    plan.write(sweep_folder(root, plan.name))
    given = {"plan": files.snapshot(plan), "of": 1, "first": 0, "task": "9", "restart": 0, "workers": 0, "work": WORK}
    words = [word for flag, value in {**given, **changed}.items() for word in (f"--{flag}", str(value))]
    return [str(root), plan.name, *words]


def _slot_process(root, plan, prefix=(), **environment):
    """A slot as its parent starts it; in a group of its own."""
    script = SLOW.format(tests=str(Path(__file__).parent), arguments=_slot_arguments(root, plan))
    env = {**os.environ, "FAKE_LEDGER": str(root / "ledger"), **environment}
    (root / "ledger").mkdir(parents=True)
    return subprocess.Popen([*prefix, sys.executable, "-c", script], env=env, start_new_session=True)


def test_a_slot_does_not_hear_slurms_own_sigterm(tmp_path):
    """It goes to every process of the job: catches a child that ends on it before its parent can tell it how."""
    child = _slot_process(tmp_path, fake_plan(3), FAKE_SECONDS="0.7")
    wait_until(lambda: any((tmp_path / "ledger").glob("cell*")))
    child.terminate()
    assert child.wait(60) == 0 and len(list((tmp_path / "ledger").glob("cell*"))) == 3


def test_a_slot_without_its_parent_leaves(tmp_path):
    """Slurm kills the parent alone, as kill -9 of one process does: catches a child that computes on beside its job."""
    parent = (sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])")
    process = _slot_process(tmp_path, fake_plan(60), parent, FAKE_SECONDS="0.5")
    wait_until(lambda: any((tmp_path / "ledger").glob("cell*")))
    process.kill()
    process.wait()
    wait_until(lambda: not list((tmp_path / "store" / "claims").iterdir()))
    wait_until(lambda: not _group(process.pid))
    (said,) = Slots(tmp_path, "s").notes()
    assert said.end == "stopped" and len(list((tmp_path / "ledger").glob("cell*"))) < 60


def _group(number):
    """Processes of a group that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            found += [path] if int(group) == number and state != "Z" else []
    return found


def test_which_share_a_slot_takes_and_what_it_runs_again(tmp_path, monkeypatch):
    """Catches slots that all begin at the same place (--first, array index), and a list of retries that is not read."""
    plan, seen = fake_plan(8), []
    monkeypatch.setattr(slot.signal, "signal", lambda *_: None)
    monkeypatch.setattr(execute, "help_with", lambda *a, **k: seen.append((a[3], k["retry"])) or HELPED)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    files = Slots(tmp_path, "s")
    files.prepare()
    Store(tmp_path).prepare()
    again = {plan.cells[1].fingerprint: 0}
    assert slot.main(_slot_arguments(tmp_path, plan, of=9, first=4, retry=files.write_retry(again))) == 0
    ((share, retry),) = seen
    assert (share.part, share.of) == (6, 9) and retry == again.keys()


HELPED = execute.Helped(0, 0, (), False, None)


@pytest.mark.parametrize(("number", "end"), [(signal.SIGINT, "time"), (signal.SIGHUP, "stopped")])
def test_told_to_leave_before_the_engine_listens(tmp_path, number, end):
    """Catches a slot that leaves without a word: its exit would pass for the end of its work."""
    child = _slot_process(tmp_path, fake_plan(3), FAKE_FAULTS=json.dumps({"bank": "hang"}), SLOT_STALL="1")
    wait_until(lambda: (tmp_path / "stalled").exists())
    child.send_signal(number)
    assert child.wait(60) == _slot.LEFT
    assert [note.end for note in Slots(tmp_path, "s").notes()] == [end]


def test_a_slot_that_begins_after_cancel_computes_nothing(tmp_path, monkeypatch, capsys):
    """Catches a sweep that goes on because one slot started while `cancel` looked at the queue."""
    monkeypatch.setattr(slot.signal, "signal", lambda *_: None)
    monkeypatch.setattr(execute, "help_with", lambda *a, **k: pytest.fail("it worked"))
    arguments = _slot_arguments(tmp_path, fake_plan(2))
    Slots(tmp_path, "s").cancel()
    assert slot.main(arguments) == 0 and Slots(tmp_path, "s").notes()[0].end == "stopped"


def test_a_slot_whose_child_is_killed_first_waits_to_be_killed_too(tmp_path, monkeypatch):
    """Catches TIMEOUT and NODE_FAIL recorded as FAILED, which would count as a bug of the cells in flight: Slurm ends
    a job process by process."""
    monkeypatch.setattr(_slot, "MOMENT", 1.5)
    start = _slot.subprocess.Popen
    die = "import os; os.kill(os.getpid(), 9)"
    monkeypatch.setattr(_slot.subprocess, "Popen", lambda command: start([command[0], "-c", die]))
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="exit code -9"):
        _slot.Slot((), str(tmp_path), 60.0, 5.0)()
    assert 1.5 <= time.monotonic() - began < 30


def test_a_slot_whose_child_does_not_leave_is_out_of_time(tmp_path, monkeypatch):
    """Catches FAILED, a bug of the cells in flight, for a child that hangs when the time is over."""
    monkeypatch.setattr(_slot, "GRACE", 0.5)
    monkeypatch.setattr(_slot, "MOMENT", 0.0)
    slept = []
    monkeypatch.setattr(_slot, "_sleep_until_killed", lambda: slept.append(1))
    start = _slot.subprocess.Popen
    hang = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    monkeypatch.setattr(_slot.subprocess, "Popen", lambda command: start([command[0], "-c", hang]))
    with pytest.raises(RuntimeError, match="exit code -9"):
        _slot.Slot((), str(tmp_path), 7.0, 1.0)()
    assert slept


def test_sleeping_until_killed(monkeypatch):
    """Catches a slot that ends by itself after it was told to leave: it would count as COMPLETED. Not for ever."""
    monkeypatch.setattr(_slot, "PATIENCE", 1.5)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="nobody has ended it"):
        _slot._sleep_until_killed()
    assert 1.5 <= time.monotonic() - began < 10


def _real_plan():
    """A plan of one real cell that has not been computed."""
    from rmsweep.grid import describe
    from rmsweep.planner import make

    node = {
        "name": "s",
        "set": {"size": "tiny", "reward_model": "bt_linear", "n_annotations": 40},
        "axes": {"seed": [7]},
    }
    return make(describe(node), PRESETS)


# -- inside a slot -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "told", "requeued"),
    [(signal.SIGUSR2, "INT", True), (signal.SIGTERM, "HUP", False), (None, "INT", True)],
)
def test_signals_in_a_slot(tmp_path, monkeypatch, number, told, requeued):
    """The warning and the slot's own clock: publish, then back to the queue. SIGTERM: publish, then wait to be killed,
    since a job that exits by itself is never requeued."""
    script = (
        "import signal, sys, time, pathlib\n"
        "def end(name): pathlib.Path('told').write_text(name); sys.exit(75)\n"
        "signal.signal(signal.SIGINT, lambda *_: end('INT')); signal.signal(signal.SIGHUP, lambda *_: end('HUP'))\n"
        "pathlib.Path('up').touch(); time.sleep(30)\n"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slots").mkdir()
    Diary(tmp_path / "slots", "5_0", 0).ended("time", 3)
    asked, slept = [], []
    monkeypatch.setattr(_queue, "requeue", lambda name: asked.append(name) or True)
    monkeypatch.setattr(_slot, "_sleep_until_killed", lambda: slept.append(1))
    start = _slot.subprocess.Popen
    monkeypatch.setattr(_slot.subprocess, "Popen", lambda command: start([command[0], "-c", script]))
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    if number is not None:
        threading.Thread(target=_signal_once_up, args=(tmp_path / "up", number), daemon=True).start()
    seconds = 3600.0 if number is not None else 27.0
    before = {n: signal.getsignal(n) for n in (signal.SIGUSR2, signal.SIGTERM)}
    _slot.Slot((), str(tmp_path / "slots"), seconds, 20.0)()
    assert (tmp_path / "told").read_text() == told
    assert asked == (["5_0"] if requeued else []) and slept == [1]
    assert {n: signal.getsignal(n) for n in before} == before


def _signal_once_up(path, number):
    while not path.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), number)


def test_a_turn_without_a_cell_is_not_requeued(tmp_path):
    """Catches a slot that goes back to the queue for ever with a cell that is too long for it; or after a cancel."""
    supervisor = _slot._Supervisor(_slot.Slot((), str(tmp_path / "slots"), 60.0, 5.0))
    (tmp_path / "slots").mkdir()
    assert not supervisor._is_worth_it("5_0", 0)
    Diary(tmp_path / "slots", "5_0", 0).ended("time", 0)
    assert not supervisor._is_worth_it("5_0", 0)
    Diary(tmp_path / "slots", "5_0", 0).ended("time", 1)
    assert supervisor._is_worth_it("5_0", 0)
    (tmp_path / _slot.CANCELLED).touch()
    assert not supervisor._is_worth_it("5_0", 0)


def test_a_request_to_leave_outweighs_a_warning():
    """Catches a slot that is preempted just after its warning and exits by itself: it would never be requeued."""
    supervisor = _slot._Supervisor(_slot.Slot((), "", 60.0, 5.0))
    for why in ("time", "leave", "time", ""):
        supervisor._note(why)
    assert supervisor.why == "leave"


@pytest.mark.parametrize(("code", "requeued"), [(_slot.LEFT, True), (0, False), (1, False)])
def test_only_who_has_work_left_goes_back_to_the_queue(tmp_path, monkeypatch, code, requeued):
    """Catches a slot that is requeued although nothing is left, or although it failed."""
    asked = []
    monkeypatch.setattr(_queue, "requeue", lambda name: asked.append(name) or False)
    monkeypatch.setattr(_slot._Supervisor, "_is_worth_it", lambda *_: True)
    script = f"import time, sys, signal; signal.signal(signal.SIGINT, lambda *_: sys.exit({code})); time.sleep(60)"
    start = _slot.subprocess.Popen
    monkeypatch.setattr(_slot.subprocess, "Popen", lambda command: start([command[0], "-c", script]))
    monkeypatch.setattr(_slot, "LAG", 1.0)
    with contextlib.suppress(RuntimeError):
        _slot.Slot((), str(tmp_path), 8.0, 5.0)()
    assert bool(asked) == requeued


def test_a_child_that_does_not_leave_is_killed(monkeypatch):
    """Catches a slot that hangs with its child until Slurm kills both, and what was published last with them."""
    monkeypatch.setattr(_slot, "GRACE", 0.5)
    supervisor = _slot._Supervisor(_slot.Slot((), "", 60.0, 5.0))
    supervisor.why = "time"
    script = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    child.stdout.readline()
    assert supervisor._ended(child) == -signal.SIGKILL


def test_slots_wait_longer_than_a_lease():
    """Catches slots that all leave before what a dead node held can be claimed."""
    assert claims.LEASE < slot.PATIENCE


def test_a_cell_that_another_slot_has_run_again_is_not_run_a_third_time(tmp_path, monkeypatch):
    """The list of retries says up to which attempt; catches slots that each repeat the whole list."""
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"1": "raise", "2": "raise"}))
    plan = fake_plan(4)
    fake_run(plan, tmp_path)
    keys = [plan.cells[i].fingerprint for i in (1, 2)]
    again = Store(tmp_path).attempts(keys)
    fake_run(plan, tmp_path, retry=frozenset(keys[:1]))
    seen = []
    monkeypatch.setattr(slot.signal, "signal", lambda *_: None)
    monkeypatch.setattr(execute, "help_with", lambda *a, **k: seen.append(k["retry"]) or HELPED)
    files = Slots(tmp_path, "s")
    files.prepare()
    assert slot.main(_slot_arguments(tmp_path, plan, retry=files.write_retry(again))) == 0
    assert seen == [frozenset(keys[1:])]


def test_the_limits_of_the_job_count(tmp_path, monkeypatch):
    """A site may give less time than was asked for."""
    monkeypatch.setenv("SLURM_JOB_START_TIME", "1000")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1600")
    assert _slot._Supervisor(_slot.Slot((), "", 3600.0, 100.0)).seconds == 600 - 100 - _slot.LAG


def test_slots_share(tmp_path, monkeypatch):
    """Catches slots that all begin with the same unit: each begins with its own share."""
    monkeypatch.setattr(execute.units, "MAX_CELLS", 2)
    plan, first = fake_plan(8), []
    for part in range(2):
        root = tmp_path / str(part)
        seen = []
        share = execute.Share(part, 2, 0.0, lambda cells, seen=seen: seen.extend(cells))
        plan.write(root / "sweeps" / "s")
        helped = execute.help_with(plan, root, Local(workers=0), share, retry=frozenset(), work=WORK)
        first.append(seen[0])
        assert helped.n_computed == 8 and not helped.n_missing
    assert first == [plan.cells[0].fingerprint, plan.cells[4].fingerprint]


def test_a_slot_loses_patience(tmp_path, monkeypatch):
    """Catches a slot that keeps its node while others finish what they hold."""
    plan = fake_plan(4)
    store = Store(tmp_path)
    store.prepare()
    with Claims(store.folder / "claims") as others:
        others.take(cell.fingerprint for cell in plan.cells[:2])
        share = execute.Share(0, 1, 0.6, lambda cells: None)
        began = time.monotonic()
        helped = execute.help_with(plan, tmp_path, Local(workers=0), share, retry=frozenset(), work=WORK)
    assert helped.n_computed == 2 and helped.n_missing == 2 and 0.5 < time.monotonic() - began < 20
    assert not (tmp_path / "sweeps/s/results.parquet").exists()


def test_a_slot_waits_for_a_bank(tmp_path):
    """Catches slots that leave while another one still builds what all of them need."""
    plan = fake_plan(4)
    plan.write(tmp_path / "sweeps" / "s")
    store = Store(tmp_path)
    store.prepare()
    others = Claims(store.folder / "claims")
    with others:
        others.take([f"bank-{plan.cells[0].bank_id}"])
        threading.Timer(1.5, others.release, [[f"bank-{plan.cells[0].bank_id}"]]).start()
        share = execute.Share(0, 1, 0.2, lambda cells: None)
        helped = execute.help_with(plan, tmp_path, Local(workers=0), share, retry=frozenset(), work=WORK)
    assert helped.n_computed == 4


# -- its note ----------------------------------------------------------------------------------------------


def test_the_diary_is_kept_while_cells_are_computed(tmp_path):
    """Catches a note that is written at the end only: of a slot that is killed nothing would be known."""
    files = Slots(tmp_path, "s")
    files.prepare()
    with Diary(files.notes_folder, "5_0", 1, Order("p", "r")) as diary:
        assert files.notes()[0] == Note("5_0", 1, files.notes()[0].host, 0, {}, None, "", "p", "r")
        diary.told(["a", "b"])
        wait_until(lambda: files.notes()[0].in_flight, 20)
        assert files.notes()[0].in_flight.keys() == {"a", "b"} and files.notes()[0].end is None


def test_the_end_of_a_slot_outlives_a_slow_write(tmp_path, monkeypatch):
    """Catches a late note of cells in flight over the one that says how the slot ended, and notes without news."""
    written = []
    monkeypatch.setattr("rmsweep.slots.atomic.note", lambda path, data: written.append(json.loads(data)))
    diary = Diary(tmp_path, "5_0", 0)
    diary.told(["a"])
    diary.ended("time", 7)
    diary._write({})
    assert [(n["end"], n["computed"]) for n in written[-2:]] == [("time", 7)] * 2


def test_changed_code_is_refused_by_the_slot(tmp_path, monkeypatch):
    """The real check: a slot that starts after the code changed computes nothing and says why, in its note too."""
    plan = _real_plan()
    code = json.loads(plan.cells[0].code)
    old = plan.cells[0]._replace(code=json.dumps({**code, "train": "0" * 16}))
    files = Slots(tmp_path, "s")
    files.prepare()
    name = files.snapshot(dataclasses.replace(plan, cells=[old]))
    monkeypatch.setattr(slot.signal, "signal", lambda *_: None)
    rest = ["--plan", name, "--of", "1", "--first", "0", "--task", "9", "--restart", "0", "--workers", "0"]
    assert slot.main([str(tmp_path), "s", *rest, "--work", "rmsweep.runner:pipeline"]) == 1
    (said,) = files.notes()
    assert said.end == "refused" and "code of train has changed" in said.message
    assert not list((tmp_path / "store" / "results").iterdir())


# -- GPUs --------------------------------------------------------------------------------------------------

SMI = """GPU 0: NVIDIA H200 (UUID: GPU-aaaa-1)
GPU 1: NVIDIA H200 (UUID: GPU-bbbb-2)
  MIG 1g.18gb     Device  0: (UUID: MIG-cccc-3)
  MIG 1g.18gb     Device  1: (UUID: MIG-dddd-4)
"""


def test_gpus_of_this_process(monkeypatch):
    """What Slurm gave counts, else what there is; a divided GPU is its parts."""
    monkeypatch.setattr(hardware, "_nvidia_smi", lambda *_: SMI)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert hardware.gpus() == ["GPU-aaaa-1", "MIG-cccc-3", "MIG-dddd-4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert hardware.gpus() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,-1,5")
    assert hardware.gpus() == ["3"]


class Gpus:
    """A source of tasks that say which GPU their worker sees."""

    def __init__(self, n):
        self.tasks, self.seen = [Task(f"t{i}", "test_slot:visible", None) for i in range(n)], {}

    def next(self):
        return self.tasks.pop() if self.tasks else None

    def waiting(self):
        return False

    def handle(self, event: Event):
        pid, gpu = event.data
        self.seen[pid] = gpu


def visible(payload, channel):
    time.sleep(0.3)
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")


def test_one_worker_per_gpu(monkeypatch):
    """Catches workers that all take the first GPU; the driver's own environment stays."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,7")
    source = Gpus(6)
    assert Local().n_workers(10, ["0", "7"]) == 2
    Local().run(source, 6, gpus=["0", "7"])
    assert sorted(source.seen.values()) == ["0", "7"] and os.environ["CUDA_VISIBLE_DEVICES"] == "0,7"
