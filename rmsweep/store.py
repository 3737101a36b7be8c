"""The store: banks and cell results as immutable, content-addressed artefacts under root/store.

    banks/<bank_id>/                  files of Bank.read and manifest.json (size and sha256 of each), written last
    results/<unit>-<sha>.parquet      records of finished cells (schemas.RECORD): deterministic columns only
    costs/<unit>-<sha>.parquet        what they cost (schemas.COSTS)
    kept/<unit>-<sha>.safetensors     what `keep` asked for, arrays named <fingerprint>/<name>
    journals/                         finished cells that no part holds yet (rmsweep.journals)
    quarantine/                       whatever failed its checksum

A part's name carries the first 24 hex digits of its sha256 and is verified on every read. What is done is what the
parts hold: no index, no lock. Costs and kept arrays are published before the records, whose publication is the commit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rmsweep import atomic, journals
from rmsweep.bank import reference_problem
from rmsweep.errors import StoreError
from rmsweep.fingerprint import canonical_json, digest
from rmsweep.journals import Finished, Journal
from rmsweep.parts import Files, Gone, Parts, sha, table_of
from rmsweep.schemas import COSTS, RECORD, arrow

KEY = re.compile(r"[0-9a-f]{16,64}")
FOLDERS = ("banks", "results", "costs", "kept", "journals", "claims", "quarantine")
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MANIFEST = "manifest.json"
RANK = {"done": 0, "diverged": 1, "skipped": 2, "failed": 3}  # which of several records of one cell counts
COSTS_SCHEMA = arrow(COSTS)
KEPT_BYTES = 256 << 20  # kept arrays of a unit are merged up to this size, then begin another file
RECORD_SMALL, COSTS_SMALL = ("fingerprint", "status", "reason", "cause", "attempt"), ("fingerprint", "attempt")
MANY_SMALL, MERGE_BELOW, MERGE_TO = 64, 30, 60  # more than so many parts of fewer rows than that become parts of these


class State(NamedTuple):
    """What the store holds of a cell."""

    status: str
    reason: str | None
    cause: str | None = None
    attempt: int | None = None


class Store:
    """The artefacts under `root`/store. Reading creates nothing.

    heal: move what fails its checksum to quarantine, so that it is computed again (runs); without it corrupt parts
    are only passed over (plan, status). `corrupt` says what was found and what was done about it.
    """

    def __init__(self, root: Path, *, heal: bool = False) -> None:
        self.folder = root / "store"
        self.heal = heal
        self.corrupt: list[str] = []
        self.record_parts = Parts(self.folder / "results", self._set_aside, RECORD, RECORD_SMALL, _record_order)
        self.cost_parts = Parts(self.folder / "costs", self._set_aside, COSTS_SCHEMA, COSTS_SMALL, _cost_order)
        self._kept = Files(self.folder / "kept", self._set_aside)
        self._kept_index = dict[str, set[tuple[str, str]]]()
        self._verified: set[str] = set()

    @property
    def conflicts(self) -> set[str]:
        """Cells of which two records were met that differ: something is not deterministic."""
        return self.record_parts.conflicts

    def prepare(self) -> None:
        """Make the folders and prove that they can be written; StoreError naming the path otherwise."""
        for name in FOLDERS:
            atomic.probe(self.folder / name)

    @property
    def part_files(self) -> dict[str, Files]:
        """Every kind of parts, by the name of their folder."""
        return {"results": self.record_parts, "costs": self.cost_parts, "kept": self._kept}

    # -- banks ---------------------------------------------------------------------------------------------

    def bank_ids(self) -> list[str]:
        """Every bank that is published, sound or not."""
        try:
            return sorted(name for name in os.listdir(self.folder / "banks") if KEY.fullmatch(name))
        except FileNotFoundError:
            return []

    def has_bank(self, bank_id: str) -> bool:
        """Whether a bank is published; its bytes are verified when it is opened."""
        return (self._bank(bank_id) / MANIFEST).is_file()

    def bank(self, bank_id: str) -> Path | None:
        """Folder of a bank, verified on its first opening in this process; None where it is absent or corrupt."""
        folder = self._bank(bank_id)
        if not folder.exists():
            return None
        if bank_id in self._verified:
            return folder
        problem = bank_problem(folder, bank_id)
        if problem:
            self._set_aside(folder, problem)
            return None
        self._verified.add(bank_id)
        return folder

    def build_bank(self, bank_id: str, generate: Callable[[Path], None]) -> Path:
        """Publish the bank that `generate` writes into a folder; a sound one that is there already is kept."""
        folder = self.bank(bank_id)
        if folder is not None:
            return folder
        temporary = self.folder / "banks" / atomic.temporary_name(_key(bank_id))
        try:
            atomic.make_folder(temporary)
            _generate(generate, temporary)
            _write_manifest(temporary, bank_id)
            atomic.publish_folder(temporary, self._bank(bank_id))
        finally:
            atomic.remove_folder(temporary)
        folder = self.bank(bank_id)
        if folder is None:
            raise StoreError(f"{self._bank(bank_id)}: was published and fails its checksums; is the disk sound?")
        return folder

    def _bank(self, bank_id: str) -> Path:
        return self.folder / "banks" / _key(bank_id)

    # -- parts: writing ------------------------------------------------------------------------------------

    def publish_part(
        self,
        unit: str,
        records: Sequence[Mapping[str, Any]],
        costs: Sequence[Mapping[str, Any]],
        kept: Mapping[str, NDArray[Any]] | None = None,
    ) -> list[Path]:
        """Publish finished cells of a unit; the records last, since they make the cells done. Files written."""
        files = [self._part("costs", unit, parquet(table_of(costs, COSTS_SCHEMA)), "parquet")]
        if kept:
            files.append(self._part("kept", unit, _safetensors(kept), "safetensors"))
        return [*files, self._part("results", unit, parquet(table_of(records, RECORD)), "parquet")]

    def journal(self, owner: str, unit: str) -> Journal:
        """Where an attempt at a unit keeps finished cells until a part holds them. owner: of claims."""
        return Journal(self.folder / "journals", owner, _key(unit))

    def recover(self, concerns: Callable[[str, str], bool]) -> set[Path]:
        """Publish what journals of ended processes hold, and remove them; which. concerns: told owner and unit.

        What cannot be had, or read by this version, stays. Of a living process it costs a publication, and kept arrays
        lie there twice. Done twice it does no harm: equal records count once. Raises StoreError where the disk refuses.
        """
        found = [(p, unit) for p, owner, unit in journals.listed(self.folder / "journals") if concerns(owner, unit)]
        return {path for path, unit in found if (mine := journals.taken(path)) and self._publish_journal(mine, unit)}

    def _publish_journal(self, path: Path, unit: str) -> bool:
        """Whether a journal could be read; large arrays go to files of their own, so that memory is bounded."""
        cells, is_whole = list[Finished](), True
        try:
            for cell in journals.read(path):
                cells.append(cell)
                if sum(array.nbytes for one in cells for array in one.kept.values()) > KEPT_BYTES:
                    self._publish_cells(unit, cells)
                    cells.clear()
        except StoreError:
            raise
        except (OSError, journals.Foreign):
            is_whole = False
        self._publish_cells(unit, cells)
        with contextlib.suppress(StoreError):  # it is published: at worst it is once more
            if is_whole:
                atomic.remove(path)
        return is_whole

    def _publish_cells(self, unit: str, cells: Sequence[Finished]) -> None:
        if cells:
            kept = {f"{c.record['fingerprint']}/{name}": a for c in cells for name, a in c.kept.items()}
            self.publish_part(unit, [c.record for c in cells], [c.cost for c in cells], kept)

    def discard(self, files: Iterable[Path]) -> None:
        """Remove parts that a published one has replaced."""
        for path in files:
            atomic.remove(path)

    def _part(self, kind: str, unit: str, data: bytes, suffix: str) -> Path:
        path = self.folder / kind / f"{_key(unit)}-{sha(data)}.{suffix}"
        if path.exists() and _sha_of(path) != sha(data):
            self._set_aside(path, "its bytes are not those of its name", force=True)
        atomic.publish(path, data, kind)
        return path

    # -- parts: reading ------------------------------------------------------------------------------------

    def done(self, fingerprints: Iterable[str]) -> dict[str, str]:
        """Fingerprint -> status (done, diverged, skipped, failed) of the cells that have a record."""
        return {key: state.status for key, state in self.states(fingerprints).items()}

    def done_and_kept(self, fingerprints: Iterable[str], keep: str) -> dict[str, str]:
        """As `done`, without the done cells that lack what `keep` (scores, models) asks for."""
        found = self.done(fingerprints)
        if keep == "none" or "done" not in found.values():
            return found
        has = {key for key, name in self._kept_names() if (name == "scores") == (keep == "scores")}
        return {key: status for key, status in found.items() if status != "done" or key in has}

    def _kept_names(self) -> set[tuple[str, str]]:
        """Fingerprint and name of every array that was kept."""
        from safetensors.numpy import load

        found = set[tuple[str, str]]()
        for name in self._kept.listed():  # files never change: read and verified once per process
            if name not in self._kept_index and (data := self._kept.read(name)) is not None:
                self._kept_index[name] = {(key, rest) for key, _, rest in (n.partition("/") for n in load(data))}
            found |= self._kept_index.get(name, set())
        return found

    def states(self, fingerprints: Iterable[str]) -> dict[str, State]:
        """Fingerprint -> status, reason and cause of the cells that have a record; holds those columns only."""
        return {key: State(*found.small[1:]) for key, found in self.record_parts.find(set(fingerprints)).items()}

    def attempts(self, fingerprints: Iterable[str]) -> dict[str, int]:
        """Fingerprint -> number of the last attempt of the cells that have a cost row."""
        return {key: found.small[1] or 0 for key, found in self.cost_parts.find(set(fingerprints)).items()}

    def records(self, fingerprints: Iterable[str], columns: Sequence[str] | None = None) -> pa.Table:
        """One record per cell that has any, sorted by fingerprint: a pure function of the records in the parts.

        Of several records of a cell done goes before diverged, skipped and failed, then the last attempt, then the
        smaller reason, then the smaller digest of the record.
        """
        names = None if columns is None else list(dict.fromkeys([*RECORD_SMALL, *columns]))
        return self.record_parts.table(set(fingerprints), names)

    def costs(self, fingerprints: Iterable[str]) -> pa.Table:
        """The cost row of the last attempt of every cell that has any, sorted by fingerprint."""
        return self.cost_parts.table(set(fingerprints))

    def kept(self, fingerprint: str) -> dict[str, NDArray[Any]]:
        """Arrays that `keep` stored for a cell, by name; empty where there are none."""
        from safetensors.numpy import load

        prefix = f"{_key(fingerprint)}/"
        for data in self._kept.sound(lambda path: _names_fingerprint(path, prefix)):
            arrays = {name[len(prefix) :]: a for name, a in load(data).items() if name.startswith(prefix)}
            if arrays:
                return arrays
        return {}

    def merge(self, fingerprints: Iterable[str]) -> None:
        """Merge the small parts of these cells where there are many, as after many kills; the old ones go last.

        Done when a run begins and when its tables are made, so files stay bounded by units and MERGE_TO; kept arrays
        are not merged. A disk that refuses leaves the parts as they are.
        """
        wanted = set(fingerprints)
        for kind, parts in (("costs", self.cost_parts), ("results", self.record_parts)):
            small = parts.small_parts(wanted, MERGE_BELOW)
            for group in _grouped(small, parts.n_rows) if len(small) > MANY_SMALL else []:
                with contextlib.suppress(Gone, StoreError):  # another driver was first; what is there is enough
                    data = parquet(parts.merged(group))
                    new = self._part(kind, digest(group), data, "parquet")
                    self.discard(path for name in group if (path := parts.folder / name) != new)

    def _set_aside(self, path: Path, problem: str, *, force: bool = False) -> None:
        """Note a corrupt artefact; where this store heals, move it to quarantine."""
        if not (self.heal or force):
            self.corrupt.append(f"{path}: {problem}")
            return
        target = self.folder / "quarantine" / f"{path.name}.{uuid.uuid4().hex[:8]}"
        atomic.move(path, target)
        self.corrupt.append(f"{path}: {problem}; moved to {target}, it will be computed again")


def bank_problem(folder: Path, bank_id: str, told: Callable[[int], object] = lambda n_bytes: None) -> str | None:
    """What is wrong with a published bank (absent, foreign or changed files), or None. told: bytes of each file."""
    try:
        manifest = json.loads(atomic.read(folder / MANIFEST))
        files = manifest["files"]
        if manifest != _manifest(bank_id, files):
            return f"{MANIFEST} is damaged or belongs to another bank"
        present = {entry.name for entry in folder.iterdir()} - {MANIFEST}
        if present != set(files):
            return f"files {sorted(present ^ set(files))} are absent or foreign"
        for name, entry in files.items():
            size, found = atomic.sha256(folder / name)
            told(size)
            if [size, found] != [entry["size"], entry["sha256"]]:
                return f"{name} fails its checksum"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is absent"
    except OSError as error:
        if error.errno in atomic.NO_FILE:
            return f"cannot be read ({error})"
        raise atomic.unreadable(folder, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read ({error})"
    return reference_problem(folder)


def _generate(generate: Callable[[Path], None], folder: Path) -> None:
    try:
        generate(folder)
    except StoreError:
        raise
    except OSError as error:
        if atomic.is_disk_trouble(error):
            raise StoreError(f"{folder}: cannot be written ({error.strerror or error})") from error
        raise


def _write_manifest(folder: Path, bank_id: str) -> None:
    """Bring every file of a bank to the disk, then write manifest.json: the commit mark."""
    files = {}
    for path in sorted(folder.iterdir()):
        if not FILE.fullmatch(path.name) or path.is_symlink() or not path.is_file():
            raise StoreError(f"{path}: a bank is a flat folder of plain files")
        size, sha = atomic.fsync_file(path)
        files[path.name] = {"size": size, "sha256": sha}
    atomic.replace(folder / MANIFEST, json.dumps(_manifest(bank_id, files), indent=1, sort_keys=True).encode(), "bank")


def _manifest(bank_id: str, files: Mapping[str, Any]) -> dict[str, Any]:
    said = {"bank_id": bank_id, "files": files}
    return {**said, "digest": hashlib.sha256(canonical_json(said).encode()).hexdigest()}


def _record_order(status: str, reason: str | None, cause: str | None, attempt: int | None) -> tuple[Any, ...]:
    return (RANK.get(status, len(RANK)), -(attempt or 0), reason or "", cause or "")


def _cost_order(attempt: int | None) -> tuple[Any, ...]:
    return (-(attempt or 0),)


def _grouped(parts: Iterable[str], n_rows: Callable[[str], int]) -> Iterator[list[str]]:
    """Groups of parts with at least MERGE_TO rows together; a rest of one part is left out."""
    group: list[str] = []
    for part in parts:
        group.append(part)
        if sum(map(n_rows, group)) >= MERGE_TO:
            yield group
            group = []
    if len(group) > 1:
        yield group


def _key(key: str) -> str:
    """`key` if it is one: names never become paths."""
    if not KEY.fullmatch(key):
        raise StoreError(f"{key!r} is no key of the store; allowed: 16 to 64 hex digits")
    return key


def parquet(table: pa.Table) -> bytes:
    """Parquet bytes of a table, each page with a checksum."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _safetensors(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)})


def _names_fingerprint(path: Path, prefix: str) -> bool:
    """Whether the header of a safetensors file (length as uint64, then JSON) names arrays of a cell."""
    with open(path, "rb") as handle:
        header = handle.read(min(int.from_bytes(handle.read(8), "little"), 1 << 24))
    return f'"{prefix}'.encode() in header


def _sha_of(path: Path) -> str:
    try:
        return sha(atomic.read(path))
    except OSError:
        return ""
