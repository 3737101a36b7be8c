"""The simulated world against its formulas."""

import numpy as np
import pytest
from conftest import make_bank, make_spec

from rmsweep.annotators import Seen
from rmsweep.datasets.simulated import GoldenReward
from rmsweep.rng import stream, streams
from rmsweep.stages.annotate import annotate, reference_pairs, solve_beta

BETAS = (0.5, 0.7, 1.0, 3.0, 5.0, 10.0)
LLMS = ("sim_2b", "sim_7b", "sim_8b", "sim_2b_sft", "sim_7b_sft", "sim_8b_sft")


def test_closed_form_variance_equals_monte_carlo():
    """Catches a wrong sign or factor in the covariance of the waves, on which the scale of every bank rests."""
    reward = GoldenReward.draw(make_spec().dataset)
    z = stream(0, "test").standard_normal((400_000, len(reward.linear)))
    for v in (0.3, 1.0):
        assert reward.variance(v) == pytest.approx(reward(np.sqrt(v) * z).var(), rel=0.02)


def test_smoothed_is_the_conditional_expectation():
    """Catches a wrong decay of the waves: the ceiling would not be E[golden | embedding]."""
    reward = GoldenReward.draw(make_spec().dataset)
    m = stream(1, "test").standard_normal(len(reward.linear))
    noise = stream(2, "test").standard_normal((400_000, len(reward.linear)))
    brute = reward(m + np.sqrt(0.4) * noise).mean()
    assert reward.smoothed(0.4)(m[None])[0] == pytest.approx(brute, abs=0.01)


def test_same_prompt_difference_has_the_stated_sd(tmp_path):
    """Catches a golden reward whose unit is not what the papers' betas expect."""
    bank = make_bank(make_spec(size="demo"), tmp_path)
    assert reference_pairs(bank.train)[0].golden_difference(bank.train).std() == pytest.approx(1.3, rel=0.05)


@pytest.mark.parametrize("llm", ["sim_2b", "sim_8b_sft"])
def test_ceiling_is_the_conditional_expectation(tmp_path, llm):
    """Catches a biased ceiling (a prior without skill or diversity): golden on it has slope one and intercept zero."""
    bank = make_bank(make_spec(size="demo", base_llm=llm, **{"size.Q": 1000}), tmp_path)
    slope, intercept = np.polyfit(bank.test.ceiling.ravel().astype(float), bank.test.golden.ravel().astype(float), 1)
    assert slope == pytest.approx(1, abs=0.012) and intercept == pytest.approx(0, abs=0.015)


def test_without_observation_noise_the_ceiling_is_the_golden_reward(tmp_path):
    """Catches noise that enters the posterior although there is none."""
    bank = make_bank(make_spec(size="tiny", **{"dataset.observation_noise": 0.0}), tmp_path)
    np.testing.assert_allclose(bank.test.ceiling, bank.test.golden, atol=1e-5)


def test_sft_models_are_better_and_less_diverse(tmp_path):
    """Catches swapped roles of skill and diversity."""
    banks = {}
    for llm in ("sim_2b", "sim_2b_sft"):
        (tmp_path / llm).mkdir()
        banks[llm] = make_bank(make_spec(size="demo", base_llm=llm), tmp_path / llm).notes["test"]
    assert banks["sim_2b_sft"]["golden_random"] > banks["sim_2b"]["golden_random"] + 0.3
    assert banks["sim_2b_sft"]["golden_sd_within_prompt"] < banks["sim_2b"]["golden_sd_within_prompt"] - 0.1


def test_paper_betas_give_the_papers_error_rates(tmp_path):
    """Error rates of the six betas, mean over base LLMs, lie within 0.03-0.42 and fall (paper A, section 5)."""
    for dataset in ("sim_helpful", "sim_harmless"):
        banks = []
        for llm in LLMS:
            folder = tmp_path / dataset / llm
            folder.mkdir(parents=True)
            banks.append(make_bank(make_spec(size="demo", base_llm=llm, dataset=dataset), folder))
        rates = [
            np.mean([annotate(make_spec(beta=b, size="demo"), k, streams(0), {}).annotation_error_rate for k in banks])
            for b in BETAS
        ]
        assert all(0.03 < rate < 0.42 for rate in rates), rates
        assert rates == sorted(rates, reverse=True), rates


def test_bank_bytes_do_not_depend_on_size_of_the_other_split(tmp_path):
    """Catches one random stream shared by train and test: a longer train split would change the test split."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    a = make_bank(make_spec(size="tiny"), tmp_path / "a")
    b = make_bank(make_spec(size="tiny", **{"size.P": 100}), tmp_path / "b")
    np.testing.assert_array_equal(a.test.golden, b.test.golden)
    np.testing.assert_array_equal(a.test.embedding, b.test.embedding)


def test_base_llms_share_prompts_but_not_responses(tmp_path):
    """Catches LLMs whose responses are the same draws: their banks would be one bank with a shift."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    a = make_bank(make_spec(size="tiny", base_llm="sim_2b"), tmp_path / "a")
    b = make_bank(make_spec(size="tiny", base_llm="sim_7b"), tmp_path / "b")
    centred = [k.test.golden - k.test.golden.mean(axis=1, keepdims=True) for k in (a, b)]
    assert abs(np.corrcoef(*(c.ravel() for c in centred))[0, 1]) < 0.1
    assert np.corrcoef(a.test.golden.mean(axis=1), b.test.golden.mean(axis=1))[0, 1] > 0.8


def test_solved_beta_gives_the_error_rate_asked_for():
    """Catches a solver that works on the realised instead of the expected distribution."""
    spec = make_spec()
    difference = stream(5, "test").standard_normal(100_000) * 1.2
    beta = solve_beta(Seen(difference), 0.2, spec.annotator)
    assert np.mean(1 - spec.annotator.probability(np.abs(difference), beta)) == pytest.approx(0.2, abs=1e-9)
