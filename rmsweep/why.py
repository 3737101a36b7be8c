"""Why a planned cell is stored or new: which part of its identity differs from the nearest stored cell's."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rmsweep import component, provenance
from rmsweep.cell import KEY, ErrorRate, Evaluation, PlannedCell, Values
from rmsweep.errors import ConfigError, DataError
from rmsweep.fingerprint import joined
from rmsweep.plan import Plan
from rmsweep.store import Store

NEW = "new"
MAX_SHOWN = 12
Leaves = dict[str, Any]  # path such as reward_model.hidden -> value; what is at its default is not there


class Stored(NamedTuple):
    """What the store holds of a cell besides its result; identity, code: None where they were not recorded yet."""

    cell_id: str
    fingerprint: str
    status: str
    versions: str | None
    code: str | None
    identity: str | None


class Change(NamedTuple):
    """A part of an identity that differs: what the stored cell has, what the planned one has; None: the default."""

    path: str
    stored: Any
    planned: Any


def explain(plan: Plan, root: Path, cell: str) -> str:
    """What `rmsweep plan --why CELL` prints; cell: the beginning of a cell_id of the plan, or NEW for all new cells.

    Raises ConfigError for a cell that is not there or not the only one, DataError where identities are not known.
    """
    if plan.unknown:
        raise DataError(f"--why: the cells' identities are not known without the data ({plan.unknown})")
    stored = read(root)
    if cell == NEW:
        return _summary(plan, stored)
    return _one(find(plan, cell, f", or `{NEW}` for all new cells"), stored)


def find(plan: Plan, prefix: str, asked: str = "") -> PlannedCell:
    """The planned cell whose cell_id begins with `prefix`. asked: what else might have been given, for the error."""
    found = {c.cell_id: c for c in plan.cells if prefix and c.cell_id.startswith(prefix)}
    if len(found) == 1:
        return next(iter(found.values()))
    ids = list(found or dict.fromkeys(c.cell_id for c in plan.cells))
    some = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
    what = f"begins {len(found):,} cells of this plan" if found else "is no cell of this plan"
    raise ConfigError(f"{prefix!r} {what}; give more digits of one, such as {some}{asked}")


def read(root: Path) -> list[Stored]:
    """Every cell that the store under `root` holds a record of."""
    if not (root / "store").is_dir():
        return []
    store = Store(root)
    keys = set(_fingerprints(store))
    states = store.done(keys)
    table = store.cost_parts.table(keys, ["fingerprint", "cell_id", "versions", "code", "identity"])
    costs = {row["fingerprint"]: row for row in table.to_pylist()}
    return [Stored(**costs[key], status=states[key]) for key in sorted(states.keys() & costs.keys())]


def _fingerprints(store: Store) -> Iterator[str]:
    for data in store.cost_parts.sound(lambda path: True):
        try:
            yield from pq.read_table(io.BytesIO(data), columns=["fingerprint"])["fingerprint"].to_pylist()
        except (OSError, pa.ArrowException, KeyError):
            continue  # of another version: no cell of ours


# -- one cell ----------------------------------------------------------------------------------------------


def _one(cell: PlannedCell, stored: Sequence[Stored]) -> str:
    if cell.reason is not None:
        return f"cell {cell.cell_id}: skipped: {cell.reason}"
    same = next((s for s in stored if s.fingerprint == cell.fingerprint), None)
    if same is not None:
        return "\n".join([f"cell {cell.cell_id}: stored, {same.status}", *_origin(cell, same)])
    nearest = Nearest([cell], stored).of(cell)
    if nearest is None:
        return f"cell {cell.cell_id}: new; {_no_other(cell, stored)}"
    other, changes = nearest
    what = "this cell" if other.cell_id == cell.cell_id else f"cell {other.cell_id}"
    head = f"cell {cell.cell_id}: new; the nearest stored result is of {what} ({other.status}), which differs in"
    defaults = _Defaults(cell)
    return "\n".join([head, *(f"  {_spelled(c, defaults)}" for c in changes)])


def _origin(cell: PlannedCell, stored: Stored) -> list[str]:
    """With which code and libraries a stored result was computed, beside today's."""
    pairs = {"libraries": (stored.versions, provenance.versions()), "code": (stored.code, cell.code)}
    return [f"  {what}: {_since(then, now)}" for what, (then, now) in pairs.items()]


