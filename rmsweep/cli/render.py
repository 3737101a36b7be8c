"""Text for the terminal: a plan's counts, and the table of golden improvements at the end of a run."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rmsweep.cell import PlannedCell
from rmsweep.cost_model import COVERAGE, Forecast
from rmsweep.plan import Plan

REPLICATES = ("seed", "dataset.seed", "dataset.split_seed")  # what is averaged over, never a row of the table
MAX_ROWS = 40
FAR = 3.0  # times the cells seen: an estimate to be wary of
STATES = ("new", "done", "failed", "diverged", "skipped")
ANNOTATION_KEYS = (
    "candidates", "pairing", "annotator", "beta", "error_rate", "cross_beta_factor", "n_annotations",
    "pairs_per_prompt", "seed", "protocol",
)  # fmt: skip


def plan_text(plan: Plan, states: Mapping[str, str], *, short: bool = False) -> str:
    """A plan's counts. `states`: fingerprint -> status of cells that the store holds; short: for `run`."""
    counts = count_states(plan, states)
    head = f"sweep {plan.name}: {_cells(len(plan.cells))}  ("
    head += ", ".join(f"{counts[s]:,} {s}" for s in STATES if counts[s] or s in ("new", "done")) + ")"
    lines = [head, f"device {plan.compute.device}, precision {plan.compute.precision}, keep {plan.keep}"]
    if plan.unknown:
        lines.append(f"data not found: identities unknown, all cells count as new ({plan.unknown})")
    reasons = Counter(str(c.reason) for c in plan.cells if c.reason is not None)
    lines += [f"  skipped {count:,}: {reason}" for reason, count in reasons.most_common(3 if short else 20)]
    if not short:
        lines[1:1] = _axes(plan)
        lines.append(_artefacts(plan))
    return "\n".join(lines)


def _axes(plan: Plan) -> list[str]:
    """What varies, and over how many values; nothing for a single cell."""
    values: dict[str, set[str]] = {}
    for cell in plan.cells:
        for name, value in cell.labels.items():
            if value is not None or cell.bank_id:  # a cell skipped unseen leaves most of its labels open
                values.setdefault(name, set()).add(repr(value))
    varied = [f"{len(found)} {name}" for name, found in values.items() if len(found) > 1]
    return ["axes: " + " x ".join(varied)] if varied else []


def count_states(plan: Plan, states: Mapping[str, str]) -> Counter[str]:
    """How many cells are new, done, failed, diverged, skipped."""
    return Counter("skipped" if c.reason is not None else states.get(c.fingerprint, "new") for c in plan.cells)


def _artefacts(plan: Plan) -> str:
    runnable = [c for c in plan.cells if c.reason is None]
    if plan.unknown:
        return "banks, annotations and disk: not known without the data"
    banks = {c.bank_id for c in runnable}
    computed = {c.fingerprint for c in runnable}
    annotations = distinct_annotations(runnable)
    text = f"{len(banks):,} banks, {len(annotations):,} sets of annotations, {len(computed):,} models"
    return text + ("" if len(computed) == len(runnable) else f" ({len(runnable):,} rows: some cells are equal)")


def distinct_annotations(cells: Iterable[PlannedCell]) -> set[tuple[Any, ...]]:
    """What tells sets of annotations apart: the bank, and the design."""
    texts: dict[int, str] = {}  # nodes are shared between cells: each is spelled once

    def text(value: Any) -> str:
        return texts.setdefault(id(value), repr(value)) if isinstance(value, dict) else repr(value)

    return {(c.bank_id, *(text(c.config.get(k)) for k in ANNOTATION_KEYS)) for c in cells}


def disk_text(needed: int, free: int) -> str:
    """What the disk must hold against what is free."""
    fits = "" if needed <= free else ": DOES NOT FIT"
    return f"disk: about {size(needed)} to write, {size(free)} free{fits}"


