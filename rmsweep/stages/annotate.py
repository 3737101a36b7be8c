"""Annotate: bank -> preferences of a simulated annotator."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from rmsweep import component
from rmsweep.annotators import Annotator
from rmsweep.bank import Bank, Split
from rmsweep.cell import DEFAULT_ANNOTATIONS, CellSpec, available_annotations, too_many_annotations
from rmsweep.datasets import BankShape, RewardScale
from rmsweep.errors import DataError, DesignError
from rmsweep.preferences import Comparisons, Preferences
from rmsweep.rng import Streams, streams

MAX_REFERENCE_PAIRS = 2_000_000


def annotate(spec: CellSpec, bank: Bank, chance: Streams, cache: dict[Any, Any]) -> Preferences:
    """Compare, then label: preference = 1[u < P(a > b)], u from the stream "annotation", the same for every beta."""
    comparisons = compare(spec, bank.train, chance)
    difference = comparisons.golden_difference(bank.train)
    scale = reward_scale(spec.dataset.reward_scale, bank.train)
    beta = spec.values.beta if spec.error_rate.value is None else _solved_beta(spec, bank, scale, cache)
    probability = spec.annotator.probability(difference / scale, beta)
    label = chance("annotation").random(len(comparisons)) < probability
    return Preferences(comparisons, label.astype(np.float32), probability, difference, beta)


def compare(spec: CellSpec, split: Split, chance: Streams) -> Comparisons:
    """The cell's comparisons: prompts in the protocol's order, its candidates, its pairing."""
    n = n_annotations(spec, split)
    shuffled = spec.protocol.prompt_order == "shuffled"
    order = chance("pairing", "prompts").permutation(split.n_prompts) if shuffled else np.arange(split.n_prompts)
    candidates = spec.candidates.pick(split, spec.values.pairs_per_prompt, chance("candidates"))
    return spec.pairing.compare(candidates, order, n, spec.values.pairs_per_prompt, chance)


def n_annotations(spec: CellSpec, split: Split) -> int:
    """n_annotations as given, else 10,000 or what the design can give; DesignError when it cannot give them."""
    shape = BankShape(split.count, split.count[:0], has_texts=False)
    if problem := too_many_annotations(spec, shape):
        raise DesignError(problem)
    available = available_annotations(spec, shape)
    visits = spec.values.pairs_per_prompt * split.n_prompts
    return spec.values.n_annotations or min(DEFAULT_ANNOTATIONS, available, visits)


def reward_scale(scale: RewardScale, split: Split) -> float:
    """The unit of golden differences: a number, the sd of all golden rewards, or their pooled sd within prompts.

    within_prompt_sd = sqrt( sum_p sum_i (g_pi - mean_p)^2 / sum_p (n_p - 1) ).
    """
    golden = split.golden.astype(np.float64)
    if scale == "sd":
        value = float(np.nanstd(golden))
    elif scale == "within_prompt_sd":
        deviation = golden - np.nanmean(golden, axis=1, keepdims=True)
        value = float(np.sqrt(np.nansum(deviation**2) / max(1, int((split.count - 1).sum()))))
    else:
        value = float(scale)
    if not value > 0:
        raise DataError(f"reward_scale={scale} is {value}; it must be a positive number")
    return value


def solve_beta(
    difference: NDArray[np.float64],
    error_rate: float,
    annotator: Annotator,
    weight: NDArray[np.float64] | None = None,
) -> float:
    """Solve mean_c P(wrong | |d_c|) = error_rate for beta, over untied scaled golden differences d [C], weights [C]."""
    untied = difference != 0
    size = np.abs(difference[untied])
    if not len(size):
        raise DesignError(f"error_rate={error_rate}: all golden rewards are equal, no error can be made")
    weight = None if weight is None else weight[untied]

    def excess(log_beta: float) -> float:
        wrong = 1 - annotator.probability(size, float(np.exp(log_beta)))
        return float(np.average(wrong, weights=weight)) - error_rate

    return float(np.exp(brentq(excess, -30.0, 30.0, xtol=1e-12)))


def same_prompt_differences(split: Split) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Golden differences of all pairs of responses to one prompt, and weights that give every prompt the same total.

    Of evenly spaced prompts where there are too many pairs.
    """
    per_prompt = split.n_responses * (split.n_responses - 1) // 2
    step = max(1, -(-split.n_prompts * per_prompt // MAX_REFERENCE_PAIRS))
    golden = split.golden[::step].astype(np.float64)
    first, second = np.triu_indices(split.n_responses, 1)
    difference = golden[:, first] - golden[:, second]
    valid = np.isfinite(difference)
    weight = valid / np.maximum(valid.sum(axis=1, keepdims=True), 1)
    return difference[valid], weight[valid]


def _solved_beta(spec: CellSpec, bank: Bank, scale: float, cache: dict[Any, Any]) -> float:
    """Beta of the cell's error rate: once per bank, or for this cell's design, never dependent on its seed."""
    value = spec.error_rate.value
    assert value is not None
    if spec.error_rate.reference == "this_design":
        difference = compare(spec, bank.train, streams(bank.seed)).golden_difference(bank.train)
        return solve_beta(difference / scale, value, spec.annotator)
    key = ("beta", value, scale, str(component.identity(spec.annotator)))
    if key not in cache:
        difference, weight = same_prompt_differences(bank.train)
        cache[key] = solve_beta(difference / scale, value, spec.annotator, weight)
    return float(cache[key])
