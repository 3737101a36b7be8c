"""Measure what the papers' 12,960 cells cost: a stratified sample run for real, extrapolated; and check `rmsweep plan`.

    python scripts/bench_paper.py --root DIR --cells 48 --seed 0 --protocol clean --lgb default --json FILE

The sample is stratified over reward model x n_annotations and random over the rest, on the first `--banks` of the 12
banks (assumed: what a cell costs does not depend on its bank). Cells run through the same code as `rmsweep run`; the
same command again computes nothing twice, a larger `--cells` adds to the sample. A core-second is a second of a
worker, which has one thread: the three stages, plus what the runner spends outside them (workers x wall time minus
stages, which includes the start of the workers, the checking of banks, and waiting for the last cell, and so is an
upper bound), plus building 12 banks. Then the cost model of `rmsweep plan` is fitted to random halves of the sampled
cells and predicts the other halves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from rmsweep import atomic, cost_model, execute
from rmsweep.cell import PlannedCell
from rmsweep.cli import compose
from rmsweep.cli.device import resolve_compute
from rmsweep.cost_model import STAGES, CostModel, Observation
from rmsweep.engines.local import Local
from rmsweep.plan import Plan, sweep_folder
from rmsweep.planner import make
from rmsweep.presets import Presets
from rmsweep.rng import stream
from rmsweep.runner import one_thread, pipeline, warm
from rmsweep.store import Store

PUBLISHED = "as published: about 6,000 core-hours reported by the authors; one network per cell, modelled: 933"
COVERAGE = cost_model.COVERAGE
N_HALVES = 40
Stratum = tuple[str, int]
Words = Sequence[str]


class Measured(NamedTuple):
    """Stage seconds [n, 3] of the sampled cells of one stratum, which has `size` cells in the whole grid."""

    size: int
    seconds: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Seconds of the cells, stages summed [n]."""
        return self.seconds.sum(axis=1)


def main(argv: Words | None = None) -> int:
    args = arguments(argv)
    grid = whole_grid(args)
    sample = sampled(grid, args)
    ledger = Ledger(sweep_folder(args.root, sample.name) / "bench_paper.json")
    ledger.add(build_banks(sample, args.root))
    ledger.add(run(sample, args))
    observations = {o.fingerprint: o for o in cost_model.observe(args.root)}
    strata = measure(grid, sample, observations)
    report = {
        "protocol": args.protocol, "lgb": args.lgb, "size": args.size, "cells": len(grid.cells),
        "sampled": sum(len(m.seconds) for m in strata.values()), "failures": failures(sample, args.root),
        "covered": sum(m.size for m in strata.values()), "seed": args.seed, "banks_sampled": args.banks,
        "host": platform.node(), "workers": args.workers, **grid.compute._asdict(), "published": PUBLISHED,
        "strata": table(strata), "stages": stage_hours(strata),
        **totals(strata, ledger.read(), n_banks=len({c.bank_id for c in grid.cells})),
        "cost_model": check(grid, sample, observations, args.root),
    }  # fmt: skip
    print(text(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 2 if report["failures"] else 0


def arguments(argv: Words | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="kept between runs; a full-size bank takes 6.3 GB")
    parser.add_argument("--cells", type=int, default=48, help="how many cells the sample has")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--banks", type=int, default=1, help="how many of the 12 banks it is taken from")
    parser.add_argument("--protocol", choices=("clean", "released"), default="clean")
    parser.add_argument("--lgb", choices=("default", "fast"), default="default")
    parser.add_argument("--size", default="paper")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=None, help="0: inside this process")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="size=tiny")
    args = parser.parse_args(argv)
    args.size = "tiny" if args.quick else args.size
    args.workers = Local().n_workers(args.cells) if args.workers is None else args.workers
    return args


# -- the sample --------------------------------------------------------------------------------------------


def whole_grid(args: argparse.Namespace) -> Plan:
    """The plan of all 12,960 cells; its name is that of the sample's sweep."""
    lgb = {"default": "clf_lgb", "fast": "clf_lgb_fast"}[args.lgb]
    words = [
        "sweep=paper/full", f"size={args.size}", f"protocol={args.protocol}", f"reward_model=bt_mlp,clf_mlp,{lgb}",
        f"sweep.name=bench-{args.size}-{args.protocol}-{args.lgb}",
    ]  # fmt: skip
    request = compose.read(words, Presets())
    compute = resolve_compute(args.device, args.precision)
    return make(request.sweep, request.presets, compute=compute)


def stratum(cell: PlannedCell) -> Stratum:
    return cell.labels["reward_model"], cell.labels["n_annotations"]


