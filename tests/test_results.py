"""The tables: a pure, sorted function of plan and records; reading; SQL without access to anything else."""

import random

import pyarrow.parquet as pq
import pytest
from fake_pipeline import fake_plan, fake_run

from rmsweep import atomic, results
from rmsweep.errors import ConfigError, StoreError
from rmsweep.fingerprint import digest
from rmsweep.schemas import AXES, METRICS, SCHEMA_VERSION, STATUS
from rmsweep.store import Store

NAMES = ("results", "prompts", "costs")


def record(cell, i):
    status = ("done", "failed", "diverged")[i % 3] if i % 5 == 0 else "done"
    base = {"fingerprint": cell.fingerprint, "cell_id": cell.cell_id, "status": status, "reason": None}
    values = {"golden_improvement": i / 7, "beta": 0.25, "n_annotations": 77, "golden_picked": [i / 3, 1.0]}
    return base | (values if status == "done" else {"reason": f"reason {i}"})


def fill(root, plan, order, size):
    store = Store(root)
    store.prepare()
    runnable = [(i, c) for i, c in enumerate(plan.cells) if c.reason is None]
    rows = [(record(c, i), {"cell_id": c.cell_id, "fingerprint": c.fingerprint, "attempt": 1}) for i, c in runnable]
    rows = [rows[i] for i in order(range(len(rows)))]
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        store.publish_part(digest([r["fingerprint"] for r, _ in part]), [r for r, _ in part], [c for _, c in part])
    return store


def test_same_bytes_whatever_the_order(tmp_path):
    """Catches tables that depend on completion order, unit size or plan order: 20 shuffles."""
    plan, rng, seen = fake_plan(10, (0.5, 1.0), exclude=[{"seed": 3}]), random.Random(3), set()
    for i in range(20):
        size = rng.choice([1, 3, 7, 20])
        store = fill(tmp_path / str(i), plan, lambda r: rng.sample(r, len(r)), size)
        results.assemble(rng.sample(plan.cells, len(plan.cells)), store, tmp_path / str(i))
        seen.add(tuple((tmp_path / str(i) / f"{n}.parquet").read_bytes() for n in ("results", "prompts")))
    assert len(seen) == 1


def test_rows_and_columns(tmp_path):
    """One row per cell, labels typed, realised beta and n_annotations from the record, skipped cells with reason."""
    plan = fake_plan(6, (0.5, 1.0), exclude=[{"seed": 3}])
    summary = results.assemble(plan.cells, fill(tmp_path, plan, list, 4), tmp_path)
    table, prompts, costs = (pq.read_table(tmp_path / f"{name}.parquet") for name in NAMES)
    names = table.column_names
    extra = names[1 + len(AXES) : 1 - len(STATUS) - len(METRICS)]
    assert names == [
        "cell_id",
        *(c.name for c in AXES),
        *extra,
        *(c.name for c in STATUS[1:]),
        *(c.name for c in METRICS),
    ]
    assert "dataset.seed" in extra and str(table.schema.field("dataset.seed").type) == "int64"
    rows = table.to_pylist()
    assert len(rows) == 12 and summary.n_missing == 0 and summary.counts["skipped"] == 2
    for row in rows:
        assert (row["status"] == "skipped") == (row["seed"] == 3)
        assert (row["reason"] is None) == (row["status"] == "done")
        assert (row["golden_improvement"] is None) == (row["status"] != "done")
        assert row["beta"] == (0.25 if row["status"] == "done" else row["beta"]) and row["beta"] is not None
        assert row["n_annotations"] == 77 or row["status"] != "done"
    assert prompts.num_rows == summary.counts["done"] and costs.num_rows == 10


def test_cells_that_have_not_run_are_counted_not_shown(tmp_path):
    """Catches an invented status."""
    store = Store(tmp_path)
    store.prepare()
    summary = results.assemble(fake_plan(4).cells, store, tmp_path)
    assert pq.read_table(summary.results).num_rows == 0 and summary.n_missing == 4


def test_row_groups_are_one_table(tmp_path, monkeypatch):
    """Catches rows lost, doubled or out of order where one group of rows ends and the next begins."""
    plan = fake_plan(7, (0.5, 1.0), worlds=(0, 1), exclude=[{"seed": 3}])
    store, tables = fill(tmp_path, plan, lambda r: random.Random(1).sample(r, len(r)), 5), []
    for rows in (1024, 3):
        monkeypatch.setattr(results, "ROW_GROUP", rows)
        results.assemble(plan.cells, store, tmp_path)
        tables.append([pq.read_table(tmp_path / f"{name}.parquet") for name in NAMES])
    assert tables[0] == tables[1] and tables[0][0].num_rows == 28
    assert pq.ParquetFile(tmp_path / "results.parquet").num_row_groups == 10
    ids = [t["cell_id"].to_pylist() for t in tables[0]]
    assert all(list_ == [i for i in ids[0] if i in set(list_)] for list_ in ids[1:])


def test_a_part_merged_while_tables_are_made(tmp_path, monkeypatch):
    """Catches rows that vanish, or an error, because another driver merged parts between choosing and reading."""
    plan = fake_plan(100)
    store = fill(tmp_path, plan, list, 1)
    take, done = store.record_parts.take, []

    def merge_first(rows, columns=None):
        if not done:
            done.append(1)
            Store(tmp_path).merge(c.fingerprint for c in plan.cells)
        return take(rows, columns)

    monkeypatch.setattr(store.record_parts, "take", merge_first)
    assert results.assemble(plan.cells, store, tmp_path).n_missing == 0 and done
    assert pq.read_table(tmp_path / "results.parquet").num_rows == 100


