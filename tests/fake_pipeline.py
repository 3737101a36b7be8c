"""A cheap stand-in for the real pipeline, named by import path from tests only; it never loads torch.

Its numbers are a pure function of the cell's config. Environment variables (workers inherit them) say how a run goes:
FAKE_LEDGER: a folder that gets one file per computed cell and per built bank, naming the GPUs that were to be seen.
FAKE_SECONDS: how long a cell takes.
FAKE_FAULTS: JSON, seed -> raise | diverge | skip | die | segfault | terminated | stray_column | slow | hang | hog |
short | data, and the same with _once; "bank" -> raise | die | hang; "open" -> how often opening
a bank fails. FAKE_HOG: bytes that hog takes.
"""

import functools
import json
import os
import signal
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rmsweep import execute
from rmsweep.engines.local import Local
from rmsweep.errors import DataError, DesignError, Diverged
from rmsweep.grid import describe
from rmsweep.planner import make
from rmsweep.presets import Presets
from rmsweep.schemas import METRICS


class FakeOutcome(NamedTuple):
    metrics: dict
    golden_picked: np.ndarray
    seconds: dict
    kept: dict


class Fake:
    """A rmsweep.runner.Work."""

    def build(self, config, folder, inputs=None):
        note("bank")
        fault = faults().get("bank")
        if fault == "raise":
            raise RuntimeError("no such world")
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            time.sleep(1000)
        golden = np.arange(1000, dtype=np.float32) + config["dataset"].get("seed", 0)
        np.save(folder / "golden.npy", golden)
        np.save(folder / "embedding.npy", 2 * golden)

    def open(self, folder):
        if (fault := faults().get("open")) and len(OPENED) < fault:
            OPENED.append(folder)
            raise RuntimeError("no such bank")
        return np.load(folder / "golden.npy")

    def run(self, config, bank, compute, cache, keep):
        seed, beta = int(config["seed"]), float(config["beta"])
        apply(faults().get(str(seed)), seed)
        rng = np.random.default_rng([seed, int(beta * 1000)])
        metrics = {c.name: None for c in METRICS} | {
            "golden_improvement": float(rng.random()), "n_train": seed, "bon_n": [1, 2], "bon_golden": [0.0, 1 / 3],
            "beta": beta, "n_annotations": 100,
        }  # fmt: skip
        if faults().get(str(seed)) == "stray_column":
            metrics["no_such_column"] = 1.0
        if faults().get(str(seed)) == "nan":
            metrics["spearman"] = float("nan")
        note(f"cell-{seed}-{beta}")
        kept = {"scores": rng.random((2, 3)).astype(np.float32)} if keep == "scores" else {}
        return FakeOutcome(
            metrics, rng.random(4).astype(np.float32), {"annotate": 0.0, "train": 0.0, "evaluate": 0.0}, kept
        )

    def run_cells(self, configs, bank, compute, cache, keep):
        for i, config in enumerate(configs):
            yield i, functools.partial(self.run, config, bank, compute, cache, keep)


WORK = Fake()
HOGGED, OPENED = [], []


def faults():
    return json.loads(os.environ.get("FAKE_FAULTS", "{}"))


def apply(fault, seed):
    """Let the cell go wrong."""
    marker = Path(os.environ.get("FAKE_LEDGER", "/nonexistent")) / f"died-{seed}"
    if fault and fault.endswith("_once"):
        fault = None if marker.exists() else fault[: -len("_once")]
        marker.touch()
    numbers = {"die": signal.SIGKILL, "segfault": signal.SIGSEGV, "terminated": signal.SIGTERM}
    if fault in numbers:
        os.kill(os.getpid(), numbers[fault])
        time.sleep(1)
    if fault == "hang":
        time.sleep(1000)
    if fault == "hog":
        HOGGED.append(np.ones(int(os.environ["FAKE_HOG"]) // 8))
        time.sleep(1000)
    if fault == "short":
        raise MemoryError
    if fault == "data":
        raise DataError("row 3 of it is NaN")
    time.sleep(30 if fault == "slow" else float(os.environ.get("FAKE_SECONDS", "0")))
    if fault == "raise":
        raise ValueError(f"seed {seed} does not work")
    if fault == "diverge":
        raise Diverged("loss is NaN")
    if fault == "skip":
        raise DesignError("not enough pairs")


def note(what):
    if folder := os.environ.get("FAKE_LEDGER"):
        (Path(folder) / f"{what}-{uuid.uuid4().hex}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))


def fake_plan(n_seeds=6, betas=(1.0,), name="s", worlds=(0,), keep="none", exclude=()):
    """A real plan whose cells the fake runs; `worlds`: dataset seeds, one bank each."""
    axes = {"dataset.seed": list(worlds), "beta": list(betas), "seed": list(range(n_seeds))}
    node = {"name": name, "set": {"size": "tiny", "reward_model": "bt_linear"}, "axes": axes, "exclude": list(exclude)}
    return make(describe(node), Presets(), keep=keep)


def fake_run(plan, root, workers=0, engine=None, **options):
    """execute.run with the fake in place of the pipeline."""
    engine = engine or Local(workers=workers)
    options = {"progress": False, "work": "fake_pipeline:WORK", **options}
    return execute.run(plan, Path(root), engine, **options)
