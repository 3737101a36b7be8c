"""What a sweep has done: counts per state and axis, failures by cause, time left. Truth is what the store holds."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from rmsweep.plan import Plan
from rmsweep.results import sweep_folder
from rmsweep.schemas import AXES
from rmsweep.store import Store

SECONDS = ("seconds_annotate", "seconds_train", "seconds_evaluate")


def summarise(root: Path, name: str) -> dict[str, Any]:
    """JSON-able summary of the sweep: counts, per axis level, failures grouped by reason, core-seconds left."""
    plan, store = Plan.read(sweep_folder(root, name)), Store(root)
    known = store.done(c.fingerprint for c in plan.cells if c.reason is None)
    states = ["skipped" if c.reason is not None else known.get(c.fingerprint, "pending") for c in plan.cells]
    axes: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for cell, state in zip(plan.cells, states, strict=True):
        for column, value in cell.labels.items():
            axes[column][str(value)][state] += 1
    varied = [c for c in dict.fromkeys([a.name for a in AXES] + list(axes)) if len(axes.get(c, ())) > 1]
    seconds = _mean_seconds(store, plan)
    pending = [c for c, s in zip(plan.cells, states, strict=True) if s == "pending"]
    return {
        "sweep": name,
        "cells": len(plan.cells),
        "counts": dict(Counter(states)),
        "device": plan.compute.device,
        "precision": plan.compute.precision,
        "axes": {column: {level: dict(n) for level, n in axes[column].items()} for column in varied},
        "failures": dict(_reasons(store, plan).most_common()),
        "skips": dict(Counter(c.reason for c in plan.cells if c.reason is not None).most_common()),
        "core_seconds_left": sum(seconds.get(c.labels.get("reward_model"), 0.0) for c in pending) if seconds else None,
        "logs": str(sweep_folder(root, name) / "logs"),
    }


def render(summary: dict[str, Any]) -> str:
    """The summary as text for a terminal."""
    counts = summary["counts"]
    lines = [
        f"sweep {summary['sweep']}: {summary['cells']:,} cells on {summary['device']} in {summary['precision']}",
        "  " + ", ".join(f"{n:,} {state}" for state, n in sorted(counts.items())),
    ]
    if counts.get("pending"):
        lines.append(f"  left: {_time_left(summary['core_seconds_left'])}; `rmsweep run` with the same words continues")
    for column, levels in summary["axes"].items():
        cells = (f"{level} {n.get('done', 0)}/{sum(n.values()) - n.get('skipped', 0)}" for level, n in levels.items())
        lines.append(f"  {column}: {', '.join(cells)}")
    for title in ("failures", "skips"):
        lines += [f"  {title}: {n:,} x {reason}" for reason, n in summary[title].items()]
    if summary["failures"]:
        lines.append(f"  logs: {summary['logs']}; `rmsweep retry` runs failed cells again")
    return "\n".join(lines)


def _reasons(store: Store, plan: Plan) -> Counter[str]:
    """Cells per reason of failing or diverging."""
    known = store.done(c.fingerprint for c in plan.cells)
    bad = {f for f, status in known.items() if status in ("failed", "diverged")}
    reasons: dict[str, str] = {}
    for table in store.parts("results", ["fingerprint", "status", "reason"]) if bad else ():
        for row in table.to_pylist():
            if row["fingerprint"] in bad and row["status"] == known[row["fingerprint"]]:
                reasons[row["fingerprint"]] = f"{row['status']}: {row['reason']}"
    return Counter(reasons.values())


def _mean_seconds(store: Store, plan: Plan) -> dict[Any, float]:
    """Mean seconds of a finished cell per reward model of this sweep."""
    model = {c.fingerprint: c.labels.get("reward_model") for c in plan.cells}
    total, number = Counter[Any](), Counter[Any]()
    for table in store.parts("costs", ["fingerprint", *SECONDS]):
        for row in table.to_pylist():
            if row["fingerprint"] in model and row[SECONDS[1]] is not None:
                total[model[row["fingerprint"]]] += sum(row[s] or 0.0 for s in SECONDS)
                number[model[row["fingerprint"]]] += 1
    return {name: total[name] / n for name, n in number.items()}


def _time_left(core_seconds: float | None) -> str:
    if core_seconds is None:
        return "no cell has finished, so nothing is known"
    cores = os.cpu_count() or 1
    return f"about {core_seconds / 3600:.2g} core-hours, {core_seconds / cores / 60:.0f} min on {cores} cores"
