"""Journals: the finished cells of a unit at work, until a part holds them, so that SIGKILL takes only cells in flight.

    journals/<owner>.<unit>-<8 hex digits>    frames, one a cell: two lengths, sha256, JSON, safetensors

A worker appends to its own, without fsync: a power cut may take it. Others read it once its owner (of claims) has
ended; it ends where a frame is torn. What it holds counts only when it is published as a part.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rmsweep import atomic

NAME = re.compile(r"(?P<owner>[A-Za-z0-9_]+-[0-9a-f]{8}-[0-9]+\.[0-9a-f]{12})\.(?P<unit>[0-9a-f]{16,64})-[0-9a-f]{8}")
HEAD = struct.Struct("<QQ32s")  # lengths in bytes of JSON and of safetensors, sha256 of both
COLUMN, KEPT = "column/", "kept/"  # so begin the names of arrays


class Finished(NamedTuple):
    """A finished cell: record (schemas.RECORD), cost row (schemas.COSTS), kept arrays by name."""

    record: dict[str, Any]
    cost: dict[str, Any]
    kept: Mapping[str, NDArray[Any]]


class Journal:
    """The finished cells of one attempt at a unit; the file is there while it holds any. Raises StoreError."""

    def __init__(self, folder: Path, owner: str, unit: str) -> None:
        self._path = folder / f"{owner}.{unit}-{uuid.uuid4().hex[:8]}"
        self._tail: atomic.Tail | None = None

    def add(self, cell: Finished) -> None:
        """Append a finished cell."""
        if self._tail is None:
            self._tail = atomic.Tail(self._path, "journal")
        self._tail.write(frame(cell))

    def drop(self) -> None:
        """Parts hold all of it."""
        if self._tail is not None:
            self._tail.close()
            self._tail = None
            atomic.remove(self._path)


def listed(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """Every journal with its owner and its unit; other files are none."""
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(folder)):
            if match := NAME.fullmatch(name):
                yield folder / name, match["owner"], match["unit"]


def read(path: Path) -> Iterator[Finished]:
    """The cells of a journal up to the first frame that is torn or damaged; none where it is gone. Raises OSError."""
    from safetensors import SafetensorError

    try:
        rest = memoryview(atomic.read(path))
    except FileNotFoundError:
        return
    while len(rest) >= HEAD.size:
        n_json, n_arrays, said = HEAD.unpack(rest[: HEAD.size])
        body, rest = rest[HEAD.size :][: n_json + n_arrays], rest[HEAD.size + n_json + n_arrays :]
        if len(body) < n_json + n_arrays or hashlib.sha256(body).digest() != said:
            return
        try:
            yield _cell(bytes(body[:n_json]), bytes(body[n_json:]))
        except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return  # of another version


def frame(cell: Finished) -> bytes:
    """A cell as bytes that give back the same numbers, bit for bit."""
    from safetensors.numpy import save

    columns = {name: value for name, value in cell.record.items() if isinstance(value, np.ndarray)}
    rest = {name: value for name, value in cell.record.items() if name not in columns}
    words = json.dumps({"record": rest, "cost": cell.cost}, default=_plain).encode()
    named = {COLUMN + name: value for name, value in columns.items()} | {KEPT + n: a for n, a in cell.kept.items()}
    arrays = save({name: np.ascontiguousarray(array) for name, array in named.items()})
    sha = hashlib.sha256(words + arrays).digest()
    return HEAD.pack(len(words), len(arrays), sha) + words + arrays


def _cell(words: bytes, arrays: bytes) -> Finished:
    from safetensors.numpy import load

    said, found = json.loads(words), load(arrays)
    columns = {name.removeprefix(COLUMN): a for name, a in found.items() if name.startswith(COLUMN)}
    kept = {name.removeprefix(KEPT): a for name, a in found.items() if name.startswith(KEPT)}
    return Finished({**said["record"], **columns}, dict(said["cost"]), kept)


def _plain(value: Any) -> Any:
    """Numbers of numpy in JSON, exactly."""
    return value.tolist()
