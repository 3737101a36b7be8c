"""A sweep's plan: its cells with their identities, and the two files that keep it, checksummed and merged."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rmsweep import atomic, provenance
from rmsweep.cell import (
    GROUPS,
    KEY,
    PARTS,
    PlannedCell,
)
from rmsweep.errors import ConfigError, StoreError
from rmsweep.fingerprint import canonical_json, file_sha256, sealed, unsealed
from rmsweep.grid import VALUES, check_name
from rmsweep.reward_models import Compute
from rmsweep.schemas import AXES, F

FORMAT, OLD_FORMAT = 2, 1  # the old one has no checksums
REPLACING = 0.2  # seconds
HEADER, TABLE = "plan.json", "plan.parquet"
REMEDY = "the same `rmsweep run` as before writes it again"
KEEP = ("none", "scores", "models")
CONFIG_KEYS = (*GROUPS, "size", *VALUES, "error_rate", "evaluate")
IDENTITY = (*PARTS, KEY)


class Overtaken(Exception):
    """Another driver may have written the plan since it was read."""


class BankSize(NamedTuple):
    """P training prompts, responses of both splits, at most M to a test prompt, D (0 where only the data tell)."""

    P: int
    train_rows: int
    test_rows: int
    M: int
    D: int


@dataclass(frozen=True)
class Plan:
    """A sweep, resolved: its name, every cell in grid order, and what was resolved once for all of them.

    reuse: what makes a stored result count as this cell's (provenance.REUSE). bank_bytes: bank_id -> estimated size of
    the bank on disk; bank_sizes: its shape. kept_bytes: what `keep` adds. unknown: why identities are missing (the data
    are not here), None when they are known.
    """

    name: str
    cells: list[PlannedCell]
    compute: Compute
    keep: str = "none"
    plugins: tuple[str, ...] = ()
    reuse: str = "versions"
    bank_bytes: Mapping[str, int] = field(default_factory=dict, compare=False)
    bank_sizes: Mapping[str, BankSize] = field(default_factory=dict, compare=False)
    kept_bytes: int = field(default=0, compare=False)
    unknown: str | None = field(default=None, compare=False)

    def write(self, folder: Path, is_mine: Callable[[], bool] = lambda: True) -> list[str]:
        """Write plan.parquet and plan.json into `folder`; a plan that is there becomes the union of both.

        A damaged one is set aside, and cells whose data, versions or defaults have changed since give way to those of
        now; what was done about it is returned. is_mine: asked right before the plan is replaced. Raises Overtaken if
        it says no: another driver may have written meanwhile; ConfigError when the plan that is there is pinned to
        another device or precision, or to other plug-ins.
        """
        plan, table, notes, previous = self, _table(self.cells), list[str](), None
        if (folder / HEADER).exists() or (folder / TABLE).exists():
            try:
                header = read_header(folder)
                sums = header.pop("table", None)
                if header == self._header() and _read_table(folder, sums).equals(table):
                    return []  # the same command again
                old, previous = Plan.read(folder), atomic.sha256(folder / TABLE)[1]
            except StoreError as error:
                notes.append(_set_aside(folder, error))
            else:
                plan, notes = _union(old, self, folder)
                table = _table(plan.cells)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", compression_level=9, write_page_checksum=True)
        data = sink.getvalue().to_pybytes()
        tables = [hashlib.sha256(data).hexdigest(), *filter(None, [previous])]  # so that it fits at every moment
        atomic.probe(folder)
        texts = {HEADER: sealed({**plan._header(), "table": tables}), TABLE: data}
        with contextlib.ExitStack() as stack:
            drafts = [stack.enter_context(atomic.Draft(folder / name, "plan")) for name in texts]
            for draft, text in zip(drafts, texts.values(), strict=True):
                draft.write(text)
                draft.seal()
            if not is_mine():
                raise Overtaken
            for draft in drafts:
                draft.replace()
        return notes

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self.name,
            "compute": self.compute._asdict(),
            "keep": self.keep,
            "reuse": self.reuse,
            "plugins": {str(path): file_sha256(Path(path)) for path in self.plugins},
        }

    @staticmethod
    def read(folder: Path) -> Plan:
        """The plan in `folder`; raises StoreError when there is none or it cannot be read."""
        try:
            return Plan._read(folder)
        except StoreError:
            time.sleep(REPLACING)  # a driver may have been between its two files
            return Plan._read(folder)

    @staticmethod
    def _read(folder: Path) -> Plan:
        header = read_header(folder)
        try:
            cells = _cells(_read_table(folder, header.get("table")))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(f"{folder / 'plan.parquet'}: is no plan ({type(error).__name__}: {error})") from None
        return Plan(
            name=header["name"],
            cells=cells,
            compute=Compute(**header["compute"]),
            keep=header["keep"],
            plugins=tuple(header["plugins"]),
            reuse=header["reuse"],
        )


def _set_aside(folder: Path, error: StoreError) -> str:
    mark = uuid.uuid4().hex[:8]
    for name in (HEADER, TABLE):
        atomic.move(folder / name, folder / f"{name}.{mark}.damaged")
    return (
        f"{error}; set aside as *.{mark}.damaged. The plan of this command stands in its place; other grids that were "
        "run under this name have to be run again, which finds their results in the store"
    )


def _read_table(folder: Path, sums: Sequence[str] | None = None) -> pa.Table:
    """The table of cells; sums: the sha256 that it may have."""
    try:
        if sums is not None and atomic.sha256(folder / TABLE)[1] not in sums:
            raise StoreError(f"{folder / TABLE}: fails its checksum; {REMEDY}")
        return pq.read_table(folder / TABLE, page_checksum_verification=True)
    except StoreError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{folder / TABLE}: cannot be read ({error}); {REMEDY}") from None


def read_header(folder: Path) -> dict[str, Any]:
    """plan.json of a sweep's folder: name, compute, keep, reuse and the sha256 of every plug-in.

    Raises StoreError where there is none or it is damaged, ConfigError where another version wrote it.
    """
    path = folder / HEADER
    try:
        data = atomic.read(path)
        header = unsealed(data, old=json.loads(data).get("format") == OLD_FORMAT)
    except FileNotFoundError:
        raise StoreError(f"{folder}: holds no plan (plan.json); plan the sweep with `rmsweep run`") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path}: cannot be read ({error}); {REMEDY}") from None
    if header.get("format") not in (FORMAT, OLD_FORMAT):
        raise ConfigError(
            f"{path}: format {header.get('format')}, this version reads {FORMAT}; give another sweep.name"
        )
    try:
        _check_header(header)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: is no plan ({type(error).__name__}: {error}); {REMEDY}") from None
    return {"reuse": "versions", **header}  # plans of before there was a choice


def _check_header(header: Mapping[str, Any]) -> None:
    """Refuse a header that this version did not write; above all a name that would be a path."""
    check_name(str(header["name"]))
    compute = Compute(**header["compute"])
    if compute.device not in ("cpu", "cuda") or compute.precision not in ("fp32", "bf16"):
        raise ValueError(f"compute {compute}")
    if header["keep"] not in KEEP:
        raise ValueError(f"keep {header['keep']!r}")
    if header.get("reuse", "versions") not in provenance.REUSE:
        raise ValueError(f"reuse {header['reuse']!r}")
    if not all(isinstance(text, str) for pair in header["plugins"].items() for text in pair):
        raise ValueError("plugins")


def sweep_folder(root: Path, name: str) -> Path:
    """Folder of a sweep's plan, logs and tables."""
    return root / "sweeps" / name


