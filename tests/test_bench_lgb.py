"""scripts/bench_lgb.py: it runs, pairs the presets by seed and reports what a cell gives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench_lgb.py"


def test_it_runs_and_pairs_by_seed(tmp_path):
    """Catches a summary of the wrong rows: differences are those of the cells, seed by seed."""
    words = ["--n", "120", "--D", "8", "--Q", "12", "--M", "6", "--seeds", "2", "--rounds", "3"]
    out = tmp_path / "lgb.json"
    command = [sys.executable, str(SCRIPT), *words, "--bank-dir", str(tmp_path), "--json", str(out)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "n_annotations 120, 2 seeds" in text
    found = json.loads(out.read_text())["120"]
    rows = {(r["model"], r["seed"]): r for r in found["cells"]}
    assert set(rows) == {(m, s) for m in ("clf_lgb", "clf_lgb_fast") for s in (0, 1)}
    (spearman,) = [r for r in found["summary"] if r["what"] == "spearman"]
    expected = sum(rows["clf_lgb_fast", s]["spearman"] - rows["clf_lgb", s]["spearman"] for s in (0, 1)) / 2
    assert spearman["difference"] == pytest.approx(expected)