def size(n_bytes: float) -> str:
    """A number of bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def cost_text(plan: Plan, states: Mapping[str, str], forecast: Forecast | None, root: Path) -> str:
    """Estimated core-hours of the new cells, how sure that is, and which of them have no estimate."""
    if not any(c.reason is None and c.fingerprint not in states for c in plan.cells):
        return "estimated core-hours: 0, nothing is new"
    advice = "run a few of these cells (such as one seed, one bank), then plan again"
    if forecast is None:
        return f"estimated core-hours: not known yet, nothing was measured under root={root}; {advice}"
    gap = ", ".join(f"{_cells(n)} of {model}" for model, n in forecast.uncovered.items())
    missing = f"no finished cell like them (protocol, device, precision) under root={root}"
    if not forecast.n_covered:
        return f"estimated core-hours: not known for {gap}: {missing}; {advice}"
    interval = f"{100 * COVERAGE:.0f} % interval {number(forecast.low)} to {number(forecast.high)}"
    where = ", ".join(forecast.hosts[:3]) + (f" and {len(forecast.hosts) - 3} more" if len(forecast.hosts) > 3 else "")
    text = (
        f"estimated core-hours: about {number(forecast.hours)} ({interval}; fitted to {_cells(forecast.n_cells)} done"
    )
    text += f" on {where}" + ("" if forecast.here else ", other machines differ") + ")"
    lines = [text, f"  {_reach(forecast)}; banks and start-up not counted"]
    return "\n".join([*lines, *([f"  without {gap}: {missing}"] if gap else [])])


def slots_text(engine: Any, plan: Plan, states: Mapping[str, str], forecast: Forecast | None) -> str:
    """What slots of a cluster are asked for, and how many hours and turns they need as far as the cost is known."""
    n_new = len({c.fingerprint for c in plan.cells if c.reason is None and c.fingerprint not in states})
    n_slots = engine.slots_for(n_new)
    gpus = f", {engine.gpus_per_slot} GPU{'s' * (engine.gpus_per_slot > 1)}" * bool(engine.gpus_per_slot)
    memory = f", {number(engine.memory_gib)} GiB" if engine.memory_gib else ""
    limit = f"{engine.time_minutes} min"
    cpus = f"{engine.cpus_per_slot} CPU{'s' * (engine.cpus_per_slot > 1)}"
    text = f"slurm: {n_slots} slot{'s' * (n_slots != 1)} of {cpus}{gpus}{memory}, at most {limit} at a time"
    if not n_slots or forecast is None or not forecast.n_covered or forecast.uncovered:
        return text
    hours = forecast.hours / (n_slots * engine.workers_per_slot)
    turns = math.ceil(hours * 60 / (engine.time_minutes - engine.signal_seconds / 60))
    return f"{text}: about {number(hours)} h on all of them at once, {turns} turn{'s' * (turns > 1)} each"


def _reach(forecast: Forecast) -> str:
    """Whether the planned cells are like those seen."""
    parts = []
    for factors, what in ((forecast.reach, "beyond the largest"), (forecast.depth, "below the smallest")):
        if factors:
            worst = "EXTRAPOLATED" if max(factors.values()) > FAR else "extrapolated"
            each = ", ".join(f"{model} {number(factor)}x" for model, factor in factors.items())
            parts.append(f"{worst} {what} cells seen: {each}")
    return "; ".join(parts) or "sizes within those of the cells seen"


def number(value: float) -> str:
    """Two significant digits below 100, whole numbers above."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def improvement_table(rows: Sequence[Mapping[str, Any]], cells: Sequence[PlannedCell], width: int | None = None) -> str:
    """Mean and standard error of golden_improvement over replicates: reward models against the varied axes.

    rows: results (labels, status, golden_improvement), one per cell of `cells`.
    """
    axes = varied_axes(cells)
    models = list(dict.fromkeys(c.labels["reward_model"] for c in cells if c.reason is None))
    groups: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    lost = 0
    for row, cell in zip(rows, cells, strict=True):
        if cell.reason is not None:
            continue
        value = row.get("golden_improvement")
        key = tuple(_short(cell.labels.get(axis)) for axis in axes)
        values = groups.setdefault(key, {}).setdefault(cell.labels["reward_model"], [])
        if value is None or math.isnan(value):
            lost += 1
        else:
            values.append(value)
    body = [[*key, *(mean_se(by.get(model, [])) for model in models)] for key, by in groups.items()]
    table = aligned([[*axes, *models], *body[:MAX_ROWS]], len(axes), width)
    lines = ["golden_improvement, mean ± standard error over replicates", *table]
    if len(body) > MAX_ROWS:
        lines.append(f"... {len(body) - MAX_ROWS} more rows: see `rmsweep results`")
    if lost:
        lines.append(f"{_cells(lost)} without a value (not run, failed or diverged) left out of the means")
    return "\n".join(lines)


def varied_axes(cells: Sequence[PlannedCell]) -> list[str]:
    """Labels with several values among the cells that can run, replicates and the reward model aside."""
    live = [c.labels for c in cells if c.reason is None]
    names = list(dict.fromkeys(name for labels in live for name in labels))
    fixed = {*REPLICATES, "reward_model"}
    return [n for n in names if n not in fixed and len({repr(labels.get(n)) for labels in live}) > 1]


def mean_se(values: Sequence[float]) -> str:
    """`1.234 ± 0.012`: mean and sd / sqrt(n) (n - 1 in the sd); the value alone for n = 1, - for none."""
    if not values:
        return "-"
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return f"{mean:.3f} ± {math.sqrt(variance / len(values)):.3f}"


def aligned(rows: Sequence[Sequence[str]], n_left: int, width: int | None = None) -> list[str]:
    """Rows as columns of text, the first `n_left` left-aligned, split over several blocks where too wide."""
    width = width or shutil.get_terminal_size((110, 24)).columns
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left, right = list(range(n_left)), list(range(n_left, len(widths)))
    blocks: list[list[int]] = [[]]
    for column in right:
        used = sum(widths[i] + 2 for i in (*left, *blocks[-1], column))
        if blocks[-1] and used > width + 2:
            blocks.append([])
        blocks[-1].append(column)
    lines = []
    for block in blocks:
        for row in rows:
            texts = [row[i].ljust(widths[i]) if i < n_left else row[i].rjust(widths[i]) for i in (*left, *block)]
            lines.append(("  " + "  ".join(texts)).rstrip())
    return lines


def _short(value: Any) -> str:
    if value is None:
        return "default"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cells(n: int) -> str:
    return f"{n:,} cell" + ("" if n == 1 else "s")
