"""The evaluate stage: complete records, references, caching, ragged banks."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_spec, random_bank

from rmsweep.bank import Bank
from rmsweep.errors import Diverged
from rmsweep.metrics.best_of_n import pick
from rmsweep.rng import streams
from rmsweep.schemas import METRICS, RECORD
from rmsweep.stages.annotate import annotate
from rmsweep.stages.evaluate import calibration_split, evaluate

SPEC = make_spec(size="tiny", beta=2.0)


class Perfect:
    """Scores a split by `function` of its golden rewards; counts how often it is asked."""

    def __init__(self, function=lambda golden: golden, history=None):
        self.function, self.history, self.asked = function, history or {}, 0

    def score(self, split):
        self.asked += 1
        with np.errstate(invalid="ignore"):
            return self.function(split.golden).astype(np.float32)

    def state(self):
        return {}


def evaluated(bank, model, cache=None, spec=SPEC):
    preferences = annotate(spec, bank, streams(0), {})
    return evaluate(spec, bank, preferences, model, {} if cache is None else cache)


@pytest.fixture(scope="module")
def ragged() -> Bank:
    rng = np.random.default_rng(0)
    found = random_bank(rng, p=40, n=6, q=25, m=9)
    sides = []
    for side in (found.train, found.test):
        golden = np.array(side.golden)
        beyond = np.arange(side.n_responses) >= rng.integers(1, side.n_responses + 1, side.n_prompts)[:, None]
        golden[beyond] = np.nan
        embedding = np.where(beyond[..., None], 0, side.embedding).astype(np.float32)
        sides.append(dataclasses.replace(side, golden=golden, embedding=embedding))
    return Bank(*sides, seed=3)


def test_record_is_complete_and_fits_the_schema(tiny_bank):
    """Every column of METRICS is there, with a type that Arrow takes; nothing else but the resolved values."""
    history = {"n_train": 80, "n_validation": 20, "epochs": 3, "best_epoch": 2, "train_loss": 0.5, "l2": None}
    result = evaluated(tiny_bank, Perfect(history=history))
    assert set(result.metrics) == {c.name for c in METRICS} | {"n_annotations", "beta"}
    schema = pa.schema([RECORD.field(name) for name in result.metrics])
    row = pa.Table.from_pylist([result.metrics], schema=schema).to_pylist()[0]
    assert row["n_train"] == 80 and row["validation_loss"] is None and row["bon_n"] == list(range(1, 21))
    assert result.golden_picked.dtype == result.scores.dtype == np.float32


def test_oracle_reaches_every_upper_bound(tiny_bank):
    """Scoring by the golden reward itself picks the best, agrees with everything, and beats the ceiling."""
    metrics = evaluated(tiny_bank, Perfect()).metrics
    golden = tiny_bank.test.golden.astype(np.float64)
    assert metrics["golden_best"] == pytest.approx(golden.max(axis=1).mean())
    assert metrics["golden_random"] == pytest.approx(golden.mean())
    assert metrics["golden_improvement"] == pytest.approx(metrics["golden_best"] - metrics["golden_random"])
    assert metrics["bon_golden"][-1] == pytest.approx(metrics["golden_best"])
    assert metrics["bon_golden"][0] == pytest.approx(metrics["golden_random"])
    assert metrics["spearman"] == pytest.approx(1) and metrics["agreement"] == metrics["agreement_cross_prompt"] == 1
    assert 0.5 < metrics["agreement_noisy"] < metrics["agreement_noisy_cross_prompt"] < 1
    assert metrics["pick_quantile"] == pytest.approx(1 - 0.5 / tiny_bank.test.n_responses)
    assert metrics["golden_random"] < metrics["golden_ceiling"] < metrics["golden_best"]


def test_ceiling_is_the_pick_by_the_banks_ceiling(tiny_bank):
    """And None where the world does not know it."""
    expected = pick(tiny_bank.test.ceiling, tiny_bank.test.golden).golden.mean()
    assert evaluated(tiny_bank, Perfect()).metrics["golden_ceiling"] == pytest.approx(expected)
    unknown = dataclasses.replace(tiny_bank, test=dataclasses.replace(tiny_bank.test, ceiling=None))
    assert evaluated(unknown, Perfect()).metrics["golden_ceiling"] is None


def test_constant_scores_are_chance(tiny_bank):
    """Catches an argmax that takes the first response of a tie: everything is one half, nothing improves."""
    metrics = evaluated(tiny_bank, Perfect(np.zeros_like)).metrics
    assert metrics["golden_improvement"] == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(metrics["bon_golden"], metrics["golden_random"])
    halves = ("agreement", "agreement_cross_prompt", "agreement_noisy", "agreement_noisy_cross_prompt")
    assert [metrics[name] for name in halves] == [0.5] * 4
    assert metrics["spearman"] == 0 and metrics["pick_quantile"] == pytest.approx(0.5)
    np.testing.assert_allclose(metrics["tilt_kl"] + metrics["tilt_kl_calibrated"], 0, atol=1e-9)


def test_only_order_counts_except_for_raw_tilt_which_calibration_restores(tiny_bank):
    """A monotone distortion leaves all but the raw tilted policy alone; recalibrated policies come back."""
    plain = evaluated(tiny_bank, Perfect()).metrics
    bent = evaluated(tiny_bank, Perfect(lambda g: np.exp(2 * g))).metrics
    same = ("bon_golden", "golden_improvement", "spearman", "agreement_noisy", "pick_quantile")
    for name in same:
        np.testing.assert_allclose(bent[name], plain[name], rtol=1e-6)
    for name in ("tilt_golden_calibrated", "tilt_kl_calibrated"):  # linear between calibration scores: not exact
        np.testing.assert_allclose(bent[name], plain[name], rtol=1e-3, atol=1e-4)
    assert np.abs(np.subtract(bent["tilt_kl"], plain["tilt_kl"])).max() > 0.1


def test_same_bits_with_a_shared_cache(tiny_bank):
    """Catches a cache that keeps something of an earlier cell (its beta, its annotator, its scores)."""
    other = make_spec(size="tiny", beta=0.5, **{"dataset.reward_scale": 2.0, "evaluate": {"n_noisy_pairs": 50}})
    cache: dict = {}
    first = evaluated(tiny_bank, Perfect(np.negative), cache)
    second = evaluated(tiny_bank, Perfect(), cache, other)
    again = evaluated(tiny_bank, Perfect(np.negative), cache)
    assert first.metrics == again.metrics == evaluated(tiny_bank, Perfect(np.negative)).metrics
    assert second.metrics == evaluated(tiny_bank, Perfect(), spec=other).metrics


def test_noisy_agreement_uses_the_cells_beta_and_the_reward_scale(tiny_bank):
    """Perfect order: E max(p, 1 - p). Rises with beta, 1 without noise, depends on beta / scale only."""

    def noisy(beta, scale=1.0):
        spec = make_spec(size="tiny", beta=beta, **{"dataset.reward_scale": scale})
        return evaluated(tiny_bank, Perfect(), spec=spec).metrics["agreement_noisy"]

    assert noisy(0.0) == 0.5 < noisy(1.0) < noisy(5.0) < noisy(float("inf")) == 1
    assert noisy(3.0, 2.0) == pytest.approx(noisy(1.5))


def test_ragged_bank_ignores_padding(ragged):
    """Whatever a model writes at padding, no metric moves; picks stay within each prompt's own responses."""
    low, high = (evaluated(ragged, Perfect(lambda g, v=v: np.nan_to_num(-g, nan=v))) for v in (-1e9, 1e9))
    assert low.metrics == high.metrics
    np.testing.assert_array_equal(low.golden_picked, np.nanmin(ragged.test.golden, axis=1))
    assert low.metrics["golden_random"] == pytest.approx(np.nanmean(ragged.test.golden, axis=1).mean())
    assert len(low.metrics["bon_n"]) == ragged.test.count.max()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_score_that_is_not_finite_is_diverged(tiny_bank, value):
    """NaN must become `diverged`, never a number; also when only a calibration score is broken."""
    with pytest.raises(Diverged):
        evaluated(tiny_bank, Perfect(lambda g: np.where(g == g.max(), value, g)))


def test_calibration_rows_are_whole_prompts_of_the_training_split(ragged, tiny_bank):
    """At least n responses, evenly spaced, all of a prompt's; the whole split where it has fewer."""
    few = calibration_split(tiny_bank.train, 95)
    assert few.golden.shape == (10, 10)
    assert few.prompt_id == [f"train-{i}" for i in range(0, 500, 50)]
    everything = calibration_split(ragged.train, 10_000)
    np.testing.assert_array_equal(everything.golden, ragged.train.golden)


def test_model_scores_the_test_split_once(tiny_bank):
    """Scoring is what evaluation costs: the test split once, the calibration rows once."""
    model = Perfect()
    evaluated(tiny_bank, model)
    assert model.asked == 2
