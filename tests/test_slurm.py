"""engine=slurm against stand-ins for Slurm's commands on PATH: nothing twice, nothing lost, no endless submitting."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import fake_slurm
import pytest
from conftest import PRESETS
from fake_pipeline import fake_plan, fake_run
from waiting import wait_until

from rmsweep import cluster, collect, component, execute, intake, rounds, status
from rmsweep.claims import Claims
from rmsweep.cli import main, render
from rmsweep.engines import _queue, _slot, slurm
from rmsweep.engines.local import Local
from rmsweep.engines.slurm import Slurm
from rmsweep.errors import ConfigError, RmsweepError, StoreError
from rmsweep.fingerprint import digest
from rmsweep.plan import sweep_folder
from rmsweep.progress import Progress
from rmsweep.slots import Job, Note, Slots
from rmsweep.store import Store
from rmsweep.todo import Todo

pytest.importorskip("submitit")
WORK = "fake_pipeline:WORK"


class Site:
    """What the tests see of the fake cluster and do to it."""

    def __init__(self, folder):
        self.folder = folder

    def calls(self, command):
        path = self.folder / "calls.log"
        return [line for line in path.read_text().splitlines() if line.split()[0] == command] if path.exists() else []

    def jobs(self):
        return fake_slurm.jobs()

    def tasks(self):
        return {task: state for job in self.jobs().values() for task, state in job["tasks"].items()}

    def wrong(self, **faults):
        (self.folder / "faults.json").write_text(json.dumps(faults))

    def states(self, **states):
        """Set tasks' states; `all=STATE` those of all tasks. GONE: the queue no longer knows it."""
        for name, job in self.jobs().items():
            known = {task: states.get(f"t{task}", states.get("all", state)) for task, state in job["tasks"].items()}
            accounting = {t: s for t, s in states.get("accounting", {}).items() if t in known}
            fake_slurm.save(name, {**job, "tasks": known, "accounting": accounting})


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A cluster without nodes: jobs wait until the test says otherwise."""
    folder = tmp_path / "slurm"
    for name, value in fake_slurm.install(folder).items():
        monkeypatch.setenv(name, value)
    return Site(folder)


@pytest.fixture
def nodes(site, monkeypatch):
    """And nodes: processes of this machine."""
    monkeypatch.setenv("FAKE_SLURM_RUN", "1")
    repository = Path(cluster.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{repository}{os.pathsep}{Path(__file__).parent}")
    return site


def engine(**fields):
    fields = {"slots": 2, "cpus_per_slot": 1, "time_minutes": 60, **fields}
    return dataclasses.replace(Slurm(), **{"poll_seconds": 0.0, **fields})


@contextlib.contextmanager
def driver(root, plan, retry=frozenset(), **fields):
    """A driver that has planned, as cluster.run makes it."""
    store, files = Store(root, heal=True), Slots(root, plan.name)
    store.prepare()
    files.prepare()
    with Claims(store.folder / "claims") as claims:
        execute.write_plan(plan, sweep_folder(root, plan.name), claims)
        todo = Todo(store, execute.pending_cells(plan.cells, store, retry, plan.keep))
        bar = Progress(plan.name, len(todo.cells), None, show=False)
        made = engine(**fields)
        yield cluster._Driver(plan, root, made, claims, files, todo, bar, WORK, made.memory_gib)


def note(driver, task, end=None, restart=0, message="", computed=0, **in_flight):
    """What a slot would have written."""
    said = Note(task, restart, "n1", computed, in_flight, end, message, *driver._order)
    path = driver.files.notes_folder / f"{task}.{restart}.json"
    path.write_text(json.dumps(said._asdict()))


def table(root):
    return (Path(root) / "sweeps" / "s" / "results.parquet").read_bytes()


# -- submitting --------------------------------------------------------------------------------------------


def test_the_same_command_again_adopts(site, tmp_path):
    """Catches a second driver, or a driver started again, that submits a second time."""
    plan = fake_plan(6)
    for _ in range(3):
        with driver(tmp_path, plan) as one:
            one.step()
            one.step()
    assert len(site.calls("sbatch")) == 1 and len(site.tasks()) == 2


def test_two_drivers_at_once(site, tmp_path):
    """Catches two drivers that both find nothing in the queue and both submit: one waits until the other has."""
    site.wrong(slow=0.5)
    with driver(tmp_path, fake_plan(6)) as one, driver(tmp_path, fake_plan(6)) as two:
        threads = [threading.Thread(target=each.step) for each in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert one.n_live == two.n_live == 2 and not one.notes + two.notes
    assert len(site.calls("sbatch")) == 1


def test_a_look_that_is_older_than_the_submission(site, tmp_path):
    """Catches jobs counted as gone because the last look at the queue was before them."""
    with driver(tmp_path, fake_plan(6), poll_seconds=30.0) as one:
        for _ in range(3):
            one.step()
        assert one.n_live == 2
    with driver(tmp_path, fake_plan(6), poll_seconds=30.0) as two:
        for _ in range(3):
            two.step()
        assert two.n_live == 2
    assert len(site.calls("sbatch")) == 1 and len(site.calls("squeue")) == 2  # a driver that begins always asks


def test_after_a_lost_reply_the_queue_is_asked_anew(site, tmp_path):
    """Catches a driver that comes back, takes the look from before the submission for now, and submits again."""
    site.wrong(lose_reply=1)
    for _ in range(2):
        with driver(tmp_path, fake_plan(6), poll_seconds=30.0) as one:
            one.step()
    assert len(site.calls("sbatch")) == 1 and len(site.calls("squeue")) == 2


def test_another_driver_does_not_decide_on_a_look_from_before_a_lost_reply(site, tmp_path):
    """Catches a second submission by a driver of the same machine, which takes the other's look for the present."""
    fields = {"poll_seconds": 30.0, "slots": 2}
    with driver(tmp_path, fake_plan(6), **fields) as one, driver(tmp_path, fake_plan(6), **fields) as two:
        site.wrong(max_submit=0)
        one.step()
        two.step()
        site.wrong(lose_reply=1)
        one.step()
        assert not one.n_live
        two.step()
        assert two.n_live == 2
    assert len(site.tasks()) == 2


def test_status_after_cancel(site, tmp_path):
    """Catches slots that `status` shows for half a minute after they were cancelled."""
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
    cluster.cancel(tmp_path, "s")
    assert "slots: none in the queue (cancelled)" in status.render(status.summarise(tmp_path, "s"))


def test_a_status_does_not_hide_a_submission_under_way(site, tmp_path):
    """Catches a look of `status`, taken while sbatch worked, that a driver then decides on."""
    files = Slots(tmp_path, "s")
    files.prepare()
    with contextlib.suppress(ZeroDivisionError), files.submitting():
        files.look(fresh=True)
        raise ZeroDivisionError
    files.look()
    files.poll()
    files.poll()
    assert len(site.calls("squeue")) == 2


