"""Garbage collection: what killed processes left behind, and artefacts that no sweep refers to.

What killed processes had finished is published first.

An orphan is removed once its owner is known to have ended: a process of this machine that is no more, or one of
another machine when nobody beats any longer (`claims`). Never by age. Results are never thrown away unless asked for.
Symbolic links are not followed out of the root.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rmsweep import atomic, journals
from rmsweep.claims import BEATS, LEASE, Lives
from rmsweep.errors import ConfigError, StoreError
from rmsweep.parts import Damaged
from rmsweep.plan import Plan
from rmsweep.progress import STATUS_FILE
from rmsweep.slots import Slots
from rmsweep.store import Store
from rmsweep.verify import existing_store, sweep_folders

POLL = 1.0  # seconds between two looks at the beats of others
ORPHANS, CLAIMS, STATUS = "temporary files", "claims and beats of ended runs", "status files of ended runs"
SLOTS = "files of slots that have ended"
JOURNALS = "journals of ended runs, what they hold being published"
UNREFERENCED, QUARANTINE = "artefacts that no sweep's plan refers to", "quarantined artefacts"


class Item(NamedTuple):
    """A file or folder, and its size in bytes."""

    path: Path
    size: int


@dataclass
class Collected:
    """What was removed (dry: would be), and what was found and left, by what it is; notes: why something was left."""

    dry: bool
    removed: dict[str, list[Item]] = field(default_factory=dict)
    left: dict[str, list[Item]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Watch:
    """Tells which owners of claims are alive. told: hears before it waits; sleep: seconds of the clock `now`."""

    def __init__(
        self,
        folder: Path,
        lease: float = LEASE,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        told: Callable[[str], object] = lambda text: None,
    ) -> None:
        self._folder, self._lease, self._lives = folder, lease, Lives(folder, lease, now)
        self._sleep, self._told = sleep, told

    def alive(self, owners: Iterable[str]) -> list[str]:
        """Those of `owners` that are alive: each is watched until it beats, or has not for a lease."""
        first = {owner: self._beat(owner) for owner in owners if not self._lives.is_dead(owner)}
        unsure, beating = set(first), set[str]()
        if unsure:
            self._told(f"watching {len(unsure)} owners of claims for a beat, for at most {self._lease:.0f} s")
        while unsure:
            self._sleep(POLL)
            beating |= {owner for owner in unsure if self._beat(owner) not in (first[owner], None)}
            unsure = {owner for owner in unsure - beating if not self._lives.is_dead(owner)}
        return sorted(beating)

    def _beat(self, owner: str) -> bytes | None:
        try:
            return atomic.read(self._folder / f"{owner}{BEATS}")
        except OSError:
            return None


def collect(
    root: Path,
    *,
    dry_run: bool = False,
    unreferenced: bool = False,
    quarantine: bool = False,
    watch: Watch | None = None,
) -> Collected:
    """Remove orphans; report unreferenced artefacts and the quarantine, and remove these where asked to.

    Raises ConfigError where there is no store; asked for `unreferenced`, before anything is removed, ConfigError while
    a run is alive and StoreError when a plan cannot be read. StoreError where the disk refuses.
    """
    store, found = existing_store(root), Collected(dry_run)
    watch = watch or Watch(store.folder / "claims")
    temporary = _temporary(root, store)  # before the owners are watched: who writes later must not lose it
    claims = _claims(root, store)
    authors = {path: owner for path, owner, _ in journals.listed(store.folder / "journals") if path.is_file()}
    alive = watch.alive({*claims.values(), *authors.values()})
    unused = _unreferenced(root, store, found, must=unreferenced)
    if unreferenced and unused and (running := [*alive, *_drivers(root)]):
        raise ConfigError(f"--unreferenced: a run is alive ({', '.join(running)}); wait for its end, or stop it")
    void = [path for path, owner in _claims(root, store).items() if claims.get(path) == owner and owner not in alive]
    unpublished = _recover(store, {path: owner for path, owner in authors.items() if owner not in alive}, found)
    _take(found, CLAIMS, [path for path in void if claims[path] not in unpublished])
    _take(found, ORPHANS, _orphans(temporary, alive, found))
    _take(found, STATUS, [path for path in _status_files(root) if _ended(path)])
    _take(found, SLOTS, _slot_files(root, found))
    _take(found, QUARANTINE, _entries(store.folder / "quarantine", root), quarantine)
    _take(found, UNREFERENCED, unused, unreferenced)
    return found


def _recover(store: Store, authors: Mapping[Path, str], found: Collected) -> set[str]:
    """Publish what runs that were killed had finished; owners of what is left, whose claims are still needed."""
    sizes, dead = {path: size(path) for path in sorted(authors)}, set(authors.values())
    try:
        taken = set(sizes) if found.dry else store.recover(lambda owner, unit: owner in dead)
    except StoreError as error:  # a full disk, which is why we are asked
        found.notes.append(f"journals of ended runs were left: {error}")
        return dead
    if items := [Item(path, n_bytes) for path, n_bytes in sizes.items() if path in taken]:
        found.removed[JOURNALS] = items
    left = [owner for _, owner, _ in journals.listed(store.folder / "journals") if owner in dead]
    if left and not found.dry:
        found.notes.append(f"{len(left)} journals of ended runs were left: this version cannot read them")
    return set(left)


def _take(found: Collected, what: str, paths: Iterable[Path], wanted: bool = True) -> None:
    """Remove paths where that is wanted and no dry run; note them either way.

    One that is gone is passed over: its owner gave it its name, or took it back, before it ended.
    """
    for path in filter(os.path.lexists, sorted(paths)):
        item = Item(path, size(path))
        if wanted and not found.dry:
            _remove(path)
        (found.removed if wanted else found.left).setdefault(what, []).append(item)


def _remove(path: Path) -> None:
    """A folder gets a temporary name first, so that a kill leaves an orphan and never half a bank."""
    if path.is_symlink() or not path.is_dir():
        atomic.remove(path)
        return
    aside = path
    if not atomic.TEMPORARY.fullmatch(path.name):
        aside = path.parent / atomic.temporary_name()
        atomic.move(path, aside)
    atomic.remove_folder(aside)


def size(path: Path) -> int:
    """Bytes of a file or of all files in a folder, links not followed."""
    try:
        if path.is_symlink() or not path.is_dir():
            return path.lstat().st_size
        return sum(size(Path(entry.path)) for entry in os.scandir(path))
    except OSError:
        return 0


# -- what is left behind -----------------------------------------------------------------------------------


def _temporary(root: Path, store: Store) -> dict[Path, str]:
    """Temporary files and folders with their owners."""
    folders = [store.folder, *sorted(store.folder.glob("*")), root / "sweeps"]
    for pattern in ("*", "*/slurm", "*/slurm/*", "*/slurm/plans/*"):
        folders += sorted(path for path in (root / "sweeps").glob(pattern) if path.is_dir())
    paths = [path for folder in folders for path in _entries(folder, root)]
    return {path: named["owner"] for path in paths if (named := atomic.TEMPORARY.fullmatch(path.name))}


def _orphans(temporary: Mapping[Path, str], alive: Collection[str], found: Collected) -> list[Path]:
    """Those whose owner has ended: a process of this machine, or of any where nobody beats."""
    dead = [p for p, owner in temporary.items() if atomic.is_dead(owner) or not (alive or _is_here(owner))]
    if n_left := sum(path.exists() for path in set(temporary) - set(dead)):
        found.notes.append(f"{n_left} temporary files were left: their owners are alive, or may be on another machine")
    return dead


def _is_here(owner: str) -> bool:
    return owner.rpartition("-")[0] == atomic.machine()


def _claims(root: Path, store: Store) -> dict[Path, str]:
    """Claims and beats with their owners."""
    owners: dict[Path, str] = {}
    for path in _entries(store.folder / "claims", root):
        if path.name.endswith(BEATS):
            owners[path] = path.name[: -len(BEATS)]
        elif path.is_symlink() and not atomic.TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError):
                owners[path] = os.readlink(path)
    return owners


def _slot_files(root: Path, found: Collected) -> Iterator[Path]:
    """What slots of a cluster left, where the queue says that none of the sweep is alive."""
    for folder in sorted(root.glob("sweeps/*/slurm")):
        files = Slots(root, folder.parent.name)
        if not _inside(folder, root) or not (left := list(files.leftovers())):
            continue
        driver = folder.parent / STATUS_FILE
        look = None if driver.exists() and not _ended(driver) else files.look(fresh=True)
        if look is None or any(task.is_live for task in look.tasks.values()):
            found.notes.append(f"{folder}: left as it is: slots or a driver may be alive, as far as is known here")
        else:
            yield from left


def _status_files(root: Path) -> list[Path]:
    return [path for path in root.glob(f"sweeps/*/{STATUS_FILE}") if _inside(path.parent, root)]


def _drivers(root: Path) -> list[str]:
    """Sweeps whose driver is at work on this machine."""
    return [f"sweep {path.parent.name}" for path in _status_files(root) if _ended(path) is False]


def _ended(path: Path) -> bool | None:
    """Whether the driver that wrote a status file has ended; None where that cannot be known from here."""
    try:
        state = json.loads(atomic.read(path))
        here = state["host"] == platform.node()
        return atomic.is_dead(f"{atomic.machine()}-{int(state['pid'])}") if here else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _entries(folder: Path, root: Path) -> list[Path]:
    """What lies in a folder; nothing where it is absent or a link leads out of the root."""
    if not _inside(folder, root):
        return []
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _inside(folder: Path, root: Path) -> bool:
    return folder.resolve().is_relative_to(root.resolve())


# -- what nobody refers to ---------------------------------------------------------------------------------


def _unreferenced(root: Path, store: Store, found: Collected, *, must: bool) -> list[Path]:
    """Banks and parts of no planned cell; where a plan cannot be read none and a note, or where it `must` an error."""
    try:
        plans = [Plan.read(folder) for folder in sweep_folders(root)]
    except StoreError as error:
        if must:
            raise StoreError(f"--unreferenced: {error}; without every plan nothing can be known to be unused") from None
        found.notes.append(f"unreferenced artefacts are not known: {error}")
        return []
    cells = [cell for plan in plans for cell in plan.cells if cell.reason is None]
    banks, keys = {cell.bank_id for cell in cells}, {cell.fingerprint for cell in cells}
    unused = [store.folder / "banks" / bank for bank in store.bank_ids() if bank not in banks]
    unused += [path for path, held in _parts(store) if held.isdisjoint(keys)]
    return [path for path in unused if _inside(path.parent, root)]


def _parts(store: Store) -> Iterator[tuple[Path, set[str]]]:
    """Every sound part and the cells that it holds something of."""
    for files in store.part_files.values():
        for name in sorted(files.names()):
            try:
                yield files.folder / name, files.cells(name)
            except (Damaged, FileNotFoundError):
                continue  # damaged: what it held is not known; the next run sets it aside
