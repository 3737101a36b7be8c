"""The linear reward models against a generic optimiser in float64, and their choice of l2."""

import dataclasses

import numpy as np
import pytest
from conftest import make_spec, random_bank
from scipy.optimize import minimize

from rmsweep import component
from rmsweep.errors import ConfigError, DesignError
from rmsweep.preferences import Comparisons, Preferences
from rmsweep.protocols import SplitExamples, pairwise, pointwise
from rmsweep.reward_models import Compute, TrainingData
from rmsweep.reward_models.linear import GRID, Linear
from rmsweep.rng import streams


@dataclasses.dataclass(frozen=True)
class FirstTrain:
    """A protocol that trains on the first `n` comparisons and validates on the rest."""

    n: int

    def split(self, split, preferences, rows, rng):
        examples = (pointwise if rows else pairwise)(split, preferences)
        train = examples.comparison < self.n
        return SplitExamples(examples.take(np.flatnonzero(train)), examples.take(np.flatnonzero(~train)))


def labelled(bank, n, rng, soft=False):
    """n random cross-prompt comparisons with labels 0 or 1, or probabilities."""
    p, k = bank.train.golden.shape
    sides = [rng.integers(p, size=n), rng.integers(k, size=n), rng.integers(p, size=n), rng.integers(k, size=n)]
    pairs = Comparisons(*sides)
    difference = pairs.golden_difference(bank.train)
    p = 1 / (1 + np.exp(-2 * difference))
    label = p if soft else rng.random(n) < p
    return Preferences(pairs, label.astype(np.float32), p, difference, 2.0)


def training(bank, preferences, n_train):
    return TrainingData(bank.train, preferences, FirstTrain(n_train), streams(0), Compute(), {})


@pytest.fixture(scope="module")
def bank():
    rng = np.random.default_rng(0)
    found = random_bank(rng, p=60, n=4, d=5)
    golden = np.asarray(found.train.embedding, dtype=np.float64) @ np.array([1.0, -0.5, 0, 0, 0.2])
    embedding = found.train.embedding * np.array([3, 1, 1, 0.2, 1], dtype=np.float32) + 2
    train = dataclasses.replace(found.train, golden=golden.astype(np.float32), embedding=embedding)
    return dataclasses.replace(found, train=train)


def solution(x, target, l2, intercept):
    """argmin of mean softplus(m) - t m + l2/2 |w|^2 by BFGS on numerical gradients; x standardised."""
    dim = x.shape[1]

    def loss(theta):
        m = x @ theta[:dim] + theta[dim:].sum()
        return np.mean(np.logaddexp(0, m) - target * m) + l2 / 2 * theta[:dim] @ theta[:dim]

    return minimize(loss, np.zeros(dim + intercept), method="BFGS", tol=1e-9).x


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("scaling", ["common", "per_feature"])
def test_bradley_terry_is_the_penalised_optimum(bank, soft, scaling):
    """Catches a wrong penalty, soft labels cut to 0 and 1, centring that does not cancel, an intercept."""
    preferences = labelled(bank, 300, np.random.default_rng(1), soft)
    model = Linear(component.build("objective", "bradley_terry"), scaling, 0.01).fit(training(bank, preferences, 300))
    pairs = preferences.comparisons
    a, b = (bank.train.gather(r).astype(np.float64) for r in (pairs.rows_a(bank.train), pairs.rows_b(bank.train)))
    sd = np.concatenate([a, b]).std(axis=0)
    sd = np.sqrt(np.mean(sd**2)) * np.ones(5) if scaling == "common" else sd
    expected = solution((a - b) / sd, preferences.preference, 0.01, 0) / sd
    np.testing.assert_allclose(model.coefficient, expected, atol=2e-3 * np.abs(expected).max())


def test_classification_is_the_penalised_optimum(bank):
    """Catches a penalised or missing intercept, and rows labelled the wrong way round."""
    preferences = labelled(bank, 200, np.random.default_rng(2))
    preferences = dataclasses.replace(preferences, preference=np.where(np.arange(200) < 50, 1, preferences.preference))
    data = training(bank, preferences, 200)
    model = Linear(component.build("objective", "classification"), "per_feature", 0.05).fit(data)
    rows = pointwise(bank.train, preferences)
    x = bank.train.gather(rows.first).astype(np.float64)
    theta = solution((x - x.mean(axis=0)) / x.std(axis=0), rows.target, 0.05, 1)
    score = (x - x.mean(axis=0)) / x.std(axis=0) @ theta[:5] + theta[5]
    np.testing.assert_allclose(model.score_rows(x.astype(np.float32)), score, atol=2e-3 * np.abs(score).max())


