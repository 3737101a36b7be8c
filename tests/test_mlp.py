"""The MLP and its training loop: initialisation, batches, stopping, restoring, divergence."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import make_spec, random_bank

from rmsweep.errors import Diverged
from rmsweep.protocols import Schedule
from rmsweep.reward_models import Compute, TrainingData
from rmsweep.reward_models import _training as training
from rmsweep.reward_models.mlp import build_network
from rmsweep.rng import stream, streams
from rmsweep.stages.annotate import annotate

PASS = Schedule(1e-3, 7, 30, 3, epoch="pass", stop="best", restore_best=True)
RELEASED = Schedule(1e-3, 7, 30, 3, epoch="resample", stop="each_previous", restore_best=False)


@pytest.fixture(scope="module")
def bank():
    return random_bank(np.random.default_rng(2), p=200, n=4, q=10, m=8, d=6)


def fit(bank, **changes):
    spec = make_spec(n_annotations=200, **{"reward_model.hidden": [16], **changes})
    preferences = annotate(spec, bank, streams(0), {})
    return spec.reward_model.fit(TrainingData(bank.train, preferences, spec.protocol, streams(0), Compute(), {}))


def test_initialisation_is_pytorchs_default():
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases, the paper's layer widths, no activation at the end."""
    network = build_network((64, 1024, 512, 1), "relu", stream(0, "init"))
    assert [type(m).__name__ for m in network] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    for layer, fan_in in zip(network[::2], (64, 1024, 512), strict=True):
        for parameter in (layer.weight, layer.bias):
            assert parameter.abs().max() <= 1 / np.sqrt(fan_in)
        assert float(layer.weight.detach().std()) == pytest.approx(1 / np.sqrt(3 * fan_in), rel=0.1)


def test_objectives_share_initialisation_and_order(bank):
    """Common random numbers: before its first step the classifier is the Bradley-Terry network, bit for bit."""
    networks = [build_network((6, 16, 1), "relu", streams(3)("init")) for _ in range(2)]
    for a, b in zip(*(n.parameters() for n in networks), strict=True):
        assert torch.equal(a, b)


def test_an_epoch_passes_over_all_examples_or_resamples():
    """`pass` visits every example once; `resample` draws each batch anew, distinct inside, as released."""
    visited = np.concatenate(list(training.batches(30, PASS, stream(0, "o"))))
    assert sorted(visited) == list(range(30))
    drawn = list(training.batches(30, RELEASED, stream(0, "o")))
    assert [len(b) for b in drawn] == [7] * 5 and all(len(set(b)) == 7 for b in drawn)
    assert len(set(np.concatenate(drawn))) < 30


@pytest.mark.parametrize(
    ("losses", "schedule", "stops"),
    [
        ([1.0, 0.9, 0.8, 0.81], PASS, False),
        ([1.0, 0.9, 0.8, 0.81, 0.82], PASS, False),
        ([1.0, 0.9, 0.8, 0.81, 0.82, 0.8000001], PASS, True),
        ([1.0, 0.5, 0.6, 0.7, 0.65], RELEASED, False),  # larger than the best, not than each of the last three
        ([0.5, 0.5, 0.6, 0.7, 0.71], RELEASED, True),
        ([0.5, 0.6, 0.7], RELEASED, False),
    ],
)
def test_stopping_rules(losses, schedule, stops):
    """`best`: no new best for three epochs. `each_previous`: the newest is larger than each of the previous three."""
    assert training.stops(losses, schedule) is stops


class Scripted:
    """Replaces validation by a script of losses and marks the epoch in the weights."""

    def __init__(self, monkeypatch, losses):
        self.losses, self.epoch = losses, 0
        monkeypatch.setattr(training, "_validate", self.validate)

    def validate(self, loss, examples):
        self.epoch += 1
        with torch.no_grad():
            loss.network[-1].bias.fill_(self.epoch)
        return self.losses[self.epoch - 1]


def test_clean_restores_the_best_epoch(bank, monkeypatch):
    """Catches last weights kept, or weights aliased instead of copied."""
    Scripted(monkeypatch, [0.9, 0.5, 0.6, 0.7, 0.8, 0.1])
    model = fit(bank, **{"protocol.patience": 3})
    assert model.history["epochs"] == 5 and model.history["best_epoch"] == 2
    assert float(model.network[-1].bias.detach()) == 2.0 and model.history["validation_loss"] == 0.5


def test_released_keeps_the_last_epoch(bank, monkeypatch):
    """A quirk of the released scripts: no best weights."""
    Scripted(monkeypatch, [0.9, 0.5, 0.6, 0.7, 0.8, 0.1])
    model = fit(bank, protocol="released")
    assert model.history["epochs"] == 5 and float(model.network[-1].bias.detach()) == 5.0


