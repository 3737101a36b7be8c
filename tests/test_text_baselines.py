"""reward_model=length and surface: scores by hand, the fit against plain gradient steps."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import random_bank

from rmsweep import component
from rmsweep.datasets import BankShape
from rmsweep.errors import DesignError
from rmsweep.preferences import Comparisons, Preferences
from rmsweep.reward_models import Compute, TrainingData, surface
from rmsweep.rng import streams

RNG = np.random.default_rng(0)
TEXTS = [
    "",
    "one",
    "two words",
    "- item\n- other\n",
    "`code` why?",
    "12 of 345!",
    "a longer answer, with more words in it",
]


def text_split(p=30, n=6):
    bank = random_bank(np.random.default_rng(1), p=p, n=n)
    responses = [[f"{TEXTS[RNG.integers(len(TEXTS))]} {'x' * RNG.integers(30)}" for _ in range(n)] for _ in range(p)]
    golden = bank.train.golden.copy()
    golden[3, 4:] = np.nan  # a ragged prompt
    responses[3] = responses[3][:4]
    return replace(bank.train, golden=golden, response=responses)


def preferences_of(split, reward, n=400, soft=False):
    rng = np.random.default_rng(2)
    a = rng.integers(0, split.n_prompts, n)
    first = rng.integers(0, split.count[a])
    second = (first + rng.integers(1, split.count[a])) % split.count[a]
    difference = reward[a, first] - reward[a, second]
    p = 1 / (1 + np.exp(-difference))
    label = p if soft else rng.random(n) < p
    return Preferences(Comparisons(a, first, a, second), label.astype(np.float32), p, difference, 1.0)


def fit(kind, split, preferences, protocol="clean", **fields):
    model = component.build("reward_model", {"kind": kind, **fields})
    return model.fit(TrainingData(split, preferences, component.build("protocol", protocol), streams(0), Compute(), {}))


def test_length_is_the_number_of_characters():
    """Catches bytes counted for characters, and a length taken for the wrong response of a ragged prompt."""
    split = text_split()
    split.response[0][0] = "\u00e9\U0001f600"
    scores = fit("length", split, None).score(split)
    assert scores.dtype == np.float32 and scores.shape == split.golden.shape and scores[0, 0] == 2
    for p, responses in enumerate(split.response):
        assert scores[p, : len(responses)].tolist() == [len(r) for r in responses]
    assert np.isfinite(scores).all()


def test_features_by_hand():
    """Catches a feature that counts something else."""
    text = "1. Why `x`?\n\n- see ```y``` now!\n  * 42 times"
    words = ["1.", "Why", "`x`?", "-", "see", "```y```", "now!", "*", "42", "times"]
    by_hand = {
        "log_characters": np.log1p(len(text)),
        "log_words": np.log1p(10),
        "word_length": sum(map(len, words)) / 10,
        "log_lines": np.log1p(4),
        "log_list_items": np.log1p(3),
        "log_code_marks": np.log1p(4),
        "log_questions": np.log1p(2),
        "log_digits": np.log1p(3),
    }
    assert tuple(by_hand) == surface.FEATURES
    np.testing.assert_allclose(surface.text_features(text), list(by_hand.values()))
    assert surface.text_features("") == [0.0] * 8


@pytest.mark.parametrize("soft", [False, True])
def test_surface_minimises_the_stated_loss(soft):
    """The stated loss has gradient zero at the weights: catches an intercept, signs, lost soft labels."""
    split = text_split()
    features = surface.surface_features(split)
    preferences = preferences_of(split, features[:, :, 0] - features[:, :, 5], soft=soft)
    model = fit("surface", split, preferences, l2=1e-2)
    valid = features[np.isfinite(split.golden)]
    f = ((features - valid.mean(axis=0)) / np.where(valid.std(axis=0) > 0, valid.std(axis=0), 1)).reshape(-1, 8)
    train, validation = component.build("protocol", "clean").split(split, preferences, False, streams(0)("split"))
    d, p = f[train.first] - f[train.second], train.target.astype(float)
    win = 1 / (1 + np.exp(-d @ model.weight))
    gradient = d.T @ (win - p) / len(p) + 1e-2 * model.weight
    np.testing.assert_allclose(gradient, 0, atol=1e-5)
    assert np.abs(model.weight).max() > 0.1
    loss = -np.mean(p * np.log(win) + (1 - p) * np.log(1 - win))
    assert model.history["train_loss"] == pytest.approx(loss, rel=1e-6)
    assert model.history["n_train"] == len(train) and model.history["n_validation"] == len(validation)
    np.testing.assert_allclose(model.score(split).reshape(-1), f @ model.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("protocol", ["clean", "released"])
def test_surface_learns_and_is_bit_identical(protocol):
    split = text_split()
    reward = 2 * surface.surface_features(split)[:, :, 0]
    preferences = preferences_of(split, reward)
    one, two = (fit("surface", split, preferences, protocol).score(split) for _ in range(2))
    assert one.tobytes() == two.tobytes()
    assert np.corrcoef(one.reshape(-1), reward.reshape(-1))[0, 1] > 0.9


@pytest.mark.parametrize("sign", [1, -1])
def test_surface_with_labels_of_one_kind(sign):
    """Catches a classifier that refuses a single class: the a side may win every comparison."""
    split = text_split()
    preferences = preferences_of(split, sign * surface.surface_features(split)[:, :, 0])
    kept = np.full(len(preferences), float(sign > 0), dtype=np.float32)
    model = fit("surface", split, replace(preferences, preference=kept))
    assert np.isfinite(model.weight).all()


def test_banks_without_texts_are_skipped_with_the_reason():
    counts = np.array([2, 2])
    for kind in ("length", "surface"):
        model = component.build("reward_model", kind)
        assert model.skip(BankShape(counts, counts, True)) is None
        assert "texts" in model.skip(BankShape(counts, counts, False))
        bank = random_bank(np.random.default_rng(0))
        with pytest.raises(DesignError, match="texts"):
            fit(kind, bank.train, preferences_of(bank.train, bank.train.golden)).score(bank.train)