def pinned_compute(folder: Path) -> Compute | None:
    """Device and precision that the plan in `folder` is pinned to; None where there is no sound plan."""
    return None if (header := _sound_header(folder)) is None else Compute(**header["compute"])


def pinned_reuse(folder: Path) -> str | None:
    """What the plan in `folder` was last planned to reuse; None where there is no sound plan."""
    return None if (header := _sound_header(folder)) is None else str(header["reuse"])


def _sound_header(folder: Path) -> dict[str, Any] | None:
    """plan.json, unless it is absent, or damaged: then `Plan.write` sets it aside."""
    with contextlib.suppress(StoreError):
        return read_header(folder)
    return None


# -- files -------------------------------------------------------------------------------------------------


def _union(old: Plan, new: Plan, folder: Path) -> tuple[Plan, list[str]]:
    """Both plans' cells, the old ones first, and what to say of it; what was pinned must agree."""
    if old.compute != new.compute:
        raise ConfigError(
            f"sweep {old.name} is pinned to {_spelled(old.compute)}, not {_spelled(new.compute)}; "
            f"give {_spelled(old.compute)}, or another sweep.name=NAME"
        )
    pinned = read_header(folder)["plugins"]
    for path in new.plugins:
        if path in pinned and file_sha256(Path(path)) != pinned[path]:
            raise ConfigError(f"sweep {old.name} was planned with another {path}; give another sweep.name=NAME")
    plugins = tuple(dict.fromkeys((*old.plugins, *new.plugins)))
    kept = _not_superseded(old.cells, new.cells)
    gone = len(old.cells) - len(kept)
    notes = [
        f"{gone:,} cells of sweep {old.name} give way to those planned now, of the same labels or config but with "
        "other data, versions or defaults; their results stay in the store"
    ]
    notes = notes[: bool(gone)]
    if old.reuse != new.reuse and (others := len({c.cell_id for c in kept} - {c.cell_id for c in new.cells})):
        notes.append(f"{others:,} cells of earlier grids of sweep {old.name} were planned with --reuse {old.reuse}")
    return dataclasses.replace(new, name=old.name, cells=_merged(kept, new.cells), plugins=plugins), notes


