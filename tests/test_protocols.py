"""Protocols: the clean split leaks nothing; `released` equals a literal re-statement of the published training."""

import numpy as np
import pytest
import torch
from conftest import make_spec, random_bank

from rmsweep import component
from rmsweep.reward_models import Compute, TrainingData
from rmsweep.reward_models.mlp import build_network
from rmsweep.rng import streams
from rmsweep.stages.annotate import annotate

CLEAN = component.build("protocol", "clean")


@pytest.fixture(scope="module")
def bank():
    return random_bank(np.random.default_rng(1), p=600, n=6, d=5)


def examples_of(bank, protocol, pointwise, seed=0, **changes):
    preferences = annotate(make_spec(n_annotations=600, **changes), bank, streams(seed), {})
    return preferences, protocol.split(bank.train, preferences, pointwise, streams(seed)("split"))


def rows(examples):
    return set(examples.first) | (set() if examples.second is None else set(examples.second))


@pytest.mark.parametrize("pointwise", [False, True])
@pytest.mark.parametrize("pairing", ["same_prompt", "cross_prompt"])
def test_clean_split_has_no_response_on_both_sides(bank, pairing, pointwise):
    """Catches any leak between training and validation, and a comparison used twice."""
    preferences, split = examples_of(bank, CLEAN, pointwise, pairing=pairing)
    assert not rows(split.train) & rows(split.validation)
    per_comparison = 2 if pointwise else 1
    for side in split:
        assert (np.bincount(side.comparison)[np.unique(side.comparison)] == per_comparison).all()
    prompt_a = preferences.comparisons.prompt_a
    assert not set(prompt_a[split.train.comparison]) & set(prompt_a[split.validation.comparison])


def test_clean_split_keeps_every_comparison_of_a_training_prompt(bank):
    """None leaves training; validation comparisons lie within validation prompts on both sides."""
    strict = component.build("protocol", {"kind": "clean", "min_validation": 10})
    preferences, split = examples_of(bank, strict, False, pairing="cross_prompt")
    prompt_a, prompt_b = preferences.comparisons.prompt_a, preferences.comparisons.prompt_b
    training_prompts = set(prompt_a[split.train.comparison])
    assert len(training_prompts) == 480
    np.testing.assert_array_equal(split.train.comparison, np.flatnonzero(np.isin(prompt_a, list(training_prompts))))
    assert not set(prompt_b[split.validation.comparison]) & training_prompts
    assert len(split.validation) >= 10


def test_clean_split_of_few_cross_prompt_comparisons_still_validates_without_leak(bank):
    """Catches an empty validation set, with which early stopping would be blind."""
    preferences = annotate(make_spec(n_annotations=60, pairing="cross_prompt"), bank, streams(3), {})
    split = CLEAN.split(bank.train, preferences, False, streams(3)("split"))
    assert len(split.validation) > 0 and not rows(split.train) & rows(split.validation)


def test_clean_targets_are_the_preferences(bank):
    """Catches a flipped side: a's target is p, b's 1 - p."""
    preferences, split = examples_of(bank, CLEAN, True)
    a = preferences.comparisons.rows_a(bank.train)
    for side in split:
        is_a = side.first == a[side.comparison]
        expected = np.where(is_a, preferences.preference[side.comparison], 1 - preferences.preference[side.comparison])
        np.testing.assert_array_equal(side.target, expected)


def test_clean_batches_are_smaller_where_comparisons_are_few():
    """Catches one step per epoch at small n, and a batch that holds other comparisons for rows than for pairs."""
    for n, batch in ((50, 16), (400, 50), (1024, 128), (32_000, 128)):
        assert CLEAN.schedule(n, False).batch == batch and CLEAN.schedule(2 * n, True).batch == 2 * batch
    few = component.build("protocol", {"kind": "clean", "batch_comparisons": 7})
    assert few.schedule(32_000, False).batch == 7


def test_released_mirrors_leak_and_other_units_do_not(bank):
    """The documented quirk: most validation pairs have their mirror in training; by comparison or prompt none has."""
    for unit, leaks in (("example", True), ("comparison", False), ("prompt", False)):
        protocol = component.build("protocol", {"kind": "released", "unit_of_split": unit})
        _, split = examples_of(bank, protocol, False)
        both = np.isin(split.validation.comparison, split.train.comparison).mean()
        assert (both > 0.7) if leaks else both == 0


def test_released_schedule_is_the_published_one():
    """A5: batch min(10240, n), Adam 1e-3, 30 epochs, patience 3, resampled batches, last weights."""
    s = component.build("protocol", "released").schedule(8000, False)
    published = (1e-3, 8000, 30, 3, "resample", False)
    assert (s.learning_rate, s.batch, s.max_epochs, s.patience, s.epoch, s.restore_best) == published
    assert component.build("protocol", "released").schedule(64_000, False).batch == 10_240


