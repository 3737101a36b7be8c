"""Records -> tables: results.parquet, prompts.parquet and costs.parquet of a sweep, and how to read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rmsweep import atomic
from rmsweep.cell import PlannedCell
from rmsweep.errors import ConfigError
from rmsweep.plan import Plan
from rmsweep.schemas import AXES, COSTS, METRICS, RECORD, SCHEMA_VERSION, STATUS, Column, arrow
from rmsweep.store import RANK, Store, parquet_bytes

if TYPE_CHECKING:
    import pandas as pd

TABLES = ("results", "prompts", "costs")
REALISED = ("beta", "n_annotations")  # labels that a record knows better


def sweep_folder(root: Path, name: str) -> Path:
    """Folder of a sweep's plan, logs and tables."""
    return root / "sweeps" / name


def make_sweep_folder(root: Path, name: str) -> Path:
    """Create it; returns its folder of logs."""
    return atomic.make_folder(sweep_folder(root, name) / "logs")


def mark_last(root: Path, name: str) -> None:
    """Remember which sweep was run last."""
    atomic.replace(root / "sweeps" / ".last", name.encode())


def last_sweep(root: Path) -> str:
    """Name of the sweep that was run last under `root`."""
    marker = root / "sweeps" / ".last"
    if not marker.is_file():
        raise ConfigError(f"no sweep under root={root} yet; `rmsweep run` makes one")
    return marker.read_text().strip()


def assemble(plan: Plan, store: Store, folder: Path) -> dict[str, int]:
    """Write the sweep's three tables, a pure sorted function of plan and records; returns cells per status."""
    records = _records(store, [c.fingerprint for c in plan.cells if c.reason is None])
    cells = sorted((c for c in plan.cells if c.reason is not None or c.fingerprint in records.rows), key=_order)
    tables = {
        "results": results_table(cells, records),
        "prompts": _prompts_table(cells, records),
        "costs": _costs_table(cells, store),
    }
    for name, table in tables.items():
        atomic.replace(folder / f"{name}.parquet", parquet_bytes(table))
    counts = Counter(tables["results"].column("status").to_pylist())
    counts["not run yet"] = len(plan.cells) - len(cells)
    return {status: n for status, n in counts.items() if n}


class _Records:
    """Records of a plan's cells: `table`, and the row of each fingerprint in it."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.rows = {f: i for i, f in enumerate(table.column("fingerprint").to_pylist())}

    def take(self, cells: Iterable[PlannedCell]) -> pa.Table:
        """The cells' records in their order, all null where a cell has none."""
        rows = [None if c.reason is not None else self.rows[c.fingerprint] for c in cells]
        return self.table.take(pa.array(rows, pa.int64()))


def _records(store: Store, fingerprints: Iterable[str]) -> _Records:
    """One record per fingerprint: done before diverged, skipped, failed, then the first by content."""
    wanted = pa.array(sorted(set(fingerprints)), pa.string())
    found = [t.filter(pc.is_in(t.column("fingerprint"), value_set=wanted)) for t in store.parts("results")]
    table = pa.concat_tables([RECORD.empty_table(), *found])
    best: dict[str, tuple[Any, ...]] = {}
    keys = (table.column(name).to_pylist() for name in ("fingerprint", "status", "reason"))
    for row, (fingerprint, status, reason) in enumerate(zip(*keys, strict=True)):
        best[fingerprint] = min(best.get(fingerprint, (9,)), (RANK[status], reason or "", row))
    return _Records(table.take(pa.array([best[f][2] for f in sorted(best)], pa.int64())))


def results_table(cells: list[PlannedCell], records: _Records) -> pa.Table:
    """One row per cell: id, axes, status, metrics."""
    taken = records.take(cells)
    columns: dict[str, pa.Array] = {"cell_id": pa.array([c.cell_id for c in cells], pa.string())}
    for column in _label_columns(cells):
        labels = pa.array([c.labels.get(column.name) for c in cells], column.type)
        known = taken.column(column.name) if column.name in REALISED else None
        columns[column.name] = labels if known is None else pc.coalesce(known.combine_chunks(), labels)
    skipped = pa.array([None if c.reason is None else "skipped" for c in cells], pa.string())
    columns["status"] = pc.coalesce(skipped, taken.column("status").combine_chunks())
    reasons = pa.array([c.reason for c in cells], pa.string())
    columns["reason"] = pc.coalesce(reasons, taken.column("reason").combine_chunks())
    for column in METRICS:
        columns[column.name] = taken.column(column.name).combine_chunks()
    return pa.table(columns).replace_schema_metadata({"rmsweep_schema": str(SCHEMA_VERSION)})