def test_ctrl_c_does_not_reach_sbatch(site, tmp_path):
    """Catches an sbatch that a Ctrl-C in the terminal kills half-way: the signals wait until it has ended."""
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
    blocked = json.loads((site.folder / "blocked.json").read_text())
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} <= set(blocked)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_an_sbatch_that_does_not_end(site, tmp_path, monkeypatch):
    """Catches a driver that hangs with it, and one that submits beside it; what it submitted in the end is found."""
    monkeypatch.setattr(slurm, "SECONDS", 0.3)
    site.wrong(slow=1.5)
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        one.step()
        assert [text for text in one.notes if "not ended within" in text] and len(site.calls("sbatch")) == 1
        wait_until(lambda: not any(thread.name == slurm.THREAD for thread in threading.enumerate()))
        one.step()
        assert one.n_live == 2
    assert len(site.calls("sbatch")) == 1


@pytest.mark.parametrize("fault", ["lose_reply", "garble", "mute"])
def test_a_lost_reply(site, tmp_path, fault):
    """Catches jobs submitted twice because sbatch's answer did not come; the found slots get what they are to run."""
    site.wrong(**{fault: 1})
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        assert not one.files.jobs()
        one.step()
        one.step()
        assert list(one.files.jobs()) == ["101"] and any("found again" in text for text in one.notes)
        for task in site.tasks():
            assert (one.files.folder / f"{task}_submitted.pkl").exists()
    assert len(site.calls("sbatch")) == 1


def test_a_driver_killed_between_sbatch_and_its_record(site, tmp_path):
    """Catches a job that nobody remembers: the queue has its name."""
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        (one.files.folder / "jobs" / "101.json").unlink()
    with driver(tmp_path, fake_plan(6)) as two:
        two.step()
        assert list(two.files.jobs()) == ["101"]
    assert len(site.calls("sbatch")) == 1


def test_array_limits(site, tmp_path):
    """Catches arrays above the site's MaxArraySize, and slots above what may be submitted: the rest comes later."""
    site.wrong(max_array=3, max_submit=7)
    with driver(tmp_path, fake_plan(20), slots=8) as one:
        one.step()
        assert [len(job["tasks"]) for job in site.jobs().values()] == [3, 3, 1]
        site.wrong(max_array=3)
        one.step()
        assert len(site.tasks()) == 8
        one.step()
    assert len(site.tasks()) == 8


def test_a_site_that_does_not_say_its_limit(site, tmp_path, monkeypatch):
    """Catches 'Invalid job array specification' as the end: arrays are halved until they are taken."""
    monkeypatch.setattr(_queue, "max_array", lambda: None)
    site.wrong(max_array=3)
    with driver(tmp_path, fake_plan(20), slots=5) as one:
        for _ in range(4):
            one.step()
    assert len(site.tasks()) == 5 and max(len(job["tasks"]) for job in site.jobs().values()) <= 3


def test_duplicate_ids(site, tmp_path):
    """A task listed twice is one slot; a job id that Slurm gives a second time is the new job, in the new round."""
    site.wrong(twice=True, duplicate="7")
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        site.states(all="COMPLETED")
        site.wrong(duplicate="7")
        for _ in range(2):
            one.step()
        site.wrong(twice=True, duplicate="7")
        for _ in range(3):
            one.step()
        assert [(job.id, job.n_slots, job.round) for job in one.files.jobs().values()] == [("7", 2, 2)]
        assert one.n_live == 2 and not one.n_missing
    assert len(site.calls("sbatch")) == 2


def test_sbatch_refuses(site, tmp_path):
    """One message with the site's own words, exit code 1."""
    site.wrong(refuse="invalid partition specified: nope")
    with pytest.raises(ConfigError, match="invalid partition specified: nope"):
        cluster.run(fake_plan(2), tmp_path, engine(), progress=False, work=WORK)


def test_what_is_asked_for(site, tmp_path):
    """Catches options that do not arrive at sbatch."""
    fields = {"partition": "gpu", "account": "me", "qos": "q", "constraint": "a100|h100", "gpus_per_slot": 2}
    with driver(tmp_path, fake_plan(6), **fields, memory_gib=3.5, cpus_per_slot=6, signal_seconds=90) as one:
        one.step()
    (job,) = site.jobs().values()
    wanted = {"partition": "gpu", "account": "me", "qos": "q", "constraint": "'a100|h100'", "gres": "gpu:2"}
    wanted |= {"mem": "3584M", "cpus-per-task": "6", "time": "60", "signal": "B:USR2@90", "requeue": "", "nodes": "1"}
    assert wanted.items() <= job["options"].items() and "--workers" not in job["script"]


def test_no_words_of_a_config_reach_a_shell(tmp_path):
    """Catches a batch script that a name with a line break writes its own commands into."""
    for field in ("partition", "account", "qos", "constraint"):
        with pytest.raises(ConfigError, match=field):
            component.build("engine", {"kind": "slurm", field: "a\nrm -rf x"})
    for name in ("a\nb", "a\\b", "a%b"):
        with pytest.raises(ConfigError, match="control characters"):
            cluster.run(fake_plan(1), tmp_path / name, engine(), progress=False)


def test_fields_that_contradict(tmp_path):
    """Catches slots that are over before they begin, and a queue asked too often."""
    for node, words in (
        ({"time_minutes": 2, "signal_seconds": 60}, "half"),
        ({"max_memory_gib": 4.0}, "memory_gib"),
        ({"poll_seconds": 5.0}, "poll_seconds"),
    ):
        with pytest.raises(ConfigError, match=words):
            component.build("engine", {"kind": "slurm", **node})


def test_presets_of_sites_are_data():
    """Every option of conf/engine builds, and none of its fields is in any identity."""
    for option in PRESETS.options("engine"):
        built = component.build("engine", PRESETS.node("engine", option))
        assert set(component.identity(built)) == {"kind", "version"}


