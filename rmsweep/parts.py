"""Parts: immutable files named by their digest, verified on reading; rows are found through a few small columns.

A part is <key>-<first 24 hex digits of its sha256>.<suffix>. What is in memory grows with the small columns only:
rows are read when asked for, one part at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rmsweep import atomic
from rmsweep.errors import StoreError
from rmsweep.fingerprint import DIGITS

PART = re.compile(rf"([0-9a-f]{{16,64}})-([0-9a-f]{{{DIGITS}}})\.(parquet|safetensors)")
MAX_TRIES = 50


class Row(NamedTuple):
    """Where a row lies: a part's name, and the row in it."""

    part: str
    row: int


class Found(NamedTuple):
    """The rows of one cell that count, several where they are alike in the small columns; `small`: those columns."""

    order: tuple[Any, ...]
    small: tuple[Any, ...]
    rows: list[Row]


class Chosen(NamedTuple):
    """The row of one cell that counts, and its small columns."""

    row: Row
    small: tuple[Any, ...]


class Gone(Exception):
    """A part that held a wanted row was merged into another one, or damaged, since the row was found: find it again."""


class Damaged(Exception):
    """A part's bytes are not what they were published as; says how."""


class Files:
    """The files of one folder that are named as parts, of arrays named <fingerprint>/<name> unless a subclass says.

    set_aside: told of a damaged one (path, problem).
    """

    def __init__(self, folder: Path, set_aside: Callable[[Path, str], None]) -> None:
        self.folder, self._set_aside = folder, set_aside

    def names(self) -> list[str]:
        """Names of the parts; temporary and foreign files are none."""
        try:
            return [name for name in os.listdir(self.folder) if PART.fullmatch(name)]
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes | None:
        """The verified bytes of a part; None where it is gone, or damaged and now set aside."""
        try:
            return self._verified(name)
        except FileNotFoundError:
            return None
        except Damaged as damaged:
            self._set_aside(self.folder / name, str(damaged))
            return None

    def cells(self, name: str) -> set[str]:
        """Fingerprints of the cells that a part holds something of; it is verified and nothing set aside.

        Raises Damaged, and FileNotFoundError where it is gone.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            return {key.partition("/")[0] for key in load(self._verified(name))}
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise Damaged(f"is no part of this version ({error})") from None

    def _verified(self, name: str) -> bytes:
        try:
            data = atomic.read(self.folder / name)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in atomic.NO_FILE:
                raise Damaged(f"cannot be read ({error.strerror})") from None
            raise atomic.unreadable(self.folder / name, error) from error
        if sha(data) != name.partition("-")[2].partition(".")[0]:
            raise Damaged("its bytes are not those of its name")
        return data

    def listed(self) -> Iterator[str]:
        """Every part's name, to be read as it comes.

        A part that goes away while we read was merged into one published before: list again until nothing is new.
        """
        seen: set[str] = set()
        while new := sorted(set(self.names()) - seen):
            seen |= set(new)
            yield from new

    def sound(self, concerns: Callable[[Path], bool]) -> Iterator[bytes]:
        """The verified bytes of every part that `concerns` us."""
        for name in self.listed():
            with contextlib.suppress(FileNotFoundError):
                data = self.read(name) if concerns(self.folder / name) else None
                if data is not None:
                    yield data


class Parts(Files):
    """Parquet parts of one schema; several rows of one cell may lie in them.

    small: columns kept in memory, fingerprint first. order: of their values; of several rows of a cell the smallest
    counts, and among equals the smaller digest of the whole row. `conflicts`: cells of which two such rows differ.
    """

    def __init__(
        self,
        folder: Path,
        set_aside: Callable[[Path, str], None],
        schema: pa.Schema,
        small: Sequence[str],
        order: Callable[..., tuple[Any, ...]],
    ) -> None:
        super().__init__(folder, set_aside)
        self.schema, self.conflicts = schema, set[str]()
        self._names, self._order = list(small), order
        self._small_schema = pa.schema([schema.field(name) for name in small])
        self._asked, self._foreign = set[str](), set[str]()  # cells asked for so far; parts with none of them
        self._index: dict[str, list[tuple[Any, ...]]] = {}  # parts never change: read and verified once per process

    def find(self, wanted: Set[str]) -> dict[str, Found]:
        """Fingerprint -> the rows that count, of the wanted cells that have any."""
        best: dict[str, Found] = {}
        for part, index in self._indexed(wanted).items():
            for row, small in enumerate(index):
                key = small[0]
                if key not in wanted:
                    continue
                order, known = self._order(*small[1:]), best.get(key)
                if known is None or order < known.order:
                    best[key] = Found(order, small, [Row(part, row)])
                elif order == known.order:
                    known.rows.append(Row(part, row))
        return best

    def choose(self, wanted: Set[str]) -> dict[str, Row]:
        """Fingerprint -> its one row: a pure function of the rows in the parts. Raises Gone."""
        return {key: cell.row for key, cell in self.pick(wanted).items()}

    def pick(self, wanted: Set[str]) -> dict[str, Chosen]:
        """Fingerprint -> its one row with the small columns, of one listing. Raises Gone."""
        found = self.find(wanted)
        digests = self._digests(row for cell in found.values() if len(cell.rows) > 1 for row in cell.rows)
        self.conflicts |= {key for key, cell in found.items() if len({digests.get(row) for row in cell.rows}) > 1}
        return {
            key: Chosen(min(cell.rows, key=lambda row: (digests.get(row, ""), row)), cell.small)
            for key, cell in found.items()
        }

    def take(self, rows: Sequence[Row], columns: Sequence[str] | None = None) -> pa.Table:
        """These rows in this order; every part is opened once. Raises Gone."""
        names = self.schema.names if columns is None else list(columns)
        schema = pa.schema([self.schema.field(name) for name in names])
        tables, places = [schema.empty_table()], list[int]()
        for part, here in _by_part(rows).items():
            table = self._open(part, schema)
            tables.append(table.take(pa.array([rows[place].row for place in here], pa.int64())))
            places += here
        order = np.argsort(np.asarray(places, dtype=np.int64))
        return pa.concat_tables(tables).combine_chunks().take(pa.array(order, pa.int64()))

    def table(self, wanted: Set[str], columns: Sequence[str] | None = None) -> pa.Table:
        """The one row of every wanted cell that has any, sorted by fingerprint."""

        def read() -> pa.Table:
            chosen = self.choose(wanted)
            return self.take([chosen[key] for key in sorted(chosen)], columns)

        return again(read)

    def small_parts(self, wanted: Set[str], n_rows: int) -> list[str]:
        """Names of the parts that concern the wanted cells and hold fewer than n_rows rows."""
        return [name for name, index in self._indexed(wanted).items() if len(index) < n_rows]

    def n_rows(self, part: str) -> int:
        """Rows of a part that was found."""
        return len(self._index[part])

    def merged(self, parts: Iterable[str]) -> pa.Table:
        """All rows of some parts, rows that are equal once. Raises Gone."""
        kept: dict[str, Row] = {}
        rows = [Row(part, row) for part in parts for row in range(self.n_rows(part))]
        for row, text in self._digests(rows).items():
            kept.setdefault(text, row)
        return self.take(list(kept.values()))

    def cells(self, name: str) -> set[str]:
        """As of `Files`; also refuses what has not this schema."""
        if name not in self._index:
            self._index[name] = self._small(self._verified(name))
        return {small[0] for small in self._index[name]}

    def _indexed(self, wanted: Set[str]) -> dict[str, list[tuple[Any, ...]]]:
        """Part -> its small columns, row by row, of every sound part that concerns the wanted cells."""
        names = []
        if not self._asked.issuperset(wanted):
            self._asked |= wanted
            self._foreign.clear()
        for name in self.listed() if wanted else ():
            self._look(name)
            names.append(name)
        return {name: self._index[name] for name in sorted(names) if name in self._index}

    def _look(self, name: str) -> None:
        if name in self._index or name in self._foreign:
            return
        if not self._concerns(self.folder / name):
            self._foreign.add(name)
            return
        data = self.read(name)
        if data is None:
            return
        try:
            self._index[name] = self._small(data)
        except Damaged as damaged:
            self._set_aside(self.folder / name, str(damaged))

    def _small(self, data: bytes) -> list[tuple[Any, ...]]:
        """The small columns of a part, row by row. Raises Damaged."""
        try:
            file = _parquet(pa.BufferReader(data))
            _conform(file.schema_arrow.empty_table(), self.schema)
            columns = _conform(file.read(columns=self._names), self._small_schema)
        except (OSError, pa.ArrowException, ValueError, KeyError) as error:
            raise Damaged(f"is no part of this version ({error})") from None
        return list(zip(*(column.to_pylist() for column in columns.columns), strict=True))

    def _concerns(self, path: Path) -> bool:
        """Whether a part may hold a cell that was asked for: foreign sweeps' parts need not be read whole."""
        try:
            with _parquet(path) as file:
                return not self._asked.isdisjoint(file.read(columns=["fingerprint"])["fingerprint"].to_pylist())
        except FileNotFoundError:
            return False
        except (OSError, pa.ArrowException, ValueError, KeyError):
            return True  # the checksum will tell

    def _open(self, part: str, schema: pa.Schema) -> pa.Table:
        data = self.read(part)
        if data is None:
            self._index.pop(part, None)
            raise Gone(part)
        return _conform(_parquet(pa.BufferReader(data)).read(columns=schema.names), schema)

    def _digests(self, rows: Iterable[Row]) -> dict[Row, str]:
        """Digest of every whole row, one part in memory at a time."""
        result: dict[Row, str] = {}
        asked = list(rows)
        for part, here in _by_part(asked).items():
            table = self._open(part, self.schema)
            for place in here:
                result[asked[place]] = _row_digest(table, asked[place].row)
        return result


