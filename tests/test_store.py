"""The store: what is committed is served whole, what is damaged is not served at all."""

import errno
import io
import os
import random

import numpy as np
import pyarrow.parquet as pq
import pytest

from rmsweep import atomic, parts
from rmsweep.errors import StoreError
from rmsweep.fingerprint import digest
from rmsweep.parts import table_of
from rmsweep.schemas import RECORD
from rmsweep.store import MERGE_TO, Store, parquet

UNIT, BANK, OTHER = digest("unit"), digest("bank"), digest("other")


def key(i):
    return digest(["cell", i])


def record(i, status="done", **values):
    base = {"fingerprint": key(i), "cell_id": digest(i), "status": status}
    return base | ({"golden_improvement": i / 7} if status == "done" else {}) | values


def cost(i, attempt=1):
    return {"fingerprint": key(i), "cell_id": digest(i), "attempt": attempt}


def put(store, rows, unit=UNIT, attempt=1):
    return store.publish_part(
        unit, rows, [{**cost(0), "fingerprint": r["fingerprint"], "attempt": attempt} for r in rows]
    )


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path, heal=True)
    store.prepare()
    return store


def build(folder):
    np.save(folder / "golden.npy", np.arange(50.0))
    (folder / "bank.json").write_text("{}")


# -- parts -------------------------------------------------------------------------------------------------


def test_records_come_back(store):
    """Catches lost rows and types; a store without these cells says nothing of them."""
    put(store, [record(0), record(1, "failed", reason="boom")])
    assert store.done([key(0), key(1), key(2)]) == {key(0): "done", key(1): "failed"}
    assert store.states([key(1)])[key(1)].reason == "boom"
    assert store.records([key(0)])["golden_improvement"].to_pylist() == [0.0]


def test_reading_creates_nothing(tmp_path):
    """Catches `plan` making folders."""
    assert Store(tmp_path / "none").done([key(0)]) == {} and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_of_several_records_the_best_counts(tmp_path, order):
    """done, diverged, skipped, failed, whichever came first and in whichever part."""
    store = Store(tmp_path)
    store.prepare()
    statuses = ["failed", "skipped", "diverged", "done"]
    for i in order:
        put(store, [record(5, statuses[i])], unit=digest(["u", i]))
        best = max(order[: order.index(i) + 1])
        assert store.done([key(5)]) == {key(5): statuses[best]}


def test_two_results_of_one_cell_are_noted(store):
    """Nondeterminism: a choice that depends on the records only, and a warning."""
    values = []
    for a, b in ((1.0, 2.0), (2.0, 1.0)):
        for unit, value in ((UNIT, a), (OTHER, b)):
            put(store, [record(0, golden_improvement=value)], unit=unit)
        values.append(store.records([key(0)])["golden_improvement"].to_pylist())
    assert values[0] == values[1] and store.conflicts == {key(0)}


def test_last_attempt_is_the_cost(store):
    """Catches the first try's cost row."""
    for attempt in (2, 1, 3):
        put(store, [record(0, "failed")], unit=digest(attempt), attempt=attempt)
    assert store.costs([key(0)])["attempt"].to_pylist() == [3]


def test_a_stray_column_is_an_error():
    """Arrow would drop it in silence."""
    with pytest.raises(ValueError, match="no_such"):
        table_of([record(0, no_such=1)], RECORD)


@pytest.mark.parametrize("heal", [True, False])
def test_damaged_parts_are_never_served(tmp_path, heal):
    """250 random damages (flip, truncate, empty, append, zero): the cell counts as not done, every time."""
    seed = 20
    print("seed", seed)
    rng = random.Random(seed)
    writer = Store(tmp_path)
    writer.prepare()
    path = next(p for p in put(writer, [record(0), record(1)]) if p.parent.name == "results")
    data = path.read_bytes()
    for _ in range(250):
        store = Store(tmp_path, heal=heal)
        path.write_bytes(damaged(data, rng))
        assert store.done([key(0), key(1)]) == {}
        assert path.exists() is not heal and len(store.corrupt) == 1


