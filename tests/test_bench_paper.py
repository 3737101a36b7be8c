"""scripts/bench_paper.py: the sample, the extrapolation against its formula, and a run at size=tiny."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from rmsweep.store import Store

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench_paper.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_paper", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plan, grids = module.whole_grid, {}  # 12,960 cells, planned once per protocol

    def whole_grid(args):
        return grids[args.protocol] if args.protocol in grids else grids.setdefault(args.protocol, plan(args))

    module.whole_grid, module.N_HALVES = whole_grid, 2
    return module


def run(bench, root, *words):
    """Exit code and report of the script at size=tiny, in this process."""
    file = root / "report.json"
    code = bench.main(["--root", str(root / "out"), "--quick", "--workers", "0", "--json", str(file), *words])
    return code, json.loads(file.read_text())


def test_a_sample_grows_and_nothing_runs_twice(bench, tmp_path, capsys):
    """Catches a larger sample that is another one, cells computed again, and rows that lose a stratum."""
    code, first = run(bench, tmp_path, "--cells", "12")
    assert code == 0 and first["sampled"] == 12 and first["covered"] == first["cells"] == 12_960
    assert [r["sampled"] for r in first["strata"]] == [1] * 12 and {r["cells"] for r in first["strata"]} == {1080}
    assert {r["n_annotations"] for r in first["strata"]} == {62, 125, 250, 500}
    text = capsys.readouterr().out
    assert "about 6,000 core-hours reported" in text and "whole grid" in text and "cost model" in text
    costs = tmp_path / "out" / "store" / "costs"
    before = {p.name for p in costs.iterdir()}
    code, second = run(bench, tmp_path, "--cells", "15")
    assert code == 0 and second["sampled"] == 15 and before <= {p.name for p in costs.iterdir()}
    means = {(r["reward_model"], r["n_annotations"]): r for r in first["strata"]}
    for row in second["strata"]:
        if row["sampled"] == 1:  # the cell that was there before, not another one
            assert row["seconds"] == means[row["reward_model"], row["n_annotations"]]["seconds"]
    ledger = json.loads(next((tmp_path / "out" / "sweeps").glob("*/bench_paper.json")).read_text())
    assert ledger["overhead_cells"] == 15 and ledger["banks"] == 1


def test_the_report_adds_up(bench, tmp_path, monkeypatch):
    """Catches a total that is not the sum of its parts."""
    monkeypatch.setattr(bench, "N_HALVES", 40)
    _, report = run(bench, tmp_path, "--cells", "24", "--protocol", "released")
    rows, total = report["strata"], report["total_hours"]
    stages = sum(r["cells"] * r["seconds"] for r in rows) / 3600
    assert report["stage_hours"]["hours"] == pytest.approx(stages) == sum(report["stages"].values())
    assert total["hours"] == pytest.approx(stages + report["overhead_hours"] + report["bank_hours"])
    assert sum(m["hours"] for m in report["by_model"].values()) == pytest.approx(stages)
    found = report["cost_model"]
    assert found["halves"] == 40 and 0 <= found["coverage"] <= 1 and found["whole_grid"]["n_covered"] == 12_960
    assert found["whole_grid"]["hours"] == pytest.approx(stages, rel=0.5)


def test_the_stratified_interval(bench):
    """Catches standard errors that forget weights, finite strata or degrees of freedom: coverage by simulation."""
    rng = np.random.default_rng(0)
    population = {("m", n): rng.gamma(20.0, n / 20, 1080) for n in (5, 10, 20, 40)}
    true = sum(values.sum() for values in population.values()) / 3600
    hits, estimates = 0, []
    for _ in range(400):
        strata = {
            key: bench.Measured(len(values), rng.choice(values, 3, replace=False)[:, None] * [0.1, 0.5, 0.4])
            for key, values in population.items()
        }
        found = bench.stratified(strata)
        hits += found["low"] <= true <= found["high"]
        estimates.append((found["hours"], found["se"]))
    hours, errors = np.array(estimates).T
    assert 0.86 < hits / 400 < 0.95 and np.mean(hours) == pytest.approx(true, rel=0.01)
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(np.std(hours), rel=0.1)
    whole = {key: bench.Measured(len(v), v[:, None] * [0.1, 0.5, 0.4]) for key, v in population.items()}
    assert bench.stratified(whole)["se"] == pytest.approx(0, abs=1e-9) and bench.stratified(whole)[
        "hours"
    ] == pytest.approx(true)


def test_a_stratum_with_one_cell_borrows_the_others_spread(bench):
    """Catches an interval of width zero out of single cells."""
    strata = {("m", 5): bench.Measured(1080, np.array([[1.0, 0, 0], [1.5, 0, 0]])), ("m", 10): bench.Measured(
        1080, np.array([[2.0, 0, 0]])
    )}  # fmt: skip
    variances = bench.variances(strata)
    relative = np.var([0.8, 1.2], ddof=1)
    assert variances["m", 10] == (pytest.approx(relative * 4), 1) and variances["m", 5][0] == pytest.approx(0.125)


def test_what_failed_is_not_extrapolated(bench, tmp_path, capsys, monkeypatch):
    """Catches a total for 12,960 cells in which a reward model that always fails costs nothing."""

    def refuse(self, *args):
        raise RuntimeError("no such network")

    monkeypatch.setattr("rmsweep.reward_models.lgb.LGB.fit", refuse)
    code, report = run(bench, tmp_path, "--cells", "12")
    text = capsys.readouterr().out
    assert code == 2 and report["covered"] == 8640 and sum(report["failures"].values()) == 4
    assert "only 8,640 of 12,960 cells" in text and "no such network" in text
    states = Store(tmp_path / "out").folder
    monkeypatch.undo()
    assert states.is_dir() and run(bench, tmp_path, "--cells", "12")[1]["covered"] == 12_960  # tried again
