"""The real command line on the real pipeline: the demo, resuming, worker counts, kills, bad input."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rmsweep import provenance, versions
from rmsweep.cli import main

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
SMALL = ["size=tiny", "reward_model=bt_mlp,clf_mlp,clf_lgb,bt_linear", "pairing=same_prompt,cross_prompt", "seed=0,1"]


def rmsweep(*words, root, check=True):
    """Run the command line as its user would; returns the finished process."""
    command = [sys.executable, "-m", "rmsweep", *words, f"root={root}"]
    result = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def here(*words, root, check=True):
    """The same command line, its work too, in this process, which has all libraries: seconds less than a new one."""
    alone = ["engine.workers=0"] if words[0] == "run" and not any("engine" in word for word in words) else []
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*words, *alone, f"root={root}"])
    assert not check or code == 0, out.getvalue() + err.getvalue()
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def tables(root, name="e2e"):
    folder = Path(root) / "sweeps" / name
    return {t: (folder / f"{t}.parquet").read_bytes() for t in ("results", "prompts")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted sweep with two workers."""
    root = tmp_path_factory.mktemp("whole")
    here("run", *SMALL, "sweep.name=e2e", "engine.workers=2", root=root)
    return root


def test_the_demo_is_one_command(tmp_path):
    """`rmsweep run`: 54 cells, a table with mean and standard error, the path of the results; again: nothing to do."""
    first = rmsweep("run", root=tmp_path)
    path = tmp_path / "sweeps" / "demo" / "results.parquet"
    assert str(path) in first.stdout and "54 done" in first.stdout and "±" in first.stdout
    table = pq.read_table(path)
    assert table.num_rows == 54 and set(table.column("status").to_pylist()) == {"done"}
    assert table.column("golden_improvement").null_count == 0
    costs = pq.read_table(path.with_name("costs.parquet"))
    assert max(costs.column("peak_memory_mib").to_pylist()) < 2048
    assert "0 computed" in here("run", root=tmp_path).stdout
    assert "54" in here("status", root=tmp_path).stdout
    counted = here("results", "--csv", "--sql", "select count(*) as n from results where beta = 3", root=tmp_path)
    assert counted.stdout.split() == ["n", "18"]


def test_one_worker_or_two_give_the_same_bytes(whole, tmp_path):
    """Bit-identical numbers whatever the worker and the unit."""
    here("run", *SMALL, "sweep.name=e2e", "engine.workers=1", root=tmp_path)
    assert tables(tmp_path) == tables(whole)


def test_a_cell_alone_equals_the_cell_in_the_sweep(whole, tmp_path):
    """Bit-identical numbers whatever runs beside it."""
    rows = {r["cell_id"]: r for r in pq.read_table(whole / "sweeps" / "e2e" / "results.parquet").to_pylist()}
    for model in ("bt_mlp", "clf_lgb"):
        words = ["size=tiny", f"reward_model={model}", "pairing=cross_prompt", "seed=1", f"sweep.name={model}"]
        here("run", *words, root=tmp_path)
        (alone,) = pq.read_table(tmp_path / "sweeps" / model / "results.parquet").to_pylist()
        assert alone == rows[alone["cell_id"]]


def test_kill_dash_nine_and_again_gives_the_same_bytes(whole, tmp_path):
    """The whole process group dies in the middle of real cells, twice; the same command continues."""
    command = [sys.executable, "-m", "rmsweep", "run", *SMALL, "sweep.name=e2e", f"root={tmp_path}"]
    for seconds in (3.0, 4.5):
        process = subprocess.Popen(command, env=ENV, start_new_session=True, stdout=-3, stderr=-3)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):  # it may have finished
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    here("run", *SMALL, "sweep.name=e2e", root=tmp_path)
    assert tables(tmp_path) == tables(whole)


