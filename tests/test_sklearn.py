"""The closed list of scikit-learn classifiers."""

import dataclasses
import typing

import numpy as np
import pytest
from conftest import make_spec, random_bank
from test_linear import labelled, training

from rmsweep.errors import ConfigError, DesignError
from rmsweep.metrics.rank import spearman
from rmsweep.protocols import pointwise
from rmsweep.reward_models.sklearn import CERTAIN, ESTIMATORS, Name, Sklearn

FAST = {"random_forest": {"n_estimators": 40}, "extra_trees": {"n_estimators": 40}, "mlp": {"max_iter": 60}}


@pytest.fixture(scope="module")
def bank():
    found = random_bank(np.random.default_rng(0), p=150, n=6, q=20, m=12, d=4)
    sides = [
        dataclasses.replace(s, golden=(s.embedding[..., 0] - 0.5 * s.embedding[..., 1]).astype(np.float32))
        for s in (found.train, found.test)
    ]
    return dataclasses.replace(found, train=sides[0], test=sides[1])


def test_the_list_of_names_is_the_table():
    """The type that checks configs and the table of constructors must not drift apart."""
    assert set(typing.get_args(Name)) == set(ESTIMATORS)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_learns_repeats_and_hides_nothing(bank, estimator):
    """Every entry ranks better than chance, twice the same, higher is chosen; state is empty."""
    data = training(bank, labelled(bank, 500, np.random.default_rng(1)), 450)
    spec = Sklearn(estimator, FAST.get(estimator, {}))
    first, again = spec.fit(data), spec.fit(data)
    np.testing.assert_array_equal(first.score(bank.test), again.score(bank.test))
    assert spearman(first.score(bank.test), bank.test.golden) > 0.5
    assert first.state() == {} and first.history["n_train"] == 450


def test_log_odds_keep_the_order_where_probabilities_saturate(bank):
    """Catches scores that tie at p = 0 or 1: naive Bayes far from the data is certain, but not equally so."""
    data = training(bank, labelled(bank, 500, np.random.default_rng(2)), 450)
    model = Sklearn("gaussian_nb").fit(data)
    x = np.zeros((50, 4), dtype=np.float32)
    x[:, 0] = np.linspace(60, 160, 50)
    assert len(np.unique(model.estimator.predict_proba(x)[:, 1])) < 40
    assert len(np.unique(model.score_rows(x))) == 50


def test_certain_forests_get_finite_scores_at_the_ends(bank):
    """Catches infinite log odds of p = 0 and p = 1, and a limit that overtakes a probability in between."""
    preferences = labelled(bank, 100, np.random.default_rng(3))
    model = Sklearn("random_forest", {"n_estimators": 20}).fit(training(bank, preferences, 100))
    x = bank.train.gather(pointwise(bank.train, preferences).first)
    score, p = model.score_rows(x), model.estimator.predict_proba(x)[:, 1]
    assert score.max() == CERTAIN and (p == 1).any()
    np.testing.assert_array_equal(np.argsort(score, kind="stable"), np.argsort(p.round(12), kind="stable"))


def test_one_class_gives_a_constant_score(bank):
    """The released split of two examples can leave one class; scikit-learn would raise."""

    class OnlyChosen:
        def split(self, split, preferences, rows, rng):
            examples = pointwise(split, preferences)
            from rmsweep.protocols import SplitExamples

            return SplitExamples(examples.take(np.flatnonzero(examples.target == 1)), examples.take(np.arange(0)))

    data = training(bank, labelled(bank, 20, np.random.default_rng(4)), 20)
    model = Sklearn().fit(dataclasses.replace(data, protocol=OnlyChosen()))
    assert np.ptp(model.score(bank.test)) == 0


def test_probabilities_as_targets_are_refused(bank):
    """Rounding them would change the data; the message names the kinds that take them."""
    with pytest.raises(DesignError, match="linear, lgb and mlp"):
        Sklearn().fit(training(bank, labelled(bank, 20, np.random.default_rng(5), soft=True), 15))


@pytest.mark.parametrize(
    ("estimator", "options", "message"),
    [
        ("random_forest", {"n_estimator": 5}, "Did you mean 'n_estimators'"),
        ("random_forest", {"n_jobs": 4}, "unknown option"),
        ("logistic_regression", {"C": "1"}, "options.C='1'"),
        ("logistic_regression", {"C": -1.0}, "options.C=-1.0"),
        ("knn", {"weights": "odd"}, "options.weights='odd'"),
        ("mlp", {"hidden_layer_sizes": [64, 0]}, "hidden_layer_sizes"),
        ("svm", {}, "estimator='svm'"),
    ],
)
def test_options_are_a_closed_table(estimator, options, message):
    """Catches misspelt options, wrong types, and options that would break determinism."""
    with pytest.raises(ConfigError, match=message):
        changes = {"reward_model.estimator": estimator, "reward_model.options": options}
        make_spec(reward_model="clf_sklearn", **changes)


def test_options_reach_the_estimator():
    """Lists of configs become tuples, integers are numbers."""
    changes = {"reward_model.estimator": "mlp", "reward_model.options": {"hidden_layer_sizes": [8, 4], "alpha": 1}}
    last = make_spec(reward_model="clf_sklearn", **changes).reward_model.build(3)[-1]
    assert (last.hidden_layer_sizes, last.alpha, last.random_state) == ((8, 4), 1, 3)
