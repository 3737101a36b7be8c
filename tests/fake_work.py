"""A stand-in for the pipeline without torch: cells of milliseconds that fail, diverge or kill their worker on request.

Run as a script it is a whole driver, to be killed: fake_work.py ROOT N_SEEDS WORKERS.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from rmsweep.errors import DesignError, Diverged
from rmsweep.pipeline import Outcome
from rmsweep.rng import stream

FAIL, DIVERGE, SKIP, DIE, DIE_ONCE = 900, 901, 902, 903, 904


class Fake:
    """What rmsweep.runner.Work asks for."""

    def build(self, config, folder):
        """A bank is one number per base LLM."""
        (folder / "bank.json").write_text(json.dumps(config["base_llm"]))
        (folder / "data.bin").write_bytes(b"x" * 50_000)

    def open(self, folder):
        """The bank's content."""
        return json.loads((folder / "bank.json").read_text())

    def run(self, config, bank, compute, cache, keep):
        """Metrics that are a pure function of cell and bank."""
        seed = config["seed"]
        if seed == FAIL:
            raise ValueError("this cell always fails")
        if seed == DIVERGE:
            raise Diverged("loss is not finite at epoch 3")
        if seed == SKIP:
            raise DesignError("not enough pairs")
        if seed == DIE or (seed == DIE_ONCE and first_time()):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        draw = stream(seed, "fake", bank["name"]).random(5)
        metrics = {"golden_improvement": float(draw.mean()), "spearman": None, "beta": config["beta"]}
        return Outcome(metrics, draw.astype(np.float32), {"train": 0.01}, {"scores": draw} if keep == "scores" else {})


WORK = Fake()


def first_time():
    """True once per FAKE_MARKER file."""
    marker = Path(os.environ["FAKE_MARKER"])
    fresh = not marker.exists()
    marker.touch()
    return fresh


def main(root, n_seeds, workers):
    """Run the fake sweep as a process of its own."""
    from running import fake_plan, run

    summary = run(fake_plan(int(n_seeds)), Path(root), int(workers))
    return 128 + summary.interrupted if summary.interrupted else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
