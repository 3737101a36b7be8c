"""Running a plan: units, workers, failures, resuming, tables."""

import json
import random

import pyarrow.parquet as pq
import pytest
from fake_work import DIE, DIE_ONCE, DIVERGE, FAIL, SKIP
from running import digests, fake_plan, planned, run

from rmsweep import results, status
from rmsweep.errors import ConfigError
from rmsweep.plan import Plan
from rmsweep.reward_models import Compute
from rmsweep.store import Store
from rmsweep.units import MAX_CELLS, split


def rows(summary):
    return {r["seed"]: r for r in pq.read_table(summary.results).to_pylist()}


def test_units_share_a_bank_and_cover_every_cell_once():
    """Catches a unit over two banks, a lost cell, a cell computed twice, units too large for a kill to be cheap."""
    cells = fake_plan(200).cells
    units = split([*cells, *cells], n_workers=2)
    assert sorted(c.fingerprint for u in units for c in u.cells) == sorted({c.fingerprint for c in cells})
    assert all(len({c.bank_id for c in u.cells}) == 1 and len(u.cells) <= MAX_CELLS for u in units)
    assert len(units) >= 8 and len({u.unit_id for u in units}) == len(units)


def test_one_row_per_cell_and_nothing_is_computed_twice(tmp_path):
    """The main job, and the no-op of running it again."""
    plan = fake_plan(5)
    first, second = run(plan, tmp_path), run(plan, tmp_path)
    assert (first.n_computed, second.n_computed) == (10, 0) and first.counts == second.counts
    table = pq.read_table(first.results)
    assert table.num_rows == 10 and set(table.column("status").to_pylist()) == {"done"}
    assert table.column("spearman").null_count == 10  # NaN is null, never a number
    assert results.last_sweep(tmp_path) == "fake"


def test_workers_units_and_order_do_not_change_a_byte(tmp_path):
    """The tables are a pure function of the plan: 0, 1 or 2 workers, shuffled cells, another history."""
    plan = fake_plan(8)
    shuffled = Plan("fake", random.Random(0).sample(plan.cells, len(plan.cells)), Compute())
    run(plan, tmp_path / "a")
    run(plan, tmp_path / "b", workers=1)
    run(shuffled, tmp_path / "c", workers=2)
    run(Plan("other", plan.cells[3:9], Compute()), tmp_path / "d")
    run(plan, tmp_path / "d", workers=2)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") == digests(tmp_path / "c") == digests(tmp_path / "d")


def test_another_sweep_reuses_what_it_shares(tmp_path):
    """Cells and banks belong to the store, not to a sweep."""
    run(fake_plan(4, name="one"), tmp_path)
    assert run(fake_plan(6, name="two"), tmp_path).n_computed == 4


def test_a_failing_and_a_diverging_cell_are_results(tmp_path):
    """The others go on; the cause is in the table, the traceback in costs and in the unit's log."""
    plan = fake_plan([0, FAIL, DIVERGE, SKIP, 1], llms=("sim_2b",))
    summary = run(plan, tmp_path)
    table = rows(summary)
    assert summary.counts == {"done": 2, "failed": 1, "diverged": 1, "skipped": 1}
    assert table[FAIL]["reason"] == "ValueError: this cell always fails" and table[FAIL]["golden_improvement"] is None
    assert table[DIVERGE]["status"] == "diverged" and table[DIVERGE]["golden_improvement"] is None
    costs = pq.read_table(summary.results.with_name("costs.parquet")).to_pylist()
    traceback = next(c["traceback"] for c in costs if c["traceback"])
    assert "in run" in traceback and "always fails" in traceback
    assert any("always fails" in log.read_text() for log in (tmp_path / "sweeps" / "fake" / "logs").iterdir())
    assert run(plan, tmp_path).n_computed == 0  # a failure is recorded, not tried again unasked


def test_retry_runs_failed_cells_again_and_counts_attempts(tmp_path):
    """Only what is asked for, and the last attempt's cost stays."""
    plan = fake_plan([0, FAIL], llms=("sim_2b",))
    run(plan, tmp_path)
    failed = frozenset(c.fingerprint for c in plan.cells if c.labels["seed"] == FAIL)
    summary = run(plan, tmp_path, retry=failed)
    assert summary.n_computed == 1
    costs = {c["fingerprint"]: c for c in pq.read_table(summary.results.with_name("costs.parquet")).to_pylist()}
    assert costs[next(iter(failed))]["attempt"] == 2


