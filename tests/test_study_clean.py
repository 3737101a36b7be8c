"""The study behind protocol=clean: its training is the product's, and it trains on no outer prompt."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import random_bank

from rmsweep import component
from rmsweep.reward_models import Compute, TrainingData
from rmsweep.rng import streams

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "study_clean.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study_clean", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["study_clean"] = module  # dataclasses and typing look a module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(study):
    bank = random_bank(np.random.default_rng(3), p=300, n=11, d=6)
    return study.World(bank.train.take(np.arange(200)), bank.train.take(np.arange(200, 300)), bank.test, (8,))


@pytest.mark.parametrize("objective", ["bradley_terry", "classification"])
def test_a_trajectory_is_the_products_training(study, world, objective, bf16_everywhere):
    """Catches a study of another training loop than the one whose defaults it sets: losses, steps, batches."""
    condition = study.Condition("none", 200, 1.0, objective, 0)
    setting = study.Setting(1e-2, 32, weight_decay=1e-3, max_epochs=6)
    trajectory = study.Run(study.Data.of(world, condition), world.hidden, condition, setting).trajectory(patience=9)
    node = {"kind": "clean", "learning_rate": 1e-2, "batch_comparisons": 32, "weight_decay": 1e-3, "max_epochs": 6}
    protocol = component.build("protocol", {**node, "min_steps": 1, "patience": 9})
    model = component.build("reward_model", {"kind": "mlp", "objective": objective, "hidden": [8]})
    compute, preferences = Compute("cpu", "bf16"), world.preferences(200, 1.0, 0)
    history = model.fit(TrainingData(world.inner, preferences, protocol, streams(0), compute, {})).history
    kept, visits = trajectory.kept(9, 6)
    assert history["validation_loss"] == pytest.approx(kept.inner, abs=2e-3)
    assert history["n_train"] == trajectory.n_train and visits == 6 * trajectory.n_train
    assert len({round(e.inner, 4) for e in trajectory.epochs}) > 3  # it does train


def test_stopping_rules_are_told_from_one_trajectory(study):
    """Patience counts epochs after the best; a cap ends it; visits go on until the stop, not to the kept epoch."""
    epochs = [study.Epoch(inner, i, 0.5) for i, inner in enumerate([0.7, 0.6, 0.61, 0.59, 0.62, 0.63, 0.5])]
    trajectory = study.Trajectory(100, epochs, 0.0)
    assert [(e.loss, v) for e, v in (trajectory.kept(1, 60), trajectory.kept(2, 60), trajectory.kept(3, 60))] == [
        (1, 300), (3, 600), (6, 700),
    ]  # fmt: skip
    assert trajectory.kept(3, 3)[1] == 300


def test_outer_labels_do_not_reach_training(study, world):
    """Catches a leak: with other outer embeddings the inner losses are the same, the outer ones are not."""
    condition = study.Condition("none", 200, 1.0, "bradley_terry", 0)
    swapped = world._replace(outer=world.inner.take(np.arange(100)))
    one, other = (
        study.Run(study.Data.of(w, condition), w.hidden, condition, study.Setting(max_epochs=2)).trajectory(2).epochs
        for w in (world, swapped)
    )
    assert [e.inner for e in one] == [e.inner for e in other] and one[0].loss != other[0].loss


def test_quick_study_runs_continues_and_prints(study, tmp_path, monkeypatch, capsys):
    """--quick trains both settings for both objectives; a second call trains nothing and prints the same tables."""
    arguments = ["study_clean.py", "--quick", "--out", str(tmp_path / "out.jsonl")]
    printed = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", arguments)
        study.main()
        printed.append(capsys.readouterr().out)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 8
    assert printed[0] == printed[1] and "**classification**, 2 conditions" in printed[0]