def damaged(data, rng):
    kind, at = rng.randrange(5), rng.randrange(len(data))
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return b""
    if kind == 3:
        return data + b"x"
    return data[:at] + bytes(len(data) - at) if any(data[at:]) else b"x"


def test_a_damaged_part_is_published_again(store):
    """A part under its own name with wrong bytes must not be taken for nondeterminism."""
    files = put(store, [record(0)])
    path = next(p for p in files if p.parent.name == "results")
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    assert put(store, [record(0)]) == files and path.read_bytes() == good and store.done([key(0)])


def test_swapped_parts_are_not_served(store):
    """Two sound files under each other's names."""
    a, b = (next(p for p in put(store, [record(i)], unit=digest(i)) if p.parent.name == "results") for i in (0, 1))
    x, y = a.read_bytes(), b.read_bytes()
    a.write_bytes(y)
    b.write_bytes(x)
    assert store.done([key(0), key(1)]) == {}


def test_a_part_merged_while_we_read(store, monkeypatch):
    """Catches cells that vanish because their part was replaced between listing and reading."""
    from rmsweep import atomic

    old = put(store, [record(0)])
    read, done = atomic.read, []

    def merge_first(path):
        if not done:
            done.append(1)
            put(store, [record(0), record(1)])
            store.discard(old)
        return read(path)

    monkeypatch.setattr(atomic, "read", merge_first)
    assert store.done([key(0), key(1)]) == {key(0): "done", key(1): "done"}


def test_foreign_and_temporary_files_are_passed_over(store):
    """Orphans of killed writers, editors' files, symbolic links."""
    files = put(store, [record(0)])
    folder = store.folder / "results"
    (folder / ".host-1-abc.tmp").write_bytes(b"half")
    (folder / "notes.txt").write_text("x")
    target = next(p for p in files if p.parent == folder)
    (folder / f"{OTHER}-{'0' * 24}.parquet").symlink_to(target)
    assert store.done([key(0)]) == {key(0): "done"}