def test_a_different_sweep_reuses_what_it_shares(whole):
    """Banks and cells belong to the store: half of this grid is there already."""
    out = here("run", "size=tiny", "reward_model=bt_mlp", "seed=range(4)", "sweep.name=more", root=whole).stdout
    assert "4 done" in out and "2 computed" in out


def test_keep_is_honoured_for_finished_cells(tmp_path):
    """Catches keep= that is silently ignored where the metrics are there already; again: nothing to do."""
    words = ["run", "size=tiny", "reward_model=bt_linear,clf_sklearn", "sweep.name=k"]
    here(*words, root=tmp_path)
    for keep in ("scores", "models"):
        assert "2 computed" in here(*words, f"keep={keep}", root=tmp_path).stdout
        assert "0 computed" in here(*words, f"keep={keep}", root=tmp_path).stdout
    assert "2 done; 0 computed" in here(*words, root=tmp_path).stdout
    refused = here("results", "beta=3", root=tmp_path, check=False)
    assert refused.returncode == 1 and "--sql" in refused.stderr


def test_one_cell_is_one_row_however_it_was_asked_for(tmp_path):
    """A named sweep asked for again with a default spelled out: one row, the union of its labels."""
    words = ["run", "size=tiny", "reward_model=bt_linear", "sweep.name=u"]
    here(*words, root=tmp_path)
    here(*words, "protocol.learning_rate=0.0003", root=tmp_path)
    (row,) = pq.read_table(tmp_path / "sweeps" / "u" / "results.parquet").to_pylist()
    assert row["protocol.learning_rate"] == 0.0003


def test_paper_sweeps_follow_the_dataset(tmp_path):
    """`sweep=paper/quality dataset=released_helpful` asks for the released files' own base LLMs."""
    out = here("plan", "sweep=paper/quality", "dataset=released_helpful", root=tmp_path).stdout
    assert "540 cells" in out and "does not go with" not in out


def test_plugin_adds_an_objective(tmp_path):
    """--plugin FILE.py: a ten-line loss against all others, its digest in the fingerprint."""
    plugin = tmp_path / "margin.py"
    source = '''
from dataclasses import dataclass
from typing import ClassVar
import torch
from rmsweep.component import component

@component("objective", "margin", version=1)
@dataclass(frozen=True)
class Margin:
    """Hinge."""
    pointwise: ClassVar[bool] = False
    def __call__(self, reward_a, reward_b, preference):
        return torch.relu({m} - (2 * preference - 1) * (reward_a - reward_b))
'''
    ids = set()
    for m, engine in ((1, "engine.workers=1"), (2, "engine.workers=0")):  # plug-ins are a process's for good
        plugin.write_text(source.replace("{m}", str(m)))
        words = ["size=tiny", "reward_model.objective=margin", f"sweep.name=m{m}", engine, "--plugin", str(plugin)]
        rmsweep("run", *words, root=tmp_path / "o")
        ids.add(pq.read_table(tmp_path / "o" / "sweeps" / f"m{m}" / "results.parquet").column("cell_id")[0].as_py())
    assert len(ids) == 2
    refused = here("run", "size=tiny", "reward_model.objective=margin", root=tmp_path / "p", check=False)
    assert refused.returncode == 1 and "bradley_terry" in refused.stderr