def test_a_machine_without_slurm(tmp_path, monkeypatch):
    """Catches a driver that waits for ever for a squeue which is not there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for detach in (False, True):
        with pytest.raises(ConfigError, match="login node"):
            cluster.run(fake_plan(1), tmp_path, engine(), detach=detach, work=WORK)


@pytest.mark.parametrize(
    ("fields", "n_cells", "hours", "text"),
    [
        ({"slots": 20, "cpus_per_slot": 32, "memory_gib": 64.0}, 12960, 116.0,
         "20 slots of 32 CPUs, 64 GiB, at most 240 min at a time: about 0.18 h on all of them at once, 1 turn each"),
        ({"slots": 4, "cpus_per_slot": 16, "gpus_per_slot": 1, "time_minutes": 60}, 400, 12.0,
         "4 slots of 16 CPUs, 1 GPU, at most 60 min at a time: about 3 h on all of them at once, 4 turns each"),
        ({"slots": 8, "cpus_per_slot": 8}, 9, 4.0,
         "2 slots of 8 CPUs, at most 240 min at a time: about 0.25 h on all of them at once, 1 turn each"),
        ({"slots": 8, "cpus_per_slot": 1}, 1, None, "1 slot of 1 CPU, at most 240 min at a time"),
        ({"slots": 8, "cpus_per_slot": 8}, 0, 0.0, "0 slots of 8 CPUs, at most 240 min at a time"),
    ],
)  # fmt: skip
def test_what_plan_says_of_slots(fields, n_cells, hours, text):
    """By hand: hours over slots and workers, turns of the time limit less the warning; as many slots as come."""
    cells = [SimpleNamespace(reason=None, fingerprint=str(i)) for i in range(n_cells)]
    forecast = None if hours is None else SimpleNamespace(hours=hours, n_covered=1, uncovered={})
    plan = SimpleNamespace(cells=cells)
    assert render.slots_text(Slurm(**fields), plan, {}, forecast) == f"slurm: {text}"


def test_shares_begin_where_those_before_end(site, tmp_path):
    """Catches arrays whose slots all begin with the same units."""
    with driver(tmp_path, fake_plan(40), slots=5, max_array=3) as one:
        seen = []
        submit = one.engine.submit
        object.__setattr__(one.engine, "submit", lambda slot, *rest: seen.append(slot.arguments) or submit(slot, *rest))
        one.step()
        assert [words[words.index("--first") + 1] for words in seen] == ["0", "3"]
    with driver(tmp_path, fake_plan(40), slots=5) as two:
        two.step()
        assert two._slot().arguments[two._slot().arguments.index("--first") + 1] == "5"


def test_the_users_own_defaults_count_where_the_config_says_nothing(site, tmp_path, monkeypatch):
    """Catches SBATCH_PARTITION over engine.partition, SBATCH_CLUSTERS and SBATCH_WAIT, and what a job that the driver
    runs in would pass on to its slots; a default for what the config leaves open stays."""
    gone = ["SBATCH_PARTITION", "SBATCH_MEM_PER_CPU", "SBATCH_CLUSTERS", "SBATCH_WAIT", "SLURM_ARRAY_TASK_ID",
            "SLURM_RESTART_COUNT", "SLURM_JOB_END_TIME"]  # fmt: skip
    for name in [*gone, "SBATCH_ACCOUNT", "SBATCH_QOS", "SLURM_CONF"]:
        monkeypatch.setenv(name, "mine")
    seen = []
    monkeypatch.setattr("submitit.SlurmExecutor.submit_array", lambda *a: seen.append(dict(os.environ)) or 1 / 0)
    fields = {"partition": "p", "qos": "q", "memory_gib": 1.0}
    with driver(tmp_path, fake_plan(6), **fields) as one, pytest.raises(ZeroDivisionError):
        one.engine.submit(one._slot(), "s", one.files.folder, 1, None)
    assert not {*gone, "SBATCH_QOS"} & seen[0].keys() and {"SBATCH_ACCOUNT", "SLURM_CONF"} <= seen[0].keys()
    assert os.environ["SLURM_ARRAY_TASK_ID"] == "mine"


def test_a_job_of_which_only_a_part_is_found(site, tmp_path):
    """An array of three whose answer was lost and of which one task lives: its end is known by its own name."""
    site.wrong(lose_reply=1)
    with driver(tmp_path, fake_plan(6), slots=3) as one:
        one.step()
        site.states(t101_1="FAILED", t101_2="FAILED")
        one.step()
        assert one.files.jobs()["101"].tasks == ["101_0"] and len(site.tasks()) == 5


# -- watching ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["UNKNOWN", "REQUEUE_HOLD", "SOMETHING_NEW", "SUSPENDED"])
def test_strange_states_count_as_live(site, tmp_path, state):
    """Catches slots submitted beside those in a state that nobody has heard of."""
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        site.states(all=state)
        for _ in range(3):
            one.step()
    assert len(site.calls("sbatch")) == 1


def test_a_queue_that_does_not_answer(site, tmp_path):
    """Catches a decision on no answer."""
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        site.wrong(silent=True)
        for _ in range(3):
            one.step()
        site.wrong()
        one.step()
    assert len(site.calls("sbatch")) == 1 and len(site.calls("squeue")) == 5


def test_a_queue_that_does_not_answer_is_not_asked_by_every_status(site, tmp_path):
    """Catches a squeue for every `rmsweep status` while Slurm is down."""
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        site.wrong(silent=True)
        one.step()
        for _ in range(5):
            text = status.render(status.summarise(tmp_path, "s"))
    assert "squeue does not answer" in text and len(site.calls("squeue")) == 2


def test_accounting_that_is_silent_once(site, tmp_path):
    """Catches a slot that nobody replaces, and a cause that is lost, because sacct did not answer at the first look."""
    plan = fake_plan(6)
    with driver(tmp_path, plan, slots=3) as one:
        one.step()
        note(one, "101_1", **{plan.cells[0].fingerprint: 1.0})
        site.states(t101_1="GONE", accounting={"101_1": "TIMEOUT"})
        site.wrong(no_sacct=True)
        one.step()
        site.wrong()
        one.step()
        one.step()
        assert one._ends["101_1"] == "TIMEOUT" and any("101_1 ran into its time limit" in text for text in one.notes)
    assert [len(job["tasks"]) for job in site.jobs().values()] == [3, 1] and len(site.calls("sacct")) == 2


def test_deaths_outlive_the_driver(site, tmp_path):
    """Catches a cell that kills a slot in every driver's life and is never given up."""
    plan = fake_plan(6)
    suspect = plan.cells[2].fingerprint
    for n in range(2):
        with driver(tmp_path, plan, slots=6) as one:
            one.step()
            note(one, f"101_{n}", **{suspect: 0.5})
            site.states(**{f"t101_{n}": "FAILED"})
    with driver(tmp_path, plan, slots=6) as last:
        last.step()
        state = last.todo.store.states([suspect])[suspect]
    assert (state.status, state.cause) == ("failed", "bug")


def test_cells_to_retry_do_not_wait_for_slots_that_know_nothing_of_them(site, tmp_path, monkeypatch):
    """Catches `retry` behind slots of an earlier command that are still pending; no more than the cells need."""
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"1": "raise", "2": "raise"}))
    plan = fake_plan(8)
    fake_run(plan.__class__(**{**vars(plan), "cells": plan.cells[:4]}), tmp_path)
    with driver(tmp_path, plan, slots=4) as one:
        one.step()
    failed = frozenset(plan.cells[i].fingerprint for i in (1, 2))
    with driver(tmp_path, plan, failed, slots=4) as again:
        for _ in range(3):
            again.step()
        assert again.todo.again.keys() == failed
    jobs = list(site.jobs().values())
    assert [len(job["tasks"]) for job in jobs] == [4, 2]


def test_a_record_that_vanishes_is_missed_at_the_end(tmp_path):
    """Catches a driver that looks at new cells only, and ends although a damaged part was set aside meanwhile."""
    plan, store = fake_plan(4), Store(tmp_path)
    store.prepare()
    todo = Todo(store, plan.cells)
    halves = [dataclasses.replace(plan, cells=plan.cells[i : i + 2]) for i in (0, 2)]
    fake_run(halves[0], tmp_path)
    assert todo.left() == {cell.fingerprint for cell in halves[1].cells} and todo.n_stored == 2
    for path in (tmp_path / "store" / "results").iterdir():
        path.unlink()
    fake_run(halves[1], tmp_path)
    assert todo.left() == {cell.fingerprint for cell in halves[0].cells} and todo.n_stored == 2


