"""Records -> results.parquet, prompts.parquet, costs.parquet; reading them; SQL over them.

results.parquet is a pure, sorted function of plan and records: the same bytes whatever the order, the workers and the
crashes in between. What differs between runs (times, hosts, attempts) is in costs.parquet only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rmsweep import atomic
from rmsweep.cell import PlannedCell
from rmsweep.errors import ConfigError, StoreError
from rmsweep.fingerprint import canonical_json
from rmsweep.plan import sweep_folder
from rmsweep.schemas import AXES, COSTS, METRICS, SCHEMA_VERSION, STATUS, Column
from rmsweep.store import Store, parquet

if TYPE_CHECKING:
    import pandas as pd

TABLES = ("results", "prompts", "costs")
LAST = ".last"
PROMPTS = (
    Column("cell_id", pa.string(), "joins results.parquet"),
    Column("golden_picked", pa.list_(pa.float32()), "golden reward of the pick for each test prompt, in bank order"),
)
MEASURED = ("beta", "n_annotations")  # the record's value goes before the label's


class Tables(NamedTuple):
    """The three tables, and how many of the plan's cells have no row yet."""

    results: pa.Table
    prompts: pa.Table
    costs: pa.Table
    n_missing: int

    @property
    def counts(self) -> dict[str, int]:
        """Rows of results by status."""
        found = Counter(self.results["status"].to_pylist())
        return {status: found[status] for status in ("done", "failed", "diverged", "skipped")}


# -- making the tables -------------------------------------------------------------------------------------


def assemble(cells: Sequence[PlannedCell], store: Store) -> Tables:
    """The tables of planned cells: one row per cell that was skipped by the plan or has a record."""
    wanted = [cell.fingerprint for cell in cells if cell.reason is None]
    records = store.records(wanted)
    row_of = {key: row for row, key in enumerate(records["fingerprint"].to_pylist())}
    rows = sorted((c for c in cells if c.reason is not None or c.fingerprint in row_of), key=_order)
    index = [None if cell.reason is not None else row_of[cell.fingerprint] for cell in rows]
    results = _results(rows, records.drop_columns(["golden_picked"]).take(pa.array(index, pa.int64())))
    ids = dict(zip(records["cell_id"].to_pylist(), range(len(row_of)), strict=True))
    prompts = records.select(["cell_id", "golden_picked"]).take(pa.array([ids[i] for i in sorted(ids)], pa.int64()))
    prompts = prompts.filter(pc.is_valid(prompts["golden_picked"]))
    costs = store.costs(wanted).sort_by("cell_id")
    return Tables(results, prompts, costs, len(cells) - len(rows))


def write(folder: Path, tables: Tables) -> Path:
    """Write the tables into a sweep's folder, each in place of the one before; path of results.parquet."""
    for name in reversed(TABLES):  # results last: who sees it finds the others
        table = getattr(tables, name).replace_schema_metadata({"rmsweep.schema_version": str(SCHEMA_VERSION)})
        atomic.replace(folder / f"{name}.parquet", parquet(table))
    return folder / "results.parquet"


def _results(cells: Sequence[PlannedCell], records: pa.Table) -> pa.Table:
    """Label columns beside the records' columns, row by row; a null record is a cell that the plan skips."""
    labels = _label_columns(cells)
    for name in MEASURED:
        labels[name] = pc.coalesce(records[name].combine_chunks(), labels[name])
    reasons = pa.array([cell.reason for cell in cells], pa.string())
    columns = {
        "cell_id": pa.array([cell.cell_id for cell in cells], pa.string()),
        **labels,
        "status": pc.fill_null(records["status"], "skipped"),
        "reason": pc.coalesce(records["reason"].combine_chunks(), reasons),
        **{column.name: records[column.name] for column in METRICS},
    }
    return pa.table(columns)


def _label_columns(cells: Sequence[PlannedCell]) -> dict[str, pa.Array]:
    """Axes typed by the schema, then the sweep's other labels by name, typed by what they hold."""
    columns = {
        column.name: pa.array([_number(cell.labels.get(column.name), column.type) for cell in cells], column.type)
        for column in AXES
    }
    for name in sorted({name for cell in cells for name in cell.labels} - set(columns)):
        columns[name] = _inferred([cell.labels.get(name) for cell in cells])
    return columns


def _number(value: Any, kind: pa.DataType) -> Any:
    return float(value) if kind == pa.float64() and value is not None else value


