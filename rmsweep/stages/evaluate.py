"""Evaluate: fitted model -> metrics on the test split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from rmsweep.bank import Bank, Floats, Ints, Split
from rmsweep.cell import CellSpec
from rmsweep.metrics import best_of_n, noisy, rank, tilt
from rmsweep.metrics.ragged import Group, groups
from rmsweep.preferences import Comparisons, Preferences
from rmsweep.reward_models import FittedModel
from rmsweep.rng import stream
from rmsweep.stages.annotate import reward_scale, view

HISTORY = ("n_train", "n_validation", "epochs", "best_epoch", "train_loss", "validation_loss", "l2", "learning_rate")
T = TypeVar("T")


class Evaluation(NamedTuple):
    """Columns of results.parquet, golden reward of each test prompt's pick [Q], proxy scores [Q, M]."""

    metrics: dict[str, Any]
    golden_picked: NDArray[np.float32]
    scores: NDArray[np.float32]


def evaluate(
    spec: CellSpec, bank: Bank, preferences: Preferences, model: FittedModel, cache: dict[Any, Any]
) -> Evaluation:
    """All metrics of a fitted model on the test split; what is not defined on a bank is None.

    Raises Diverged when a score is NaN or infinite. `cache` keeps pure functions of the bank between cells.
    """
    cache = cache.setdefault("evaluate", {})
    score = np.asarray(model.score(bank.test), dtype=np.float32)
    orders: dict[int, Ints] = cache.setdefault("golden_orders", {})
    parts = list(groups(score, bank.test.golden, orders))
    picked = best_of_n.pick_of(parts, bank.test.n_prompts)
    metrics = {
        **_best_of_n(parts, picked, bank.test, cache),
        **_ranks(parts, score, picked, bank.test, orders),
        **_noisy(spec, score, bank, preferences, cache),
        **_tilt(spec, score, bank, model, cache),
        **_training(preferences, model.history),
    }
    return Evaluation(metrics, picked.golden.astype(np.float32), score)


def _best_of_n(parts: Sequence[Group], picked: best_of_n.Pick, split: Split, cache: dict[Any, Any]) -> dict[str, Any]:
    curve = best_of_n.best_of_n_of(parts)
    references: dict[str, Any] = _cached(cache, "references", lambda: _references(split))
    return {
        "bon_n": list(range(1, len(curve) + 1)),
        "bon_golden": curve.tolist(),
        "golden_improvement": float(np.mean(picked.golden)) - references["golden_random"],
        **references,
    }


def _references(split: Split) -> dict[str, float | None]:
    """Golden reward of a random pick, of the best response, and of the best pick the embedding allows."""
    golden = split.golden.astype(np.float64)
    ceiling = None if split.ceiling is None else np.mean(best_of_n.pick(split.ceiling, split.golden).golden)
    return {
        "golden_random": float(np.nanmean(golden, axis=1).mean()),
        "golden_best": float(np.nanmax(golden, axis=1).mean()),
        "golden_ceiling": None if ceiling is None else float(ceiling),
    }


def _ranks(
    parts: Sequence[Group], score: Floats, picked: best_of_n.Pick, split: Split, orders: dict[int, Ints]
) -> dict[str, Any]:
    same_prompt = rank.same_prompt_counts_of(parts)
    return {
        "spearman": rank.spearman_of(parts),
        "agreement": same_prompt.agreement,
        "agreement_cross_prompt": (rank.all_counts(score, split.golden, orders) - same_prompt).agreement,
        "pick_quantile": float(np.mean(picked.quantile)),
    }


def _noisy(
    spec: CellSpec, score: Floats, bank: Bank, preferences: Preferences, cache: dict[Any, Any]
) -> dict[str, Any]:
    """Agreement with the cell's own annotator on test pairs that are the same for every cell of the bank."""
    n, scale = spec.evaluate.n_noisy_pairs, spec.dataset.reward_scale
    unit = _cached(cache, ("reward_scale", scale), lambda: reward_scale(scale, bank.train))

    def expected(name: str, draw: Callable[[Split, int, np.random.Generator], Comparisons | None]) -> float | None:
        chance = stream(bank.seed, "evaluation", name)
        pairs = _cached(cache, (name, n), lambda: draw(bank.test, n, chance))
        if pairs is None:
            return None
        seen = view(spec, bank, bank.test, pairs, unit, preferences.levels)
        probability = spec.annotator.expected(seen, preferences.beta * seen.quality)
        return noisy.agreement_noisy(score, bank.test, pairs, probability)

    return {
        "agreement_noisy": expected("same_prompt", noisy.same_prompt_pairs),
        "agreement_noisy_cross_prompt": expected("cross_prompt", noisy.cross_prompt_pairs),
    }


def _tilt(spec: CellSpec, score: Floats, bank: Bank, model: FittedModel, cache: dict[Any, Any]) -> dict[str, Any]:
    """Policies by raw scores and by scores recalibrated on training responses (tau in golden units)."""
    tau, n = spec.evaluate.tilt_tau, spec.evaluate.n_calibration
    seen = _cached(cache, ("calibration", n), lambda: calibration_split(bank.train, n))
    valid = np.isfinite(seen.golden)
    in_golden_units = tilt.recalibrated(score, model.score(seen)[valid], seen.golden[valid])
    raw, calibrated = (tilt.tilt(values, bank.test.golden, tau) for values in (score, in_golden_units))
    return {
        "tilt_tau": list(tau),
        "tilt_golden": raw.golden.tolist(),
        "tilt_kl": raw.kl.tolist(),
        "tilt_golden_calibrated": calibrated.golden.tolist(),
        "tilt_kl_calibrated": calibrated.kl.tolist(),
    }


def calibration_split(split: Split, n: int) -> Split:
    """All responses of evenly spaced prompts of a split, at least n responses where it has as many."""
    n_prompts = min(split.n_prompts, math.ceil(n * split.n_prompts / int(split.count.sum())))
    return split.take(np.arange(n_prompts) * split.n_prompts // n_prompts)


def _training(preferences: Preferences, history: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the preferences and of training; an undefined error rate (all tied) is None."""
    error_rate = preferences.annotation_error_rate
    return {
        "n_annotations": len(preferences),
        "beta": preferences.beta,
        "annotation_error_rate": None if math.isnan(error_rate) else error_rate,
        "golden_gap": preferences.golden_gap,
        **{name: history.get(name) for name in HISTORY},
    }


def _cached(cache: dict[Any, Any], key: Any, make: Callable[[], T]) -> T:
    if key not in cache:
        cache[key] = make()
    result: T = cache[key]
    return result
