"""Planner, store and runner at scale: seconds, memory, files and overhead per cell, each beside its bar.

    python scripts/bench_scale.py [--cells 12960] [--planned 100000] [--workers 2] [--real 216] [--quick] [--json FILE]

Every command line is run for real in a process of its own. "Overhead" is all processor time of `rmsweep run` on the
real pipeline (banks, annotation, metrics, records, tables, start-up) with reward models that neither fit nor score:
this file is the plug-in that holds them. --real times cells of paper/full with its own reward models; --real 12960
runs them all in one `rmsweep run`, then plans and runs the finished sweep again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rmsweep.bank import Split
from rmsweep.component import component
from rmsweep.reward_models import TrainingData

FULL = ("sweep=paper/full", "size=tiny", "protocol=clean")
PER_SEED = 12_960 // 5
Q, M = 2_292, 500  # test prompts and responses of a bank of the paper
GIB = 2**30


# -- reward models that cost nothing -----------------------------------------------------------------------


@component("reward_model", kind="bench_free", version=1)
@dataclass(frozen=True)
class Free:
    """score = one coordinate of the embedding: no fit, no product. `axis` tells three of them apart."""

    axis: int = 0

    def fit(self, data: TrainingData) -> FreeFitted:
        """Nothing to fit."""
        return FreeFitted(self.axis)


@dataclass(frozen=True)
class FreeFitted:
    """The coordinate."""

    axis: int
    history: ClassVar[Mapping[str, float | int | None]] = {"n_train": 0, "n_validation": 0}

    def score(self, split: Split) -> NDArray[np.float32]:
        """Coordinate `axis` of every response [P, N]."""
        return np.asarray(split.embedding[..., self.axis], dtype=np.float32)

    def state(self) -> dict[str, NDArray[Any]]:
        """Nothing to keep."""
        return {}


# -- measuring ---------------------------------------------------------------------------------------------


class Used(NamedTuple):
    """What a command took: wall and processor seconds (its children's too), the largest process, its output."""

    wall: float
    cpu: float
    peak_mib: float
    text: str


def rmsweep(*words: str) -> Used:
    """Run one command line; a failure ends the benchmark with its output."""
    return measured([sys.executable, "-m", "rmsweep", *words])


def measured(command: Sequence[str]) -> Used:
    """Run a command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{text}")
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return Used(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, peak, text)


def n_files(root: Path) -> int:
    """Files below a folder."""
    return sum(path.is_file() for path in root.rglob("*"))


def sizes(root: Path) -> float:
    """MiB below a folder."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) / 2**20


# -- what is measured --------------------------------------------------------------------------------------


def grid(n_cells: int) -> tuple[str, ...]:
    """Words of paper/full at size tiny with about n_cells cells."""
    if n_cells >= PER_SEED:
        return (*FULL, f"seed=range({round(n_cells / PER_SEED)})")
    return (*FULL, "seed=0", "base_llm=sim_2b", "dataset=sim_helpful", f"beta={','.join(map(str, betas(n_cells)))}")


def betas(n_cells: int) -> list[float]:
    """Betas of a grid of n_cells cells on one bank: 36 cells each."""
    return [0.5, 0.7, 1.0, 3.0, 5.0, 10.0][: max(1, n_cells // 36)]


def planned(words: Sequence[str], root: Path) -> dict[str, float]:
    """`rmsweep plan`: seconds, memory, cells."""
    used = rmsweep("plan", *words, f"root={root}")
    return {"cells": cells_of(used.text), "seconds": used.wall, "cpu_seconds": used.cpu, "peak_mib": used.peak_mib}


def cells_of(text: str) -> int:
    """Cells in the first line of a plan."""
    line = next(line for line in text.splitlines() if line.startswith("sweep "))
    return int(line.split(": ")[1].split()[0].replace(",", ""))


def overhead(n_cells: int, workers: int, root: Path) -> dict[str, float]:
    """`rmsweep run` with reward models that cost nothing, and the same command again."""
    words = [*grid(n_cells), f"root={root}", "--plugin", str(Path(__file__).resolve())]
    words += ["--config-dir", str(free_presets(root)), "reward_model=bench_free", "reward_model.axis=0,1,2"]
    words += [f"engine.workers={workers}"]
    first, again = rmsweep("run", *words), rmsweep("run", *words)
    if "; 0 computed" not in again.text:
        raise SystemExit(f"the same command computed again:\n{again.text}")
    cells, worker_mib = of_costs(root)
    return {
        "cells": cells,
        "run_seconds": first.wall,
        "overhead_ms": 1e3 * first.cpu / cells,
        "driver_peak_mib": first.peak_mib,
        "worker_peak_mib": worker_mib,
        "again_seconds": again.wall,
        "again_cpu_seconds": again.cpu,
        "again_peak_mib": again.peak_mib,
        "files": n_files(root),
        "mib_on_disk": sizes(root),
    }


def free_presets(root: Path) -> Path:
    """A --config-dir with the option reward_model=bench_free."""
    folder = root.parent / f"{root.name}-conf" / "reward_model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench_free.yaml").write_text("kind: bench_free\naxis: 0\n")
    return folder.parent


def of_costs(root: Path) -> tuple[int, float]:
    """Computed cells of the only sweep under root, and the largest worker in MiB."""
    import pyarrow.parquet as pq

    (path,) = root.glob("sweeps/*/costs.parquet")
    peaks = pq.read_table(path, columns=["peak_memory_mib"])["peak_memory_mib"].to_pylist()
    return len(peaks), max(peaks)


def tables_at_full_size(n_cells: int, root: Path) -> dict[str, float]:
    """Random records of the paper's shape in the store; assembling them, then finding that nothing is to be done."""
    measured([sys.executable, __file__, "--fill", str(n_cells), str(root)])
    first, again = (
        json.loads(measured([sys.executable, __file__, "--assemble", str(root)]).text.splitlines()[-1])
        for _ in range(2)
    )
    return {
        "cells": first["cells"],
        "assemble_seconds": first["seconds"],
        "assemble_cpu_seconds": first["cpu_seconds"],
        "assemble_peak_mib": first["peak_mib"],
        "again_cpu_seconds": again["cpu_seconds"],
        "store_mib": sizes(root / "store"),
        "tables_mib": sizes(root / "sweeps"),
    }


def real(n_cells: int, workers: int, root: Path) -> dict[str, Any]:
    """Real cells of paper/full at size tiny: all of them, or some of one bank and what the whole would take."""
    import pandas as pd

    words = [*grid(n_cells), f"engine.workers={workers}", f"root={root}"]
    used = rmsweep("run", *words)
    (path,) = root.glob("sweeps/*/costs.parquet")
    costs = pd.read_parquet(path).merge(
        pd.read_parquet(path.with_name("results.parquet"), columns=["cell_id", "reward_model"]), on="cell_id"
    )
    stages = [f"seconds_{name}" for name in ("annotate", "train", "evaluate")]
    mean = costs.groupby("reward_model")[stages].mean()
    total = float(costs[stages].sum(axis=1).mean())
    whole = finished(words, used, root) if n_cells >= 5 * PER_SEED else {}
    return {
        "cells": len(costs),
        "run_seconds": used.wall,
        "cpu_ms_per_cell": 1e3 * used.cpu / len(costs),
        "stage_ms": {model: {n[8:]: 1e3 * v for n, v in row.items()} for model, row in mean.to_dict("index").items()},
        "stages_ms_per_cell": 1e3 * total,
        "worker_peak_mib": float(costs["peak_memory_mib"].max()),
        "whole_grid_minutes_wall": 12_960 * total / workers / 60,  # on this machine as busy as it is
        "whole_grid_minutes": 12_960 * used.cpu / len(costs) / workers / 60,  # start-up counted with every cell
        **whole,
    }


def finished(words: Sequence[str], run: Used, root: Path) -> dict[str, float]:
    """The whole grid by the clock; planning it and running it again when it is done."""
    plan, again = rmsweep("plan", *words), rmsweep("run", *words)
    if "; 0 computed" not in again.text:
        raise SystemExit(f"the same command computed again:\n{again.text}")
    return {
        "whole_grid_minutes": run.wall / 60,
        "driver_peak_mib": run.peak_mib,
        "plan_seconds": plan.wall,
        "again_seconds": again.wall,
        "files": n_files(root),
    }


# -- the parts that run in their own process ---------------------------------------------------------------


def fill(n_cells: int, root: Path) -> None:
    """Publish random records of full size for the plan of paper/full, units as in a run."""
    from rmsweep import units
    from rmsweep.store import Store

    plan, rng = full_plan(n_cells), np.random.default_rng(0)
    store = Store(root)
    store.prepare()
    plan.write(root / "sweeps" / plan.name)
    for unit in units.split(plan.cells, 2):
        rows = [{"fingerprint": cell.fingerprint, "cell_id": cell.cell_id} for cell in unit.cells]
        records = [{**row, "status": "done", **random_record(rng)} for row in rows]
        store.publish_part(unit.unit_id, records, [{**row, "attempt": 1, "unit": unit.unit_id} for row in rows])


def random_record(rng: np.random.Generator) -> dict[str, Any]:
    """Metrics that do not compress."""
    return {
        "bon_n": np.arange(1, M + 1),
        "bon_golden": rng.random(M),
        "golden_improvement": float(rng.random()),
        "tilt_golden": rng.random(9),
        "golden_picked": rng.random(Q).astype(np.float32),
    }


def full_plan(n_cells: int) -> Any:
    """The plan of paper/full, or of its first seeds, without the command line."""
    from dataclasses import replace

    from rmsweep.grid import describe
    from rmsweep.planner import make
    from rmsweep.presets import Presets

    presets = Presets()
    sweep = describe(presets.node("sweep", "paper/full"))
    axes = {**sweep.axes, "seed": list(range(max(1, round(n_cells / PER_SEED))))}
    if n_cells < PER_SEED:
        axes = {**axes, "base_llm": ["sim_2b"], "dataset": ["sim_helpful"], "beta": betas(n_cells)}
    return make(replace(sweep, axes=axes), presets)


def assemble(root: Path) -> None:
    """Assemble the tables of the only sweep under root as a run does at its end, unless they are current."""
    from rmsweep import execute, results
    from rmsweep.store import Store

    (folder,) = (root / "sweeps").iterdir()
    store, start, cpu = Store(root), time.perf_counter(), time.process_time()
    tables = results.current(folder, store) or execute.assembled(folder, store)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    print(json.dumps({"cells": sum(tables.counts.values()), **seconds, "peak_mib": peak}))


# -- the report --------------------------------------------------------------------------------------------

BARS: tuple[tuple[str, str, float], ...] = (  # section, figure, at most
    ("plan", "seconds", 10),
    ("overhead", "overhead_ms", 20),
    ("overhead", "worker_peak_mib", 1.5 * 1024),
    ("overhead", "driver_peak_mib", 1.5 * 1024),
    ("overhead", "again_seconds", 10),
    ("overhead", "files", 2_000),
    ("tables_at_full_size", "assemble_peak_mib", 1.5 * 1024),
    ("real", "whole_grid_minutes", 60),
    ("real", "worker_peak_mib", 1.5 * 1024),
    ("real", "driver_peak_mib", 1.5 * 1024),
    ("real", "plan_seconds", 10),
    ("real", "again_seconds", 10),
    ("real", "files", 2_000),
)


def report(name: str, measure: Callable[[], dict[str, Any]], found: dict[str, Any]) -> None:
    """Measure one section and print it."""
    found[name] = measure()
    print(name)
    bars = {figure: bar for section, figure, bar in BARS if section == name}
    for figure, value in found[name].items():
        if isinstance(value, dict):
            for key, inner in value.items():
                print(f"  {figure} {key}: " + ", ".join(f"{k} {v:.1f}" for k, v in inner.items()))
            continue
        bar = f"  (bar {bars[figure]:g}: {'met' if value < bars[figure] else 'NOT MET'})" if figure in bars else ""
        print(f"  {figure:30} {value:12,.1f}{bar}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=12_960)
    parser.add_argument("--planned", type=int, default=100_000)
    parser.add_argument("--real", type=int, default=216)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="of `plan`; the median counts")
    parser.add_argument("--quick", action="store_true", help="72 cells of everything: whether it works, not how fast")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--fill", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--assemble", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fill:
        return fill(int(args.fill[0]), Path(args.fill[1]))
    if args.assemble:
        return assemble(args.assemble)
    if args.quick:
        args.cells = args.planned = args.real = 72
        args.repeats = 1
    found: dict[str, Any] = {"workers": args.workers}
    with tempfile.TemporaryDirectory(prefix="rmsweep-scale-") as folder:
        root = Path(folder)
        report("plan", lambda: median(args.repeats, lambda: planned(grid(args.cells), root / "none")), found)
        report("plan_many", lambda: planned(grid(args.planned), root / "none"), found)
        report("overhead", lambda: overhead(args.cells, args.workers, root / "overhead"), found)
        report("tables_at_full_size", lambda: tables_at_full_size(args.cells, root / "full"), found)
        report("real", lambda: real(args.real, args.workers, root / "real"), found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return None


def median(n: int, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The median of every figure over n repeats."""
    runs = [measure() for _ in range(n)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


if __name__ == "__main__":
    main()