def test_a_worker_killed_once_is_replaced(tmp_path, monkeypatch):
    """Its unit goes on where the store says; no cell is lost, none is done twice."""
    monkeypatch.setenv("FAKE_MARKER", str(tmp_path / "died"))
    summary = run(fake_plan([0, 1, DIE_ONCE, 2, 3], llms=("sim_2b",)), tmp_path, workers=1)
    assert summary.counts["done"] == 5 and (tmp_path / "died").exists()


def test_a_cell_that_kills_its_worker_fails_alone(tmp_path):
    """Twice in flight when the worker died: recorded as failed with the cause; the pool and the others go on."""
    summary = run(fake_plan([0, 1, DIE, 2, 3]), tmp_path, workers=2)
    assert (summary.counts["done"], summary.counts["failed"]) == (8, 2)
    assert "killed by signal 9 twice" in rows(summary)[DIE]["reason"]


def test_skipped_cells_are_rows_with_their_reason(tmp_path):
    """Never run, never missing from the table."""
    plan = Plan("fake", [planned(0), planned(1, reason="excluded by hand")], Compute())
    summary = run(plan, tmp_path)
    assert rows(summary)[1]["status"] == "skipped" and rows(summary)[1]["reason"] == "excluded by hand"
    assert summary.n_computed == 1


def test_kept_scores_are_stored_per_part(tmp_path):
    """keep=scores: one safetensors file per part, keyed by fingerprint."""
    from safetensors.numpy import load_file

    plan = fake_plan(3, llms=("sim_2b",), keep="scores")
    run(plan, tmp_path)
    found = {}
    for file in (tmp_path / "store" / "kept").iterdir():
        found |= load_file(file)
    assert set(found) == {f"{c.fingerprint}/scores" for c in plan.cells}


def test_status_counts_states_and_axes(tmp_path):
    """Before, while and after: truth is the store."""
    plan = fake_plan([0, FAIL], name="fake")
    run(Plan("fake", plan.cells[:2], Compute()), tmp_path)
    plan.write(tmp_path / "sweeps" / "fake")
    summary = json.loads(json.dumps(status.summarise(tmp_path, "fake")))
    assert {k: n for k, n in summary["counts"].items() if n} == {"done": 1, "failed": 1, "pending": 2}
    assert summary["axes"]["base_llm"]["sim_7b"]["pending"] == 2
    assert [(f["reason"], f["count"]) for f in summary["failures"]] == [("ValueError: this cell always fails", 1)]
    text = status.render(summary)
    assert "2 pending" in text and "this cell always fails" in text


def test_sql_reads_the_tables_and_nothing_else(tmp_path):
    """A query can neither read files nor write them."""
    summary = run(fake_plan(3), tmp_path)
    folder = summary.results.parent
    frame = results.query(
        folder, "select count(*) as n, avg(r.golden_improvement) as g from results r join prompts using (cell_id)"
    )
    assert frame.n[0] == 6
    for sql in (
        f"copy results to '{tmp_path}/x.csv'",
        "select * from read_csv('/etc/passwd')",
        "selct 1",
        "select nope from results",
    ):
        with pytest.raises(ConfigError, match="--sql"):
            results.query(folder, sql)
    assert not (tmp_path / "x.csv").exists()


def test_every_column_is_documented(tmp_path):
    """`results --schema` and the file agree."""
    summary = run(fake_plan(2), tmp_path)
    text = results.schema_text()
    for table in results.TABLES:
        for name in pq.read_table(summary.results.with_name(f"{table}.parquet")).column_names:
            assert f"  {name} " in text, name


def test_pages_carry_checksums(tmp_path):
    """A flipped bit in results.parquet is found when it is read."""
    summary = run(fake_plan(2), tmp_path)
    pq.read_table(summary.results, page_checksum_verification=True)
    assert Store(tmp_path).done([]) == {}
