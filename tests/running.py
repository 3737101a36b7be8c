"""What the tests of running share: a small plan over the fake work, and digests of a sweep's tables."""

import hashlib
from pathlib import Path

from conftest import cell_config

from rmsweep import execute
from rmsweep.cell import PlannedCell
from rmsweep.engines.local import Local
from rmsweep.fingerprint import digest
from rmsweep.plan import Plan
from rmsweep.reward_models import Compute
from rmsweep.schemas import AXES

LLMS = ("sim_2b", "sim_7b")


def planned(seed, base_llm="sim_2b", reason=None):
    """One cell; its ids are digests of its labels."""
    labels = {c.name: None for c in AXES}
    labels |= {"base_llm": base_llm, "beta": 1.0, "seed": seed, "reward_model": "length", "size": "tiny"}
    config = cell_config(seed=seed, base_llm=base_llm, reward_model="length", size="tiny")
    return PlannedCell(digest(labels), digest(["f", labels]), digest(["b", base_llm]), labels, config, reason)


def fake_plan(seeds, name="fake", llms=LLMS, keep="none"):
    """Two banks, `seeds` cells each (a number, or the seeds themselves)."""
    seeds = range(seeds) if isinstance(seeds, int) else seeds
    return Plan(name, [planned(s, llm) for llm in llms for s in seeds], Compute(), keep)


def run(plan, root, workers=0, **options):
    """Run a plan over the fake work."""
    return execute.run(plan, Path(root), Local(workers), progress=False, work="fake_work:WORK", **options)


def digests(root, name="fake"):
    """sha256 of the deterministic tables."""
    folder = Path(root) / "sweeps" / name
    return {t: hashlib.sha256((folder / f"{t}.parquet").read_bytes()).hexdigest() for t in ("results", "prompts")}
