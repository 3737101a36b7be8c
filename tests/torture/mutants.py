"""Mutants of the commit protocol, each a usual mistake, and the harness that must report it."""

import contextlib
import dataclasses
import io
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq

from rmsweep import atomic, crash, journals, parts, planner, runner, store
from torture import corruption, crash_points, power_loss, scene

Mutant = Callable[[], contextlib.AbstractContextManager[Any]]


class InPlace(atomic.Draft):
    """Writes into the file of the final name."""

    def __enter__(self) -> atomic.Draft:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        crash.at(self.stage, "pre_tmp")
        self._descriptor = os.open(self.path, flags, 0o666)
        crash.at(self.stage, "tmp_opened")
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def link(self) -> bool:
        self.replace()
        return True

    def replace(self) -> None:
        crash.at(self.stage, "published")
        atomic.fsync_folder(self.path.parent)
        crash.at(self.stage, "dirsynced")


class FsyncLate(atomic.Draft):
    """Gives the file its name first, and brings its bytes to the disk afterwards."""

    def seal(self) -> atomic.Draft:
        crash.at(self.stage, "written")
        crash.at(self.stage, "fsynced")
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)
        return self

    def _sync_folder(self) -> None:
        super()._sync_folder()
        atomic.fsync_file(self.path)


def in_place() -> Any:
    return mock.patch.object(atomic, "Draft", InPlace)


def fsync_after_rename() -> Any:
    return mock.patch.object(atomic, "Draft", FsyncLate)


def no_fsync_of_files() -> Any:
    """The bytes of a file are left to the cache of the system."""

    class Lazy(atomic.Draft):
        def seal(self) -> atomic.Draft:
            return FsyncLate.seal(self)  # type: ignore[arg-type]

    return mock.patch.object(atomic, "Draft", Lazy)


def no_fsync_of_folders() -> Any:
    return mock.patch.object(atomic, "fsync_folder", lambda folder: None)


def exists_means_done() -> Any:
    """A bank with its manifest is taken for sound."""

    def problem(folder: Path, bank_id: str) -> str | None:
        return None if (folder / store.MANIFEST).is_file() else "has no manifest"

    return mock.patch.object(store, "bank_problem", problem)


def no_checksum_on_read() -> Any:
    """Parts are read and believed."""

    def read(files: parts.Files, name: str) -> bytes | None:
        with contextlib.suppress(OSError):
            return atomic.read(files.folder / name)
        return None

    return mock.patch.object(parts.Files, "read", read)


def key_without_beta() -> Any:
    """The key of a cell does not see beta."""
    real = planner.cell_parts

    def cell_parts(spec: Any, *rest: Any) -> Any:
        return real(dataclasses.replace(spec, values=dataclasses.replace(spec.values, beta=1.0)), *rest[:-1])

    return mock.patch.object(planner, "cell_parts", cell_parts)


def no_journal() -> Any:
    """What is finished is held in memory only until it is published."""
    return mock.patch.object(journals.Journal, "add", lambda self, cell: True)


def journal_dropped_first() -> Any:
    """The journal goes before the part that holds its cells is there."""
    publish = runner.Part._publish

    def dropped(part: runner.Part) -> None:
        part._journal.drop()
        publish(part)

    return mock.patch.object(runner.Part, "_publish", dropped)


def journal_removed_first() -> Any:
    """Whoever recovers a journal removes it, then publishes."""

    def read(path: Path) -> Iterator[journals.Finished]:
        cells = list(_READ(path))
        atomic.remove(path)
        return iter(cells)

    return mock.patch.object(journals, "read", read)


_READ = journals.read


@contextlib.contextmanager
def append() -> Iterator[None]:
    """Records go to the end of one file, each behind its length, as a journal has them."""
    with (
        mock.patch.object(store.Store, "_part", _append),
        mock.patch.object(parts.Parts, "names", lambda self: [f"{i}" for i in range(len(_entries(self.folder)))]),
        mock.patch.object(
            parts.Parts, "read", lambda self, name: dict(enumerate(_entries(self.folder))).get(int(name))
        ),
        mock.patch.object(parts.Parts, "_concerns", lambda self, *rest: True),
    ):
        yield


