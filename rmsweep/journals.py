"""Journals: the finished cells of a unit at work, until a part holds them, so that SIGKILL takes only cells in flight.

    journals/<owner>.<unit>-<8 hex digits>    frames, one a cell: lengths, sha256, rows in JSON, arrays as safetensors

A worker appends to its own, without fsync: a power cut may take it. Somebody else takes it by giving it another name,
when the worker has died or the owner (of claims) counts as dead; whoever was believed dead and lives sees that its
journal is gone, and publishes at once. A frame that is torn ends a journal. What it holds counts only as a part.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import struct
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rmsweep import atomic
from rmsweep.errors import StoreError
from rmsweep.parts import table_of
from rmsweep.schemas import COSTS, RECORD, arrow

NAME = re.compile(r"(?P<owner>[A-Za-z0-9_]+-[0-9a-f]{8}-[0-9]+\.[0-9a-f]{12})\.(?P<unit>[0-9a-f]{16,64})-[0-9a-f]{8}")
HEAD = struct.Struct("<QQ32s")  # lengths in bytes of JSON and of safetensors, sha256 of both
COLUMN, KEPT = "column/", "kept/"  # so begin the names of arrays
REAL = (np.dtype(np.float32), np.dtype(np.float64))
COST = arrow(COSTS)


class Finished(NamedTuple):
    """A finished cell: record (schemas.RECORD), cost row (schemas.COSTS), kept arrays by name."""

    record: dict[str, Any]
    cost: dict[str, Any]
    kept: Mapping[str, NDArray[Any]]


class Foreign(Exception):
    """A frame is sound and not of this version, or no work of ours."""


class Journal:
    """The finished cells of one attempt at a unit that no part holds yet."""

    def __init__(self, folder: Path, owner: str, unit: str) -> None:
        self._folder, self._owner, self._unit = folder, owner, unit
        self._tail: atomic.Tail | None = None

    def add(self, cell: Finished) -> bool:
        """Append a finished cell; False where it is not safe there: the disk refuses, or somebody took the file."""
        data = frame(cell)
        with contextlib.suppress(StoreError):
            if self._tail is None:
                self._tail = atomic.Tail(_fresh(self._folder, self._owner, self._unit), "journal")
            self._tail.write(data)
            return self._tail.is_there()
        return False

    def drop(self) -> None:
        """Parts hold all of it."""
        if self._tail is not None:
            self._tail.close()
            path, self._tail = self._tail.path, None
            with contextlib.suppress(StoreError):  # at worst it is published once more
                atomic.remove(path)

    def close(self) -> None:
        """Append no more, and leave the file."""
        if self._tail is not None:
            self._tail.close()


def listed(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """Every journal with its owner and its unit; other files are none. Raises StoreError."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    except OSError as error:
        raise atomic.unreadable(folder, error) from error
    for name in names:
        if match := NAME.fullmatch(name):
            yield folder / name, match["owner"], match["unit"]


def taken(path: Path) -> Path | None:
    """Where a journal is now that it is ours; None where it is not to be had, or no regular file."""
    with contextlib.suppress(OSError, StoreError):
        match = NAME.fullmatch(path.name)
        if match and stat.S_ISREG(os.lstat(path).st_mode):
            mine = _fresh(path.parent, match["owner"], match["unit"])
            atomic.take(path, mine, "journal")
            return mine
    return None


def read(path: Path) -> Iterator[Finished]:
    """The cells of a journal up to the first frame that is torn or damaged.

    Raises OSError, and Foreign at a frame that is sound and holds what tables of this version cannot.
    """
    with open(os.open(path, atomic.READ), "rb") as handle:
        left = os.fstat(handle.fileno()).st_size
        while len(head := handle.read(HEAD.size)) == HEAD.size:
            *lengths, said = HEAD.unpack(head)
            left -= HEAD.size + sum(lengths)
            if left < 0:
                return
            parts = [handle.read(length) for length in lengths]
            if _sha(parts) != said:
                return
            yield _cell(*parts)


def frame(cell: Finished) -> bytes:
    """A cell as bytes: what tables would hold of it, bit for bit."""
    from safetensors.numpy import save

    columns = {
        name: value for name, value in cell.record.items() if isinstance(value, np.ndarray) and value.dtype in REAL
    }
    rest = {name: value for name, value in cell.record.items() if name not in columns}
    named = {COLUMN + name: value for name, value in columns.items()} | {KEPT + n: a for n, a in cell.kept.items()}
    arrays = save({name: np.ascontiguousarray(array) for name, array in named.items()})
    parts = [f"[{_words(rest, RECORD)},{_words(cell.cost, COST)}]".encode(), arrays]
    return b"".join([HEAD.pack(*map(len, parts), _sha(parts)), *parts])


def _words(row: Mapping[str, Any], schema: pa.Schema) -> str:
    """A row in JSON; by way of a table, which is slower, where that has no word for what a table can hold."""
    try:
        return json.dumps(row, default=lambda value: value.tolist())
    except (TypeError, ValueError, AttributeError, RecursionError):
        (held,) = table_of([row], schema).to_pylist()
        return json.dumps({name: held[name] for name in row})


def _cell(words: bytes, arrays: bytes) -> Finished:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        (record, cost), found = json.loads(words), load(arrays)
        record |= {name.removeprefix(COLUMN): array for name, array in found.items() if name.startswith(COLUMN)}
        kept = {name.removeprefix(KEPT): array for name, array in found.items() if name.startswith(KEPT)}
        table_of([record], RECORD), table_of([cost], COST)
        if not isinstance(record["fingerprint"], str):
            raise TypeError("fingerprint")
        return Finished(record, cost, kept)
    except (SafetensorError, pa.ArrowException, ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
        raise Foreign from None


def _sha(parts: list[bytes]) -> bytes:
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.digest()


def _fresh(folder: Path, owner: str, unit: str) -> Path:
    return folder / f"{owner}.{unit}-{uuid.uuid4().hex[:8]}"