def again(read: Callable[[], Any]) -> Any:
    """The answer of `read`, called again while parts go away under it; StoreError when that does not end."""
    for _ in range(MAX_TRIES):
        try:
            return read()
        except Gone as gone:
            last = gone
    raise StoreError(f"the store's parts change faster than they can be read (last: {last})")


def table_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table; a key that the schema does not know is an error, an absent one is null."""
    for row in rows:
        if unknown := sorted(set(row) - set(schema.names)):
            raise ValueError(f"columns {unknown} are not in the schema; add them to rmsweep/schemas.py")
    columns = {field.name: pa.array([_plain(row.get(field.name)) for row in rows], field.type) for field in schema}
    return pa.table(columns, schema=schema)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def sha(data: bytes) -> str:
    """What a part's name says of its bytes."""
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def _parquet(source: Any) -> pq.ParquetFile:
    return pq.ParquetFile(source, page_checksum_verification=True)


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of `schema`; those that the version which wrote the part did not have yet are null."""
    known = set(table.schema.names)
    columns = [table[f.name].cast(f.type) if f.name in known else pa.nulls(len(table), f.type) for f in schema]
    return pa.table(columns, schema=schema)


def _by_part(rows: Sequence[Row]) -> Mapping[str, list[int]]:
    """Part -> places of its rows in `rows`."""
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.part, []).append(place)
    return places


def _row_digest(table: pa.Table, row: int) -> str:
    return hashlib.sha256(repr(table.slice(row, 1).to_pylist()).encode()).hexdigest()