def test_the_same_retry_again_adopts(site, tmp_path, monkeypatch):
    """Catches a second fleet beside the first: once one of the cells is done, the list of the rest is another list."""
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({str(i): "raise" for i in range(6)}))
    plan = fake_plan(8)
    fake_run(plan, tmp_path)
    failed = frozenset(cell.fingerprint for cell in plan.cells[:6])
    with driver(tmp_path, plan, failed, slots=3) as one:
        one.step()
    monkeypatch.setenv("FAKE_FAULTS", "{}")
    fake_run(dataclasses.replace(plan, cells=plan.cells[:2]), tmp_path, retry=failed)
    with driver(tmp_path, plan, failed, slots=3) as two:
        two.step()
        two.step()
        assert len(two.todo.again) == 4 and two.n_live == 3 and not two.n_missing
    assert len(site.tasks()) == 3


def test_a_cell_that_was_given_up_is_not_run_by_the_next_slot(tmp_path):
    """Catches a cell that kills slot after slot: `preempted` is for the next `run` to try again, not for every slot."""
    plan = fake_plan(3)
    plan.write(tmp_path / "sweeps" / "s")
    store = Store(tmp_path)
    store.prepare()
    Todo(store, plan.cells).fail(plan.cells[0].fingerprint, "preempted", "five times")
    share = execute.Share(0, 1, 0.0, lambda cells: None)
    for retry, n_cells in ((frozenset[str](), 2), (frozenset([plan.cells[0].fingerprint]), 1)):
        helped = execute.help_with(plan, tmp_path, Local(workers=0), share, retry=retry, work=WORK)
        assert helped.n_computed == n_cells


def test_slots_that_slurm_holds(site, tmp_path):
    """Catches a driver that waits without a word for slots which nobody will let go."""
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        site.states(t101_0="REQUEUE_HOLD")
        one.step()
        one.step()
        assert [text for text in one.notes if "scontrol release" in text and "101" in text]


def test_a_damaged_record_of_a_job_is_mended(site, tmp_path):
    """Catches a job that is found again at every look, for ever."""
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        (one.files.folder / "jobs" / "101.json").write_text("{")
        for _ in range(3):
            one.step()
        assert one.files.jobs()["101"].n_slots == 2 and len(one.notes) == 1