def test_kept_arrays(store):
    """Arrays of one cell only, bit for bit; damaged files are not served."""
    arrays = {f"{key(0)}/scores": np.arange(6, dtype=np.float32).reshape(2, 3), f"{key(1)}/scores": np.ones(2)}
    files = store.publish_part(UNIT, [record(0), record(1)], [cost(0), cost(1)], arrays)
    np.testing.assert_array_equal(store.kept(key(0))["scores"], arrays[f"{key(0)}/scores"])
    assert list(store.kept(key(0))) == ["scores"] and store.kept(key(2)) == {}
    path = next(p for p in files if p.suffix == ".safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert store.kept(key(0)) == {}


@pytest.mark.parametrize("name", ["../../etc", "/etc", "a/b", "", ".", "A" * 24, "é" * 24, "0" * 300, "ab\0" * 8])
def test_names_never_become_paths(store, name):
    """Only hex keys reach the file system."""
    with pytest.raises(StoreError, match="no key of the store"):
        store.bank(name)
    with pytest.raises(StoreError):
        store.publish_part(name, [record(0)], [cost(0)])


def test_records_are_the_commit(store, monkeypatch):
    """A crash between the files leaves the cell not done: costs first, records last."""
    publish, count = os.link, []

    def second_fails(*args, **options):
        count.append(1)
        if len(count) == 2:
            raise OSError(errno.ENOSPC, "full")
        return publish(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="results"):
        patch.setattr(os, "link", second_fails)
        put(store, [record(0)])
    assert store.done([key(0)]) == {} and store.costs([key(0)]).num_rows == 1
    put(store, [record(0)])
    assert store.done([key(0)]) == {key(0): "done"}


def test_parts_have_page_checksums(store):
    """For readers that do not know our names: every flip in the pages' data is an error."""
    path = next(p for p in put(store, [record(i) for i in range(40)]) if p.parent.name == "results")
    data = path.read_bytes()
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(RECORD.names.index("golden_improvement"))
    end = chunk.dictionary_page_offset + chunk.total_compressed_size
    broken = data[: end - 2] + bytes([data[end - 2] ^ 1]) + data[end - 1 :]
    with pytest.raises(OSError):
        pq.ParquetFile(io.BytesIO(broken), page_checksum_verification=True).read()


def test_many_small_parts_are_merged(store, tmp_path):
    """Catches files that grow with kills: 150 parts of one row become a few, and nothing that was stored changes."""
    for i in range(150):
        put(store, [record(i % 140, "failed" if i < 10 else "done", reason=None)], unit=digest(["u", i]), attempt=1 + i)
    put(store, [record(200 + i) for i in range(40)], unit=digest("large"))
    keys = [key(i) for i in range(300)]
    before = store.records(keys), store.costs(keys).drop_columns(["cell_id"])
    large = {p.name for p in (store.folder / "results").iterdir() if p.name.startswith(digest("large"))}
    store.merge(keys)
    names = {kind: set(os.listdir(store.folder / kind)) for kind in ("results", "costs")}
    assert len(names["results"]) == 1 + 150 // MERGE_TO + 1 and large <= names["results"] and len(names["costs"]) == 4
    for reader in (store, Store(tmp_path)):
        assert reader.records(keys) == before[0] and reader.costs(keys).drop_columns(["cell_id"]) == before[1]
        assert reader.corrupt == [] and not reader.conflicts
    Store(tmp_path).merge(keys)
    assert names == {kind: set(os.listdir(store.folder / kind)) for kind in names}


def test_merging_keeps_two_results_of_one_cell(store, tmp_path):
    """Catches evidence of nondeterminism that merging would hide, and equal rows kept twice."""
    for i in range(100):
        put(store, [record(0, golden_improvement=float(i % 2)), record(i)], unit=digest(["u", i]))
    store.merge([key(i) for i in range(100)])
    fresh = Store(tmp_path)
    assert len(fresh.records([key(0)])) == 1 and fresh.conflicts == {key(0)}
    assert sum(pq.read_metadata(p).num_rows for p in (store.folder / "results").iterdir()) < 120


# -- banks -------------------------------------------------------------------------------------------------


def test_a_bank_is_built_once(store):
    """Catches a second build, and temporary folders left behind."""
    calls = []

    def counted(folder):
        calls.append(1)
        build(folder)

    assert store.bank(BANK) is None and not store.has_bank(BANK)
    folder = store.build_bank(BANK, counted)
    assert store.build_bank(BANK, counted) == folder and len(calls) == 1 and store.has_bank(BANK)
    assert os.listdir(store.folder / "banks") == [BANK]


@pytest.mark.parametrize("file", ["golden.npy", "bank.json", "manifest.json"])
@pytest.mark.parametrize("kind", ["flip", "truncate", "remove", "empty"])
def test_damaged_banks_are_never_served(store, tmp_path, file, kind):
    """numpy loads a flipped bit without a word: the manifest must catch it; then the bank is built again."""
    path = store.build_bank(BANK, build) / file
    data = path.read_bytes()
    at = len(data) // 2
    damage = {"flip": data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :], "truncate": data[:at], "empty": b""}
    path.unlink() if kind == "remove" else path.write_bytes(damage[kind])
    fresh = Store(tmp_path, heal=True)
    assert fresh.bank(BANK) is None and len(fresh.corrupt) == 1
    assert len(os.listdir(fresh.folder / "quarantine")) == 1
    assert Store(tmp_path).bank(fresh.build_bank(BANK, build).name) is not None


