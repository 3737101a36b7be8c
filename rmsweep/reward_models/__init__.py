"""Reward models: what is trained on preferences; their score is the proxy reward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rmsweep.bank import Floats, Split
from rmsweep.preferences import Preferences
from rmsweep.protocols import FitProtocol
from rmsweep.rng import Streams

BF16_WEIGHTS = 1 << 16  # the demo's 256 x 128 is below: fp32 takes 0.7 times as long there


class Compute(NamedTuple):
    """Where and in what arithmetic a model is fitted: resolved once per sweep, part of the fingerprint."""

    device: str = "cpu"
    precision: str = "fp32"

    def of(self, widths: Sequence[int]) -> Compute:
        """Itself, or fp32 for a network D -> ... -> 1 without a layer of BF16_WEIGHTS: casts would cost more there."""
        large = any(a * b >= BF16_WEIGHTS for a, b in itertools.pairwise(widths))
        return self if large else Compute(self.device, "fp32")


@dataclass(frozen=True, eq=False)
class TrainingData:
    """All a reward model may see: training split, preferences, protocol, named random streams, compute.

    `cache` outlives the cell within a unit (binned banks and the like); its content must be a pure function of the
    bank, never of a cell, so that a cell alone and a cell among 200 give the same bits.
    """

    split: Split
    preferences: Preferences
    protocol: FitProtocol
    streams: Streams
    compute: Compute
    cache: dict[Any, Any]


class FittedModel(Protocol):
    """A trained reward model."""

    history: Mapping[str, float | int | None]

    def score(self, split: Split) -> NDArray[np.float32]:
        """Proxy rewards [P, N] of every response of `split`; what stands at padding is ignored."""
        ...

    def state(self) -> dict[str, NDArray[Any]]:
        """Named arrays that rebuild the model (`keep=models`); empty where a library has no safe format."""
        ...


class RewardModel(Protocol):
    """The whole interface of a reward model."""

    def fit(self, data: TrainingData) -> FittedModel:
        """Train on `data`; raises Diverged on NaN or infinity."""
        ...


def score_in_chunks(split: Split, score_rows: Callable[[Floats], Floats], max_rows: int = 16384) -> NDArray[np.float32]:
    """Proxy rewards [P, N], streaming the embeddings [rows, D], fp16 or fp32, through `score_rows` -> [rows].

    max_rows: about how many at a time.
    """
    scores = np.zeros(split.golden.shape, dtype=np.float32)
    for part in split.chunks(max_rows):
        block = np.asarray(split.embedding[part]).reshape(-1, split.dim)
        scores[part] = score_rows(block).reshape(scores[part].shape)
    return scores
