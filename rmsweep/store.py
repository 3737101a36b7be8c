"""The store: banks and results as immutable, checksummed artefacts; no database, no lock, no append.

store/banks/ID/              a bank's files; manifest.json (size and sha256 of each) is its commit mark
store/results/UNIT-SHA.parquet   records of a unit's cells (schemas.RECORD), named by the digest of their bytes
store/costs/UNIT-SHA.parquet     what they cost (schemas.COSTS)
store/kept/UNIT-SHA.safetensors  what `keep` asked for
store/quarantine/            what failed its checksum
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rmsweep import atomic
from rmsweep.bank import Bank
from rmsweep.errors import StoreError
from rmsweep.fingerprint import DIGITS, file_sha256

PART = re.compile(rf"[0-9a-f]+-[0-9a-f]{{{DIGITS}}}\.(parquet|safetensors)")
ID = re.compile(rf"[0-9a-f]{{{DIGITS}}}")
RANK = {"done": 0, "diverged": 1, "skipped": 2, "failed": 3}  # of two records of a cell, the lower one counts


@dataclass(frozen=True)
class Store:
    """All paths of the store below `root`, and the only code that writes there."""

    root: Path

    def folder(self, name: str) -> Path:
        """store/NAME."""
        return self.root / "store" / name

    def check_writable(self) -> None:
        """StoreError before any work if the store cannot be written."""
        for name in ("banks", "results", "costs"):
            atomic.check_writable(self.folder(name))

    # -- banks ------------------------------------------------------------------------------------------------------

    def has_bank(self, bank_id: str) -> bool:
        """Whether the bank is committed (its checksums are verified when it is opened)."""
        return (self._bank(bank_id) / "manifest.json").is_file()

    def publish_bank(self, bank_id: str, generate: Callable[[Path], None]) -> None:
        """Let `generate` write the bank into a hidden folder, checksum it, and commit it under its name."""
        path = self._bank(bank_id)
        atomic.make_folder(path.parent)
        temp = atomic.make_folder(atomic.temp_name(path))
        try:
            generate(temp)
            atomic.publish(temp / "manifest.json", json.dumps(_manifest(temp), indent=1, sort_keys=True).encode())
            atomic.publish_folder(temp, path)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(
                f"cannot write {path}: {error}; finished cells are safe, the same command continues"
            ) from error
        finally:
            shutil.rmtree(temp, ignore_errors=True)

    def open_bank(self, bank_id: str) -> Bank | None:
        """The bank, every file's sha256 verified; a corrupt one goes to quarantine and None is returned."""
        path = self._bank(bank_id)
        try:
            manifest = json.loads((path / "manifest.json").read_bytes())
            sound = _manifest(path) == manifest
        except (OSError, ValueError):
            sound = False
        if sound:
            return Bank.read(path)
        self._quarantine(path)
        return None

    def _bank(self, bank_id: str) -> Path:
        if not ID.fullmatch(bank_id):
            raise StoreError(f"{bank_id!r} is no bank id")
        return self.folder("banks") / bank_id

    # -- parts ------------------------------------------------------------------------------------------------------

    def publish_part(self, unit_id: str, records: pa.Table, costs: pa.Table, kept: bytes | None = None) -> list[Path]:
        """Commit the records of a unit's cells; the records last, since they say that a cell is done."""
        parts = [("costs", "parquet", parquet_bytes(costs)), ("results", "parquet", parquet_bytes(records))]
        if kept is not None:
            parts.insert(0, ("kept", "safetensors", kept))
        paths = []
        for name, suffix, data in parts:
            digest = hashlib.sha256(data).hexdigest()[:DIGITS]
            paths.append(atomic.make_folder(self.folder(name)) / f"{unit_id}-{digest}.{suffix}")
            atomic.publish(paths[-1], data)
        return paths

    def parts(self, name: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Every sound part of store/NAME in the order of their names; a corrupt one goes to quarantine."""
        for path in self._paths(name):
            table = self._read(path, columns)
            if table is not None:
                yield table

    def done(self, fingerprints: Iterable[str]) -> dict[str, str]:
        """Fingerprint -> status of those cells that have a record."""
        wanted, found = set(fingerprints), dict[str, str]()
        for table in self.parts("results", ["fingerprint", "status"]):
            for fingerprint, status in zip(*(table.column(i).to_pylist() for i in range(2)), strict=True):
                if fingerprint in wanted and RANK[status] < RANK.get(found.get(fingerprint, ""), 9):
                    found[fingerprint] = status
        return found

    def _paths(self, name: str) -> list[Path]:
        folder = self.folder(name)
        return sorted(p for p in folder.iterdir() if PART.fullmatch(p.name)) if folder.is_dir() else []

    def _read(self, path: Path, columns: list[str] | None) -> pa.Table | None:
        """The part at `path` if its bytes hash to its name."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None  # merged into another part by its unit
        if not _hashes_to_name(path, data):
            self._quarantine(path)
            return None
        return pq.read_table(io.BytesIO(data), columns=columns, page_checksum_verification=True)

    def _quarantine(self, path: Path) -> None:
        """Move a corrupt artefact aside; what it held counts as not done."""
        if not path.exists():
            return
        target = atomic.temp_name(atomic.make_folder(self.folder("quarantine")) / path.name)
        os.rename(path, target)
        print(f"rmsweep: {path} is damaged; moved to {target}, it will be made again", file=sys.stderr)


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as Parquet with page checksums; equal tables give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, store_schema=True)
    return sink.getvalue()


def _hashes_to_name(path: Path, data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest()[:DIGITS] == path.stem.rpartition("-")[2]


def _manifest(folder: Path) -> dict[str, Any]:
    """Name -> size and sha256 of every file but the manifest."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != "manifest.json" and p.name[0] != ".")
    return {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in files}