def test_foreign_files_and_swapped_banks(store, tmp_path):
    """Two sound banks under each other's names; a file that nobody committed."""
    for name in (BANK, OTHER):
        store.build_bank(name, build)
    banks = store.folder / "banks"
    (banks / BANK).rename(banks / "t")
    (banks / OTHER).rename(banks / BANK)
    (banks / "t").rename(banks / OTHER)
    assert Store(tmp_path).bank(BANK) is None
    (banks / OTHER).rename(banks / "t")
    (banks / BANK).rename(banks / OTHER)
    assert Store(tmp_path).bank(OTHER) is not None
    (banks / OTHER / "extra.npy").write_bytes(b"x")
    assert Store(tmp_path).bank(OTHER) is None


def test_a_failing_build_leaves_nothing(store):
    """The error is the dataset's own, unless it is the disk."""
    for error, expected in ((ValueError("bad"), ValueError), (OSError(errno.ENOSPC, "full"), StoreError)):

        def broken(folder, error=error):
            build(folder)
            raise error

        with pytest.raises(expected):
            store.build_bank(BANK, broken)
        assert os.listdir(store.folder / "banks") == []


def test_a_bank_is_flat(store):
    """Sub-folders and links would escape the manifest."""
    with pytest.raises(StoreError, match="flat"):
        store.build_bank(BANK, lambda folder: (folder / "sub").mkdir())
    with pytest.raises(StoreError, match="flat"):
        store.build_bank(BANK, lambda folder: (folder / "a.npy").symlink_to("/etc/hostname"))


def test_a_read_only_root_is_refused_first(tmp_path, monkeypatch):
    """Exit code 3 and the path, before any work (root ignores modes, so the refusal is injected)."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match=r"store/banks.*Read-only") as info:
        Store(tmp_path).prepare()
    assert info.value.exit_code == 3


def test_parts_of_an_older_version_lack_new_columns(store):
    """A column added later must not orphan what is done: it reads as null."""
    data = parquet(table_of([record(0)], RECORD).drop_columns(["learning_rate"]))
    atomic.publish(store.folder / "results" / f"{UNIT}-{parts.sha(data)}.parquet", data, "results")
    found = store.records([key(0)])
    assert found["learning_rate"].to_pylist() == [None] and found["status"].to_pylist() == ["done"]
    assert not store.corrupt


def test_kept_arrays_of_a_part_replaced_while_reading(store, monkeypatch):
    """Catches arrays that vanish because a worker's flush replaced their part after the folder was listed."""

    def publish(unit, *cells):
        arrays = {f"{key(i)}/scores": np.full(2, float(i)) for i in cells}
        return store.publish_part(digest(unit), [record(i) for i in cells], [cost(i) for i in cells], arrays)

    files, read, done = [*publish("a", 0), *publish("b", 1)], store._kept.read, []

    def replacing(name):
        if not done:
            done.append(publish("b", 1, 2))
            store.discard(path for path in files if path.parent.name == "kept" and path.name != name)
        return read(name)

    monkeypatch.setattr(store._kept, "read", replacing)
    assert {key for key, _ in store._kept_names()} >= {key(1), key(2)} and done


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO, errno.ENOMEM, errno.EACCES, errno.ESTALE])
def test_what_cannot_be_read_now_is_not_thrown_away(store, monkeypatch, code):
    """Catches sound results in quarantine because descriptors, memory or a file server failed for a moment."""
    store.publish_part(UNIT, [record(0)], [cost(0)])
    monkeypatch.setattr(atomic, "STALE_WAITS", (0.0,))
    fresh, real = Store(store.folder.parent, heal=True), os.open

    def refuse(path, *rest, **options):
        if str(path).endswith(".parquet"):
            raise OSError(code, os.strerror(code))
        return real(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(StoreError, match="left as it is"):
            fresh.states([key(0)])
    assert fresh.states([key(0)])[key(0)].status == "done" and not fresh.corrupt
