"""The notebook face: the same numbers as the stages, own arrays, own losses."""

import functools

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

import rmsweep
from rmsweep.errors import ConfigError
from rmsweep.objectives._function import _digest


def linear_world(p=400, n=6, q=40, m=15, d=8, seed=0):
    """Golden reward = a fixed direction of the embedding: any sound objective must learn it."""
    rng = np.random.default_rng(seed)
    direction = rng.standard_normal(d) / 2

    def side(*shape):
        embedding = rng.standard_normal((*shape, d)).astype(np.float32)
        return embedding @ direction, embedding

    return rmsweep.Bank.from_arrays(*side(p, n), *side(q, m))


@pytest.fixture(scope="module")
def bank():
    return linear_world()


def hinge(reward_a, reward_b, preference):
    """max(0, 1 - (r_chosen - r_rejected))."""
    return torch.relu(1 - (2 * preference - 1) * (reward_a - reward_b))


def test_annotate_fit_score_best_of_n(bank):
    """The ten lines of the README give a reward model far better than chance."""
    preferences = rmsweep.annotate(bank, 400, beta=5.0, pairing="cross_prompt", seed=1)
    model = rmsweep.fit(bank, preferences, "bt_linear")
    curve = rmsweep.best_of_n(rmsweep.score(model, bank.test), bank.test.golden)
    best = bank.test.golden.max(axis=1).mean()
    assert curve.shape == (15,) and curve[0] == pytest.approx(bank.test.golden.mean(), abs=1e-6)
    assert (np.diff(curve) > 0).all() and curve[-1] > 0.8 * best


def test_score_takes_splits_blocks_and_rows(bank):
    """[P, N, D] and [R, D] give the numbers of the split itself."""
    model = rmsweep.fit(bank, rmsweep.annotate(bank, 100), "bt_linear")
    scores = rmsweep.score(model, bank.test)
    np.testing.assert_allclose(rmsweep.score(model, bank.test.embedding), scores, rtol=1e-6)
    np.testing.assert_allclose(rmsweep.score(model, bank.test.embedding[3]), scores[3], rtol=1e-5)


def test_own_objective_trains(bank):
    """A ten-line loss is used as it is: the hinge gives another, sound model."""
    preferences = rmsweep.annotate(bank, 400, beta=10.0)
    own = rmsweep.score(rmsweep.fit(bank, preferences, objective=hinge, hidden=[32]), bank.test)
    ours = rmsweep.score(rmsweep.fit(bank, preferences, hidden=[32]), bank.test)
    assert not np.array_equal(own, ours)
    assert np.corrcoef(own.ravel(), bank.test.golden.ravel())[0, 1] > 0.6


def test_sweep_with_own_objective_and_own_bank(bank, tmp_path):
    """The grid of a notebook: own loss beside the published ones, on own arrays, resumed without recomputing."""
    axes = {"beta": [1, 5], "seed": [0, 1]}
    options = {"bank": bank, "root": tmp_path, "progress": False, "set": {"reward_model.hidden": [16]}}
    table = rmsweep.sweep(axes, objectives={"hinge": hinge}, **options)
    assert len(table) == 12 and set(table.reward_model) == {"bt_mlp", "clf_mlp", "hinge"}
    assert (table.status == "done").all() and table.golden_improvement.notna().all()
    again = rmsweep.sweep(axes, objectives={"hinge": hinge}, **options)
    assert again.equals(table)
    assert rmsweep.load(tmp_path).equals(table)


def test_a_changed_objective_is_another_cell(bank, tmp_path):
    """Catches the stale result of an edited loss."""

    def make(margin):
        return lambda a, b, p: softplus(margin - (2 * p - 1) * (a - b))

    tables = [
        rmsweep.sweep({"reward_model": ["own"]}, objectives={"own": make(m)}, bank=bank, root=tmp_path, progress=False)
        for m in (0.0, 2.0)
    ]
    assert len(tables[0]) == len(tables[1]) == 1 and tables[0].cell_id[0] != tables[1].cell_id[0]


def keyword_margin(m):
    def loss(a, b, p, *, margin=m):
        return torch.relu(margin - (2 * p - 1) * (a - b))

    return loss


def weighted(tensor):
    return lambda a, b, p: torch.relu(tensor[1000] - (2 * p - 1) * (a - b))


@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (keyword_margin, 1.0, 0.01),
        (weighted, torch.ones(5000), torch.ones(5000) + torch.nn.functional.one_hot(torch.tensor(1000), 5000)),
        (weighted, np.ones(5000), np.ones(5000) + np.eye(1, 5000, 1000)[0]),
        (lambda m: functools.partial(keyword_margin(1.0), margin=m), 1.0, 0.01),
        (lambda m: lambda a, b, p: keyword_margin(m)(a, b, p), 1.0, 0.01),
    ],
)
def test_everything_a_loss_holds_is_in_its_digest(make, first, second):
    """Catches stale results: keyword-only defaults, long arrays whose text is shortened, closed-over functions."""
    assert _digest(make(first)) != _digest(make(second))
    assert _digest(make(first)) == _digest(make(first))


def test_a_loss_that_cannot_be_fingerprinted_is_refused():
    """An object's text holds an address: it would never be found again, or found wrongly."""
    thing = object()
    with pytest.raises(ConfigError, match="cannot be fingerprinted"):
        _digest(lambda a, b, p: (thing, a - b)[1])


def test_axes_and_objectives_are_not_lost(bank, tmp_path):
    """An objective joins a given axis; names of existing reward models and single values are refused."""
    options = {"bank": bank, "root": tmp_path, "progress": False, "set": {"reward_model.hidden": [8]}}
    table = rmsweep.sweep({"reward_model": ["bt_mlp"], "seed": np.arange(1)}, objectives={"hinge": hinge}, **options)
    assert set(table.reward_model) == {"bt_mlp", "hinge"}
    with pytest.raises(ConfigError, match="exists"):
        rmsweep.sweep({"seed": [0]}, objectives={"bt_mlp": hinge}, **options)
    with pytest.raises(ConfigError, match="needs a list"):
        rmsweep.sweep({"beta": 3}, **options)
    with pytest.raises(ConfigError, match="exclude each other"):
        rmsweep.annotate(bank, beta=1.0, error_rate=0.2)


def test_bad_names_and_choices_are_refused(bank):
    """Messages name what is allowed."""
    with pytest.raises(ConfigError, match="lower-case"):
        rmsweep.sweep({"beta": [1]}, objectives={"My Loss": hinge}, bank=bank)
    with pytest.raises(ConfigError, match="Valid: cross_prompt, same_prompt"):
        rmsweep.annotate(bank, pairing="cross")
