"""Journals: what a worker has finished outlives SIGKILL, bit for bit; what is torn or foreign is never served."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from fake_pipeline import fake_plan, fake_run
from waiting import wait_until

from rmsweep import atomic, claims, collect
from rmsweep.claims import Claims
from rmsweep.engines.local import Local
from rmsweep.errors import StoreError
from rmsweep.journals import Finished, Journal, frame, listed, read
from rmsweep.store import Store

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
    (path,) = (path for path, _, _ in listed(store.folder / "journals"))
    return path


def recovered(store):
    """As when a run begins."""
    store.recover(lambda owner, unit: claims.has_ended(owner))


def computed(ledger):
    return Counter(name.rpartition("-")[0] for name in os.listdir(ledger) if name.startswith("cell-"))


# -- bytes -------------------------------------------------------------------------------------------------


def test_a_frame_gives_back_the_same_bits(tmp_path):
    """Catches numbers rounded on their way through text, and kinds of numbers that text does not know."""
    hard = [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, float("inf"), float("nan"), None]
    arrays = {"scores": np.float32([[1 / 3, np.nan]]), "w/0": np.array([2**60 + 1]), "none": np.zeros((0, 2))}
    record = {"bon_golden": hard, "spearman": np.float32(0.1), "n_train": np.int64(2**53 + 1), "reason": None}
    one = cell(**record, golden_picked=np.float32([0.1, -0.0, np.inf]))
    one = one._replace(cost={**one.cost, "traceback": "a\n\x00 \udc80 é", "seconds_train": 0.1 + 0.2}, kept=arrays)
    (tmp_path / "j").write_bytes(frame(one))
    (back,) = read(tmp_path / "j")
    assert repr(back.record["bon_golden"]) == repr(hard) and back.record["reason"] is None
    assert back.record["spearman"] == float(np.float32(0.1)) and back.record["n_train"] == 2**53 + 1
    assert back.record["golden_picked"].tobytes() == one.record["golden_picked"].tobytes() and back.cost == one.cost
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


def test_cells_of_another_version_are_dropped(tmp_path):
    """A column or a key that this version does not know; the others of the journal count."""
    store = ready(tmp_path)
    path = written(store, dead_owner(), [cell(KEYS[0], no_such_column=1.0), cell("../x"), cell(KEYS[1], bon_n="x")])
    path.write_bytes(path.read_bytes() + frame(cell(KEYS[2])))
    recovered(store)
    assert set(store.done([*KEYS, "../x"])) == {KEYS[2]} and not os.listdir(store.folder / "journals")


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
