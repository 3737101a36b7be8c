"""Journals: what a worker has finished outlives SIGKILL, bit for bit; what is torn or foreign is never served."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from fake_pipeline import fake_plan, fake_run
from safetensors.numpy import save
from waiting import wait_until

from rmsweep import atomic, claims, collect, journals, units
from rmsweep import store as stores
from rmsweep.claims import Claims
from rmsweep.engines import Death, Event
from rmsweep.engines.local import Local
from rmsweep.errors import StoreError
from rmsweep.journals import COST, Finished, Journal, frame, listed, read
from rmsweep.parts import table_of
from rmsweep.progress import Progress
from rmsweep.reward_models import Compute
from rmsweep.runner import Job, Part
from rmsweep.schedule import Schedule
from rmsweep.schemas import RECORD
from rmsweep.store import Store
from rmsweep.todo import Todo

UNIT, ELSEWHERE = "ab" * 12, "elsewhere-01234567-1.0123456789ab"
KEYS = [f"{i:024x}" for i in range(5)]


def cell(key=KEYS[0], **metrics):
    record = {"fingerprint": key, "cell_id": key, "status": "done", "golden_picked": np.arange(3, dtype=np.float32)}
    return Finished({**record, **metrics}, {"cell_id": key, "fingerprint": key, "unit": UNIT, "attempt": 1}, {})


def ready(tmp_path):
    store = Store(tmp_path, heal=True)
    store.prepare()
    return store


def dead_owner():
    """An owner of claims that was a process of this machine."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return f"{atomic.machine()}-{child.pid}.0123456789ab"


def written(store, owner, cells):
    journal = store.journal(owner, UNIT)
    for one in cells:
        journal.add(one)
    return journal_of(store)


def recovered(store):
    """As when a run begins on this machine."""
    return store.recover(lambda owner, unit: claims.has_ended(owner))


def journal_of(store):
    (path,) = (path for path, _, _ in listed(store.folder / "journals"))
    return path


class Quiet:
    """A channel that nobody listens to."""

    def shield(self):
        return contextlib.nullcontext()


def computed(ledger):
    return Counter(name.rpartition("-")[0] for name in os.listdir(ledger) if name.startswith("cell-"))


# -- bytes -------------------------------------------------------------------------------------------------


def test_a_frame_gives_back_what_tables_would_hold(tmp_path):
    """Catches numbers rounded on their way, and kinds of numbers that only the tables know."""
    hard = [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, float("inf"), float("nan"), None]
    arrays = {"scores": np.float32([[1 / 3, np.nan]]), "w/0": np.array([2**60 + 1]), "none": np.zeros((0, 2))}
    record = {"bon_golden": hard, "spearman": np.float32(0.1), "n_train": np.int64(2**53 + 1), "reason": None}
    one = cell(**record, golden_picked=np.float32([0.1, -0.0, np.inf]), category=np.array(["a", "b"]))
    one = one._replace(cost={**one.cost, "traceback": "a\n é", "seconds_train": 0.1 + 0.2}, kept=arrays)
    (tmp_path / "j").write_bytes(frame(one))
    (back,) = read(tmp_path / "j")
    for row, given, schema in ((back.record, one.record, RECORD), (back.cost, one.cost, COST)):
        assert repr(table_of([row], schema).to_pylist()) == repr(table_of([given], schema).to_pylist())
    assert repr(back.record["bon_golden"]) == repr(hard) and back.record["n_train"] == 2**53 + 1
    assert {k: (a.dtype, a.shape, a.tobytes()) for k, a in back.kept.items()} == {
        k: (a.dtype, a.shape, a.tobytes()) for k, a in arrays.items()
    }


def test_wherever_it_is_torn_the_frames_before_count(tmp_path):
    """Catches a torn end that hides what was whole, or is served."""
    frames = [frame(cell(key)) for key in KEYS[:3]]
    data, ends = b"".join(frames), np.cumsum([len(f) for f in frames])
    for n in [*range(0, len(data), 7), *ends, *(ends - 1)]:
        (tmp_path / "j").write_bytes(data[:n])
        assert [c.record["fingerprint"] for c in read(tmp_path / "j")] == KEYS[: int((ends <= n).sum())]