def literal_released(bank, preferences, chance, pointwise, batch, epochs, patience):
    """The published training line by line: lists and copies, nothing shared but the random draws."""
    x = torch.tensor(np.asarray(bank.train.embedding), dtype=torch.float32)
    c = preferences.comparisons
    winners, losers = [], []
    for i in range(len(preferences)):
        a, b = (c.prompt_a[i], c.response_a[i]), (c.prompt_b[i], c.response_b[i])
        win, lose = (a, b) if preferences.preference[i] == 1 else (b, a)
        winners.append(x[win]), losers.append(x[lose])
    if pointwise:  # in the library rows stand comparison by comparison, a before b
        data = []
        for i in range(len(preferences)):
            a_wins = preferences.preference[i] == 1
            pair = [(winners[i], 1.0), (losers[i], 0.0)]
            data += pair if a_wins else pair[::-1]
    else:
        data = [((win, lose), 1.0) for win, lose in zip(winners, losers, strict=True)]
        data += [((lose, win), 0.0) for win, lose in zip(winners, losers, strict=True)]
    shuffled = chance("split").permutation(len(data))
    n_val = int(np.ceil(0.2 * len(data)))
    val_ids = set(shuffled[:n_val])
    train = [d for i, d in enumerate(data) if i not in val_ids]
    val = [d for i, d in enumerate(data) if i in val_ids]

    torch_net = build_network((x.shape[2], 8, 4, 1), "relu", chance("init"))
    adam = torch.optim.Adam(torch_net.parameters(), lr=1e-3)

    def loss_of(items):
        if pointwise:
            probability = torch.sigmoid(torch_net(torch.stack([e for e, _ in items]))[:, 0])
        else:
            f = [torch_net(torch.stack([pair[k] for pair, _ in items]))[:, 0] for k in (0, 1)]
            probability = torch.sigmoid(f[0] - f[1])
        return torch.nn.BCELoss()(probability, torch.tensor([y for _, y in items]))

    order, losses = chance("order"), []
    batch = min(batch, len(train))
    for _ in range(epochs):
        for _ in range(int(np.ceil(len(train) / batch))):
            step = loss_of([train[i] for i in order.permutation(len(train))[:batch]])
            adam.zero_grad(), step.backward(), adam.step()
        with torch.no_grad():
            losses.append(float(loss_of(val)))
        if len(losses) > patience and all(losses[-1] > previous for previous in losses[-1 - patience : -1]):
            break
    return torch_net, losses


@pytest.mark.parametrize(("objective", "batch"), [("bradley_terry", 10_240), ("classification", 300)])
def test_released_equals_a_literal_restatement(bank, objective, batch):
    """Same rows, same steps, same stopping epoch, same rewards (to float32 rounding)."""
    config = {"kind": "mlp", "objective": objective, "hidden": [8, 4]}
    protocol = component.build("protocol", {"kind": "released", "batch": batch, "max_epochs": 12})
    preferences = annotate(make_spec(n_annotations=400, protocol="released"), bank, streams(4), {})
    data = TrainingData(bank.train, preferences, protocol, streams(4), Compute(), {})
    fitted = component.build("reward_model", config).fit(data)
    network, losses = literal_released(bank, preferences, streams(4), objective == "classification", batch, 12, 3)
    assert fitted.history["epochs"] == len(losses)
    assert fitted.history["validation_loss"] == pytest.approx(losses[-1], abs=1e-5)
    ours, theirs = fitted.score(bank.test), network(torch.tensor(np.asarray(bank.test.embedding)))[..., 0].detach()
    if objective == "bradley_terry":  # its loss does not see a common constant; Adam turns rounding noise into steps
        ours, theirs = ours - ours.mean(), theirs - theirs.mean()
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


def test_converged_splits_as_clean_and_tries_every_pair(bank):
    """Catches a control that differs from clean in more than its tuning."""
    converged = component.build("protocol", {"kind": "converged", "learning_rates": [1e-2, 1e-3]})
    (_, ours), (_, theirs) = (examples_of(bank, protocol, True) for protocol in (converged, CLEAN))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.first, b.first)
    schedule = converged.schedule(960, True)
    assert schedule.trials == tuple((rate, decay) for rate in (1e-2, 1e-3) for decay in converged.weight_decays)
    assert schedule.restore_best and schedule.batch == CLEAN.schedule(960, True).batch
    assert schedule.patience > CLEAN.patience and schedule.max_epochs > CLEAN.max_epochs


def test_converged_keeps_the_trial_that_validates_best(bank):
    """Catches trials that start from other weights or batches, and a choice by anything but validation loss."""
    model = component.build("reward_model", {"kind": "mlp", "objective": "bradley_terry", "hidden": [8]})
    rates, decays = (1e-2, 1e-4), (0.0, 0.1)

    def fit(rates, decays):
        node = {"kind": "converged", "learning_rates": rates, "weight_decays": decays, "max_epochs": 6}
        protocol = component.build("protocol", node)
        preferences = annotate(make_spec(n_annotations=300), bank, streams(5), {})
        return model.fit(TrainingData(bank.train, preferences, protocol, streams(5), Compute(), {}))

    alone = {(r, d): fit([r], [d]).history["validation_loss"] for r in rates for d in decays}
    chosen = fit(list(rates), list(decays)).history
    assert len(set(alone.values())) == 4
    assert chosen["validation_loss"] == min(alone.values())
    assert chosen["l2"] == min(alone, key=alone.__getitem__)[1]
