"""The surface baseline: Bradley-Terry on eight counts of a response's form; it understands nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from sklearn.linear_model import LogisticRegression

from rmsweep.bank import Split
from rmsweep.component import component
from rmsweep.datasets import BankShape
from rmsweep.errors import DesignError, Diverged
from rmsweep.protocols import Examples
from rmsweep.reward_models import TrainingData

Array = NDArray[np.float64]
FEATURES = (
    "log_characters", "log_words", "word_length", "log_lines",
    "log_list_items", "log_code_marks", "log_questions", "log_digits",
)  # fmt: skip
LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+•]|\d+[.)])[ \t]", re.MULTILINE)
CODE_MARK = re.compile(r"`+")
QUESTION = re.compile(r"[?!]")
DIGIT = re.compile(r"\d")
NEEDS_TEXTS = "reward_model surface needs the responses' texts, which this bank does not have"


@component("reward_model", version=1)
@dataclass(frozen=True)
class Surface:
    """score = w.f with w from Bradley-Terry on differences of eight standardised features f of the text.

    Minimises sum_c [-p log sigma(w.(f_a - f_b)) - (1 - p) log sigma(w.(f_b - f_a))] + l2 n / 2 |w|^2 over the
    n examples the protocol trains on; mean and sd of f come from the training split's responses.
    """

    l2: Annotated[float, Field(gt=0)] = 1e-4

    def skip(self, shape: BankShape) -> str | None:
        """Runs on banks with texts only."""
        return None if shape.has_texts else NEEDS_TEXTS

    def fit(self, data: TrainingData) -> FittedSurface:
        """Fit the eight weights; raises Diverged when they are not finite, DesignError without texts."""
        if "surface" not in data.cache:
            data.cache["surface"] = surface_features(data.split)
        features = data.cache["surface"]
        valid = features[np.isfinite(data.split.golden)]
        mean, sd = valid.mean(axis=0), valid.std(axis=0)
        scale = np.where(sd > 0, sd, 1.0)
        flat = ((features - mean) / scale).reshape(-1, len(FEATURES))
        train, validation = data.protocol.split(data.split, data.preferences, False, data.streams("split"))
        weight, iterations = _bradley_terry(flat, train, self.l2)
        history = {
            "n_train": len(np.unique(train.comparison)),
            "n_validation": len(np.unique(validation.comparison)),
            "epochs": iterations,
            "best_epoch": None,
            "train_loss": _loss(flat, train, weight),
            "validation_loss": _loss(flat, validation, weight) if len(validation) else None,
            "l2": self.l2,
        }
        return FittedSurface(mean, scale, weight, history)


@dataclass(frozen=True, eq=False)
class FittedSurface:
    """Weights [8] on standardised features."""

    mean: Array
    scale: Array
    weight: Array
    history: Mapping[str, float | int | None]

    def score(self, split: Split) -> NDArray[np.float32]:
        """w.f of every response [P, N]; that of an empty text at padding."""
        return (((surface_features(split) - self.mean) / self.scale) @ self.weight).astype(np.float32)

    def state(self) -> dict[str, NDArray[Any]]:
        """Mean, scale and weight of the features, [8] each."""
        return {"mean": self.mean, "scale": self.scale, "weight": self.weight}


def surface_features(split: Split) -> Array:
    """The features FEATURES of every response, float64 [P, N, 8]; zero at padding."""
    if split.response is None:
        raise DesignError(NEEDS_TEXTS)
    features = np.zeros((*split.golden.shape, len(FEATURES)))
    for prompt, responses in enumerate(split.response):
        for index, text in enumerate(responses):
            features[prompt, index] = text_features(text)
    return features


def text_features(text: str) -> list[float]:
    """Eight numbers: mean characters per word, and log(1 + count) of characters, words, lines, list items,
    runs of backticks, question and exclamation marks, digits.
    """
    words = text.split()
    counts = [len(text), len(words), len(text.splitlines())]
    counts += [len(pattern.findall(text)) for pattern in (LIST_ITEM, CODE_MARK, QUESTION, DIGIT)]
    characters, n_words, *others = np.log1p(counts).tolist()
    return [characters, n_words, sum(map(len, words)) / max(1, len(words)), *others]


def _bradley_terry(features: Array, train: Examples, l2: float) -> tuple[Array, int]:
    """Weights and iterations; each comparison stands as a win (weight p) and a loss (1 - p) of its first."""
    difference = _differences(features, train)
    target = train.target.astype(np.float64)
    model = LogisticRegression(C=1 / (l2 * len(train)), fit_intercept=False, tol=1e-8, max_iter=1000)
    won = np.repeat([True, False], len(train))
    model.fit(np.tile(difference, (2, 1)), won, sample_weight=np.concatenate([target, 1 - target]))
    weight = np.asarray(model.coef_[0], dtype=np.float64)
    if not np.isfinite(weight).all():
        raise Diverged("reward_model surface: weights are not finite")
    return weight, int(model.n_iter_[0])


def _loss(features: Array, examples: Examples, weight: Array) -> float:
    """Mean Bradley-Terry loss in nats."""
    logit = _differences(features, examples) @ weight
    return float(np.mean(np.logaddexp(0, -logit) + (1 - examples.target) * logit))


def _differences(features: Array, examples: Examples) -> Array:
    """f(first) - f(second), [E, 8]."""
    if examples.second is None:
        raise ValueError("surface needs pairwise examples")
    return np.asarray(features[examples.first] - features[examples.second])