def sampled(grid: Plan, args: argparse.Namespace) -> Plan:
    """The first cells of a random order within every stratum, as many of each: a larger sample holds the smaller."""
    banks = list(dict.fromkeys(c.bank_id for c in grid.cells))[: args.banks]
    strata: dict[Stratum, list[PlannedCell]] = {}
    for cell in grid.cells:
        if cell.bank_id in banks and cell.reason is None:
            strata.setdefault(stratum(cell), []).append(cell)
    orders = {
        key: stream(args.seed, "bench_paper", *map(str, key)).permutation(len(cells)) for key, cells in strata.items()
    }
    turns = ((i, key) for i in range(max(map(len, strata.values()))) for key in strata if i < len(strata[key]))
    chosen = [strata[key][orders[key][i]] for _, (i, key) in zip(range(args.cells), turns, strict=False)]
    place = {c.fingerprint: i for i, c in enumerate(grid.cells)}
    return dataclasses.replace(grid, cells=sorted(chosen, key=lambda c: place[c.fingerprint]))


class Ledger:
    """Sums over all runs of one sample, kept beside its plan: what the store does not record."""

    KEYS = ("bank_seconds", "banks", "overhead_seconds", "overhead_cells")

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, float]:
        """The sums so far."""
        return json.loads(self.path.read_text()) if self.path.exists() else dict.fromkeys(self.KEYS, 0.0)

    def add(self, amounts: Mapping[str, float]) -> None:
        """Add to the sums."""
        sums = self.read()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic.replace(self.path, json.dumps({k: sums[k] + amounts.get(k, 0.0) for k in self.KEYS}).encode(), "table")


def build_banks(sample: Plan, root: Path) -> dict[str, float]:
    """Build the sample's banks; seconds and number of those that were not there."""
    store, spent = Store(root.resolve(), heal=True), {"bank_seconds": 0.0, "banks": 0.0}
    store.prepare()
    configs = {c.bank_id: c.config for c in sample.cells}
    missing = [bank for bank in configs if not store.has_bank(bank)]
    needed, free = sum(sample.bank_bytes[bank] for bank in missing), shutil.disk_usage(root).free
    if needed > free:
        raise SystemExit(f"{needed / 1e9:.1f} GB of banks do not fit on {root} ({free / 1e9:.1f} GB free)")
    for bank in missing:
        start = time.perf_counter()
        with one_thread():  # as a worker builds it
            store.build_bank(bank, lambda folder, bank=bank: pipeline.build(configs[bank], folder, {}))
        spent = {"bank_seconds": spent["bank_seconds"] + time.perf_counter() - start, "banks": spent["banks"] + 1}
    return spent


def run(sample: Plan, args: argparse.Namespace) -> dict[str, float]:
    """Run what is missing of the sample; core-seconds outside the stages and the cells that they are for."""
    known = Store(args.root).done(c.fingerprint for c in sample.cells)
    todo = [c.fingerprint for c in sample.cells if known.get(c.fingerprint) in (None, "failed")]
    if not args.workers:
        warm()
    start = time.perf_counter()
    summary = execute.run(sample, args.root, Local(workers=args.workers), retry=frozenset(todo))
    wall = time.perf_counter() - start
    if summary.interrupted:
        raise SystemExit(128 + summary.interrupted)
    if not todo:
        return {}
    costs = Store(args.root).costs(todo)
    spent = sum(sum(s or 0.0 for s in costs[f"seconds_{stage}"].to_pylist()) for stage in STAGES)
    return {"overhead_seconds": wall * max(1, args.workers) - spent, "overhead_cells": len(todo)}


def failures(sample: Plan, root: Path) -> dict[str, int]:
    """Why sampled cells have no seconds: status and reason -> cells."""
    states = Store(root).states(c.fingerprint for c in sample.cells)
    return dict(Counter(f"{s.status}: {s.reason}" for s in states.values() if s.status != "done"))


# -- the extrapolation -------------------------------------------------------------------------------------


def measure(grid: Plan, sample: Plan, observations: Mapping[str, Observation]) -> dict[Stratum, Measured]:
    """Stage seconds of the sample's finished cells, by stratum, with the stratum's size in the grid."""
    sizes: dict[Stratum, int] = {}
    for cell in grid.cells:
        sizes[stratum(cell)] = sizes.get(stratum(cell), 0) + (cell.reason is None)
    seconds: dict[Stratum, list[Sequence[float]]] = {}
    for cell in sample.cells:
        if cell.fingerprint in observations:
            seconds.setdefault(stratum(cell), []).append(observations[cell.fingerprint].seconds)
    return {key: Measured(sizes[key], np.array(rows)) for key, rows in sorted(seconds.items())}


