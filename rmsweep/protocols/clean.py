"""The protocol done right: split by prompt, each comparison once, best weights restored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rmsweep.bank import Ints, Split
from rmsweep.component import component
from rmsweep.preferences import Preferences
from rmsweep.protocols import Schedule, SplitExamples, pairwise, pointwise

MIN_BATCH = 16  # comparisons


@component("protocol", version=2)
@dataclass(frozen=True)
class Clean:
    """Validation prompts are set aside, no response stands on both sides, the best epoch's weights are kept.

    A comparison follows its prompt a: all comparisons of training prompts train. One of a validation prompt validates
    if its b belongs to a validation prompt too and neither response occurs in training; the others (cross-prompt
    comparisons that straddle the split) are left out: under cross_prompt about 2 % of all comparisons validate. Where
    that is fewer than `min_validation`, comparisons whose b belongs to a training prompt are admitted, still without a
    response that occurs in training: about 6 %.

    A batch holds `batch_comparisons`, fewer where an epoch would have less than `min_steps` steps (never fewer than
    16). Training stops when `patience` epochs brought no better validation loss; max_epochs is a guard. How these
    numbers were chosen, by validation alone: docs/clean_protocol.md.
    """

    prompt_order: ClassVar[Literal["shuffled"]] = "shuffled"

    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    min_validation: Annotated[int, Field(ge=1)] = 200
    batch_comparisons: Annotated[int, Field(ge=1)] = 128
    min_steps: Annotated[int, Field(ge=1)] = 8
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_epochs: Annotated[int, Field(ge=1)] = 100
    patience: Annotated[int, Field(ge=1)] = 2

    def split(
        self, split: Split, preferences: Preferences, pointwise_rows: bool, rng: np.random.Generator
    ) -> SplitExamples:
        """Training and validation examples; `rng`: stream "split"."""
        train, validation = self.sides(split, preferences, rng)
        examples = (pointwise if pointwise_rows else pairwise)(split, preferences)
        return SplitExamples(
            examples.take(np.flatnonzero(train[examples.comparison])),
            examples.take(np.flatnonzero(validation[examples.comparison])),
        )

    def sides(
        self, split: Split, preferences: Preferences, rng: np.random.Generator
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which comparisons train and which validate, bool [C] each; some may do neither."""
        pairs = preferences.comparisons
        held_out = self._held_out(pairs.prompt_a, rng.random(split.n_prompts))
        train = ~held_out[pairs.prompt_a]
        rows_a, rows_b = pairs.rows_a(split), pairs.rows_b(split)
        seen = np.zeros(split.golden.size, dtype=bool)
        seen[rows_a[train]] = seen[rows_b[train]] = True
        unseen = ~train & ~seen[rows_a] & ~seen[rows_b]
        validation = unseen & held_out[pairs.prompt_b]
        return train, validation if validation.sum() >= self.min_validation else unseen

    def _held_out(self, prompt_a: Ints, key: NDArray[np.float64]) -> NDArray[np.bool_]:
        """The validation_fraction of the prompts in use with the smallest keys [P], at least one but never all."""
        used = np.unique(prompt_a)
        n = min(max(1, round(self.validation_fraction * len(used))), len(used) - 1)
        held_out = np.zeros(len(key), dtype=bool)
        held_out[used[np.argsort(key[used])[:n]]] = True
        return held_out

    def schedule(self, n_train: int, pointwise_rows: bool, mass: float | None = None) -> Schedule:
        """Equal numbers of steps for pairs and rows: a batch holds the same number of comparisons."""
        rows = 2 if pointwise_rows else 1
        small = max(MIN_BATCH, n_train // rows // self.min_steps)
        return Schedule(
            learning_rate=self.learning_rate,
            batch=min(self.batch_comparisons, small) * rows,
            max_epochs=self.max_epochs,
            patience=self.patience,
            epoch="pass",
            stop="best",
            restore_best=True,
            weight_decay=self.weight_decay,
        )