BAD = {
    "unknown option": (["reward_model=bt_mpl"], "bt_mlp"),
    "misspelt key": (["bata=1"], "beta"),
    "wrong type": (["seed=soon"], "integer"),
    "negative beta": (["beta=-1"], "greater than or equal to 0"),
    "nan beta": (["beta=nan"], "nan"),
    "path-like option": (["dataset=../../etc/passwd"], "sim_helpful"),
    "path-like name": (["sweep.name=../../x"], "letters, digits"),
    "environment": (["beta=${oc.env:HOME}"], "interpolation"),
    "code": (["+reward_model._target_=os.system"], "_target_"),
    "both": (["beta=1", "error_rate=0.2"], "error_rate"),
    "missing file": (["dataset=table", "dataset.path=/nowhere.parquet"], "/nowhere.parquet"),
    "no file": (["dataset=table"], "dataset.path"),
    "too many": (["size=tiny", "n_annotations=501"], "at most 500"),
    "too many in every cell": (["size=tiny", "n_annotations=501,600"], "at most 500"),
    "verb": ([], ""),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_message_and_nothing_runs(tmp_path, words, message):
    """Exit code 1, what is allowed, no traceback, nothing written."""
    result = here(*(["run", *words] if message else ["rnu"]), root=tmp_path / "o", check=False)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not (tmp_path / "o").exists()


def test_too_many_annotations_inside_a_grid_are_skipped(tmp_path):
    """The other cells run; the row says why."""
    here("run", "size=tiny", "reward_model=bt_linear", "n_annotations=100,501", "sweep.name=s", root=tmp_path)
    rows = pq.read_table(tmp_path / "sweeps" / "s" / "results.parquet").to_pylist()
    assert sorted(r["status"] for r in rows) == ["done", "skipped"]
    assert "at most 500" in next(r["reason"] for r in rows if r["status"] == "skipped")


def test_a_diverging_cell_is_a_result_with_null_metrics(tmp_path):
    """Exit code 2, status diverged, never a zero."""
    words = ["size=tiny", "protocol.learning_rate=1e30", "sweep.name=d"]
    assert here("run", *words, root=tmp_path, check=False).returncode == 2
    (row,) = pq.read_table(tmp_path / "sweeps" / "d" / "results.parquet").to_pylist()
    assert row["status"] == "diverged" and row["golden_improvement"] is None and row["bon_golden"] is None


def test_retry_after_a_version_was_raised(tmp_path, monkeypatch):
    """Catches results of new code under the key of old code: what failed is planned anew, not retried."""
    words = [
        "run",
        "size=tiny",
        "reward_model=bt_linear",
        "sweep.name=s",
        "engine.memory_gib=0.0001",
        "engine.workers=1",
    ]
    assert here(*words, root=tmp_path, check=False).returncode == 2
    with monkeypatch.context() as patch:
        patch.setitem(versions.STAGES, "evaluate", 99)
        told = here("retry", "engine.workers=0", root=tmp_path, check=False)
    assert told.returncode == 1 and "other versions or defaults" in told.stderr
    assert here("retry", "engine.workers=0", root=tmp_path).returncode == 0


def test_code_that_changes_under_a_run(tmp_path, monkeypatch):
    """Catches a worker that starts late, imports edited code and stores its numbers under the plan's key."""
    real, words = provenance.code_of, ["run", "size=tiny", "reward_model=bt_linear", "sweep.name=s"]
    with monkeypatch.context() as patch:  # of this process, the driver: it plans with other code than the worker finds
        patch.setattr(provenance, "code_of", lambda spec: real(spec) | {"train": "older"})
        told = here(*words, "engine.workers=1", root=tmp_path, check=False)
    assert told.returncode == 1 and "code of train has changed" in told.stderr, told.stderr
    assert here(*words, root=tmp_path).returncode == 0


@pytest.mark.slow
def test_real_responses(shared, tmp_path):
    """AlpacaEval 2 outputs with a judge's scores: bt_linear ranks them, clearly better than length does (README)."""
    file = shared / "data" / "alpaca_eval2_golden.parquet"
    words = ["sweep=examples/alpaca_eval", f"dataset.path={file}", "reward_model=bt_linear,length"]
    rmsweep("run", *words, "dataset.split_seed=0,1", root=tmp_path)
    table = pq.read_table(tmp_path / "sweeps" / "alpaca_eval" / "results.parquet").to_pandas()
    spearman = table.groupby("reward_model").spearman.mean()
    assert spearman["bt_linear"] >= 0.58 and spearman["bt_linear"] >= spearman["length"] + 0.04
