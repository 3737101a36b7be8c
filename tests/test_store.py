"""The store: corruption is found on read, set aside and made again; parts and banks are immutable."""

import os

import numpy as np
import pytest
from running import fake_plan, planned, run

from rmsweep.errors import StoreError
from rmsweep.store import Store


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    elif how == "truncate":
        data = data[: len(data) // 2]
    elif how == "append":
        data += b"x"
    else:
        data = bytearray(len(data))
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["flip", "truncate", "append", "zero"])
def test_damaged_parts_are_quarantined_and_made_again(tmp_path, how):
    """npy and Parquet do not notice a flipped bit: the digest in the name does."""
    plan = fake_plan(6, llms=("sim_2b",))
    before = run(plan, tmp_path)
    table = before.results.read_bytes()
    parts = sorted((tmp_path / "store" / "results").iterdir())
    damage(parts[0], how)
    after = run(plan, tmp_path)
    assert 0 < after.n_computed <= 6 and after.results.read_bytes() == table
    assert len(list((tmp_path / "store" / "quarantine").iterdir())) == 1


@pytest.mark.parametrize("how", ["flip", "truncate", "append", "zero"])
@pytest.mark.parametrize("file", ["data.bin", "bank.json", "manifest.json"])
def test_damaged_banks_are_quarantined_and_built_again(tmp_path, how, file):
    """Every file of a bank is covered by its manifest."""
    run(fake_plan(1, llms=("sim_2b",)), tmp_path)
    (bank,) = (p for p in (tmp_path / "store" / "banks").iterdir())
    original = (bank / file).read_bytes()
    damage(bank / file, how)
    run(fake_plan(2, llms=("sim_2b",)), tmp_path, workers=1)  # a bank is verified once per process
    assert (bank / file).read_bytes() == original
    assert len(list((tmp_path / "store" / "quarantine").iterdir())) == 1


def test_swapped_parts_are_found(tmp_path):
    """A file under another file's name is damage too."""
    run(fake_plan(3), tmp_path)
    a, b = sorted((tmp_path / "store" / "results").iterdir())[:2]
    a.rename(tmp_path / "x"), b.rename(a), (tmp_path / "x").rename(b)
    assert run(fake_plan(3), tmp_path).n_computed > 0


def test_ids_never_become_paths(tmp_path):
    """A bank id is hex or nothing."""
    for name in ("../../etc", "", "x" * 24, "/abs"):
        with pytest.raises(StoreError, match="no key of the store"):
            Store(tmp_path).has_bank(name)


def test_foreign_files_in_the_store_are_ignored(tmp_path):
    """Temp files of killed writers and users' notes are no parts."""
    store = Store(tmp_path)
    store.prepare()
    for name in (".u-abc.parquet.host-1-x.tmp", "notes.parquet", "README"):
        (tmp_path / "store" / "results" / name).write_text("x")
    assert store.done(["a"]) == {}


def test_of_two_records_done_counts(tmp_path):
    """A retried cell's success replaces its failure, whatever their order on disk."""
    store, cell = Store(tmp_path), planned(0)
    store.prepare()
    failed = {"fingerprint": cell.fingerprint, "cell_id": cell.cell_id, "status": "failed", "reason": "broke"}
    done = {**failed, "status": "done", "reason": None, "golden_picked": np.ones(2, np.float32)}
    for unit, row in (("a" * 16, failed), ("b" * 16, done), ("c" * 16, {**failed, "reason": "again"})):
        store.publish_part(unit, [row], [])
    assert store.done([cell.fingerprint]) == {cell.fingerprint: "done"}


def test_read_only_files_do_not_matter(tmp_path):
    """Published files may be made read-only by their owner."""
    run(fake_plan(2), tmp_path)
    for path in (tmp_path / "store").rglob("*"):
        if path.is_file():
            os.chmod(path, 0o444)
    assert run(fake_plan(2), tmp_path).n_computed == 0
