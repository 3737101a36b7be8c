"""scripts/bench_reference.py: it runs and says all it should, and its baseline measures what rmsweep measures."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_bank

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import _bench
import bench_reference
import reference_baseline
from reference_baseline import Baseline, annotate_loop, best_of_n, both_orders, mean_spearman, single_rows

from rmsweep.metrics import best_of_n as ours
from rmsweep.metrics import rank
from rmsweep.objectives.bradley_terry import BradleyTerry
from rmsweep.objectives.classification import Classification

POINT = bench_reference.Point(60, 1.0, 0)
pytestmark = pytest.mark.filterwarnings("ignore:Creating a tensor from a list")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick timing run: its JSON and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    words = ["--quick", "--repeats", "1", "--bank-dir", str(folder), "--json", str(folder / "out.json")]
    assert bench_reference.main(words) == 0
    return json.loads((folder / "out.json").read_text()), folder


@pytest.fixture(scope="module")
def trained():
    """A bank, preferences of a cell on it, and the args that made them."""
    args = bench_reference.parse(["--quick"])
    bank = random_bank(np.random.default_rng(0), p=80, n=10, q=9, m=30, d=6)
    return bank, bench_reference.released_preferences(args, bank, POINT)


def test_quick_timing_has_every_part(quick):
    """Catches a variant, stage or field that went missing, and a baseline or rmsweep that no longer runs."""
    found, _ = quick
    variants = {row["variant"] for row in found["summary"]}
    wanted = {v.name for v in bench_reference.VARIANTS if not v.missing}
    assert variants == wanted | {"bt baseline", "clf baseline", "lgb baseline"}
    for row in found["summary"]:
        for stage in ("prepare", "train", "evaluate", "cell"):
            assert row[f"{stage}_cpu"] >= 0 and row[f"{stage}_wall"] > 0 and row[f"{stage}_ratio"] > 0
        assert np.isfinite([row["bon"], row["spearman"]]).all()
        assert ("cell_ratio_equal_epochs" in row) == (row["protocol"] == "released")
        assert row["side"] == "baseline" or row["objective"] == "lgb" or row["train_tflops"] > 0
    assert set(found) >= {"options", "machine", "peak_tflops", "cells", "lgb_sweeps", "best_of_n", "bars"}
    assert found["best_of_n"]["equal_at_m"] and found["peak_tflops"]["fp32"] > 0
    assert len(found["bars"]) >= 10 and not any(bar["verdict"] in ("met", "NOT MET") for bar in found["bars"][:-1])


def test_quick_parity_has_every_part(quick, capsys):
    """Catches a parity table without a metric, a side, an interval or its margin; it reuses the bank."""
    _, folder = quick
    banks, out = sorted(p.name for p in folder.iterdir() if p.is_dir()), folder / "parity.json"
    words = ["--quick", "--parity", "--seeds", "3", "--only", "bt", "--beta", "5", "--bank-dir", str(folder)]
    assert bench_reference.main([*words, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["parity"]
    assert {row["metric"] for row in rows} == {"bon", "spearman"}
    assert all(row["low"] <= row["difference"] <= row["high"] and row["margin"] > 0 for row in rows)
    assert any(row["test"] == "paired" for row in rows) == _bench.has_bf16()
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == banks
    assert "margin" in capsys.readouterr().out


def test_epochs_are_equal_where_asked(trained):
    """Catches an early stop under --epochs, which would make the ratio one of epochs, not of speed."""
    args, bank = bench_reference.parse(["--quick", "--epochs", "7"]), trained[0]
    for objective in ("bt", "clf"):
        assert bench_reference.run_baseline(args, bank, objective, POINT)["epochs"] == 7
    for variant in bench_reference.VARIANTS[:2]:
        assert bench_reference.run_ours(args, bank, variant, POINT, {}, "fp32")["epochs"] == 7


def test_best_of_n_agrees_with_the_exact_one():
    """Equal at N=M; within sampling noise elsewhere. Catches a pick by the worst score, a biased subset."""
    chance = np.random.default_rng(3)
    score = chance.standard_normal((300, 40))
    golden = score + chance.standard_normal((300, 40))
    sampled, exact = best_of_n(score, golden, (2, 10, 40)), ours.best_of_n(score, golden)
    assert sampled[40] == pytest.approx(exact[39], abs=1e-12)
    assert [sampled[2], sampled[10]] == pytest.approx([exact[1], exact[9]], abs=0.05)


def test_spearman_and_quantile_agree_with_ours():
    """Catches a different correlation or a quantile of something else than the pick."""
    chance = np.random.default_rng(4)
    score, golden = chance.standard_normal((2, 50, 20))
    assert mean_spearman(score, golden) == pytest.approx(rank.spearman(score, golden), abs=1e-12)
    by_rank = ours.pick(score, golden).quantile.mean() - 0.5 / 20  # ours is the middle of the rank
    assert reference_baseline.mean_quantile(score, golden) == pytest.approx(by_rank, abs=1e-12)


def test_losses_agree_with_our_objectives(trained):
    """The mean loss over all examples is the objective's mean over comparisons. Catches a swapped side or target."""
    bank, preferences = trained
    rows = reference_baseline.training_rows(bank.train, preferences)
    torch.manual_seed(0)
    network = torch.nn.Linear(6, 1)
    reward_a, reward_b = (
        network(torch.tensor(bank.train.gather(r))).squeeze(-1)
        for r in (preferences.comparisons.rows_a(bank.train), preferences.comparisons.rows_b(bank.train))
    )
    label = torch.tensor(preferences.preference)
    cases = ((both_orders(rows, 0), BradleyTerry()), (single_rows(rows, 0, as_numpy=False), Classification()))
    for copies, objective in cases:
        sides = [
            torch.nn.BCELoss(reduction="sum")(reference_baseline.probability(network, side.x), side.y)
            for side in copies
        ]
        mean = sum(sides) / sum(len(side) for side in copies)
        assert mean.item() == pytest.approx(objective(reward_a, reward_b, label).mean().item(), abs=1e-6)


