"""Cells -> plan: which cells a sweep has, their identities, why some are skipped; and the plan's files."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rmsweep import atomic
from rmsweep.cell import (
    GROUPS,
    CellSpec,
    PlannedCell,
    bank_id,
    build_cell,
    cell_id,
    fingerprint,
    why_skipped,
)
from rmsweep.datasets import BankShape
from rmsweep.errors import ConfigError, DataError, DesignError, StoreError
from rmsweep.fingerprint import canonical_json, digest, file_sha256
from rmsweep.grid import VALUES, Grid, GridCell, Sweep, derived_name
from rmsweep.presets import Presets
from rmsweep.reward_models import Compute
from rmsweep.schemas import AXES, F

FORMAT = 1
KEEP = ("none", "scores", "models")
CONFIG_KEYS = (*GROUPS, "size", *VALUES, "error_rate", "evaluate")
NO_BANK = BankShape(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), False)


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

    bank_bytes: bank_id -> estimated size of the bank on disk; bank_sizes: its shape. kept_bytes: what `keep`
    adds. unknown: why identities are missing (the data are not here), None when they are known.
    """

    name: str
    cells: list[PlannedCell]
    compute: Compute
    keep: str = "none"
    plugins: tuple[str, ...] = ()
    bank_bytes: Mapping[str, int] = field(default_factory=dict, compare=False)
    bank_sizes: Mapping[str, BankSize] = field(default_factory=dict, compare=False)
    kept_bytes: int = field(default=0, compare=False)
    unknown: str | None = field(default=None, compare=False)

    def write(self, folder: Path) -> None:
        """Write plan.parquet and plan.json into `folder`; a plan that is there becomes the union of both.

        Raises ConfigError when that plan is pinned to another device or precision, or to other plug-ins.
        """
        header, table = self._header(), _table(self.cells)
        if (folder / "plan.json").exists():
            if read_header(folder) == header and _read_table(folder).equals(table):
                return  # the same command again
            merged = _union(Plan.read(folder), self, folder)
            header, table = merged._header(), _table(merged.cells)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", compression_level=9, write_page_checksum=True)
        atomic.probe(folder)
        atomic.replace(folder / "plan.parquet", sink.getvalue().to_pybytes())
        atomic.replace(folder / "plan.json", (json.dumps(header, indent=1, sort_keys=True) + "\n").encode())

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self.name,
            "compute": self.compute._asdict(),
            "keep": self.keep,
            "plugins": {str(path): file_sha256(Path(path)) for path in self.plugins},
        }

    @staticmethod
    def read(folder: Path) -> Plan:
        """The plan in `folder`; raises StoreError when there is none or it cannot be read."""
        header = read_header(folder)
        return Plan(
            name=header["name"],
            cells=_cells(_read_table(folder)),
            compute=Compute(**header["compute"]),
            keep=header["keep"],
            plugins=tuple(header["plugins"]),
        )


def _read_table(folder: Path) -> pa.Table:
    try:
        return pq.read_table(folder / "plan.parquet", page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{folder / 'plan.parquet'}: cannot be read ({error})") from None


def read_header(folder: Path) -> dict[str, Any]:
    """plan.json of a sweep's folder: name, compute, keep and the sha256 of every plug-in."""
    try:
        header: dict[str, Any] = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{folder}: holds no plan (plan.json); plan the sweep with `rmsweep run`") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder / 'plan.json'}: cannot be read ({error})") from None
    if header.get("format") != FORMAT:
        raise StoreError(f"{folder / 'plan.json'}: format {header.get('format')}, this version reads {FORMAT}")
    return header