def variances(strata: Mapping[Stratum, Measured]) -> dict[Stratum, tuple[float, int]]:
    """Variance of a cell's seconds, and its degrees of freedom, by stratum.

    A stratum with a single cell gets the relative variance of the others together.
    """
    many = {key: m.total for key, m in strata.items() if len(m.total) > 1}
    free = sum(len(t) - 1 for t in many.values())
    relative = sum(float(((t / t.mean() - 1) ** 2).sum()) for t in many.values()) / max(1, free)
    return {
        key: (float(m.total.var(ddof=1)), len(m.total) - 1) if key in many else (relative * m.total[0] ** 2, free)
        for key, m in strata.items()
    }


def stratified(strata: Mapping[Stratum, Measured]) -> dict[str, float]:
    """Core-hours of all cells of these strata: sum_h N_h mean_h, with its standard error and t interval.

    se^2 = sum_h N_h^2 s_h^2 / n_h (1 - n_h / N_h); degrees of freedom after Satterthwaite.
    """
    hours = sum(m.size * float(m.total.mean()) for m in strata.values()) / 3600
    parts = []
    for key, (variance, free) in variances(strata).items():
        size, n = strata[key].size, len(strata[key].total)
        parts.append((size**2 * variance / n * (1 - n / size) / 3600**2, free))
    se2 = sum(v for v, _ in parts)
    bottom = sum(v**2 / free for v, free in parts if free)
    free = se2**2 / bottom if bottom else float("nan")
    half = float(student.ppf((1 + COVERAGE) / 2, free) * np.sqrt(se2)) if bottom else float("nan")
    return {"hours": hours, "se": float(np.sqrt(se2)), "low": hours - half, "high": hours + half}


def table(strata: Mapping[Stratum, Measured]) -> list[dict[str, Any]]:
    """One row per reward model and quantity."""
    rows = []
    for (model, n), m in strata.items():
        means = dict(zip(STAGES, m.seconds.mean(axis=0).tolist(), strict=True))
        sd = float(m.total.std(ddof=1)) if len(m.total) > 1 else None
        rows.append({
            "reward_model": model, "n_annotations": n, "cells": m.size, "sampled": len(m.total), **means,
            "seconds": float(m.total.mean()), "sd": sd, "hours": m.size * float(m.total.mean()) / 3600,
        })  # fmt: skip
    return rows


def stage_hours(strata: Mapping[Stratum, Measured]) -> dict[str, float]:
    """Core-hours of the whole grid by stage."""
    sums = sum(m.size * m.seconds.mean(axis=0) for m in strata.values()) / 3600
    return dict(zip(STAGES, np.atleast_1d(sums).tolist(), strict=False))


def totals(strata: Mapping[Stratum, Measured], ledger: Mapping[str, float], n_banks: int) -> dict[str, Any]:
    """Core-hours of the whole grid: its stages, what the runner adds, its banks, and all of it."""
    n_cells = sum(m.size for m in strata.values())
    per_cell = ledger["overhead_seconds"] / max(1.0, ledger["overhead_cells"])
    per_bank = ledger["bank_seconds"] / max(1.0, ledger["banks"])
    total, added = stratified(strata), (per_cell * n_cells + per_bank * n_banks) / 3600
    models = sorted({model for model, _ in strata})
    return {
        "stage_hours": total,
        "by_model": {m: stratified({k: v for k, v in strata.items() if k[0] == m}) for m in models},
        "overhead_seconds_per_cell": per_cell,
        "bank_seconds": per_bank,
        "overhead_hours": per_cell * n_cells / 3600,
        "bank_hours": per_bank * n_banks / 3600,
        "total_hours": {**total, **{k: total[k] + added for k in ("hours", "low", "high")}},
    }


# -- the cost model ----------------------------------------------------------------------------------------