def test_a_signal_while_a_submission_fails(site, tmp_path, monkeypatch):
    """Catches a driver that is deaf to Ctrl-C while the site is full: the signal came, and nobody looked."""
    monkeypatch.setattr(cluster, "LOOK", 0.05)
    site.wrong(max_submit=0, slow=0.5)
    threading.Timer(0.8, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with driver(tmp_path, fake_plan(40), slots=16) as one:
        assert one.watch() == signal.SIGTERM and time.monotonic() - began < 8


def test_what_happens_is_told_at_once(site, tmp_path, capsys):
    """Catches news that come when all is over; and news that come twice."""
    site.wrong(max_submit=0)
    threading.Timer(1.0, site.wrong).start()
    threading.Timer(4.0, cluster.cancel, (tmp_path, "s")).start()
    summary = cluster.run(fake_plan(6), tmp_path, engine(poll_seconds=0.2), work=WORK)
    said = capsys.readouterr().err
    assert any("sbatch takes no array" in note for note in summary.notes)
    for note in summary.notes:
        assert said.count(note) == 1, note
    assert said.index("sbatch takes no array") < said.index("cancelled")


def test_slots_that_wait_when_nothing_is_left(site, tmp_path, monkeypatch):
    """Catches slots that still come, one by one, to a sweep that is finished; those at work end by themselves."""
    monkeypatch.setattr(cluster, "LOOK", 0.05)
    with driver(tmp_path, fake_plan(6), slots=3) as one:
        one.step()
        site.states(t101_0="RUNNING")
        fake_run(fake_plan(6), tmp_path)
        assert one.watch() is None and not one.left()
    assert site.tasks() == {"101_0": "RUNNING", "101_1": "CANCELLED", "101_2": "CANCELLED"}


def test_another_way_to_the_same_root_finds_the_same_jobs(site, tmp_path):
    """Catches slots submitted twice where a root is mounted under two paths; a copy has slots of its own."""
    with driver(tmp_path / "a", fake_plan(6)) as one:
        one.step()
        name = one.files.name
    shutil.copytree(tmp_path / "a", tmp_path / "copy", symlinks=True)
    (tmp_path / "a").rename(tmp_path / "b")
    with driver(tmp_path / "b", fake_plan(6)) as two:
        two.step()
        assert two.files.name == name
    assert len(site.calls("sbatch")) == 1
    files = Slots(tmp_path / "copy", "s")
    assert files.name != name
    files.prepare()
    assert Slots(tmp_path / "copy", "s").name == files.name != name


def test_a_found_job_keeps_the_record_that_its_driver_wrote(site, tmp_path):
    """Catches a driver that cannot see the other's record yet (NFS) and writes a poorer one over it."""
    files = Slots(tmp_path, "s")
    files.prepare()
    files.record(Job("7", 3, 4.0, "p", "r", 2))
    files.record_found(Job("7", 1, None))
    assert files.jobs()["7"] == Job("7", 3, 4.0, "p", "r", 2)


def test_gc_takes_what_slots_left(site, tmp_path):
    """Catches pickles and notes that stay for ever, and gc under a slot that lives or where the queue is not known."""
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        note(one, "101_0", "done")
        one.files.log("101_0").write_text("what it said")
        left = set(one.files.leftovers())
    kinds = ("101_0_submitted.pkl", "101_submission.sh", "101.json", "101_0.0.json", one._order.plan)
    assert {path.name for path in left} >= set(kinds)
    assert not collect.collect(tmp_path).removed.get(collect.SLOTS)
    site.states(all="COMPLETED")
    site.wrong(silent=True)
    found = collect.collect(tmp_path)
    assert not found.removed.get(collect.SLOTS) and any("may be alive" in text for text in found.notes)
    site.wrong()
    assert {item.path for item in collect.collect(tmp_path).removed[collect.SLOTS]} >= left
    assert not list(one.files.leftovers()) and one.files.log("101_0").exists()
    with driver(tmp_path, fake_plan(6)) as two:
        two.step()
        assert two.n_live == 2


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED by 0", "NODE_FAIL", "PREEMPTED"])
def test_a_slot_that_is_lost_is_replaced(site, tmp_path, state):
    """One for one while others are at work; Catches a sweep that goes on with ever fewer slots."""
    with driver(tmp_path, fake_plan(6), slots=3) as one:
        one.step()
        site.states(t101_1=state)
        for _ in range(3):
            one.step()
    assert [len(job["tasks"]) for job in site.jobs().values()] == [3, 1]


def test_a_slot_that_is_not_requeued_is_replaced(site, tmp_path):
    """Its time was over, the site has no requeue, and it ended as COMPLETED: catches a sweep with ever fewer slots."""
    with driver(tmp_path, fake_plan(6), slots=3) as one:
        one.step()
        note(one, "101_1", "time", computed=2)
        site.states(t101_1="COMPLETED")
        for _ in range(3):
            one.step()
    assert [len(job["tasks"]) for job in site.jobs().values()] == [3, 1]


@pytest.mark.parametrize("fault", [{"silent": True}, {"max_submit": 0}])
def test_detached_without_a_slot_is_a_failure(site, tmp_path, monkeypatch, fault):
    """Catches `--detach` that says goodbye although Slurm has nothing, and one that gives up at the first silence."""
    monkeypatch.setattr(cluster, "PATIENCE", 0.3)
    site.wrong(**fault)
    with pytest.raises(RmsweepError, match="no slot is at work"):
        cluster.run(fake_plan(6), tmp_path, engine(poll_seconds=0.1), detach=True, work=WORK)
    monkeypatch.setattr(cluster, "PATIENCE", 30.0)
    threading.Timer(0.5, site.wrong).start()
    assert cluster.run(fake_plan(6), tmp_path, engine(poll_seconds=0.1), detach=True, work=WORK) is None
    assert site.tasks()  # one, where the limit was lifted between two tries


def test_a_node_that_kills_every_slot_is_not_fed(site, tmp_path):
    """Catches endless submitting to a broken node while one slot lives elsewhere."""
    with driver(tmp_path, fake_plan(40), slots=4) as one:
        for _ in range(40):
            one.step()
            site.states(**{f"t{task}": "RUNNING" if task == "101_0" else "FAILED" for task in site.tasks()})
        assert not one.is_over and any("ended without a cell" in text for text in one.notes)
    assert len(site.tasks()) <= 4 + rounds.FRUITLESS * 4 + 4


def test_rounds_in_which_nothing_was_taken_do_not_count(site, tmp_path):
    """Catches a driver that gives up on its slots because the site was full for a while."""
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        site.states(all="COMPLETED")
        site.wrong(max_submit=0)
        for _ in range(10):
            one.step()
        assert not one.is_over
        refused = len(site.calls("sbatch")) - 1
        assert refused <= 2 + 4, "a full site is asked ever more seldom"
        site.wrong()
        for _ in range(intake.LONGEST + 1):
            one.step()
    assert len(site.tasks()) == 4


def test_the_time_is_noted_before_the_job_has_ended(site, tmp_path):
    """The common order: the note first, COMPLETED at a later look. Catches a slot that is then never replaced."""
    with driver(tmp_path, fake_plan(6), slots=3) as one:
        one.step()
        site.states(all="RUNNING")
        note(one, "101_1", "time", computed=2)
        one.step()
        site.states(t101_1="COMPLETED")
        one.step()
        one.step()
    assert [len(job["tasks"]) for job in site.jobs().values()] == [3, 1]


def test_memory_doubles_once_for_many_slots(site, tmp_path):
    """Catches memory that is doubled for every slot that ran out of it, and for one that had done its work."""
    with driver(tmp_path, fake_plan(6), slots=4, memory_gib=4.0, max_memory_gib=256.0) as one:
        one.step()
        note(one, "101_3", "done", computed=3)
        site.states(all="OUT_OF_MEMORY")
        one.step()
    assert [job["options"]["mem"] for job in site.jobs().values()] == ["4096M", "8192M"]


def test_cancelled_between_the_look_and_the_submission(site, tmp_path):
    """Catches slots that nobody cancels: the driver had looked already when `cancel` came."""
    with driver(tmp_path, fake_plan(6)) as one:
        submit = one.engine.submit

        def late(*arguments):
            cluster.cancel(tmp_path, "s")
            return submit(*arguments)

        object.__setattr__(one.engine, "submit", late)
        one.step()
    assert set(site.tasks().values()) == {"CANCELLED"}


def test_a_full_site_is_no_error(site, tmp_path):
    """Catches the usual words of a submit limit taken for a command that can never work."""
    limit = "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: "
    site.wrong(refuse=limit + "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)")
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        assert not site.jobs()
        site.wrong()
        one.step()
    assert len(site.tasks()) == 2


def test_slots_that_store_nothing(site, tmp_path):
    """Catches endless submitting: three rounds without a stored cell are enough, and the log is shown."""
    with driver(tmp_path, fake_plan(6)) as one:
        for _ in range(20):
            if one.is_over:
                break
            one.step()
            for task in site.tasks():
                one.files.log(task).write_text("ModuleNotFoundError: No module named 'rmsweep'\n")
            site.states(all="FAILED")
        assert one.is_over and "stored nothing" in one.notes[-1] and "ModuleNotFoundError" in one.notes[-1]
    assert len(site.calls("sbatch")) == 3


def test_without_accounting_a_slot_that_is_gone_is_gone(site, tmp_path):
    """Catches waiting for ever for the end of a job that Slurm has forgotten."""
    site.wrong(no_sacct=True)
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        site.states(all="GONE")
        for _ in range(3):
            one.step()
    assert len(site.calls("sbatch")) == 2


def test_the_queue_is_asked_once_per_interval(site, tmp_path, monkeypatch):
    """Catches a poll per look at the store, or per job."""
    monkeypatch.setattr(cluster, "LOOK", 0.05)
    with driver(tmp_path, fake_plan(6), poll_seconds=30.0) as one:
        threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        assert one.watch() == signal.SIGINT
        for _ in range(5):
            status.summarise(tmp_path, "s")
    assert len(site.calls("squeue")) == 1


# -- what became of slots ----------------------------------------------------------------------------------


def test_more_memory(site, tmp_path, monkeypatch):
    """Catches cells that run out of memory and are given the same again: it is doubled up to the limit, then they have
    failed as at home."""
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"1": "short"}))
    plan = fake_plan(3)
    with driver(tmp_path, plan, memory_gib=4.0, max_memory_gib=8.0) as one:
        one.step()
        fake_run(plan, tmp_path)
        assert one._has_left() and one.left() == {plan.cells[1].fingerprint}
        site.states(all="COMPLETED")
        one.step()
        one.step()
        assert [job["options"]["mem"] for job in site.jobs().values()] == ["4096M", "8192M"]
        assert "--retry" in " ".join(one._slot().arguments)
        fake_run(plan, tmp_path, retry=frozenset(one.todo.cells))
        assert not one._has_left()
    assert Store(tmp_path).states([plan.cells[1].fingerprint])[plan.cells[1].fingerprint].cause == "oom"