def make(
    sweep: Sweep,
    presets: Presets,
    *,
    compute: Compute = Compute(),  # noqa: B008  an immutable tuple
    keep: str = "none",
    plugins: Sequence[str] = (),
    need_data: bool = True,
) -> Plan:
    """The plan of `sweep`: every cell composed, checked and identified; nothing is computed or written.

    Raises ConfigError for values impossible in every cell, DesignError when no cell can run, DataError when
    data are missing or unsound; with `need_data=False` such data only leave the identities empty.
    """
    if keep not in KEEP:
        raise ConfigError(f"keep={keep}: allowed are {', '.join(KEEP)}")
    planner = _Planner(compute, need_data, keep)
    points, cells = [], []
    for point in Grid(sweep, presets).cells():
        points.append(point)
        cells.append(planner.plan(point))
    _refuse_impossible(sweep, points, planner.errors)
    _refuse_unrunnable(cells)
    return Plan(
        name=sweep_name(sweep, plugins),
        cells=_unique(cells),
        compute=compute,
        keep=keep,
        plugins=tuple(str(p) for p in plugins),
        bank_bytes=planner.bank_bytes,
        bank_sizes=planner.bank_sizes,
        kept_bytes=planner.kept_bytes,
        unknown=planner.unknown,
    )


def sweep_name(sweep: Sweep, plugins: Sequence[str] = ()) -> str:
    """The sweep's own name, else one derived from its grid and the bytes of its plug-ins."""
    return sweep.name or derived_name(sweep, [file_sha256(Path(p)) for p in plugins])


def sweep_folder(root: Path, name: str) -> Path:
    """Folder of a sweep's plan, logs and tables."""
    return root / "sweeps" / name


def pinned_compute(folder: Path) -> Compute | None:
    """Device and precision that the plan in `folder` is pinned to; None where there is no plan."""
    return Compute(**read_header(folder)["compute"]) if (folder / "plan.json").exists() else None


class _Source(NamedTuple):
    """What is known of a bank's data: sha256 by input name, and its shape; None where they are not here."""

    inputs: dict[str, str] | None
    shape: BankShape | None


class _Planner:
    """Composes, checks and identifies cells; whatever cells share is done once."""

    def __init__(self, compute: Compute, need_data: bool, keep: str) -> None:
        self.compute, self.need_data, self.keep = compute, need_data, keep
        self.errors: dict[int, ConfigError] = {}  # position in the grid -> why the config is not sound
        self.bank_bytes: dict[str, int] = {}
        self.bank_sizes: dict[str, BankSize] = {}
        self.kept_bytes = 0
        self.unknown: str | None = None
        self._position = -1
        self._cache: dict[Any, Any] = {}

    def plan(self, point: GridCell) -> PlannedCell:
        """The planned cell at one point of the grid."""
        self._position += 1
        try:
            if point.error is not None:
                raise point.error
            spec = self._spec(point)
        except ConfigError as error:
            self.errors[self._position] = error
            labels = _labels(point, None)
            return PlannedCell(digest({"unsound": labels}), "", "", labels, point.config, point.reason or str(error))
        labels, llm = _labels(point, spec), point.choices["base_llm"]
        reason = point.reason
        if llm not in spec.dataset.base_llms:
            reason = reason or why_skipped(spec, NO_BANK, llm)
        if reason is not None:  # known without the data, so it must not need them
            return PlannedCell(cell_id(spec, {}), "", "", labels, point.config, reason)
        return self._identified(point, spec, labels)

    def _identified(self, point: GridCell, spec: CellSpec, labels: dict[str, Any]) -> PlannedCell:
        llm = point.choices["base_llm"]
        source_key = _key(point, "dataset", "base_llm", "embedder", "size")
        inputs, shape = self._once(("source", source_key), lambda: self._source(spec))
        if inputs is None or shape is None:
            return PlannedCell("", "", "", labels, point.config)
        values = spec.values
        reason = self._once(
            ("skip", source_key, _key(point, "candidates", "pairing", "reward_model"), values.n_annotations,
             values.pairs_per_prompt),
            lambda: why_skipped(spec, shape, llm),
        )  # fmt: skip
        bank = self._once(("bank", source_key), lambda: bank_id(spec, inputs))
        if reason is None:
            if bank not in self.bank_bytes:
                self.bank_bytes[bank], self.bank_sizes[bank] = bank_bytes(spec, shape), bank_size(spec, shape)
            self.kept_bytes += kept_bytes(spec, shape, self.keep)
        cell = cell_id(spec, inputs, lambda name, make: self._once(("text", name, *_text_key(point, name)), make))
        return PlannedCell(cell, fingerprint(cell, self.compute), bank, labels, point.config, reason)

    def _spec(self, point: GridCell) -> CellSpec:
        """build_cell(point.config); components and values that an earlier cell had are not checked again."""
        group_key = ("groups", _key(point, *GROUPS, "size"))
        value_key = ("values", _key(point, "values", "error_rate", "evaluate"))
        known, values = self._cache.get(group_key), self._cache.get(value_key)
        if known is None or values is None:
            spec = build_cell(point.config)
            self._cache.setdefault(group_key, spec)
            self._cache.setdefault(
                value_key, {"values": spec.values, "error_rate": spec.error_rate, "evaluate": spec.evaluate}
            )
            return spec
        return dataclasses.replace(known, **values)

    def _source(self, spec: CellSpec) -> _Source:
        """Digest and check the data of one bank; missing files are an error only where they are needed."""
        try:
            files = spec.dataset.inputs(spec.base_llm, spec.embedder)
            digests = {name: self._sha256(Path(path)) for name, path in files.items()}
            return _Source(digests, spec.dataset.shape(spec.base_llm, spec.size, spec.embedder))
        except FileNotFoundError as error:
            problem = DataError(f"{error.filename}: no such file")
        except DataError as error:
            problem = error
        if self.need_data:
            raise problem
        self.unknown = self.unknown or str(problem)
        return _Source(None, None)

    def _sha256(self, path: Path) -> str:
        state = path.stat()
        key = ("sha256", str(path.resolve()), state.st_size, state.st_mtime_ns)
        return str(self._once(key, lambda: file_sha256(path)))

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