def _prompts_table(cells: list[PlannedCell], records: _Records) -> pa.Table:
    """cell_id and the golden reward picked for each test prompt, in bank order."""
    picked = records.take(cells).column("golden_picked").combine_chunks()
    table = pa.table({"cell_id": pa.array([c.cell_id for c in cells], pa.string()), "golden_picked": picked})
    return table.filter(pc.is_valid(table.column("golden_picked")))


def _costs_table(cells: list[PlannedCell], store: Store) -> pa.Table:
    """The last attempt's cost of every cell."""
    wanted = {c.fingerprint: i for i, c in enumerate(cells) if c.reason is None}
    last: dict[str, dict[str, Any]] = {}
    for table in store.parts("costs"):
        mask = pc.is_in(table.column("fingerprint"), value_set=pa.array(list(wanted), pa.string()))
        for row in table.filter(mask).to_pylist():
            if row["attempt"] >= last.get(row["fingerprint"], {"attempt": 0})["attempt"]:
                last[row["fingerprint"]] = row
    rows = sorted(last.values(), key=lambda row: wanted[row["fingerprint"]])
    return pa.Table.from_pylist(rows, schema=arrow(COSTS))


def attempts(store: Store, fingerprints: frozenset[str]) -> dict[str, int]:
    """Attempts so far of cells that are to be run again."""
    found: dict[str, int] = {}
    for table in store.parts("costs", ["fingerprint", "attempt"]) if fingerprints else ():
        for fingerprint, attempt in zip(*(table.column(i).to_pylist() for i in range(2)), strict=True):
            if fingerprint in fingerprints:
                found[fingerprint] = max(found.get(fingerprint, 0), attempt)
    return found


def _label_columns(cells: list[PlannedCell]) -> list[Column]:
    """The standard axes, then whatever else the sweep varies, typed by its values."""
    standard = {column.name for column in AXES}
    extra = dict.fromkeys(name for c in cells for name in c.labels if name not in standard)
    return [
        *AXES,
        *(Column(n, _type(c.labels.get(n) for c in cells), "set or varied by the sweep") for n in sorted(extra)),
    ]


def _type(values: Iterable[Any]) -> pa.DataType:
    kinds = {type(v) for v in values if v is not None}
    if kinds == {bool}:
        return pa.bool_()
    if kinds and kinds <= {int}:
        return pa.int64()
    return pa.float64() if kinds and kinds <= {int, float} else pa.string()


def _order(cell: PlannedCell) -> tuple[Any, ...]:
    """Sort by axes, then by id: the same table whatever order cells were planned or finished in."""
    labels = [cell.labels.get(column.name) for column in AXES]
    extra = sorted((k, str(v)) for k, v in cell.labels.items() if k not in {c.name for c in AXES})
    return (
        *(
            (v is None, str(v) if isinstance(v, str) else "", 0 if isinstance(v, str) or v is None else v)
            for v in labels
        ),
        extra,
        cell.cell_id,
    )


# -- reading ------------------------------------------------------------------------------------------------------------


def load(path: Path) -> pd.DataFrame:
    """The results of a results.parquet, a sweep's folder, or the last sweep under a root."""
    path = Path(path)
    if (path / "sweeps").is_dir():
        path = sweep_folder(path, last_sweep(path))
    file = path / "results.parquet" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{file}: no such table; give a results.parquet, a sweep's folder or a root")
    return pq.read_table(file, page_checksum_verification=True).to_pandas()


def query(folder: Path, sql: str) -> pd.DataFrame:
    """SQL over the tables results, prompts and costs of a sweep; it can read no file and write nothing."""
    import duckdb

    connection = duckdb.connect(":memory:")
    for name in TABLES:
        connection.register(name, pq.read_table(folder / f"{name}.parquet", page_checksum_verification=True))
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    try:
        return connection.execute(sql).df()
    except duckdb.Error as error:
        raise ConfigError(f"--sql: {error}; tables: {', '.join(TABLES)}; columns: `rmsweep results --schema`") from None


def schema_text() -> str:
    """Every column of the three tables with its type and meaning."""
    picked = Column(
        "golden_picked", pa.list_(pa.float32()), "golden reward of the pick for each test prompt, bank order"
    )
    tables: Mapping[str, tuple[Column, ...]] = {
        "results": (STATUS[0], *AXES, *STATUS[1:], *METRICS),
        "prompts": (STATUS[0], picked),
        "costs": COSTS,
    }
    lines = [f"schema version {SCHEMA_VERSION}; results also has one column per other key that a sweep sets or varies"]
    for name, columns in tables.items():
        lines += ["", f"{name}.parquet", *(f"  {c.name:<30}{c.type!s:<16}{c.doc}" for c in columns)]
    return "\n".join(lines)
