"""Train: preferences -> fitted reward model."""

from __future__ import annotations

from typing import Any

from rmsweep.bank import Bank
from rmsweep.cell import CellSpec
from rmsweep.preferences import Preferences
from rmsweep.reward_models import Compute, FittedModel, TrainingData
from rmsweep.rng import Streams


def train(
    spec: CellSpec, bank: Bank, preferences: Preferences, chance: Streams, compute: Compute, cache: dict[Any, Any]
) -> FittedModel:
    """Fit the cell's reward model on its preferences under its protocol; raises Diverged."""
    return spec.reward_model.fit(
        TrainingData(bank.train, preferences, spec.protocol, chance, compute, cache.setdefault("train", {}))
    )