@pytest.mark.parametrize("max_memory_gib", [8.0, 64.0])
def test_more_memory_from_the_next_driver(site, tmp_path, monkeypatch, max_memory_gib):
    """Catches a promise that only the driver of the first round keeps: after `--detach`, when it was killed, and when
    the slots that had more memory never tried the cell. Once it was tried with all there is, it has failed."""
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"1": "short"}))
    plan, wanted = fake_plan(3), ["4096M"]
    fields = {"memory_gib": 4.0, "max_memory_gib": max_memory_gib, "slots": 1}
    assert cluster.run(plan, tmp_path, engine(**fields), detach=True, work=WORK) is None
    fake_run(plan, tmp_path)
    site.states(all="COMPLETED")
    for _ in range(2):
        assert cluster.run(plan, tmp_path, engine(**fields), detach=True, work=WORK) is None
        cluster.cancel(tmp_path, "s")
        wanted.append("8192M")
    assert [job["options"]["mem"] for job in site.jobs().values()] == wanted
    fake_run(plan, tmp_path, retry=frozenset([plan.cells[1].fingerprint]))
    if max_memory_gib > 8:
        assert cluster.run(plan, tmp_path, engine(**fields), detach=True, work=WORK) is None
        assert list(site.jobs().values())[-1]["options"]["mem"] == "16384M"
    else:
        summary = cluster.run(plan, tmp_path, engine(**fields), progress=False, work=WORK)
        assert summary.counts["failed"] == 1 and len(site.jobs()) == 3


def test_the_users_own_memory_counts(site, tmp_path, monkeypatch):
    """Catches slots that get twice what was too little although the user now asks for eight times as much."""
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"1": "short"}))
    plan = fake_plan(3)
    assert cluster.run(plan, tmp_path, engine(memory_gib=4.0), detach=True, work=WORK) is None
    fake_run(plan, tmp_path)
    site.states(all="COMPLETED")
    larger = engine(memory_gib=32.0, max_memory_gib=64.0)
    assert cluster.run(plan, tmp_path, larger, detach=True, work=WORK) is None
    assert list(site.jobs().values())[-1]["options"]["mem"] == "32768M"


@pytest.mark.parametrize(
    ("jobs", "more"),
    [
        ([], None),
        ([("", 4.0)], 8.0),
        ([("", None)], None),
        ([("", 4.0), ("", 16.0)], 8.0),  # whichever it was: the least is safe to double
        ([("", 4.0), ("tried", 8.0)], 16.0),
        ([("", 4.0), ("tried", 8.0), ("untried", 16.0)], 16.0),
        ([("", 4.0), ("untried", 16.0)], 8.0),
        ([("", 4.0), ("other", 16.0)], 8.0),
        ([("", 4.0), ("damaged", 16.0)], 8.0),
        ([("", 4.0), ("tried", 16.0)], None),
    ],
)
def test_what_a_cell_had_and_can_have(tmp_path, monkeypatch, jobs, more):
    """Memory belongs to the cell: catches that of slots which never had it in hand, and lists that cannot be read."""
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"1": "short"}))
    plan, files = fake_plan(3), Slots(tmp_path, "s")
    fake_run(plan, tmp_path)
    files.prepare()
    key, store = plan.cells[1].fingerprint, Store(tmp_path)
    now = store.attempts([key])[key]
    lists = {"tried": {key: now - 1}, "untried": {key: now}, "other": {plan.cells[0].fingerprint: 1}}
    for number, (name, memory_gib) in enumerate(jobs, 101):
        retry = files.write_retry(lists[name]) if name in lists else "retry-0.json" * bool(name)
        files.record(Job(str(number), 2, memory_gib, "p", retry))
    asked = engine(memory_gib=4.0, max_memory_gib=16.0)
    short = cluster._short_of_memory([cell.fingerprint for cell in plan.cells], store, asked, files)
    assert short == ({} if more is None else {key: more})


def test_memory_of_the_slots_at_work(site, tmp_path):
    """Catches a driver that comes back and replaces a slot with a smaller one."""
    with driver(tmp_path, fake_plan(6), memory_gib=4.0, max_memory_gib=8.0) as one:
        one.step()
        site.states(all="OUT_OF_MEMORY")
        one.step()
        site.states(t102_0="RUNNING", t102_1="NODE_FAIL")
    with driver(tmp_path, fake_plan(6), memory_gib=4.0, max_memory_gib=8.0) as two:
        two.step()
    assert [job["options"]["mem"] for job in site.jobs().values()] == ["4096M", "8192M", "8192M"]


def test_a_slot_killed_for_its_memory(site, tmp_path):
    """OUT_OF_MEMORY: the next slots get more."""
    with driver(tmp_path, fake_plan(6), memory_gib=4.0, max_memory_gib=6.0) as one:
        one.step()
        site.states(all="OUT_OF_MEMORY")
        one.step()
    assert [job["options"]["mem"] for job in site.jobs().values()] == ["4096M", "6144M"]


@pytest.mark.parametrize(
    ("end", "state", "cause", "words", "times"),
    [
        ("time", "PENDING", "timeout", "time limit", 2),
        (None, "TIMEOUT", "timeout", "time limit", 2),
        (None, "NODE_FAIL", "preempted", "node failure", 5),
        ("stopped", "PREEMPTED", "preempted", "was preempted", 5),
        (None, "OUT_OF_MEMORY", "oom", "OUT_OF_MEMORY", 2),
        (None, "FAILED", "bug", "failed", 2),
    ],
)
def test_causes(site, tmp_path, end, state, cause, words, times):
    """A cell that was in flight whenever its slot ended is given up as at home, with the cause; others are not."""
    plan = fake_plan(6)
    suspect, late = plan.cells[2].fingerprint, plan.cells[3].fingerprint
    with driver(tmp_path, plan, slots=6) as one:
        one.step()
        for n in range(times):
            one.step()
            assert suspect in one.left()
            task, turn = ("101_0", n) if state == "PENDING" else (f"101_{n}", 0)
            note(one, task, end, turn, **{suspect: 0.95, **({late: 0.1} if cause == "timeout" else {})})
            if state == "PENDING":
                note(one, task, None, turn + 1)
            site.states(**{f"t{task}": state})
        one.step()
        states = one.todo.store.states(one.todo.cells)
    assert list(states) == [suspect] and states[suspect].cause == cause and words in states[suspect].reason


def test_two_slots_in_a_row_fail_a_cell_and_it_says_where(site, tmp_path):
    """The reason names slot and host, so that its log is found."""
    plan = fake_plan(2)
    with driver(tmp_path, plan, slots=1) as one:
        one.step()
        for turn in range(2):
            note(one, "101", "time", turn, **{plan.cells[0].fingerprint: 1.0})
            note(one, "101", None, turn + 1)
            one.step()
        reason = one.todo.store.states(one.todo.cells)[plan.cells[0].fingerprint].reason
    assert reason == "slot 101 on n1 ran into its time limit, 2 times with this cell"


@pytest.mark.parametrize(("end", "error"), [("refused", ConfigError), ("store", StoreError)])
def test_a_slot_that_refuses_ends_the_driver(site, tmp_path, end, error):
    """Catches submitting again and again what no slot will run."""
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        note(one, "101_0", end, message="the code of train has changed")
        site.states(all="FAILED")
        with pytest.raises(error, match="slot 101_0 on n1: the code of train has changed"):
            one.step()
    assert len(site.calls("sbatch")) == 1


