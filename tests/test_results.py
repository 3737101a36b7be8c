"""The tables: a pure, sorted function of plan and records; reading; SQL without access to anything else."""

import random

import pyarrow.parquet as pq
import pytest
from fake_pipeline import fake_plan, fake_run

from rmsweep import results
from rmsweep.errors import ConfigError, StoreError
from rmsweep.fingerprint import digest
from rmsweep.schemas import AXES, METRICS, STATUS
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
        tables = results.assemble(rng.sample(plan.cells, len(plan.cells)), store)
        (tmp_path / str(i) / "t").mkdir()
        results.write(tmp_path / str(i) / "t", tables)
        seen.add(tuple((tmp_path / str(i) / "t" / f"{n}.parquet").read_bytes() for n in ("results", "prompts")))
    assert len(seen) == 1


def test_rows_and_columns(tmp_path):
    """One row per cell, labels typed, realised beta and n_annotations from the record, skipped cells with reason."""
    plan = fake_plan(6, (0.5, 1.0), exclude=[{"seed": 3}])
    tables = results.assemble(plan.cells, fill(tmp_path, plan, list, 4))
    names = tables.results.column_names
    extra = names[1 + len(AXES) : -2 - len(METRICS)]
    assert names == [
        "cell_id",
        *(c.name for c in AXES),
        *extra,
        *(c.name for c in STATUS[1:]),
        *(c.name for c in METRICS),
    ]
    assert "dataset.seed" in extra and str(tables.results.schema.field("dataset.seed").type) == "int64"
    rows = tables.results.to_pylist()
    assert len(rows) == 12 and tables.n_missing == 0 and tables.counts["skipped"] == 2
    for row in rows:
        assert (row["status"] == "skipped") == (row["seed"] == 3)
        assert (row["reason"] is None) == (row["status"] == "done")
        assert (row["golden_improvement"] is None) == (row["status"] != "done")
        assert row["beta"] == (0.25 if row["status"] == "done" else row["beta"]) and row["beta"] is not None
        assert row["n_annotations"] == 77 or row["status"] != "done"
    assert tables.prompts.num_rows == tables.counts["done"] and tables.costs.num_rows == 10


def test_cells_that_have_not_run_are_counted_not_shown(tmp_path):
    """Catches an invented status."""
    store = Store(tmp_path)
    store.prepare()
    tables = results.assemble(fake_plan(4).cells, store)
    assert tables.results.num_rows == 0 and tables.n_missing == 4


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
        assert file.schema_arrow.metadata[b"rmsweep.schema_version"] == b"1"
