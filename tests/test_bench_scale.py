"""scripts/bench_scale.py: it measures what it says, at a size where that is quick."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench_scale.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_scale", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_scale"] = module
    spec.loader.exec_module(module)
    return module


def test_full_size_records(bench, tmp_path, capsys):
    """Catches a stand-in store whose cells are not those of paper/full, or tables that are not of full size."""
    import pyarrow.parquet as pq

    bench.fill(36, tmp_path)
    bench.assemble(tmp_path)
    first = json.loads(capsys.readouterr().out)
    (path,) = tmp_path.glob("sweeps/*/prompts.parquet")
    assert first["cells"] == 36 and len(pq.read_table(path)["golden_picked"][0]) == 2_292


@pytest.mark.slow
def test_quick(bench, tmp_path):
    """Every section of the script runs, on few cells, and says what it found."""
    out = tmp_path / "out.json"
    text = bench.measured([sys.executable, str(SCRIPT), "--quick", "--json", str(out)]).text
    found = json.loads(out.read_text())
    assert {s for s, _, _ in bench.BARS} < set(found)
    of_the_whole = {"driver_peak_mib", "plan_seconds", "again_seconds", "files"}  # with --real 12960 only
    assert all(found[s][f] > 0 for s, f, _ in bench.BARS if s != "real" or f not in of_the_whole)
    assert found["real"]["cells"] == found["overhead"]["cells"] == 72 and "whole_grid" in text