def test_one_bad_node_ends_no_driver(site, tmp_path):
    """Catches a full disk or another code on one node that ends every driver while slots work elsewhere."""
    with driver(tmp_path, fake_plan(6), slots=3) as one:
        one.step()
        site.states(t101_0="FAILED", t101_1="RUNNING")
        note(one, "101_0", "store", message="No space left on device")
        one.step()
        assert any("No space left" in text for text in one.notes)
    with driver(tmp_path, fake_plan(6), slots=3) as again:
        again.step()
        site.states(all="COMPLETED")
        again.step()


def test_slots_of_a_smaller_grid_do_not_hold_up_the_larger_one(site, tmp_path):
    """Catches new cells that wait for slots which know nothing of them; the old ones stay and are told of."""
    with driver(tmp_path, fake_plan(2)) as one:
        one.step()
        site.states(all="RUNNING")
    with driver(tmp_path, fake_plan(8)) as larger:
        larger.step()
        larger.step()
        assert any("earlier command" in text for text in larger.notes)
    assert [len(job["tasks"]) for job in site.jobs().values()] == [2, 2]


def test_a_command_that_asks_for_more_slots_gets_them(site, tmp_path):
    """Catches slots that were lost, or asked for since, and never come while one is alive."""
    with driver(tmp_path, fake_plan(12), slots=2) as one:
        one.step()
        site.states(t101_0="RUNNING", t101_1="FAILED")
    with driver(tmp_path, fake_plan(12), slots=5) as more:
        more.step()
        more.step()
    assert sum(state in ("RUNNING", "PENDING") for state in site.tasks().values()) == 5


def test_no_slot_without_work_for_its_workers(site, tmp_path):
    """Catches a slot for every cell where each slot has many workers."""
    with driver(tmp_path, fake_plan(12), slots=8, cpus_per_slot=8) as one:
        one.step()
    assert len(site.tasks()) == 2