def _key(point: GridCell, *names: str) -> tuple[Any, ...]:
    return tuple(point.parts[name] for name in names)


def _text_key(point: GridCell, name: str) -> tuple[Any, ...]:
    """What decides the text of one part of a cell's identity."""
    if name == "bank":
        return _key(point, "dataset", "base_llm", "embedder", "size")
    if name == "reward_model":
        return _key(point, "reward_model", "dataset", "size")  # the size of a simulated bank fills its null fields
    return _key(point, "values", "error_rate") if name in ("values", "error_rate") else _key(point, name)


def _labels(point: GridCell, spec: CellSpec | None) -> dict[str, Any]:
    """Columns of a cell: every axis, and whatever else the sweep sets or varies."""
    labels: dict[str, Any] = {}
    values = {k: point.config.get(k, point.varied.get(k)) for k in VALUES}
    rate = spec.error_rate.value if spec else point.varied.get("error_rate.value")
    for column in AXES:
        name = column.name
        value = rate if name == "error_rate" else point.choices.get(name, values.get(name))
        labels[name] = _typed(value, column.type == F) if name in VALUES or name == "error_rate" else value
    if rate is not None:
        labels["beta"] = None  # what error_rate is solved for: known once the cell has run
    if spec is not None:
        labels["embedder"] = spec.embedder.kind if labels["embedder"] == "auto" else labels["embedder"]
        labels["size"] = labels["size"] if spec.dataset.uses_size else None
    for key, value in sorted(point.varied.items()):
        if key not in labels and key != "error_rate.value":
            labels[key] = canonical_json(value) if isinstance(value, list | dict) else value
    return labels


