"""What became of one cell: its state, where and when it was tried, what the logs say, and who has it in hand now."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rmsweep.cell import PlannedCell
from rmsweep.plan import Plan, sweep_folder
from rmsweep.slots import Look, Note, Slots
from rmsweep.store import Store
from rmsweep.text import printable

TAIL = 15  # lines of what a slot printed
ENTRY = re.compile(r"^(done|failed|diverged|skipped)\b.* cell (?P<cell>[0-9a-f]+) attempt ")


def tell(plan: Plan, root: Path, cell: PlannedCell) -> str:
    """What `rmsweep log CELL` prints."""
    folder, store = sweep_folder(root, plan.name), Store(root)
    labels = " ".join(f"{key}={value}" for key, value in cell.labels.items())
    lines = [f"cell {cell.cell_id}: {_state(store, cell)}", f"  {labels}" if labels else "  the only cell of its sweep"]
    if cell.reason is None:
        cost = next(iter(store.costs([cell.fingerprint]).to_pylist()), None)
        lines += _tried(cost) if cost else []
        lines += _in_hand(Slots(root, plan.name), cell.fingerprint)
        lines += _logged(folder, cell.cell_id)
    return "\n".join(lines)


def _state(store: Store, cell: PlannedCell) -> str:
    if cell.reason is not None:
        return f"not planned to be computed: {cell.reason}"
    state = store.states([cell.fingerprint]).get(cell.fingerprint)
    if state is None:
        return "not computed yet"
    cause = f" ({state.cause})" if state.cause not in (None, state.status) else ""
    return f"{state.status}{cause}{f': {state.reason}' if state.reason else ''}"


def _tried(cost: dict[str, Any]) -> list[str]:
    """The last attempt that was recorded."""
    seconds = {name[8:]: value for name, value in cost.items() if name.startswith("seconds_") and value is not None}
    spent = [f"{name} {value:.2f} s" for name, value in seconds.items()]
    return [f"  attempt {cost['attempt']} on {cost['host']}{', ' + ', '.join(spent) if spent else ''}"]


def _in_hand(files: Slots, key: str) -> Iterator[str]:
    """Slots whose last turn computes the cell, or did when it ended, and the end of what they printed."""
    last = {note.task: note for note in files.notes()} if files.exist else {}
    held = [note for note in last.values() if key in note.in_flight]
    look = files.look() if held else None
    for note in held:
        path = files.log(note.task)
        yield f"  slot {note.task} on {note.host}, turn {note.restart + 1}, {_how(note, look)}; {path}"
        with contextlib.suppress(OSError):
            yield from (f"    {line}" for line in printable(path.read_text(errors="replace")).splitlines()[-TAIL:])


def _how(note: Note, look: Look | None) -> str:
    """Whether a slot has what it noted, or had it."""
    if note.end is not None:
        return f"had it in hand when it ended ({note.end})"
    if look is None:
        return "had it in hand when last heard of"
    is_live = note.task in look.tasks and look.tasks[note.task].is_live
    return "has it in hand" if is_live else "had it in hand when it was killed"


def _logged(folder: Path, cell_id: str) -> Iterator[str]:
    """What the logs of units say of the cell: where the unit ran, how the cell ended, with the traceback."""
    for path in sorted((folder / "logs").glob("*.log")):
        with contextlib.suppress(OSError):
            lines = path.read_text(errors="replace").splitlines()
            if said := list(_entries(lines, cell_id)):
                yield str(path)
                yield from (f"  {line}" for line in said)


def _entries(lines: Sequence[str], cell_id: str) -> Iterator[str]:
    """Lines of one cell, each after the line that says which worker of which host wrote it."""
    where, ours = None, False
    for line in lines:
        entry = ENTRY.match(line)
        if line.startswith("unit "):
            where, ours = line, False
        elif entry:
            ours = entry["cell"] == cell_id
        if ours:
            if where is not None:
                yield where
            yield line
            where = None