def test_tables_that_are_current_are_left_alone(tmp_path):
    """Catches a finished sweep assembled anew each time, and a damaged, absent or outdated table taken for current."""
    fake_run(fake_plan(4), tmp_path)
    folder = tmp_path / "sweeps" / "s"
    good = {name: (folder / f"{name}.parquet").read_bytes() for name in NAMES}
    inodes = [(folder / f"{name}.parquet").stat().st_ino for name in NAMES]
    again = fake_run(fake_plan(4), tmp_path)
    assert [(folder / f"{name}.parquet").stat().st_ino for name in NAMES] == inodes and again.counts["done"] == 4
    for name in NAMES:
        for damage in (good[name][:40] + b"x" + good[name][41:], good[name][:-1], None):
            path = folder / f"{name}.parquet"
            path.unlink() if damage is None else path.write_bytes(damage)
            fake_run(fake_plan(4), tmp_path)
            assert path.read_bytes() == good[name]
    (folder / results.SEAL).write_text("{")
    assert fake_run(fake_plan(4), tmp_path).counts["done"] == 4
    assert results.current(folder, Store(tmp_path)) is not None
    fake_run(fake_plan(5, name="other"), tmp_path)
    assert fake_run(fake_plan(5), tmp_path).counts["done"] == 5 and len(results.load(folder)) == 5


def test_a_slower_driver_cannot_be_sealed_as_current(tmp_path, monkeypatch):
    """Two drivers: one chose its rows early and replaces the tables of the other after that one sealed its own."""
    fake_run(fake_plan(6), tmp_path)
    folder, cells, replace = tmp_path / "sweeps" / "s", fake_plan(6).cells, atomic.Draft.replace
    fill(tmp_path / "early", fake_plan(3), list, 3)

    def slowly(draft):
        if draft.path.name == "costs.parquet":  # the slower one has written its seal: the other one runs now
            monkeypatch.setattr(atomic.Draft, "replace", replace)
            store = Store(tmp_path)
            results.assemble(cells, store, folder, results.seal(folder, store))
            assert results.current(folder, store) is not None
        replace(draft)

    monkeypatch.setattr(atomic.Draft, "replace", slowly)
    results.assemble(cells, Store(tmp_path / "early"), folder, "early")
    assert results.current(folder, Store(tmp_path)) is None
    assert fake_run(fake_plan(6), tmp_path).counts["done"] == 6 and len(results.load(folder)) == 6


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2, None], "int64"),
        ([1, 0.5], "double"),
        (["a", 1], "string"),
        ([True, False], "string"),
        ([None], "string"),
    ],
)
def test_types_of_other_labels(values, kind):
    """Catches booleans as integers and integers as text."""
    assert str(results._inferred(values).type) == kind


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    fake_run(fake_plan(3, name="a"), root)
    fake_run(fake_plan(2, name="b"), root)
    return root


def test_load(root):
    """A file, a sweep's folder, or a root (the last sweep)."""
    assert results.last_sweep(root) == "b" and len(results.load(root)) == 2
    assert len(results.load(root / "sweeps" / "a")) == len(results.load(root / "sweeps" / "a" / "results.parquet")) == 3
    with pytest.raises(ConfigError, match="no such file or folder"):
        results.load(root / "none")
    with pytest.raises(ConfigError, match="no sweep under"):
        results.last_sweep(root / "none")


def test_a_damaged_table_is_not_read(root, tmp_path):
    """Page checksums: one flipped bit is an error, not another number."""
    data = bytearray((root / "sweeps" / "a" / "results.parquet").read_bytes())
    data[40] ^= 1
    (tmp_path / "results.parquet").write_bytes(data)
    with pytest.raises(StoreError, match="cannot be read"):
        results.load(tmp_path)


def test_sql(root):
    """The three tables, joined."""
    joined = "results r join costs c using (cell_id) join prompts using (cell_id)"
    sql = f"select count(*) as n, min(c.attempt) as a from {joined}"
    assert results.query(root / "sweeps" / "a", sql).to_dict("records") == [{"n": 3, "a": 1}]


@pytest.mark.parametrize(
    "sql",
    [
        "select * from read_csv('/etc/passwd')", "select * from '/etc/passwd'", "copy results to '{out}'",
        "attach '{out}' as x", "install httpfs", "set enable_external_access = true", "select * from nothing",
        "select * from sql", "selec 1", "create table x as select * from read_text('/etc/hostname')",
    ],
)  # fmt: skip
def test_sql_reaches_nothing_else(root, tmp_path, sql):
    """No file is read or written, no Python variable is seen, no setting is changed back."""
    with pytest.raises(ConfigError, match="--sql"):
        results.query(root / "sweeps" / "a", sql.format(out=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_schema_text_names_every_column():
    """Catches an undocumented column."""
    text = results.schema_text()
    assert all(f"  {c.name} " in text for c in (*AXES, *STATUS, *METRICS))


def test_tables_have_checksums_and_version(root):
    """What is written says its schema version."""
    for name in NAMES:
        file = pq.ParquetFile(root / "sweeps" / "a" / f"{name}.parquet")
        assert file.schema_arrow.metadata[b"rmsweep.schema_version"] == str(SCHEMA_VERSION).encode()