def test_a_flipped_bit_ends_it(tmp_path):
    """Every bit of a frame is covered: damage is computed again, never served."""
    data = bytearray(frame(cell(KEYS[0])) + frame(cell(KEYS[1])))
    for place in range(0, len(data) // 2, 5):
        hurt = bytearray(data)
        hurt[place] ^= 1 << place % 8
        (tmp_path / "j").write_bytes(hurt)
        assert list(read(tmp_path / "j")) == []
    (tmp_path / "j").write_bytes(os.urandom(5000))
    assert list(read(tmp_path / "j")) == []
    (tmp_path / "link").symlink_to(tmp_path / "j")
    with pytest.raises(OSError, match="symbolic"):
        list(read(tmp_path / "link"))


# -- recovery ----------------------------------------------------------------------------------------------


def test_recovered_cells_are_those_of_a_part(tmp_path):
    """The same record as a part gives, kept arrays too; afterwards nothing is left, and twice does no harm."""
    store = ready(tmp_path)
    cells = [
        cell(key, spearman=i / 3, bon_n=[1, 2])._replace(kept={"scores": np.ones(i)}) for i, key in enumerate(KEYS)
    ]
    path = written(store, dead_owner(), cells)
    data = path.read_bytes()
    for _ in range(2):
        store.recover(lambda owner, unit: claims.has_ended(owner) and unit == UNIT)
        path.write_bytes(data)
    other = ready(tmp_path / "other")
    kept = {f"{c.record['fingerprint']}/scores": c.kept["scores"] for c in cells}
    other.publish_part(UNIT, [c.record for c in cells], [c.cost for c in cells], kept)
    assert Store(tmp_path).records(KEYS) == other.records(KEYS) and Store(tmp_path).costs(KEYS) == other.costs(KEYS)
    assert all((store.kept(key)["scores"] == other.kept(key)["scores"]).all() for key in KEYS)
    assert len(store.record_parts.names()) == 1 and not store.conflicts


def test_nobody_touches_the_journal_of_a_living_one(tmp_path):
    """Catches a second run that takes what the first is still writing, and one elsewhere whose end is not known."""
    store = ready(tmp_path)
    with Claims(store.folder / "claims") as alive:
        written(store, alive.owner, [cell()])
        (store.folder / "journals" / "notes.txt").write_text("not ours")
        recovered(Store(tmp_path, heal=True))
        assert len(list(listed(store.folder / "journals"))) == 1 and store.done(KEYS) == {}


def test_frames_of_another_version(tmp_path):
    """Catches cells thrown away for a column that this version does not know; those before it count."""
    store = ready(tmp_path)
    written(store, dead_owner(), [cell(KEYS[0]), cell(KEYS[1], spearmen=1.0), cell(KEYS[2])])
    assert recovered(store) == set() and set(store.done(KEYS)) == {KEYS[0]}
    assert len(os.listdir(store.folder / "journals")) == 1


@pytest.mark.parametrize(
    "words",
    [
        b"", b"{}", b"[1, 2]", b"[{}, {}]", b'[{"fingerprint": 3}, {}]', b"[" * 100_000,
        b'[{"fingerprint": "f", "n_train": 1e999}, {}]', b'[{"no_such": 1}, {}]',
        b'[{"fingerprint": "f", "n_train": 9223372036854775808}, {}]',
    ],
)  # fmt: skip
def test_what_somebody_else_wrote_ends_a_journal(tmp_path, words):
    """Catches a traceback whenever a run begins, for a frame with the right checksum that no worker writes."""
    for arrays in (save({}), b"garbage"):
        parts = [words, arrays]
        data = journals.HEAD.pack(*map(len, parts), journals._sha(parts)) + words + arrays
        (tmp_path / "j").write_bytes(frame(cell()) + data + frame(cell(KEYS[1])))
        found = read(tmp_path / "j")
        assert next(found).record["fingerprint"] == KEYS[0]
        with pytest.raises(journals.Foreign):
            next(found)


def test_what_cannot_be_read_stays(tmp_path):
    """Catches gc or a run that throws away, or reports as removed, what it could not look into."""
    store, owner = ready(tmp_path), dead_owner()
    (tmp_path / "secret").write_bytes(frame(cell()))
    (store.folder / "journals" / f"{owner}.{UNIT}-00000001").symlink_to(tmp_path / "secret")
    (store.folder / "journals" / f"{owner}.{UNIT}-00000002").mkdir()
    assert recovered(store) == set() and store.done(KEYS) == {}
    found = collect.collect(tmp_path)
    assert collect.JOURNALS not in found.removed and len(os.listdir(store.folder / "journals")) == 2
    assert any("2 journals" in note for note in found.notes)


def test_large_arrays_are_published_bit_by_bit(tmp_path, monkeypatch):
    """Catches a recovery that holds the scores of a whole unit in memory."""
    monkeypatch.setattr(stores, "KEPT_BYTES", 100)
    store = ready(tmp_path)
    written(store, dead_owner(), [cell(key)._replace(kept={"scores": np.ones(10)}) for key in KEYS])
    recovered(store)
    assert len(os.listdir(store.folder / "kept")) == 3 and set(store.done_and_kept(KEYS, "scores")) == set(KEYS)


# -- whoever lives and is believed dead ----------------------------------------------------------------------


def test_a_living_one_whose_journal_was_taken_publishes_at_once(tmp_path):
    """Catches cells appended to a file without a name: its next SIGKILL would lose them. The run goes on."""
    store = ready(tmp_path)
    with Part(store, UNIT, Quiet(), store.journal(ELSEWHERE, UNIT), seconds=1000) as part:
        part.add(cell(KEYS[0]))
        (path,) = Store(tmp_path).recover(lambda owner, unit: owner == ELSEWHERE)
        part.add(cell(KEYS[1]))
        assert set(Store(tmp_path).done(KEYS)) == set(KEYS[:2])
        part.add(cell(KEYS[2]))
        assert [c.record["fingerprint"] for c in read(journal_of(store))] == [KEYS[2]]
        assert not path.exists()
    assert set(store.done(KEYS)) == set(KEYS[:3]) and not os.listdir(store.folder / "journals")


@pytest.mark.parametrize("refused", ["open", "write"])
def test_a_refused_append_is_published_at_once(tmp_path, monkeypatch, refused):
    """Catches a run that ends, or a cell that is lost, although its part could be written."""
    store = ready(tmp_path)
    real = getattr(os, refused)

    def refuse(what, *rest, **more):
        where = what if refused == "open" else os.readlink(f"/proc/self/fd/{what}")
        if "/journals/" in str(where):
            raise OSError(116, "Stale file handle")
        return real(what, *rest, **more)

    with Part(store, UNIT, Quiet(), store.journal(ELSEWHERE, UNIT), seconds=1000) as part:
        part.add(cell(KEYS[0]))
        monkeypatch.setattr(os, refused, refuse)
        part.add(cell(KEYS[1]))
        assert set(Store(tmp_path).done(KEYS)) == set(KEYS[: 2 if refused == "write" else 0])
        part.add(cell(KEYS[2]))
    assert set(store.done(KEYS)) == set(KEYS[:3])


def test_a_journal_is_there_until_the_part_is(tmp_path, monkeypatch):
    """Catches a journal dropped before what it holds is published, and one that stays afterwards."""
    store = ready(tmp_path)
    publish = store.publish_part

    def watched(*args):
        assert len(list(read(journal_of(store)))) == 2
        return publish(*args)

    monkeypatch.setattr(store, "publish_part", watched)
    with Part(store, UNIT, Quiet(), store.journal(ELSEWHERE, UNIT), seconds=1000) as part:
        part.add(cell(KEYS[0]))
        part.add(cell(KEYS[1]))
        part.flush()
        assert not os.listdir(store.folder / "journals")


def test_a_refused_disk_leaves_the_journal(tmp_path, monkeypatch):
    """Catches a journal that is removed although its cells could not be published."""
    store = ready(tmp_path)
    written(store, dead_owner(), [cell()])

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        with pytest.raises(StoreError, match="No space"):
            recovered(store)
    recovered(store)
    assert store.done(KEYS) == {KEYS[0]: "done"}


# -- runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    folder = tmp_path / "ledger"
    folder.mkdir()
    monkeypatch.setenv("FAKE_LEDGER", str(folder))
    return folder


def test_a_killed_worker_loses_its_cell_only(tmp_path, ledger, monkeypatch):
    """What it had finished in the last minute is not computed again."""
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"9": "die_once"}))
    summary = fake_run(fake_plan(40), tmp_path, workers=1)  # four units of ten
    assert summary.counts["done"] == 40 and sorted(computed(ledger).values()) == [1] * 40
    assert not os.listdir(tmp_path / "store/journals")


