"""The named ordinal sweeps: each plans as it says, and the papers' one runs on small files and a tiny frozen model."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rmsweep.cli import main
from rmsweep.grid import describe
from rmsweep.planner import make
from rmsweep.presets import Presets

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "study_ordinal.py"
HEURISTICS = {"bt_margin_mlp", "bt_scaled_mlp", "bt_soft_mlp"}


def plan(name):
    presets = Presets()
    return make(describe(presets.node("sweep", name)), presets)


def labels(cells, *names):
    return {tuple(c.labels.get(n) for n in names) for c in cells}


def test_main_pairs_objectives_over_twenty_banks():
    """Catches objectives that are compared on different banks, and replicates that share one."""
    cells = plan("ordinal/main").cells
    models = {c.labels["reward_model"] for c in cells}
    assert HEURISTICS | {"bt_mlp", "ord_nll_mlp", "ord_nll_asym_mlp", "ord_at_mlp", "ord_nll_linear"} <= models
    assert len(cells) == 2 * len(models) * 3 * 20 and all(c.reason is None for c in cells)
    assert labels(cells, "seed", "dataset.seed") == {(i, i) for i in range(20)}
    for model in models:
        banks = {(c.labels["seed"], c.bank_id) for c in cells if c.labels["reward_model"] == model}
        assert len(banks) == 20 == len({bank for _, bank in banks})


def test_noise_asks_for_a_direction_where_there_is_one():
    """Catches a direction given to annotators without one, which would repeat their cells."""
    cells = plan("ordinal/noise").cells
    assert all(c.reason is None for c in cells) and len({c.cell_id for c in cells}) == len(cells)
    kinds = {(c.labels["annotator"], c.labels.get("annotator.direction")) for c in cells}
    assert {d for a, d in kinds if a == "level_shift"} == {"up", "stronger"} and len(kinds) == 3


def test_levels_and_budget():
    """Catches levels without a binary end, and a budget in which the graded labels are not the fewest."""
    assert labels(plan("ordinal/levels").cells, "annotator.levels") == {(k,) for k in (1, 2, 3, 5, 10)}
    cells = plan("ordinal/budget").cells
    assert all(c.reason is None for c in cells)
    quantity = labels(cells, "annotator", "reward_model", "n_annotations")
    assert quantity == {("likert", "ord_nll_mlp", 2000), *(("bradley_terry", "bt_mlp", 2000 * k) for k in range(1, 5))}


def write_pairs(folder):
    """HelpSteer2's layout with seven strengths, RewardBench's and RM-Bench's: preferred responses say `good`."""
    rng = np.random.default_rng(0)

    def word(n):
        return " ".join(rng.choice(["tea", "sky", "ink", "oak"], size=6)) + " good" * n

    rows = []
    for i in range(70):
        z = int(rng.integers(-3, 4))
        sides = [word(4 + z) if s else word(4 - z) for s in (0, 1)]
        row = {"prompt": f"question {i}", "response_1": sides[0], "response_2": sides[1], "preference_strength": z}
        rows.append({**row, "split": "train" if i < 50 else "validation"})
    (folder / "helpsteer.jsonl").write_text("\n".join(map(json.dumps, rows)))
    bench = [
        {"prompt": f"bench {i}", "chosen": word(8), "rejected": word(0), "subset": subset, "id": i}
        for i, subset in enumerate(["alpacaeval-easy", "llmbar-natural", "donotanswer", "hep-python"] * 3)
    ]
    pd.DataFrame(bench).to_parquet(folder / "reward-bench.parquet")
    rm = [
        {"id": str(i), "prompt": f"rm {i}", "domain": domain, "chosen": [word(7)] * 3, "rejected": [word(0)] * 3}
        for i, domain in enumerate(["chat", "code", "math", "safety-refuse", "safety-response"])
    ]
    (folder / "rm-bench.json").write_text(json.dumps(rm))


