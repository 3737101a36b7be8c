"""What the paper claims and the simulated world must show, at the size where the signal is clear."""

import numpy as np
import pytest
from conftest import make_bank, make_spec

from rmsweep.pipeline import run_cell
from rmsweep.reward_models import Compute

SEEDS = range(4)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return make_bank(make_spec(), tmp_path_factory.mktemp("demo"))


def improvement(bank, **changes):
    """Golden improvement per seed."""
    outcomes = (run_cell(make_spec(seed=s, **changes), bank, Compute()) for s in SEEDS)
    return np.array([outcome.metrics["golden_improvement"] for outcome in outcomes])


def test_quality_rises_with_the_number_of_annotations(bank):
    """Catches annotations that are not used, or a split that eats them."""
    few, many = (improvement(bank, n_annotations=n, beta=1.0) for n in (125, 2000))
    assert many.mean() > few.mean() + 0.1


def test_quality_rises_with_beta(bank):
    """Catches labels that do not depend on beta."""
    noisy, clean = (improvement(bank, beta=b, n_annotations=1000) for b in (0.2, 5.0))
    assert clean.mean() > noisy.mean() + 0.1


def test_cross_prompt_rescues_similar_candidates(bank):
    """Paper A, Fig. 5: same-prompt comparisons of similar responses are nearly useless, cross-prompt ones are not."""
    same, cross = (improvement(bank, candidates="similar", pairing=p) for p in ("same_prompt", "cross_prompt"))
    assert (cross > same).all() and cross.mean() > same.mean() + 0.5


def test_no_reward_model_beats_the_ceiling(bank):
    """E[golden | embedding] is the best score of an embedding: catches golden rewards leaking into training."""
    spec = make_spec(n_annotations=2000, beta=float("inf"), candidates="diversified")
    metrics = run_cell(spec, bank, Compute()).metrics
    assert metrics["golden_random"] < metrics["bon_golden"][-1] <= metrics["golden_ceiling"] + 0.02
    assert metrics["golden_ceiling"] < metrics["golden_best"]