def _not_superseded(old: Sequence[PlannedCell], new: Sequence[PlannedCell]) -> list[PlannedCell]:
    """Old cells without those that a new one stands for: a reader of the table could not tell the two apart."""
    ids = {cell.cell_id for cell in new}
    meant = {canonical_json(part) for cell in new for part in (cell.labels, cell.config)}
    return [
        cell
        for cell in old
        if cell.cell_id in ids or meant.isdisjoint((canonical_json(cell.labels), canonical_json(cell.config)))
    ]


def _merged(old: Sequence[PlannedCell], new: Sequence[PlannedCell]) -> list[PlannedCell]:
    """The cells of both; one cell whose labels do not contradict each other is one row with the labels of both."""
    cells: dict[str, list[PlannedCell]] = {}
    for cell in (*old, *new):
        same = cells.setdefault(cell.cell_id, [])
        for i, known in enumerate(same):
            if all(known.labels[key] == value for key, value in cell.labels.items() if key in known.labels):
                same[i] = cell._replace(labels={**known.labels, **cell.labels})
                break
        else:
            same.append(cell)
    return [cell for same in cells.values() for cell in same]


def _spelled(compute: Compute) -> str:
    return f"device={compute.device} precision={compute.precision}"


def _table(cells: Sequence[PlannedCell]) -> pa.Table:
    """One row per cell. Labels are JSON; the config is one JSON column per key, few distinct texts each."""
    texts: dict[int, str] = {}  # id of a node -> text: nodes are shared between cells

    def text(value: Any) -> str:
        if not isinstance(value, dict | list):
            return canonical_json(value)
        if id(value) not in texts:
            texts[id(value)] = canonical_json(value)
        return texts[id(value)]

    nothing: dict[str, str] = {}
    columns: dict[str, list[Any]] = {
        "cell_id": [c.cell_id for c in cells],
        "fingerprint": [c.fingerprint for c in cells],
        "bank_id": [c.bank_id for c in cells],
        "reason": [c.reason for c in cells],
        "labels": [canonical_json(c.labels) for c in cells],
        "code": [c.code for c in cells],
    }
    for part in IDENTITY:
        columns[f"identity.{part}"] = [(c.identity or nothing).get(part) for c in cells]
    for key in CONFIG_KEYS:
        columns[f"config.{key}"] = [text(c.config[key]) if key in c.config else None for c in cells]
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def _cells(table: pa.Table) -> list[PlannedCell]:
    own = ("cell_id", "fingerprint", "bank_id", "labels", "reason", *(f"config.{key}" for key in CONFIG_KEYS))
    columns = {name: _texts(table, name) for name in own}
    empty = [None] * len(table)  # plans of before there were these columns
    later = ("code", *(f"identity.{part}" for part in IDENTITY))
    columns |= {name: _texts(table, name) if name in table.column_names else empty for name in later}
    parsed: dict[str, Any] = {}

    def value(text: str) -> Any:
        if text not in parsed:
            parsed[text] = json.loads(text)
        return parsed[text]

    result = []
    for i, label_text in enumerate(columns["labels"]):
        config = {k: value(t) for k in CONFIG_KEYS if (t := columns[f"config.{k}"][i]) is not None}
        cell, key, bank = (columns[name][i] for name in ("cell_id", "fingerprint", "bank_id"))
        identity = {part: t for part in IDENTITY if (t := columns[f"identity.{part}"][i]) is not None}
        labels = _ordered(json.loads(label_text))
        result.append(
            PlannedCell(cell, key, bank, labels, config, columns["reason"][i], identity or None, columns["code"][i])
        )
    return result


def _texts(table: pa.Table, name: str) -> list[Any]:
    """A column of texts, equal ones as one object."""
    encoded = table[name].combine_chunks().dictionary_encode()
    values = encoded.dictionary.to_pylist()
    return [None if i is None else values[i] for i in encoded.indices.to_pylist()]


def _ordered(labels: dict[str, Any]) -> dict[str, Any]:
    """Labels in the order of `_labels`, numbers as numbers ("inf" is how JSON spells infinity)."""
    axes = {c.name: typed(labels[c.name], True) if c.type == F else labels[c.name] for c in AXES}
    return {**axes, **{k: labels[k] for k in sorted(labels) if k not in axes}}


def typed(value: Any, real: bool) -> Any:
    """A number of the column's type; None for what is none (the cell is then not sound and says so)."""
    try:
        return None if value is None or isinstance(value, bool) else float(value) if real else int(value)
    except (TypeError, ValueError, OverflowError):
        return None