def _since(then: str | None, now: str | None) -> str:
    """What changed between two JSON mappings."""
    if then is None or now is None:
        return "not recorded when it was computed"
    old, new = json.loads(then), json.loads(now)
    differ = [f"{k} {old.get(k)} -> {new.get(k)}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    return f"other than today's: {', '.join(differ)}" if differ else "as today"


def _no_other(cell: PlannedCell, stored: Sequence[Stored]) -> str:
    if not stored:
        return "nothing is stored here"
    if any(s.cell_id == cell.cell_id for s in stored):
        return (
            "stored with another version of a stage, device or precision, before it was recorded which of them differs"
        )
    return "all stored cells are of before their identities were recorded"


def _spelled(change: Change, defaults: _Defaults) -> str:
    """`reward_model.learning_rate: 0.001 -> 0.0003`, and what it means where that is not plain."""
    old, new = (defaults.shown(change.path, v) for v in (change.stored, change.planned))
    text = f"{change.path}: {old} -> {new}"
    first, _, rest = change.path.partition(".")
    if change.path.startswith("bank.inputs."):
        return f"{text} (the file changed)" if None not in (change.stored, change.planned) else text
    if first == "versions":
        return f"{text} (the version of stage {rest} was raised)"
    if rest.endswith("version"):
        return f"{text} (the version of this {first} was raised)"
    return text


class _Defaults:
    """Values of an identity's leaves for people: defaults spelled out, digests cut short."""

    def __init__(self, cell: PlannedCell) -> None:
        self._leaves = leaves(cell)

    def shown(self, path: str, value: Any) -> str:
        """A leaf's value; None stands for the default."""
        if value is None:
            default = self._default(path)
            return "absent" if default is None else f"default ({json.dumps(default)})"
        if isinstance(value, str) and len(value) >= 16 and set(value) <= set("0123456789abcdef"):
            return f"{value[:12]}..."
        return value if isinstance(value, str) else json.dumps(value)

    def _default(self, path: str) -> Any:
        *node, name = path.removeprefix("bank.").split(".")
        plain = {"values": Values, "evaluate": Evaluation, "error_rate": ErrorRate}
        if not node or node == ["evaluate"] or node == ["error_rate"]:
            fields = dataclasses.fields(plain[node[0] if node else "values"])
            return next((f.default for f in fields if f.name == name), None)
        kind = self._leaves.get(".".join([*node, "kind"])) or self._leaves.get(".".join(["bank", *node, "kind"]))
        if node[-1] not in component.PACKAGES or kind is None:
            return None
        return component.defaults(node[-1], kind).get(name)


# -- all new cells -----------------------------------------------------------------------------------------


def _summary(plan: Plan, stored: Sequence[Stored]) -> str:
    """How many new cells differ from their nearest stored one in which parts."""
    known = {s.fingerprint for s in stored}
    new = list({c.fingerprint: c for c in plan.cells if c.reason is None and c.fingerprint not in known}.values())
    if not new:
        return "no cell is new"
    nearest, counts = Nearest(new, stored), Counter[tuple[str, ...]]()
    examples: dict[tuple[str, ...], tuple[PlannedCell, list[Change]]] = {}
    for cell in new:
        found = nearest.of(cell)
        key = () if found is None else tuple(change.path for change in found[1])
        counts[key] += 1
        if found is not None:
            examples.setdefault(key, (cell, found[1]))
    lines = [f"{len(new):,} new cell{'s' * (len(new) > 1)}; beside the nearest stored result"]
    for key, n in counts.most_common(MAX_SHOWN):
        if key:
            cell, differing = examples[key]
            text = "; ".join(_spelled(change, _Defaults(cell)) for change in differing)
            lines.append(f"  {n:,} differ in {', '.join(key)}, such as {cell.cell_id}: {text}")
        else:
            lines.append(f"  {n:,} have none to compare with: {_no_other(new[0], stored)}")
    return "\n".join([*lines, *([f"  ... {len(counts) - MAX_SHOWN} more groups"] if len(counts) > MAX_SHOWN else [])])


# -- identities --------------------------------------------------------------------------------------------


class Nearest:
    """The stored cells nearest to planned ones: the same cell first, then by the number of leaves that differ."""

    def __init__(self, cells: Iterable[PlannedCell], stored: Sequence[Stored]) -> None:
        self._planned = {c.fingerprint: leaves(c) for c in cells}
        strict = any(found["reuse"] == "strict" for found in self._planned.values())
        known = sorted((s for s in stored if s.identity is not None), key=lambda s: (s.status != "done", s.fingerprint))
        self._stored, self._flat = known, [_comparable(s, strict) for s in known]
        self._codes: dict[tuple[str, str], int] = {}
        table = self._table([*self._flat, *self._planned.values()])
        self._theirs: NDArray[np.int32] = np.ascontiguousarray(table[: len(known)].T)
        self._ours = dict(zip(self._planned, table[len(known) :], strict=True))
        self._places = defaultdict[str, list[int]](list)  # cell_id -> places in known
        for place, other in enumerate(known):
            self._places[other.cell_id].append(place)

    def of(self, cell: PlannedCell) -> tuple[Stored, list[Change]] | None:
        """The nearest stored cell and what differs; None where no stored cell's identity is known."""
        if not self._stored:
            return None
        among = self._places.get(cell.cell_id)
        theirs = self._theirs if among is None else self._theirs[:, among]
        nearest = int(np.argmin((theirs != self._ours[cell.fingerprint][:, None]).sum(axis=0)))
        place = nearest if among is None else among[nearest]
        return self._stored[place], changes(self._flat[place], self._planned[cell.fingerprint])

    def _table(self, every: Sequence[Leaves]) -> NDArray[np.int32]:
        """A row for every identity, a column for every path whose values differ between them."""
        paths = sorted({path for found in every for path in found})
        rows = [[self._code(path, found.get(path)) for path in paths] for found in every]
        table = np.array(rows, dtype=np.int32).reshape(len(every), len(paths))
        return table[:, (table != table[:1]).any(axis=0)]

    def _code(self, path: str, value: Any) -> int:
        """A number for a leaf's value."""
        return self._codes.setdefault((path, repr(value)), len(self._codes))


def _comparable(stored: Stored, strict: bool) -> Leaves:
    """A stored identity's leaves beside those of a plan: code and libraries count where the plan's reuse is strict."""
    found = flat(stored.identity or "{}")
    if strict and found["reuse"] != "strict":
        recorded = {"code": json.loads(stored.code or "{}"), "libraries": json.loads(stored.versions or "{}")}
        recorded["libraries"] = provenance.strict_libraries(recorded["libraries"])
        return {**found, **dict(_walk("", recorded))}
    return found if strict else {path: v for path, v in found.items() if not path.startswith(("code.", "libraries."))}


def leaves(cell: PlannedCell) -> Leaves:
    """The leaves of a planned cell's identity."""
    return flat(joined(cell.identity or {}))


def flat(text: str) -> Leaves:
    """An identity's leaves by path, and `reuse`. A dataset's fields count once, not again as its bank's."""
    parts = json.loads(text)
    found = {path: v for name in parts for path, v in _flat_part(name, json.dumps(parts[name])).items()}
    again = {path for path in found if path.startswith("bank.dataset.") and path[len("bank.") :] in found}
    found = {path: v for path, v in found.items() if path not in again}
    return {**found, "reuse": "strict" if "code" in parts.get(KEY, {}) else "versions"}


@functools.lru_cache(maxsize=10_000)
def _flat_part(name: str, text: str) -> Leaves:
    """Leaves of one part; those of the plain values and of the key stand at the top."""
    return dict(_walk("" if name in ("values", KEY) else name, json.loads(text)))


def _walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield path, value
        return
    for key, inner in value.items():
        yield from _walk(f"{path}.{key}" if path else key, inner)


def changes(stored: Leaves, planned: Leaves) -> list[Change]:
    """What differs, in the order of paths; where a kind differs, its fields are not compared."""
    paths = sorted(p for p in {*stored, *planned} if stored.get(p) != planned.get(p))
    kinds = [p.removesuffix("kind") for p in paths if p.endswith(".kind")]
    shown = [p for p in paths if not any(p.startswith(kind) and p != f"{kind}kind" for kind in kinds)]
    return [Change(path, stored.get(path), planned.get(path)) for path in shown]
