"""The control for tuning: learning rate and weight decay by validation, per cell, and epochs without a budget."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from rmsweep.bank import Split
from rmsweep.component import component
from rmsweep.preferences import Preferences
from rmsweep.protocols import Schedule, SplitExamples
from rmsweep.protocols.clean import Clean

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


@component("protocol", version=1)
@dataclass(frozen=True)
class Converged:
    """Clean's split; a training run for every pair of learning rate and weight decay, the best by validation is kept.

    Every objective and cell is tuned for itself on its own validation comparisons, so that a difference between two
    objectives is not the difference between how well one setting suits them. Every run ends when `patience` epochs
    brought no better validation loss, and keeps its best epoch. What the runs share: initial weights, batches.
    Where a reward model has no learning rate (linear, boosted trees), this is `clean`.
    """

    prompt_order: ClassVar[Literal["shuffled"]] = "shuffled"

    learning_rates: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1e-3, 3e-4, 1e-4)
    weight_decays: Annotated[tuple[NotNegative, ...], Field(min_length=1)] = (0.0, 1e-3, 1e-2)
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    min_validation: Annotated[int, Field(ge=1)] = 200
    batch_comparisons: Annotated[int, Field(ge=1)] = 128
    min_steps: Annotated[int, Field(ge=1)] = 8
    max_epochs: Annotated[int, Field(ge=1)] = 300
    patience: Annotated[int, Field(ge=1)] = 10

    @property
    def clean(self) -> Clean:
        """The protocol whose split and batches these are."""
        return Clean(
            validation_fraction=self.validation_fraction,
            min_validation=self.min_validation,
            batch_comparisons=self.batch_comparisons,
            min_steps=self.min_steps,
            max_epochs=self.max_epochs,
            patience=self.patience,
        )

    def split(
        self, split: Split, preferences: Preferences, pointwise_rows: bool, rng: np.random.Generator
    ) -> SplitExamples:
        """Training and validation examples, clean's; `rng`: stream "split"."""
        return self.clean.split(split, preferences, pointwise_rows, rng)

    def schedule(self, n_train: int, pointwise_rows: bool, mass: float | None = None) -> Schedule:
        """Clean's, with every (learning_rate, weight_decay) of the two lists as a trial."""
        trials = tuple(itertools.product(self.learning_rates, self.weight_decays))
        schedule = self.clean.schedule(n_train, pointwise_rows)
        return replace(schedule, learning_rate=trials[0][0], weight_decay=trials[0][1], trials=trials)