def _inferred(values: Sequence[Any]) -> pa.Array:
    """int64 where all values are integers, float64 where all are numbers, else strings."""
    present = [v for v in values if v is not None]
    if present and all(isinstance(v, int) and not isinstance(v, bool) for v in present):
        return pa.array(values, pa.int64())
    if present and all(isinstance(v, int | float) and not isinstance(v, bool) for v in present):
        return pa.array([None if v is None else float(v) for v in values], pa.float64())
    texts = [v if v is None or isinstance(v, str) else canonical_json(v) for v in values]
    return pa.array(texts, pa.string())


def _order(cell: PlannedCell) -> tuple[Any, ...]:
    """Rows are sorted by the axes, then by the other labels, then by cell_id: readable, and free of history."""
    axes = [_sortable(cell.labels.get(column.name)) for column in AXES]
    rest = [(name, _sortable(cell.labels[name])) for name in sorted(set(cell.labels) - {c.name for c in AXES})]
    return (*axes, rest, cell.cell_id)


def _sortable(value: Any) -> tuple[int, float, str]:
    if value is None:
        return (2, 0.0, "")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (0, float(value), "")
    return (1, 0.0, value if isinstance(value, str) else canonical_json(value))


# -- reading them ------------------------------------------------------------------------------------------


def mark_last(root: Path, name: str) -> None:
    """Remember which sweep was run last."""
    atomic.replace(root / "sweeps" / LAST, name.encode())


def last_sweep(root: Path) -> str:
    """Name of the sweep that was run last under root; ConfigError where there is none."""
    known = {path.parent.name for path in root.glob("sweeps/*/plan.json")}
    try:
        name = atomic.read(root / "sweeps" / LAST).decode(errors="replace")
    except OSError:
        name = ""
    if name in known:
        return name
    if len(known) == 1:
        return known.pop()
    if not known:
        raise ConfigError(f"no sweep under root={root} yet; `rmsweep run` makes one")
    raise ConfigError(f"which sweep under root={root}? There are {', '.join(sorted(known))}")


def load(path: Path) -> pd.DataFrame:
    """The results table of a results.parquet, of a sweep's folder, or of the last sweep under a root."""
    frame: pd.DataFrame = _read(_results_file(Path(path))).to_pandas()
    return frame


def _results_file(path: Path) -> Path:
    if path.is_file():
        return path
    if (path / "results.parquet").is_file():
        return path / "results.parquet"
    if (path / "plan.json").is_file():
        raise ConfigError(f"{path}: this sweep has no results yet; `rmsweep run` makes them")
    if not path.is_dir():
        raise ConfigError(f"{path}: no such file or folder; give a results.parquet, a sweep's folder, or a root")
    return _results_file(sweep_folder(path, last_sweep(path)))


def _read(path: Path, columns: Iterable[str] | None = None) -> pa.Table:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{path}: cannot be read ({error}); `rmsweep run` writes it again") from None


def query(folder: Path, sql: str) -> pd.DataFrame:
    """The answer of one SQL query over the tables results, prompts and costs of a sweep's folder.

    duckdb in memory: the query can read no file and write none. Raises ConfigError with duckdb's message.
    """
    import duckdb

    _results_file(folder)  # a clear error where there are none
    connection = duckdb.connect(
        ":memory:", config={"enable_external_access": "false", "allow_community_extensions": "false"}
    )
    try:
        for name in TABLES:
            if (folder / f"{name}.parquet").is_file():
                connection.register(name, _read(folder / f"{name}.parquet"))
        connection.execute("SET python_enable_replacements = false")
        connection.execute("SET lock_configuration = true")
        answer = connection.execute(sql)
        if answer.description is None:
            raise ConfigError("the query gives no table; it must be a SELECT over results, prompts, costs")
        frame: pd.DataFrame = answer.df()
        return frame
    except duckdb.Error as error:
        raise ConfigError(f"--sql: {error}") from None
    finally:
        connection.close()


def schema_text() -> str:
    """The columns of the three tables: name, type, meaning."""
    tables: Mapping[str, Sequence[Column]] = {
        "results.parquet, one row per cell": (STATUS[0], *AXES, *STATUS[1:], *METRICS),
        "prompts.parquet, one row per cell that is done": PROMPTS,
        "costs.parquet, one row per computed cell": COSTS,
    }
    lines = [f"schema version {SCHEMA_VERSION}"]
    for title, columns in tables.items():
        width = max(len(column.name) for column in columns)
        lines += ["", title]
        lines += [f"  {column.name:{width}}  {_type_name(column.type):12}  {column.doc}" for column in columns]
        if title.startswith("results"):
            lines.append("  any other key that the sweep sets or varies, such as reward_model.lr, is a column too")
    return "\n".join(lines)


def _type_name(kind: pa.DataType) -> str:
    return f"list<{kind.value_type}>" if pa.types.is_list(kind) else str(kind)