def test_the_papers_sweep_runs_on_files_here(tmp_path, capsys):
    """End to end: frozen backbone, recorded strengths, lambda grid only where there are thresholds, two test sets."""
    pytest.importorskip("transformers", reason="needs transformers: pip install 'transformers>=5.3,<6'")
    from test_transformer_embedder import save_model

    model = tmp_path / "model"
    save_model(model)
    write_pairs(tmp_path)
    words = [
        "run", "sweep=ordinal/paper", f"root={tmp_path / 'out'}", "sweep.name=paper", "engine.workers=0", "seed=0",
        "dataset=helpsteer2", f"dataset.path={tmp_path / 'helpsteer.jsonl'}", f"embedder.model={model}",
        "embedder.pooling=mean",
        f"evaluate.preferences=[{tmp_path / 'reward-bench.parquet'},{tmp_path / 'rm-bench.json'}]",
        "reward_model=bt_linear,bt_margin_linear,ord_nll_linear", "reward_model.objective.l2=0.0,0.01",
    ]  # fmt: skip
    assert main(words) == 0, capsys.readouterr().err
    table = pd.read_parquet(tmp_path / "out" / "sweeps" / "paper" / "results.parquet")
    assert table["status"].eq("done").all() and len(table) == 4
    assert set(table.loc[table["reward_model"] == "ord_nll_linear", "reward_model.objective.l2"]) == {0.0, 0.01}
    row = table[table["reward_model"] == "ord_nll_linear"].iloc[0]
    assert list(row["preference_set"]) == ["test", "reward_bench", "rm_bench"]
    accuracy = dict(zip(row["preference_set"], row["preference_accuracy"], strict=True))
    assert accuracy["reward_bench"] > 0.8 and accuracy["rm_bench"] > 0.8 and accuracy["test"] > 0.6
    assert {c for c in row["preference_category"] if c.startswith("reward_bench/")} == {
        f"reward_bench/{name}" for name in ("chat", "chat_hard", "safety", "reasoning")
    }
    assert len(row["thresholds"]) == 6 and row["thresholds_source"] == "learned" and row["thresholds_true"] is None


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study_ordinal", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_axis_that_is_not_named_ends_the_study(study):
    """Catches cells of other settings counted as replicates: the intervals would be far too narrow."""
    table = pd.DataFrame({"seed": [0, 0, 1, 1], "beta": 1.0, "l2": [0.1, 0.2] * 2, "compared": "ord_nll_mlp"})
    with pytest.raises(SystemExit, match="several cells for one replicate"):
        study.check_replicates(table, ["beta"])
    study.check_replicates(table, ["beta", "l2"])
    assert study.names_of(pd.DataFrame({"a": ["x", "y"], "l2": [0.1, None]}), ["a", "l2"]) == ["x 0.1", "y"]
    with pytest.raises(SystemExit, match="--reference is one of ord_nll_mlp"):
        study.compare(table.assign(spearman=1.0), "spearman", ["beta", "l2"], "bt_mlp", "compared")


def test_differences_are_paired_by_replicate(study):
    """By hand: differences 1, 2, 3 give 2 +- 4.303 x 1 / sqrt(3); an order of rows that differs must not matter."""
    values, base = pd.Series([4.0, 3.0, 2.0], index=[2, 1, 0]), pd.Series([1.0, 1.0, 1.0], index=[0, 1, 2])
    found = study.difference(values, base)
    assert found.mean == pytest.approx(2) and found.half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert found.n == 3 and found.verdict == "ties"
    assert (
        study.difference(values + 9, base).verdict == "wins" and study.difference(values - 9, base).verdict == "loses"
    )


def test_the_study_prints_a_row_per_model(study, capsys, tmp_path, monkeypatch):
    """Catches a head whose reference is another head's, or levels of an axis pooled."""
    rows = [
        {"status": "done", "annotator": "likert", "beta": b, "reward_model": m, "seed": s, "spearman": v + 0.01 * s}
        for b in (0.5, 1.0)
        for m, v in (("bt_mlp", 0.4), ("ord_nll_mlp", 0.5), ("bt_linear", 0.7))
        for s in range(3)
    ]
    monkeypatch.setattr(study.rmsweep, "load", lambda path: pd.DataFrame(rows))
    monkeypatch.setattr("sys.argv", ["study", "x", "--metrics", "spearman"])
    study.main()
    text = capsys.readouterr().out
    assert "| ord_nll_mlp | **+0.100** ± 0.000 | **+0.100** ± 0.000 |" in text
    assert "| bt_mlp | 0.410 | 0.410 |" in text and "| bt_linear | 0.710 | 0.710 |" in text
