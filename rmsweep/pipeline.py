"""Which stage feeds which: bank -> annotate -> train -> evaluate, for one cell."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rmsweep.bank import Bank
from rmsweep.cell import CellSpec
from rmsweep.reward_models import Compute
from rmsweep.rng import streams
from rmsweep.stages.annotate import annotate
from rmsweep.stages.evaluate import evaluate
from rmsweep.stages.train import train


class Outcome(NamedTuple):
    """What a cell gives: metrics (columns of results.parquet), the golden reward picked for each test prompt [Q],
    seconds per stage, and what `keep` asked for (scores [Q, M], arrays of the model).
    """

    metrics: dict[str, Any]
    golden_picked: NDArray[np.float32]
    seconds: dict[str, float]
    kept: dict[str, NDArray[Any]]


def run_cell(
    spec: CellSpec, bank: Bank, compute: Compute, cache: dict[Any, Any] | None = None, keep: str = "none"
) -> Outcome:
    """Run one cell on its bank: a pure function of the two; raises Diverged, DesignError.

    `cache` carries pure functions of the bank between the cells of a unit.
    """
    cache = {} if cache is None else cache
    chance, clock = streams(spec.values.seed), [time.perf_counter()]
    preferences = annotate(spec, bank, chance, cache)
    clock.append(time.perf_counter())
    model = train(spec, bank, preferences, chance, compute, cache)
    clock.append(time.perf_counter())
    result = evaluate(spec, bank, preferences, model, cache)
    clock.append(time.perf_counter())
    seconds = dict(zip(("annotate", "train", "evaluate"), np.diff(clock).tolist(), strict=True))
    kept = {"scores": {"scores": result.scores}, "models": model.state()}.get(keep, {})
    return Outcome(result.metrics, result.golden_picked, seconds, kept)
