"""How far a sweep is: counts per state and per level of every varied axis, failures by cause, time left."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rmsweep import atomic
from rmsweep.cell import PlannedCell
from rmsweep.engines import _queue
from rmsweep.fingerprint import canonical_json
from rmsweep.plan import Plan, sweep_folder
from rmsweep.progress import STATUS_FILE
from rmsweep.slots import Slots
from rmsweep.store import State, Store

STATES = ("done", "failed", "diverged", "skipped", "pending")
MAX_LEVELS, MAX_REASONS = 30, 20


def summarise(root: Path, name: str) -> dict[str, Any]:
    """State of a sweep, JSON-able: counts, axes (level -> counts), failures by reason, running, corrupt.

    Changes nothing on the disk but the note of what the queue said.
    """
    root = Path(root)
    folder = sweep_folder(root, name)
    plan, store = Plan.read(folder), Store(root)
    states = store.states(cell.fingerprint for cell in plan.cells if cell.reason is None)
    of_cell = [_state(cell, states) for cell in plan.cells]
    return {
        "sweep": name,
        "folder": str(folder),
        "cells": len(plan.cells),
        "device": plan.compute.device,
        "precision": plan.compute.precision,
        "keep": plan.keep,
        "counts": _counts(of_cell),
        "axes": _axes(plan.cells, of_cell),
        "failures": _failures(plan.cells, of_cell),
        "running": _running(folder),
        "slots": _slots(root, name),
        "corrupt": store.corrupt,
    }


def _state(cell: PlannedCell, states: Mapping[str, State]) -> State:
    if cell.reason is not None:
        return State("skipped", cell.reason)
    return states.get(cell.fingerprint, State("pending", None))


def _counts(states: Sequence[State]) -> dict[str, int]:
    found = Counter(state.status for state in states)
    return {status: found[status] for status in STATES}


def _axes(cells: Sequence[PlannedCell], states: Sequence[State]) -> dict[str, dict[str, dict[str, int]]]:
    """Every label with several values: its levels in plan order, each with its counts."""
    result: dict[str, dict[str, dict[str, int]]] = {}
    for name in dict.fromkeys(name for cell in cells for name in cell.labels):
        levels: dict[str, list[State]] = {}
        for cell, state in zip(cells, states, strict=True):
            levels.setdefault(_spelled(cell.labels.get(name)), []).append(state)
        if len(levels) > 1:
            result[name] = {level: _counts(group) for level, group in levels.items()}
    return result


def _spelled(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else canonical_json(value)


def _failures(cells: Sequence[PlannedCell], states: Sequence[State]) -> list[dict[str, Any]]:
    """Failed, diverged and skipped cells grouped by reason, the largest group first; some cell ids of each."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for cell, state in zip(cells, states, strict=True):
        if state.status not in ("done", "pending"):
            groups.setdefault((state.status, state.cause or "", state.reason or ""), []).append(cell.cell_id)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        {"status": status, "cause": cause or None, "reason": reason, "count": len(ids), "cells": ids[:5]}
        for (status, cause, reason), ids in ordered
    ]


def _running(folder: Path) -> dict[str, Any] | None:
    """What the driver of this sweep last said of itself; None when it is not at work on this machine."""
    try:
        state: dict[str, Any] = json.loads(atomic.read(folder / STATUS_FILE))
        if state["host"] == platform.node():
            os.kill(int(state["pid"]), 0)
        numbers = (state["computed"], state["total"], state["eta_seconds"] or 0)
        return state if all(isinstance(n, int | float) for n in numbers) else None
    except ProcessLookupError:
        return None  # it was killed
    except PermissionError:
        return state
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _slots(root: Path, name: str) -> dict[str, Any] | None:
    """Slots of this sweep on a cluster, and how many cells each has in hand; None where none was ever submitted."""
    files = Slots(root, name)
    if not files.exist:
        return None
    look = files.look()
    found: dict[str, Any] = {"jobs": sorted(files.jobs()), "cancelled": files.cancelled, "queue": look is not None}
    tasks = [task for task in look.tasks.values() if task.is_live] if look else []
    in_hand = {note.task: len(note.in_flight) for note in files.notes()}
    found["tasks"] = [{**task._asdict(), "in_flight": in_hand.get(task.id, 0)} for task in tasks]
    return found


def _slot_lines(slots: Mapping[str, Any]) -> list[str]:
    if not slots["queue"]:
        return [f"slots: not known here (squeue does not answer); jobs {', '.join(slots['jobs'])}"]
    if not slots["tasks"]:
        return [f"slots: none in the queue{' (cancelled)' * slots['cancelled']}"]
    running = [task for task in slots["tasks"] if task["state"] in _queue.RUNNING]
    waiting = [task for task in slots["tasks"] if task["state"] not in _queue.RUNNING]
    lines = [f"slots: {len(running)} running, {len(waiting)} waiting"]
    lines += [
        f"  {t['id']}  {t['state'].lower()} on {t['where']}, {t['in_flight']} cells in flight"
        for t in running[:MAX_LEVELS]
    ]
    reasons = Counter((task["state"].lower(), task["where"] or "no reason given") for task in waiting)
    return [*lines, *(f"  {n} {state} ({where})" for (state, where), n in reasons.most_common(5))]


def render(summary: Mapping[str, Any]) -> str:
    """The summary as text for a terminal."""
    lines = [
        f"sweep {summary['sweep']}: {summary['cells']:,} cells, {_text(summary['counts'])}",
        f"device {summary['device']}, precision {summary['precision']}, keep {summary['keep']}; {summary['folder']}",
    ]
    if running := summary["running"]:
        eta = running.get("eta_seconds")
        left = "time left not known yet" if eta is None else f"about {_duration(eta)} left"
        lines.append(f"running: {running['computed']:,} of {running['total']:,} cells in this run, {left}")
    if summary.get("slots"):
        lines += _slot_lines(summary["slots"])
    for name, levels in summary["axes"].items():
        lines.append(name)
        shown = list(levels.items())[:MAX_LEVELS]
        width = max(len(level) for level, _ in shown)
        lines += [f"  {level:{width}}  {_text(counts)}" for level, counts in shown]
        if len(levels) > MAX_LEVELS:
            lines.append(f"  ... {len(levels) - MAX_LEVELS} more levels: see --json")
    lines += _failure_lines(summary["failures"])
    lines += [f"corrupt: {text}" for text in summary["corrupt"]]
    return "\n".join(lines)


def _failure_lines(failures: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["not done, by reason"] if failures else []
    for group in failures[:MAX_REASONS]:
        cause = f" ({group['cause']})" if group["cause"] not in (None, group["status"]) else ""
        lines.append(f"  {group['count']:,} {group['status']}{cause}: {group['reason']} (cell {group['cells'][0]})")
    if len(failures) > MAX_REASONS:
        lines.append(f"  ... {len(failures) - MAX_REASONS} more reasons: see --json")
    if any(group["status"] != "skipped" for group in failures):
        lines.append("  `rmsweep log CELL` shows what the logs say of one")
    return lines


def _text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {status}" for status, n in counts.items() if n)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