def test_collapsed_mirror_copies_are_the_same_loss(bank):
    """A full batch of copies, or of weighted comparisons: same steps, losses and rewards but for rounding.

    Catches weights that are not the number of copies, a mean over examples instead of copies, and a lost leak.
    """
    changes = {"protocol": "released", "protocol.max_epochs": 8}
    published, collapsed = fit(bank, **changes), fit(bank, **changes, **{"protocol.collapse_mirror": True})
    for name in ("n_train", "n_validation", "epochs", "best_epoch"):
        assert published.history[name] == collapsed.history[name]
    assert published.history["n_train"] + published.history["n_validation"] > 200  # copies stand on both sides
    for name in ("train_loss", "validation_loss"):
        assert collapsed.history[name] == pytest.approx(published.history[name], rel=1e-5)
    scores = [model.score(bank.test) for model in (collapsed, published)]
    a, b = (s - s.mean() for s in scores)  # the loss leaves the offset to rounding
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("n", [1000, 5000, 6400, 10_000, 12_800, 20_000, 32_000, 40_000])
def test_collapsed_epochs_have_as_many_steps(n):
    """An epoch takes the published number of steps, however many comparisons the split happens to leave."""
    released = make_spec(protocol="released").protocol
    collapsed = make_spec(protocol="released", **{"protocol.collapse_mirror": True}).protocol
    copies = 2 * n - int(np.ceil(0.4 * n))
    published = len(list(training.batches(copies, released.schedule(copies, False), stream(0, "o"))))
    for left in (round(0.96 * n) - 90, round(0.96 * n), round(0.96 * n) + 90):
        schedule = collapsed.schedule(left, False, float(copies))
        drawn = list(training.batches(left, schedule, stream(0, "o")))
        assert len(drawn) == published and {len(b) for b in drawn} == {schedule.batch}
        assert schedule.batch == pytest.approx(min(10_240, copies) * left / copies, abs=1)
    assert collapsed.schedule(copies, True, float(copies)) == released.schedule(copies, True)  # no copies of rows


def test_trials_keep_the_smallest_validation_loss(bank, monkeypatch):
    """Every trial starts from the same weights; a diverged one is passed over, all diverged raise."""
    protocol = make_spec().protocol
    schedule = protocol.schedule(100, False)
    losses = {}
    for trials in (((1e-6, 0.0),), ((1e-3, 0.0),), ((1e30, 0.0), (1e-6, 0.0), (1e-3, 0.0))):
        tuned = dataclasses.replace(schedule, trials=trials)
        monkeypatch.setattr(type(protocol), "schedule", lambda *_, tuned=tuned: tuned)
        with np.errstate(all="ignore"):
            model = fit(bank)
        losses[trials] = model.history["validation_loss"]
    slow, quick, best = losses.values()
    assert best == min(slow, quick) and slow != quick
    monkeypatch.setattr(type(protocol), "schedule", lambda *_: dataclasses.replace(schedule, trials=((1e30, 0.0),) * 2))
    with pytest.raises(Diverged), np.errstate(all="ignore"):
        fit(bank)


def test_small_networks_stay_in_fp32():
    """Where the casts cost more than the products save, precision=bf16 is fp32: on every device, by widths alone."""
    bf16 = Compute("cpu", "bf16")
    assert bf16.of((64, 256, 128, 1)) == Compute("cpu", "fp32")
    assert (
        bf16.of((2048, 1024, 512, 1)) == bf16 == bf16.of((64, 1024, 1))
        and Compute("cpu", "fp32").of((4096, 4096, 1))[1] == "fp32"
    )


def test_bf16_rewards_keep_their_last_digits():
    """The last layer is in fp32: rewards rounded to bf16 would tie within a prompt."""
    network = build_network((6, 16, 1), "relu", stream(0, "init"))
    embedding = np.random.default_rng(0).standard_normal((3000, 6)).astype(np.float16)
    rewards = training.score_rows(network, embedding, Compute("cpu", "bf16"))
    assert rewards.dtype == torch.float32 and len(rewards.unique()) > 2900
    assert (rewards.bfloat16().float() != rewards).float().mean() > 0.9


def test_bf16_products_change_rewards_by_rounding_only(bank, bf16_everywhere):
    """precision=bf16: the same rows, steps and stopping; rewards differ by bf16 rounding and repeat bit for bit."""
    spec = make_spec(n_annotations=200, **{"reward_model.hidden": [16]})
    preferences = annotate(spec, bank, streams(0), {})
    scores = []
    for precision in ("fp32", "bf16", "bf16"):
        compute = Compute("cpu", precision)
        data = TrainingData(bank.train, preferences, spec.protocol, streams(0), compute, {})
        scores.append(spec.reward_model.fit(data).score(bank.test))
    np.testing.assert_array_equal(scores[1], scores[2])
    assert not np.array_equal(scores[0], scores[1])
    assert np.corrcoef(scores[0].ravel(), scores[1].ravel())[0, 1] > 0.99


def test_divergence_is_raised_not_scored(bank):
    """NaN is a result of its own, never a number."""
    with pytest.raises(Diverged, match="epoch"), np.errstate(all="ignore"):
        fit(bank, **{"protocol.learning_rate": 1e30})


def test_scores_do_not_depend_on_the_chunk(bank, monkeypatch):
    """Streaming in other chunks gives the same order and the same numbers to rounding."""
    model = fit(bank)
    whole = model.score(bank.test)
    monkeypatch.setattr(type(bank.test), "chunks", lambda self, *_: (slice(i, i + 1) for i in range(self.n_prompts)))
    np.testing.assert_allclose(model.score(bank.test), whole, rtol=1e-5, atol=1e-7)
