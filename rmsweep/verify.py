"""Is everything under a root what it was published as? Checksums of the store, and the tables of every sweep.

Reads only. A table that newer records have overtaken is stale, not wrong: the next run writes it. What is damaged is
listed with what to do about it; the next run sets it aside and computes it again.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rmsweep import atomic, journals, results
from rmsweep.claims import BEATS
from rmsweep.errors import ConfigError, StoreError
from rmsweep.parts import PART, Damaged, Files, again
from rmsweep.plan import REMEDY, Plan
from rmsweep.store import FOLDERS, KEY, MANIFEST, Store, bank_problem

HEALS = {
    "banks": "the next `rmsweep run` that needs it sets it aside and builds it again; it may be removed",
    "results": "the next `rmsweep run` of its cells sets it aside and computes them again; it may be removed",
    "costs": "the next `rmsweep run` of its cells sets it aside; results stay as they are; it may be removed",
    "kept": "the next `rmsweep run keep=...` of its cells sets it aside and computes them again; it may be removed",
}
REWRITE = "`rmsweep run` writes it again"
SHOWN = ("status", "reason", "golden_improvement")  # by which a row of the table is told from its record
Told = Callable[[int], object]


class Problem(NamedTuple):
    """Something that is not as it should be: where, what is wrong, what to do."""

    path: str
    what: str
    hint: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}; {self.hint}"


@dataclass
class Report:
    """What was found. problems: mismatches; warnings: files that are not ours; notes: what is worth knowing.

    plans: those that can be read, by the sweep's folder. damaged: names of damaged banks and parts.
    """

    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    n_files: int = 0
    n_bytes: int = 0
    n_recomputed: int = 0
    plans: dict[Path, Plan] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)

    def seen(self, path: Path) -> None:
        """Count a file that was read."""
        with contextlib.suppress(OSError):
            self.n_bytes += path.lstat().st_size
            self.n_files += 1


def verify(root: Path, sweep: str | None = None, *, show: bool = False) -> Report:
    """Check the whole store, and the plan and tables of one sweep or of all; show: a progress bar on a terminal.

    Raises ConfigError where there is no store.
    """
    store, report = existing_store(root), Report()
    with bar(_n_bytes(store), "verify", "B", show) as told:
        for bank_id in store.bank_ids():
            _check_bank(store, bank_id, report, told)
        keys = [_check_parts(kind, files, report, told) for kind, files in store.part_files.items()]
    _check_conflicts(store, set().union(*keys[:1]), report)
    report.warnings += [Problem(str(path), "is nothing of the store's", "move it away") for path in _foreign(store)]
    _list_quarantine(store, report)
    for folder in sweep_folders(root) if sweep is None else [root / "sweeps" / sweep]:
        _check_sweep(folder, store, report)
    return report


def existing_store(root: Path) -> Store:
    """The store under root; ConfigError where there is none."""
    store = Store(root)
    if not store.folder.is_dir():
        raise ConfigError(f"root={root}: no store there ({store.folder}); give the root=DIR of a run")
    return store


def sweep_folders(root: Path) -> list[Path]:
    """Folders of the sweeps under root: those with a plan, or with what a plan leaves."""
    marks = ("plan.json", "plan.parquet", "results.parquet")
    return sorted({path.parent for mark in marks for path in root.glob(f"sweeps/*/{mark}")})


@contextlib.contextmanager
def bar(total: int, title: str, unit: str, show: bool) -> Iterator[Told]:
    """A progress bar on a terminal, nothing elsewhere; gives what moves it."""
    if not show or not sys.stderr.isatty():
        yield lambda n: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=title, unit=unit, unit_scale=unit == "B", dynamic_ncols=True) as shown:
        yield shown.update


# -- the store ---------------------------------------------------------------------------------------------


def _check_bank(store: Store, bank_id: str, report: Report, told: Told) -> None:
    folder = store.folder / "banks" / bank_id
    try:
        problem = bank_problem(folder, bank_id, told)
    except StoreError as error:
        problem = str(error)
    if problem and os.path.lexists(folder):  # a run may have set it aside meanwhile
        report.problems.append(Problem(str(folder), problem, HEALS["banks"]))
        report.damaged.add(bank_id)
    for name in _names(folder):
        report.seen(folder / name)


def _check_parts(kind: str, files: Files, report: Report, told: Told) -> set[str]:
    """Check every part of one kind; the cells that the sound ones hold."""
    found = set[str]()
    for name in sorted(files.names()):
        path = files.folder / name
        try:
            found |= files.cells(name)
        except FileNotFoundError:
            continue  # merged into another one meanwhile
        except (Damaged, StoreError) as damaged:
            report.problems.append(Problem(str(path), str(damaged), HEALS[kind]))
            report.damaged.add(name)
        report.seen(path)
        told(_size(path))
    return found


def _check_conflicts(store: Store, fingerprints: set[str], report: Report) -> None:
    """Two records of one cell that differ: something is not deterministic."""
    again(lambda: store.record_parts.choose(fingerprints))
    for key, found in store.record_parts.find(store.conflicts).items():
        parts = " and ".join(sorted({str(store.record_parts.folder / row.part) for row in found.rows}))
        what = f"cell {key} has two records that differ: something is not deterministic"
        hint = "every run takes the same one; compare `versions` and `host` in the costs, and repeat it with --sample"
        report.problems.append(Problem(parts, what, hint))


def _foreign(store: Store) -> Iterator[Path]:
    """What lies in the store under a name that no artefact, no claim and no temporary file has."""
    for name in _names(store.folder):
        if name not in FOLDERS and not atomic.TEMPORARY.fullmatch(name):
            yield store.folder / name
    for kind in FOLDERS:
        for name in _names(store.folder / kind):
            path = store.folder / kind / name
            if not _is_ours(path) and not atomic.TEMPORARY.fullmatch(name):
                yield path


def _is_ours(path: Path) -> bool:
    kind = path.parent.name
    if kind == "quarantine":
        return True
    if kind == "claims":
        return path.is_symlink() or path.name.endswith(BEATS)
    return bool({"banks": KEY, "journals": journals.NAME}.get(kind, PART).fullmatch(path.name))


def _list_quarantine(store: Store, report: Report) -> None:
    for name in _names(store.folder / "quarantine"):
        report.notes.append(f"{store.folder / 'quarantine' / name}: was set aside by a run; `rmsweep gc --quarantine`")


def _n_bytes(store: Store) -> int:
    """Bytes of all that is to be read."""
    banks = [store.folder / "banks" / bank / name for bank in store.bank_ids()
             for name in _names(store.folder / "banks" / bank) if name != MANIFEST]  # fmt: skip
    parts = [files.folder / name for files in store.part_files.values() for name in files.names()]
    return sum(map(_size, [*banks, *parts]))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


# -- sweeps ------------------------------------------------------------------------------------------------


def _check_sweep(folder: Path, store: Store, report: Report) -> None:
    for name in ("plan.json", "plan.parquet"):
        report.seen(folder / name)
    try:
        plan = Plan.read(folder)
    except StoreError as error:
        report.problems.append(Problem(str(folder), str(error).removesuffix(f"; {REMEDY}"), REMEDY))
        return
    report.plans[folder] = plan
    tables = [folder / f"{name}.parquet" for name in results.TABLES]
    if not any(path.exists() for path in (*tables, folder / results.SEAL)):
        report.notes.append(f"{folder}: no tables yet; `rmsweep run` writes them")
        return
    bad = [Problem(str(path), what, REWRITE) for path in tables if (what := _table_problem(path))]
    report.problems += bad
    for path in (folder / results.SEAL, *tables):
        report.seen(path)
    if not bad and results.current(folder, store) is None:
        _compare_with_records(folder, plan, store, report)


def _table_problem(path: Path) -> str | None:
    """What is wrong with a table; one without a checksum must at least be readable."""
    if problem := results.damage(path):
        return problem.removeprefix(f"{path}: ")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            file.read()
    except (OSError, pa.ArrowException) as error:
        return f"cannot be read ({error})"
    return None


def _compare_with_records(folder: Path, plan: Plan, store: Store, report: Report) -> None:
    """Say how the tables, which are not what a run would write now, differ from the store."""
    path = folder / "results.parquet"
    table = _rows(pq.read_table(path, columns=["cell_id", *SHOWN]))
    cells = {cell.cell_id: cell.fingerprint for cell in plan.cells if cell.reason is None}
    records = _rows(store.records(cells.values(), ["cell_id", *SHOWN]))
    lost = [cell for cell in cells if cell in table and cell not in records]
    newer = sum(table.get(cell) != row for cell, row in records.items())
    if lost and report.damaged.isdisjoint(store.record_parts.names()):  # else they are in what is damaged
        what = f"shows {len(lost):,} cells, such as {lost[0]}, that have no record in the store any more"
        report.problems.append(Problem(str(path), what, "`rmsweep run` computes them again"))
    why = f"{newer:,} cells have newer records" if newer else "plan, costs or the parts of the store have changed"
    report.notes.append(f"{path}: stale: {why}; `rmsweep run` writes it")


def _rows(table: pa.Table) -> dict[str, Sequence[Any]]:
    """cell_id -> the columns SHOWN."""
    columns = [table[name].to_pylist() for name in ("cell_id", *SHOWN)]
    return {row[0]: row[1:] for row in zip(*columns, strict=True)}