def _typed(value: Any, real: bool) -> Any:
    """A number of the column's type; None for what is none (the cell is then not sound and says so)."""
    try:
        return None if value is None or isinstance(value, bool) else float(value) if real else int(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _refuse_impossible(sweep: Sweep, points: Sequence[GridCell], errors: Mapping[int, ConfigError]) -> None:
    """A value that no cell can take is bad input, not a reason to skip."""
    live = [i for i, point in enumerate(points) if point.reason is None]
    if errors and all(i in errors for i in live):
        raise errors[next((i for i in live), min(errors))]
    axes = [*sweep.axes, *(k for pair in sweep.paired for k in pair)]
    for key in axes if errors else []:
        sound = {repr(points[i].varied[key]) for i in live if i not in errors}
        for i in live:
            if i in errors and repr(points[i].varied[key]) not in sound and not _is_choice(key):
                raise errors[i]


def _is_choice(key: str) -> bool:
    return key in (*GROUPS, "size")


def _refuse_unrunnable(cells: Sequence[PlannedCell]) -> None:
    """A single cell that cannot run, or a grid in which none can, is bad input."""
    if not cells:
        raise DesignError("this sweep has no cells; give at least one value to every axis")
    if any(cell.reason is None for cell in cells):
        return
    reasons = Counter(str(cell.reason) for cell in cells).most_common(5)
    if len(cells) == 1:
        raise DesignError(reasons[0][0])
    lines = "".join(f"\n  {count} cells: {reason}" for reason, count in reasons)
    raise DesignError(f"none of the {len(cells)} cells can run:{lines}")


def _unique(cells: Iterable[PlannedCell]) -> list[PlannedCell]:
    """Cells with equal identity and labels are one row; equal identity alone is two rows, computed once."""
    return list({(c.cell_id, canonical_json(c.labels)): c for c in cells}.values())


# -- sizes -------------------------------------------------------------------------------------------------


def bank_size(spec: CellSpec, shape: BankShape) -> BankSize:
    """The numbers that decide what a cell on a bank of this shape costs."""
    train, test = shape.count_train, shape.count_test
    return BankSize(len(train), int(train.sum()), int(test.sum()), int(test.max(initial=1)), _dim(spec))


def _dim(spec: CellSpec) -> int:
    """D of the bank to be made; 0 where only its data tell."""
    return spec.size.D if spec.dataset.uses_size else int(getattr(spec.embedder, "dim", 0) or 0)


def bank_bytes(spec: CellSpec, shape: BankShape) -> int:
    """Bytes of the bank on disk per response: simulated fp16 embeddings, golden reward and ceiling; else fp32."""
    responses = int(shape.count_train.sum()) + int(shape.count_test.sum())
    if spec.dataset.uses_size:
        return responses * (2 * spec.size.D + 8)
    return responses * 4 * (_dim(spec) + 1)


def kept_bytes(spec: CellSpec, shape: BankShape, keep: str) -> int:
    """Bytes that `keep` adds for one cell: float32 scores [Q, M], or the weights of an MLP."""
    if keep == "scores":
        return int(shape.count_test.sum()) * 4
    hidden = getattr(spec.reward_model, "hidden", None)
    if keep == "models" and hidden:
        dims = [_dim(spec), *hidden, 1]
        return 4 * sum((a + 1) * b for a, b in itertools.pairwise(dims))
    return 0


# -- files -------------------------------------------------------------------------------------------------


def _union(old: Plan, new: Plan, folder: Path) -> Plan:
    """Both plans' cells, the old ones first; what was pinned must agree."""
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
    return dataclasses.replace(new, name=old.name, cells=_merged(old.cells, new.cells), plugins=plugins)


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

    columns: dict[str, list[Any]] = {
        "cell_id": [c.cell_id for c in cells],
        "fingerprint": [c.fingerprint for c in cells],
        "bank_id": [c.bank_id for c in cells],
        "reason": [c.reason for c in cells],
        "labels": [canonical_json(c.labels) for c in cells],
    }
    for key in CONFIG_KEYS:
        columns[f"config.{key}"] = [text(c.config[key]) if key in c.config else None for c in cells]
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def _cells(table: pa.Table) -> list[PlannedCell]:
    columns = table.to_pydict()
    parsed: dict[str, Any] = {}

    def value(text: str) -> Any:
        if text not in parsed:
            parsed[text] = json.loads(text)
        return parsed[text]

    result = []
    for i, label_text in enumerate(columns["labels"]):
        config = {k: value(t) for k in CONFIG_KEYS if (t := columns[f"config.{k}"][i]) is not None}
        cell, key, bank = (columns[name][i] for name in ("cell_id", "fingerprint", "bank_id"))
        result.append(PlannedCell(cell, key, bank, _ordered(json.loads(label_text)), config, columns["reason"][i]))
    return result


def _ordered(labels: dict[str, Any]) -> dict[str, Any]:
    """Labels in the order of `_labels`, numbers as numbers ("inf" is how JSON spells infinity)."""
    axes = {c.name: _typed(labels[c.name], True) if c.type == F else labels[c.name] for c in AXES}
    return {**axes, **{k: labels[k] for k in sorted(labels) if k not in axes}}