def test_the_users_own_defaults_do_not_undo_ours(site, tmp_path, monkeypatch):
    """Catches SBATCH_JOB_NAME, under which no later look would find the slots."""
    monkeypatch.setenv("SBATCH_JOB_NAME", "mine")
    with driver(tmp_path, fake_plan(6)) as one:
        submit, seen = one.engine.submit, []
        monkeypatch.setattr("submitit.SlurmExecutor.submit_array", lambda *a: seen.append(dict(os.environ)) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            submit(one._slot(), "s", one.files.folder, 1, None)
    assert "SBATCH_JOB_NAME" not in seen[0] and os.environ["SBATCH_JOB_NAME"] == "mine"


def test_found_slots_get_what_they_are_to_run(site, tmp_path):
    """Catches a restored slot that holds nothing: it would end at once."""
    from submitit.core.utils import DelayedSubmission

    site.wrong(lose_reply=1)
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        one.step()
        found = DelayedSubmission.load(one.files.folder / "101_0_submitted.pkl").function
        assert isinstance(found, _slot.Slot) and "s" in found.arguments


def test_a_refused_array_leaves_no_files(site, tmp_path):
    """Catches what was prepared for every slot and is never used: thousands of files where the site is full."""
    with driver(tmp_path, fake_plan(6)) as one:
        site.wrong(max_submit=0)
        one.step()
        one.step()
        assert not list(one.files.folder.glob("*.pkl")) + list(one.files.folder.glob(".submission_file*"))
        site.wrong()
        one.step()
        one.step()
    assert len(site.tasks()) == 2


def test_slots_of_an_earlier_command_do_not_end_this_one(site, tmp_path):
    """Code changed, planned anew, and slots of before still refuse: catches a driver that takes it for its own."""
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        said = Note("101_0", 0, "n1", 0, {}, "refused", "the code of train has changed", "0" * 24)
        (one.files.notes_folder / "101_0.0.json").write_text(json.dumps(said._asdict()))
        site.states(t101_0="FAILED")
        one.step()
    assert [len(job["tasks"]) for job in site.jobs().values()] == [2, 1]


@pytest.mark.parametrize(
    "words",
    [
        "Requested node configuration is not available",
        "Required partition not available (inactive or drain)",
        "Slurm backup controller in standby mode",
        "Munge decode failed: authentication error",
        "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
    ],
)
def test_a_refusal_ends_nothing_while_slots_work(site, tmp_path, words):
    """Catches a driver that ends in mid-sweep because the place of one lost slot cannot be filled now."""
    with driver(tmp_path, fake_plan(6), slots=3) as one:
        one.step()
        site.states(t101_0="RUNNING", t101_1="RUNNING", t101_2="FAILED")
        site.wrong(refuse=words)
        one.step()
        assert one.n_live == 2 and one.n_missing == 1
    with driver(tmp_path, fake_plan(6), slots=3) as again:
        again.step()
        site.wrong()
        for _ in range(3):
            again.step()
        assert again.n_live == 3


def test_what_accounting_says_of_a_slot_that_lives_is_no_end(site, tmp_path):
    """Catches a slot that squeue has forgotten and a late accounting calls RUNNING: it was waited for, for ever."""
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        site.states(all="GONE", accounting={"101_0": "RUNNING", "101_1": "PENDING"})
        one.step()
        one.step()
        assert one.n_live == 2
    assert len(site.calls("sbatch")) == 2


@pytest.mark.parametrize("n_done", [0, 1])
def test_one_slot_that_gives_up(site, tmp_path, monkeypatch, n_done):
    """Its share may be all of one broken bank: catches a sweep that ends for it although elsewhere cells are done."""
    plan = fake_plan(6)
    with driver(tmp_path, plan) as one:
        one.step()
        site.states(t101_0="COMPLETED", t101_1="RUNNING")
        if n_done:
            fake_run(dataclasses.replace(plan, cells=plan.cells[:n_done]), tmp_path)
        note(one, "101_0", "given_up", message="stopped early: the first 20 cells failed alike")
        one.step()
        assert one.is_over == (not n_done)


@pytest.mark.parametrize(("end", "raises"), [("store", False), ("refused", True)])
def test_a_bad_node_that_begins_first(site, tmp_path, end, raises):
    """A full disk may be that node's own, so those that wait are waited for; other code is everybody's, and they go."""
    with driver(tmp_path, fake_plan(6), slots=3) as one:
        one.step()
        note(one, "101_0", end, message="No space left on device")
        site.states(t101_0="FAILED")
        with pytest.raises(ConfigError) if raises else contextlib.nullcontext():
            one.step()
    assert site.tasks()["101_1"] == ("CANCELLED" if raises else "PENDING")


def test_ctrl_c_while_another_driver_submits(site, tmp_path, monkeypatch):
    """Catches a Ctrl-C that waits for the other driver's claim."""
    monkeypatch.setattr(cluster, "LOOK", 0.05)
    key = f"slurm-{digest('s')}"
    with driver(tmp_path, fake_plan(6)) as one, Claims(one.claims.folder) as other, other.held(key):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        assert one.watch() == signal.SIGINT and time.monotonic() - began < 5
    assert not site.calls("sbatch")


@pytest.mark.parametrize(
    "text",
    [
        '{"in_flight": null}',
        '{"in_flight": {"a": null}}',
        '{"task": 5}',
        '{"task": "../../x"}',
        '{"restart": "one"}',
        "[" * 100_000,
        "null",
        "5",
    ],
)
def test_files_that_are_no_notes(site, tmp_path, text):
    """Catches a driver or a status that ends in a traceback over a file in the folder of notes, or of anything else."""
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        sound = Note("101_0", 0, "n1", 0, {}, None, "", *one._order)._asdict()
        changed = json.dumps({**sound, **json.loads(text)}) if text.startswith("{") else text
        (one.files.notes_folder / "101_0.0.json").write_text(changed)
        for path in (one.files.folder / "name.json", one.files.folder / "jobs" / "102.json", one.files._queue):
            path.write_text(text)
        one.step()
        assert not one.files.notes() and one.n_live == 2
        status.render(status.summarise(tmp_path, "s"))


def test_detached_and_cancelled_meanwhile(site, tmp_path, monkeypatch):
    """Catches `--detach` that calls cancelled slots submitted."""
    submit = Slurm.submit

    def late(self, *arguments):
        cluster.cancel(tmp_path, "s")
        return submit(self, *arguments)

    monkeypatch.setattr(Slurm, "submit", late)
    with pytest.raises(RmsweepError, match="cancelled"):
        cluster.run(fake_plan(6), tmp_path, engine(), detach=True, work=WORK)
    assert set(site.tasks().values()) == {"CANCELLED"}


def test_what_was_submitted_while_cancel_looked_goes_too(site, tmp_path, monkeypatch):
    """Catches a slot that lives on after `rmsweep cancel` because the driver's record of it came later."""
    monkeypatch.setattr(cluster, "LOOK", 0.05)
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        one.files.cancel()  # its look at the queue was before our submission
        assert one.watch() is None and one.is_over
    assert set(site.tasks().values()) == {"CANCELLED"}


def test_cancel_and_run_again_at_once(site, tmp_path):
    """Catches a run that takes the slots which `cancel` saw for alive."""
    assert cluster.run(fake_plan(6), tmp_path, engine(poll_seconds=30.0), detach=True, work=WORK) is None
    cluster.cancel(tmp_path, "s")
    assert cluster.run(fake_plan(6), tmp_path, engine(poll_seconds=30.0), detach=True, work=WORK) is None
    assert sorted(site.tasks().values()) == ["CANCELLED", "CANCELLED", "PENDING", "PENDING"]


def test_cancel(site, tmp_path, monkeypatch, capsys):
    """scancel of the sweep's jobs; the driver that watches stops and submits no more; `run` takes it up again."""
    monkeypatch.setattr(cluster, "LOOK", 0.05)
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        assert main(["cancel", "s", f"root={tmp_path}"]) == 0
        assert "2 slots cancelled" in capsys.readouterr().out
        assert one.watch() is None and one.left()
    assert set(site.calls("scancel")) == {"scancel 101"} and set(site.tasks().values()) == {"CANCELLED"}
    assert len(site.calls("sbatch")) == 1
    assert cluster.run(fake_plan(6), tmp_path, engine(), detach=True, work=WORK) is None
    assert len(site.calls("sbatch")) == 2


def test_status_shows_slots(site, tmp_path):
    """Running and waiting, where, and with how many cells in hand."""
    with driver(tmp_path, fake_plan(6)) as one:
        one.step()
        assert "2 pending (just submitted)" in status.render(status.summarise(tmp_path, "s"))
        site.states(t101_0="RUNNING")
        note(one, "101_0", a=0.1, b=0.2)
        one.files.poll(0)
    text = status.render(status.summarise(tmp_path, "s"))
    assert "slots: 1 running, 1 waiting" in text and "101_0  running on n1, 2 cells in flight" in text
    assert "1 pending (Priority)" in text
    json.dumps(status.summarise(tmp_path, "s"))


def test_ctrl_c_leaves_the_slots(site, tmp_path, monkeypatch, capsys):
    """Catches a driver whose end is the end of its jobs."""
    monkeypatch.setattr(cluster, "LOOK", 0.05)
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    summary = cluster.run(fake_plan(6), tmp_path, engine(poll_seconds=30.0), progress=False, work=WORK)
    assert summary.interrupted == signal.SIGINT and summary.n_left == 6
    assert not site.calls("scancel") and set(site.tasks().values()) == {"PENDING"}
    assert "slots work on" in capsys.readouterr().err


# -- whole runs --------------------------------------------------------------------------------------------


def test_a_whole_run(nodes, tmp_path, monkeypatch):
    """Slots as processes: the tables of engine=local, bit for bit; nothing is left to another run."""
    monkeypatch.setattr(cluster, "LOOK", 0.2)
    root, plan = tmp_path / "root", fake_plan(12)
    summary = cluster.run(plan, root, engine(), progress=False, work=WORK)
    assert summary.counts["done"] == 12 and not summary.n_left and summary.n_computed == 12
    fake_run(plan, tmp_path / "alone")
    assert table(root) == table(tmp_path / "alone")
    submitted = len(nodes.calls("sbatch"))
    assert cluster.run(plan, root, engine(), progress=False, work=WORK).n_computed == 0
    assert len(nodes.calls("sbatch")) == submitted >= 1


def test_detached(nodes, tmp_path):
    """Nobody watches: the last slot that ends writes the tables."""
    root, plan = tmp_path / "root", fake_plan(8)
    assert cluster.run(plan, root, engine(slots=1), detach=True, progress=False, work=WORK) is None
    wait_until((root / "sweeps/s/tables.json").exists, why=Slots(root, "s").log("101").read_text)
    fake_run(plan, tmp_path / "alone")
    assert table(root) == table(tmp_path / "alone")


def test_a_detached_retry(nodes, tmp_path, monkeypatch):
    """Nobody watches: the slots know which recorded cells to run again, and tables follow them."""
    root, plan = tmp_path / "root", fake_plan(8)
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"2": "raise", "5": "raise"}))
    fake_run(plan, root)
    monkeypatch.delenv("FAKE_FAULTS")
    failed = frozenset(plan.cells[i].fingerprint for i in (2, 5))
    assert cluster.run(plan, root, engine(slots=2), retry=failed, detach=True, progress=False, work=WORK) is None
    fake_run(plan, tmp_path / "alone")
    wait_until(lambda: table(root) == table(tmp_path / "alone"), why=Slots(root, "s").log("101").read_text)


def test_detach_needs_a_cluster(tmp_path, capsys):
    """Catches a run that seems to go on by itself."""
    assert main(["run", "size=tiny", f"root={tmp_path}", "--detach"]) == 1
    assert "engine=slurm" in capsys.readouterr().err
    fake_plan(1).write(tmp_path / "sweeps" / "s")
    assert main(["retry", "s", f"root={tmp_path}", "--detach"]) == 1
    assert "engine=slurm" in capsys.readouterr().err