def check(grid: Plan, sample: Plan, observations: Mapping[str, Observation], root: Path) -> dict[str, Any]:
    """Fit the cost model to random halves of the sampled cells and predict the other halves; and the whole grid.

    error: |predicted / measured - 1|, of single cells (median) and of the sum over a half (median over halves).
    coverage: share of halves whose measured sum lies in the interval.
    """
    label = {c.fingerprint: str(c.labels["reward_model"]) for c in sample.cells}
    seen = [observations[key] for key in label if key in observations]
    rng = stream(0, "bench_paper", "halves")
    cells, sums, covered, lost = [], [], [], 0
    for _ in range(N_HALVES if len(seen) > 3 else 0):
        fitted, held = halves(seen, label, rng)
        model = CostModel(fitted)
        held = [o for o in held if all(model.fit_of(w) for w in o.work)]
        if not held:
            lost += 1
            continue
        found = model.forecast((label[o.fingerprint], o.work) for o in held)
        measured = sum(sum(o.seconds) for o in held) / 3600
        sums.append(found.hours / measured - 1)
        covered.append(found.low <= measured <= found.high)
        cells += [predicted(model, o) / sum(o.seconds) - 1 for o in held]
    surveyor = cost_model.Surveyor(grid, root)
    forecast = CostModel(seen).forecast(
        (str(c.labels["reward_model"]), surveyor.work(c)) for c in grid.cells if c.reason is None
    )
    return {
        "halves": len(sums),
        "without_prediction": lost,
        "cell_error": median(np.abs(cells)),
        "sum_error": median(np.abs(sums)),
        "sum_bias": median(np.array(sums)),
        "coverage": float(np.mean(covered)) if covered else None,
        "whole_grid": dataclasses.asdict(forecast),
    }


def halves(
    seen: Sequence[Observation], label: Mapping[str, str], rng: np.random.Generator
) -> tuple[list[Observation], list[Observation]]:
    """Two random halves, with half of every reward model's cells in each."""
    order = [seen[i] for i in rng.permutation(len(seen))]
    order.sort(key=lambda o: label[o.fingerprint])
    return order[::2], order[1::2]


def predicted(model: CostModel, cell: Observation) -> float:
    """Predicted seconds of one cell."""
    fits = [(model.fit_of(work), np.array([work.amounts])) for work in cell.work]
    return sum(float(fit.seconds(amounts)[0, 0]) for fit, amounts in fits if fit is not None)


def median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None


# -- text --------------------------------------------------------------------------------------------------


def text(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{report['cells']:,} cells, size={report['size']}, protocol={report['protocol']}, LightGBM {report['lgb']}, "
        f"{report['device']} {report['precision']}, on {report['host']}: {report['sampled']} cells measured, "
        f"from {report['banks_sampled']} bank(s)",
        f"{'reward model':14} {'n':>6} {'cells':>6} {'measured':>8} {'annotate':>9} {'train':>8} {'evaluate':>9} "
        f"{'seconds':>8} {'sd':>7} {'core-h':>8}",
    ]
    for r in report["strata"]:
        sd = "-" if r["sd"] is None else f"{r['sd']:.3g}"
        lines.append(
            f"{r['reward_model']:14} {r['n_annotations']:6} {r['cells']:6,} {r['sampled']:8} {r['annotate']:9.3f} "
            f"{r['train']:8.2f} {r['evaluate']:9.2f} {r['seconds']:8.2f} {sd:>7} {r['hours']:8.3g}"
        )
    whole = report["covered"] == report["cells"]
    grid = "whole grid" if whole else f"only {report['covered']:,} of {report['cells']:,} cells (the others: no sample)"
    lines += [f"NOT MEASURED, {n} cells: {reason}" for reason, n in report["failures"].items()]
    lines += [f"{model}: {spelled(found)}" for model, found in report["by_model"].items()]
    lines += [
        f"all stages: {spelled(report['stage_hours'])}",
        f"outside the stages: {report['overhead_hours']:.3g} core-hours ({report['overhead_seconds_per_cell']:.3f} s a "
        f"cell, an upper bound), banks: {report['bank_hours']:.3g} ({report['bank_seconds']:.1f} s each)",
        f"{grid}: {spelled(report['total_hours'])}",
        f"({report['published']})",
        cost_model_text(report["cost_model"]),
    ]
    return "\n".join(lines)


def spelled(found: Mapping[str, float]) -> str:
    interval = f"{100 * COVERAGE:.0f} % interval {found['low']:.3g} to {found['high']:.3g}"
    return f"{found['hours']:.3g} core-hours, standard error {found['se']:.2g}, {interval}"


def cost_model_text(found: Mapping[str, Any]) -> str:
    grid = found["whole_grid"]
    whole = f"whole grid {grid['hours']:.3g} core-hours, interval {grid['low']:.3g} to {grid['high']:.3g}"
    if not found["halves"]:
        return f"cost model: {whole}; too few cells to check it on halves"
    return (
        f"cost model, fitted to half of the cells ({found['halves']} random halves): error of a cell "
        f"{found['cell_error']:.1%}, of the sum {found['sum_error']:.1%} (bias {found['sum_bias']:+.1%}), the interval "
        f"holds the measured sum in {found['coverage']:.0%}; fitted to all: {whole}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