@pytest.mark.parametrize("objective", ["bradley_terry", "classification"])
def test_gradient_equals_finite_differences(bank, objective):
    """Catches a gradient that belongs to another loss; the optimiser alone might hide it."""
    from rmsweep.reward_models.linear import standardisation

    preferences = labelled(bank, 50, np.random.default_rng(3), soft=True)
    rows = (pointwise if objective == "classification" else pairwise)(bank.train, preferences)
    design = standardisation(bank.train, rows, "common").design(bank.train, rows)
    theta = np.random.default_rng(4).standard_normal(5 + design.intercept)
    exact = design._replace(x=design.x.astype(np.float64))
    _, gradient = design.objective(theta, 0.3)

    def loss(t):
        m = exact.x @ t[:5] + t[5:].sum()
        return np.mean(np.logaddexp(0, m) - exact.target * m) + 0.15 * t[:5] @ t[:5]

    step = 1e-5 * np.eye(len(theta))
    numeric = [(loss(theta + s) - loss(theta - s)) / 2e-5 for s in step]
    np.testing.assert_allclose(gradient, numeric, atol=1e-5)


def test_l2_is_chosen_by_validation_loss(bank):
    """Catches a choice by training loss (always the weakest) and a history that reports another fit."""
    preferences = labelled(bank, 60, np.random.default_rng(5))
    data, objective = training(bank, preferences, 30), component.build("objective", "bradley_terry")
    chosen = Linear(objective).fit(data).history
    single = {l2: Linear(objective, l2=l2).fit(data).history["validation_loss"] for l2 in GRID}
    assert chosen["l2"] == min(single, key=single.get)
    assert chosen["validation_loss"] == pytest.approx(min(single.values()), abs=1e-4)
    assert (chosen["n_train"], chosen["n_validation"]) == (30, 30)


def test_without_validation_examples_the_middle_of_the_grid_is_taken(bank):
    """No crash, no loss invented."""
    preferences = labelled(bank, 60, np.random.default_rng(5))
    found = Linear(component.build("objective", "bradley_terry"), l2=(0.1, 10.0, 1.0)).fit(
        training(bank, preferences, 60)
    )
    assert found.history["l2"] == 1.0 and found.history["validation_loss"] is None


def test_features_that_never_vary_have_no_weight(bank):
    """Catches division by a standard deviation that is zero or rounding noise."""
    embedding = np.array(bank.train.embedding)
    embedding[..., 3], embedding[..., 4] = 1000.1, 0.0
    odd = dataclasses.replace(bank, train=dataclasses.replace(bank.train, embedding=embedding))
    for scaling in ("common", "per_feature"):
        model = Linear(component.build("objective", "classification"), scaling).fit(
            training(odd, labelled(odd, 80, np.random.default_rng(6)), 60)
        )
        assert (model.coefficient[3:] == 0).all() and np.isfinite(model.coefficient).all()


def test_one_class_of_labels_gives_finite_scores(bank):
    """Separable data and labels all equal have no finite optimum without the penalty."""
    preferences = labelled(bank, 40, np.random.default_rng(7))
    ones = dataclasses.replace(preferences, preference=np.ones(40, dtype=np.float32))
    for objective in ("bradley_terry", "classification"):
        model = Linear(component.build("objective", objective)).fit(training(bank, ones, 40))
        assert np.isfinite(model.score(bank.test)).all()


def test_config_is_checked(bank):
    """Empty or negative grids, and objectives that are no logistic regression, name the remedy."""
    for l2 in ((), (-1.0,), -0.5, "strong"):
        with pytest.raises(ConfigError, match="l2"):
            make_spec(reward_model="bt_linear", **{"reward_model.l2": l2})
    assert make_spec(reward_model="bt_linear", **{"reward_model.l2": [0.1, 1]}).reward_model.l2 == (0.1, 1.0)

    class Other:
        kind, pointwise = "margin", False

    model = Linear(Other())
    assert "kind=mlp" in model.skip(None)
    with pytest.raises(DesignError, match="margin"):
        model.fit(training(bank, labelled(bank, 10, np.random.default_rng(0)), 10))
    with pytest.raises(DesignError, match="no training example"):
        Linear(component.build("objective", "classification")).fit(
            training(bank, labelled(bank, 10, np.random.default_rng(0)), 0)
        )


def test_state_rebuilds_the_score(bank):
    """What keep=models stores is the whole model."""
    data = training(bank, labelled(bank, 80, np.random.default_rng(8)), 60)
    model = Linear(component.build("objective", "classification")).fit(data)
    x, s = bank.test.embedding.reshape(-1, 5), model.state()
    expected = (x - s["mean"]) @ s["coefficient"] + s["bias"]
    np.testing.assert_allclose(model.score(bank.test).reshape(-1), expected, rtol=1e-5, atol=1e-6)