def _append(self: store.Store, kind: str, unit: str, data: bytes, suffix: str) -> Path:
    if suffix != "parquet":
        return _PART(self, kind, unit, data, suffix)
    path = self.folder / kind / "journal"
    with open(path, "ab", buffering=0) as handle:
        handle.write(struct.pack("<I", len(data)) + data[: len(data) // 2])
        crash.at(kind, "half_written")
        handle.write(data[len(data) // 2 :])
        os.fsync(handle.fileno())
    atomic.fsync_folder(path.parent)
    return path


_PART = store.Store._part


def _entries(folder: Path) -> list[bytes]:
    """Entries of a journal up to the first that is none."""
    found, data = [], (folder / "journal").read_bytes() if (folder / "journal").exists() else b""
    while len(data) >= 4 and len(data) >= 4 + (size := struct.unpack("<I", data[:4])[0]):
        entry, data = data[4 : 4 + size], data[4 + size :]
        try:
            pq.ParquetFile(io.BytesIO(entry))
        except (OSError, ValueError):
            break
        found.append(entry)
    return found


# -- who catches them --------------------------------------------------------------------------------------


def crashes(base: Path, where: str) -> scene.Report:
    """One crash point, and going on."""
    report = scene.Report("crash-points", 0)
    with scene.quick():
        truth = scene.truth_of(scene.small(), base / "truth")
        (base / "case").mkdir()
        (base / "case" / "root").mkdir()
        computed = Counter[str]()
        crash_points.crashed(truth, base / "case" / "root", where, computed)
        report.add({"case": where}, scene.settle(base / "case" / "root", truth, before=computed, in_flight=1))
    return report


def killed_twice(base: Path, first: str, second: str) -> scene.Report:
    """Two crashes one after the other, and going on."""
    report = scene.Report("crash-points", 0)
    with scene.quick():
        truth, computed = scene.truth_of(scene.small(), base / "truth"), Counter[str]()
        (root := base / "case" / "root").mkdir(parents=True)
        for where in (first, second):
            crash_points.crashed(truth, root, where, computed)
        report.add({"case": f"{first}, {second}"}, scene.settle(root, truth, before=computed, in_flight=2))
    return report


def damage(base: Path, *kinds: str) -> scene.Report:
    """Some damaged files of these kinds."""
    return corruption.run(base, 1, 6, kinds=kinds)


def losses(base: Path) -> scene.Report:
    """Some states after a power loss while a sweep grows."""
    return power_loss.run(base, 1, 16, only="grown", until_violation=True)


MUTANTS: dict[str, tuple[Mutant, Callable[[Path], scene.Report]]] = {
    "in place": (in_place, lambda base: crashes(base, "results:half_written:1")),
    "append": (append, lambda base: crashes(base, "results:half_written:2")),
    "exists means done": (exists_means_done, lambda base: damage(base, "bank")),
    "no checksum on read": (no_checksum_on_read, lambda base: damage(base, "kept")),
    "no fsync of files": (no_fsync_of_files, losses),
    "no fsync of folders": (no_fsync_of_folders, losses),
    "fsync after rename": (fsync_after_rename, losses),
    "no journal": (no_journal, lambda base: crashes(base, "costs:half_written:1")),
    "journal dropped first": (journal_dropped_first, lambda base: crashes(base, "costs:half_written:1")),
    "journal removed first": (
        journal_removed_first,
        lambda base: killed_twice(base, "costs:half_written:1", "costs:half_written:1"),
    ),
    "key without beta": (key_without_beta, lambda base: crashes(base, "results:published:1")),
}


def caught(base: Path, name: str) -> scene.Report:
    """What its harness reports of a mutant; no violation means that it survived."""
    mutant, harness = MUTANTS[name]
    with mutant():
        return harness(base)


def run(base: Path, seed: int, *, show: Any = iter) -> scene.Report:
    """Every mutant; one that survives is a violation."""
    report = scene.Report("mutants", seed)
    for i, name in enumerate(show(list(MUTANTS))):
        folder = base / f"mutant{i}"
        folder.mkdir()
        found = caught(folder, name).violations
        report.add({"mutant": name}, [] if found else ["survived"])
        report.counts[name] = found[0]["problem"][:100] if found else "survived"
        shutil.rmtree(folder)
    return report