def test_copies_split_after_mirroring(trained):
    """2n examples, 80 % of them for training, most validation pairs mirrored in training: the published leak."""
    bank, preferences = trained
    split = both_orders(reference_baseline.training_rows(bank.train, preferences), 0)
    assert (len(split.train), len(split.validation)) == (96, 24)
    seen = {(a.numpy().tobytes(), b.numpy().tobytes()) for a, b in zip(*split.train.x, strict=True)}
    mirrored = [(b.numpy().tobytes(), a.numpy().tobytes()) in seen for a, b in zip(*split.validation.x, strict=True)]
    assert np.mean(mirrored) > 0.5


@pytest.mark.parametrize("pairing", ["cross_prompt", "same_prompt"])
def test_annotation_loop_labels_by_the_golden_reward(pairing):
    """Catches a label of the wrong side, and prompts beyond the first n."""
    golden = np.random.default_rng(0).standard_normal((50, 10))
    loop = annotate_loop(golden, 40, 100.0, pairing, np.random.RandomState(0))
    assert len(loop) == 40 and [a[0] for a, _, _ in loop] == list(range(40))
    assert all(b[0] < 40 for _, b, _ in loop)
    assert all(b_wins == (golden[b] > golden[a]) for a, b, b_wins in loop if abs(golden[a] - golden[b]) > 0.2)
    assert (pairing == "same_prompt") == all(a[0] == b[0] for a, b, _ in loop)


def test_baseline_stops_when_worse_than_each_of_the_last_three():
    """Catches stopping against the best epoch, and an epoch too early or late."""
    assert not reference_baseline.stops([1, 2, 3], 3)
    assert reference_baseline.stops([1, 2, 3, 4], 3)
    assert not reference_baseline.stops([1, 5, 3, 4], 3)
    assert reference_baseline.stops([0, 9, 1, 2, 3, 4], 3)  # neither the best nor the worst before them matters


def test_baseline_learns(trained):
    """Catches labels or examples that carry no signal: with perfect labels of a linear reward it ranks well."""
    chance = np.random.default_rng(5)
    bank = random_bank(chance, p=400, n=10, q=20, m=30, d=6)
    for split in (bank.train, bank.test):
        np.copyto(split.golden, split.embedding @ np.arange(1, 7, dtype=np.float32))
    args = bench_reference.parse(["--quick"])
    preferences = bench_reference.released_preferences(args, bank, bench_reference.Point(400, np.inf, 0))
    for objective in ("bt", "clf", "lgb"):
        cell = Baseline(objective, beta=10.0, hidden=(32, 16), rounds=30, epochs=60, bon_n=(30,), bon_repeats=1)
        outcome = cell.run(bank, preferences, _bench.Clock())
        assert outcome.spearman > 0.6, objective


def test_equivalence_of_equal_and_of_shifted_samples():
    """Catches a test that confirms what is two margins apart, denies what is equal, or has its sides swapped."""
    chance = np.random.default_rng(6)
    x, y = chance.standard_normal((2, 200))
    assert _bench.tost(x, y, margin=0.5).equivalent
    assert not _bench.tost(x + 1.0, y, margin=0.5).equivalent and not _bench.tost(x - 1.0, y, margin=0.5).equivalent
    noisy = _bench.tost(x[:5], y[:5], margin=0.1)
    assert not noisy.equivalent and noisy.low < noisy.difference < noisy.high
    assert _bench.tost(x, x + 0.01, margin=0.02, paired=True).equivalent
    assert not _bench.tost(x, x + 0.03, margin=0.02, paired=True).equivalent


def test_equivalence_errs_at_its_level():
    """At a shift of exactly one margin it says equivalent in about 5 % of the cases: the size of the test."""
    chance = np.random.default_rng(7)
    said = [_bench.tost(*(chance.standard_normal(20) + s for s in (0, 2)), margin=2.0).equivalent for _ in range(2000)]
    assert np.mean(said) == pytest.approx(0.05, abs=0.015)


def test_clock_charges_inner_stages_once():
    """Catches seconds that are counted in two stages, or charged to nobody."""
    clock, ticks = _bench.Clock(), iter(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_bench.time, "perf_counter", lambda: next(ticks))
        with clock("outer"), clock("inner"), clock(None):
            pass
    assert clock.wall == {"outer": 2, "inner": 2}