@pytest.mark.parametrize("keep", ["none", "scores"])
def test_everything_killed_loses_cells_in_flight_only(tmp_path, ledger, monkeypatch, keep):
    """kill -9 of driver and worker: the same command computes what was not finished, no more; the same tables."""
    plan = fake_plan(40, keep=keep)
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; from fake_pipeline import *\n"
        f"fake_run(fake_plan(40, keep={keep!r}), {str(tmp_path)!r}, workers=0)"
    )
    env = {**os.environ, "FAKE_SECONDS": "0.2"}
    child = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.DEVNULL)
    wait_until(lambda: sum(computed(ledger).values()) >= 5, pause=0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    store, keys = Store(tmp_path), {c.fingerprint for c in plan.cells}
    assert store.done(keys) == {} and os.listdir(tmp_path / "store/journals")
    assert fake_run(plan, tmp_path).counts["done"] == 40
    assert sum(computed(ledger).values()) <= 41
    fake_run(plan, tmp_path / "alone")
    for table in ("results", "prompts"):
        path = f"sweeps/s/{table}.parquet"
        assert (tmp_path / path).read_bytes() == (tmp_path / "alone" / path).read_bytes()
    assert set(store.done_and_kept(keys, keep)) == keys


def test_a_death_concerns_its_unit_only_and_comes_before_the_claims_are_free(tmp_path):
    """Catches journals of workers that live taken along, and cells that another run claims before they are stored."""
    store, plan = ready(tmp_path), fake_plan(2)
    with Claims(store.folder / "claims") as mine:
        job = Job(tmp_path, tmp_path, mine.owner, Compute(), "none", {})
        one = units.unit_of(plan.cells)
        bar = Progress("s", 2, None, show=False)
        schedule = Schedule(job, store, mine, [], bar)
        schedule._running[one.unit_id] = one
        for unit, key in ((one.unit_id, plan.cells[0].fingerprint), (UNIT, KEYS[0])):
            store.journal(mine.owner, unit).add(cell(key))
        order = []
        mine.release = lambda keys: order.append(set(store.done(keys)))
        schedule.handle(Event(one.unit_id, "died", Death(-9)))
        assert order == [{plan.cells[0].fingerprint}] and bar.counts["done"] == schedule.n_computed == 1
        assert [unit for _, _, unit in listed(store.folder / "journals")] == [UNIT]


def test_claims_of_the_dead_are_taken_after_their_journals(tmp_path):
    """Catches a taker that dies, or is refused, in between: nobody would look for that journal again."""
    asked = []

    def refuse(owner):
        asked.append(owner)
        raise StoreError("full")

    owner = dead_owner()
    for key in KEYS[:2]:
        os.symlink(owner, tmp_path / key)
    with Claims(tmp_path, on_death=refuse) as one:
        with pytest.raises(StoreError):
            one.take(KEYS[:1])
        assert os.readlink(tmp_path / KEYS[0]) == owner
    with Claims(tmp_path, on_death=asked.append) as two:
        assert two.take(KEYS[:2]) == set(KEYS[:2]) and asked == [owner, owner]


@pytest.mark.parametrize("how", ["no beat", "ended"])
def test_a_journal_without_claims_is_found_when_a_run_begins(tmp_path, ledger, how):
    """A full disk, claims given back, later space again; also in a notebook, whose process lives on."""
    plan, store = fake_plan(3), ready(tmp_path)
    fake_run(plan, tmp_path / "alone")
    before, keys = computed(ledger), [c.fingerprint for c in plan.cells]
    whole = Store(tmp_path / "alone")
    rows = zip(whole.records(keys).to_pylist(), whole.costs(keys).to_pylist(), strict=True)
    written(store, ELSEWHERE if how == "no beat" else dead_owner(), [Finished(r, c, {}) for r, c in rows])
    assert fake_run(plan, tmp_path).counts["done"] == 3 and computed(ledger) == before


def test_cells_without_what_is_to_be_kept_are_computed(tmp_path, ledger, monkeypatch):
    """Catches scores that are missing from a finished sweep since a dead run was not asked for them."""
    monkeypatch.setattr(claims, "LEASE", 0.5)
    plan, store = fake_plan(4, keep="scores"), ready(tmp_path)
    keys = [c.fingerprint for c in plan.cells]
    written(store, ELSEWHERE, [cell(key, cell_id=c.cell_id) for key, c in zip(keys[:2], plan.cells, strict=False)])
    (store.folder / "claims" / f"{ELSEWHERE}.beat").write_text("7")
    for key in keys:
        os.symlink(ELSEWHERE, store.folder / "claims" / key)
    summary = fake_run(plan, tmp_path)
    assert summary.n_left == 0 and set(Store(tmp_path).done_and_kept(keys, "scores")) == set(keys)


def test_whoever_takes_a_dead_owners_claims_publishes_what_it_had(tmp_path, ledger, monkeypatch):
    """A node of the cluster that is gone: its finished cells are not computed again by another one."""
    monkeypatch.setattr(claims, "LEASE", 0.5)
    plan, store = fake_plan(6), ready(tmp_path)
    fake_run(plan, tmp_path / "alone")
    before = computed(ledger)
    keys = [c.fingerprint for c in plan.cells]
    had = Store(tmp_path / "alone").records(keys[:3]).to_pylist()
    costs = Store(tmp_path / "alone").costs(keys[:3]).to_pylist()
    written(store, ELSEWHERE, [Finished(r, c, {}) for r, c in zip(had, costs, strict=True)])
    (store.folder / "claims" / f"{ELSEWHERE}.beat").write_text("7")
    for key in keys:
        os.symlink(ELSEWHERE, store.folder / "claims" / key)
    assert fake_run(plan, tmp_path).counts["done"] == 6
    assert sum((computed(ledger) - before).values()) == 3 and not os.listdir(store.folder / "journals")


def test_workers_killed_on_the_way_out_lose_nothing(tmp_path, monkeypatch):
    """A cell in foreign code does not hear SIGTERM: its worker is killed when the run ends, whatever the reason."""
    plan = fake_plan(2)
    key = plan.cells[0].fingerprint

    def run(self, source, *_):
        source.store.journal(source.claims.owner, UNIT).add(cell(key))
        raise KeyError("the engine broke")

    monkeypatch.setattr(Local, "run", run)
    with pytest.raises(KeyError):
        fake_run(plan, tmp_path)
    assert Store(tmp_path).done([key]) == {key: "done"}


def test_garbage_collection_on_a_full_disk(tmp_path, monkeypatch):
    """Catches gc that cannot make space since it has to write first; the claims that lead to the journal stay."""
    store, owner = ready(tmp_path), dead_owner()
    written(store, owner, [cell()])
    os.symlink(owner, store.folder / "claims" / KEYS[0])
    (store.folder / "quarantine" / "large").write_bytes(b"x" * 1000)

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        found = collect.collect(tmp_path, quarantine=True)
    assert collect.QUARANTINE in found.removed and collect.CLAIMS not in found.removed
    assert any("No space" in note for note in found.notes)
    found = collect.collect(tmp_path)
    assert collect.CLAIMS in found.removed and store.done(KEYS) == {KEYS[0]: "done"}


def test_a_cluster_waits_for_what_is_to_be_kept(tmp_path):
    """Catches a sweep with keep=scores that ends although a dead run published its cells without them."""
    store, plan = ready(tmp_path), fake_plan(3, keep="scores")
    todo = Todo(store, plan.cells, "scores")
    assert len(todo.left()) == 3
    keys = [c.fingerprint for c in plan.cells]
    for key, kept in zip(keys, ({"scores": np.ones(1)}, {}, {"scores": np.ones(1)}), strict=True):
        written(store, dead_owner(), [cell(key)._replace(kept=kept)])
        recovered(store)
    assert todo.left() | todo.left() == {keys[1]}


def test_an_owner_whose_beat_cannot_be_read_is_not_gone(tmp_path, monkeypatch):
    """Catches every living run's journals taken for one hiccup of a file server."""
    with Claims(tmp_path) as mine:
        assert mine.is_gone(ELSEWHERE) and not mine.is_gone(mine.owner)
        monkeypatch.setattr(os, "lstat", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        assert not mine.is_gone(ELSEWHERE)


def test_garbage_collection_publishes_before_it_removes(tmp_path):
    """Catches gc that throws finished cells away; a dry run changes nothing; the journal of a living one stays."""
    store = ready(tmp_path)
    path = written(store, dead_owner(), [cell()])
    (tmp_path / "sweeps").mkdir()
    found = collect.collect(tmp_path, dry_run=True)
    assert [item.path for item in found.removed[collect.JOURNALS]] == [path] and store.done(KEYS) == {}
    with Claims(store.folder / "claims", beat=0.2) as alive:
        living = Journal(store.folder / "journals", alive.owner, UNIT)
        living.add(cell(KEYS[1]))
        found = collect.collect(tmp_path)
        assert [item.path for item in found.removed[collect.JOURNALS]] == [path]
        assert store.done(KEYS) == {KEYS[0]: "done"} and len(os.listdir(store.folder / "journals")) == 1
        living.drop()
    assert not os.listdir(store.folder / "journals")
