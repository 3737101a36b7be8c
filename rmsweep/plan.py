"""Cells -> plan: which cells a sweep has, their identities, why some are skipped; and the plan's files."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rmsweep import atomic, provenance
from rmsweep.cell import (
    GROUPS,
    KEY,
    PARTS,
    CellSpec,
    PlannedCell,
    bank_id,
    build_cell,
    cell_id,
    cell_parts,
    fingerprint,
    key_parts,
    strict_parts,
    why_skipped,
)
from rmsweep.datasets import BankShape
from rmsweep.errors import ConfigError, DataError, DesignError, StoreError
from rmsweep.fingerprint import canonical_json, digest, digest_of_parts, file_sha256, sealed, unsealed
from rmsweep.grid import VALUES, Grid, GridCell, Sweep, check_name, derived_name
from rmsweep.presets import Presets
from rmsweep.reward_models import Compute
from rmsweep.schemas import AXES, F

FORMAT = 1
HEADER, TABLE = "plan.json", "plan.parquet"
REMEDY = "the same `rmsweep run` as before writes it again"
KEEP = ("none", "scores", "models")
CONFIG_KEYS = (*GROUPS, "size", *VALUES, "error_rate", "evaluate")
IDENTITY = (*PARTS, KEY)
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

    def write(self, folder: Path) -> list[str]:
        """Write plan.parquet and plan.json into `folder`; a plan that is there becomes the union of both.

        A damaged one is set aside, and cells whose data, versions or defaults have changed since give way to those of
        now; what was done about it is returned. Raises ConfigError when the plan that is there is pinned to another
        device or precision, or to other plug-ins.
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
        atomic.replace(folder / HEADER, sealed({**plan._header(), "table": tables}), "plan")
        atomic.replace(folder / TABLE, data, "plan")
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
    """plan.json of a sweep's folder: name, compute, keep, reuse and the sha256 of every plug-in."""
    path = folder / HEADER
    try:
        header = unsealed(atomic.read(path))
    except FileNotFoundError:
        raise StoreError(f"{folder}: holds no plan (plan.json); plan the sweep with `rmsweep run`") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise StoreError(f"{path}: cannot be read ({error}); {REMEDY}") from None
    if header.get("format") != FORMAT:
        raise StoreError(f"{path}: format {header.get('format')}, this version reads {FORMAT}")
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


def make(
    sweep: Sweep,
    presets: Presets,
    *,
    compute: Compute = Compute(),  # noqa: B008  an immutable tuple
    keep: str = "none",
    plugins: Sequence[str] = (),
    need_data: bool = True,
    reuse: str = "versions",
) -> Plan:
    """The plan of `sweep`: every cell composed, checked and identified; nothing is computed or written.

    reuse: "versions": a stored result counts where config, inputs and declared versions are the same; "strict": only if
    also the code of the cell's stages and the installed libraries are.
    Raises ConfigError for values impossible in every cell, DesignError when no cell can run, DataError when
    data are missing or unsound; with `need_data=False` such data only leave the identities empty.
    """
    if keep not in KEEP:
        raise ConfigError(f"keep={keep}: allowed are {', '.join(KEEP)}")
    if reuse not in provenance.REUSE:
        raise ConfigError(f"reuse={reuse}: allowed are {', '.join(provenance.REUSE)}")
    planner = _Planner(compute, need_data, keep, reuse)
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
        reuse=reuse,
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


class _Source(NamedTuple):
    """What is known of a bank's data: sha256 by input name, and its shape; None where they are not here."""

    inputs: dict[str, str] | None
    shape: BankShape | None


class _Code(NamedTuple):
    """The code of a cell's stages in its keys. text: stage -> digest as JSON; strict, strict_bank: what counts besides
    for the cell and for its bank where reuse is strict; key: text of what the fingerprint holds beside the cell_id.
    """

    text: str
    strict: dict[str, Any]
    strict_bank: dict[str, Any]
    key: str


class _Planner:
    """Composes, checks and identifies cells; whatever cells share is done once."""

    def __init__(self, compute: Compute, need_data: bool, keep: str, reuse: str) -> None:
        self.compute, self.need_data, self.keep, self.reuse = compute, need_data, keep, reuse
        self.errors: dict[int, ConfigError] = {}  # position in the grid -> why the config is not sound
        self.bank_bytes: dict[str, int] = {}
        self.bank_sizes: dict[str, BankSize] = {}
        self.kept_bytes = 0
        self.unknown: str | None = None
        self._position = -1
        self._cache: dict[Any, Any] = {}
        self._codes: dict[str, _Code] = {}

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
            ("skip", source_key, _key(point, "candidates", "pairing", "annotator", "reward_model"),
             values.n_annotations, values.pairs_per_prompt),
            lambda: why_skipped(spec, shape, llm),
        )  # fmt: skip
        code = self._once(("code", _key(point, *GROUPS)), lambda: self._code(spec))
        bank = self._once(("bank", source_key), lambda: bank_id(spec, inputs, code.strict_bank))
        if reason is None:
            if bank not in self.bank_bytes:
                self.bank_bytes[bank], self.bank_sizes[bank] = bank_bytes(spec, shape), bank_size(spec, shape)
            self.kept_bytes += kept_bytes(spec, shape, self.keep)
        parts = cell_parts(spec, inputs, lambda name, make: self._once(("text", name, *_text_key(point, name)), make))
        cell = digest_of_parts(parts)
        key = fingerprint(cell, self.compute, code.strict)
        return PlannedCell(cell, key, bank, labels, point.config, reason, {**parts, KEY: code.key}, code.text)

    def _code(self, spec: CellSpec) -> _Code:
        """What the code of a cell's stages adds to its keys; one text for all cells that run the same."""
        code = provenance.code_of(spec)
        text = canonical_json(code)
        if text not in self._codes:
            libraries = provenance.strict_libraries()
            cell, bank = (strict_parts(c, libraries) for c in (code, code["generate"]))
            if self.reuse != "strict":
                cell = bank = {}
            self._codes[text] = _Code(text, cell, bank, canonical_json(key_parts(self.compute, cell)))
        return self._codes[text]

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
    return dataclasses.replace(new, name=old.name, cells=_merged(kept, new.cells), plugins=plugins), notes[: bool(gone)]


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
    axes = {c.name: _typed(labels[c.name], True) if c.type == F else labels[c.name] for c in AXES}
    return {**axes, **{k: labels[k] for k in sorted(labels) if k not in axes}}
