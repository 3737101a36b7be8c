"""Power loss: what the disk may hold after a crash between two calls, and what the real code makes of it.

The calls of a small sweep are recorded. A file's bytes are on the disk from its fsync, a name from the fsync of its
folder; of what is in doubt at the crash any part may have happened: bytes absent, torn, zeroed or whole, and of the
names of a folder any subset (of at most IN_DOUBT; of more, the rest all or none).
"""

import contextlib
import copy
import hashlib
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from rmsweep import atomic
from rmsweep.store import Store
from torture import crash_points, scene
from torture.calls import Call, intercepted

IN_DOUBT = 3
TRIES = 50  # at a state that was not met yet
ROOT = 0  # inode of the sweep's root, which is there


class Ack(NamedTuple):
    """The code has said that these are stored: cells, banks, and at the end the tables."""

    cells: tuple[str, ...] = ()
    banks: tuple[str, ...] = ()
    tables: bool = False


Event = Call | Ack


class File:
    """Bytes as programs see them, and as they are on the disk (None: nothing was ever brought there).

    link: whether it is a symbolic link, whose text is part of its name and so never in doubt by itself.
    """

    def __init__(self, data: bytes = b"", disk: bytes | None = None, link: bool = False) -> None:
        self.data, self.disk, self.link = data, disk, link


class Link(bytes):
    """Text of a symbolic link."""


Change = list[tuple[int, str, int | None]]  # (folder, name, inode or gone), all at once or not at all


class Disk:
    """A file system: what programs see, what is on the disk for certain, and the changes of names in doubt."""

    def __init__(self) -> None:
        self.files: dict[int, File] = {}
        self.seen: dict[int, dict[str, int]] = {ROOT: {}}
        self.sure: dict[int, dict[str, int]] = {ROOT: {}}
        self.doubt: list[tuple[Change, set[int]]] = []  # with the folders that were not brought to the disk since
        self._next = ROOT

    @staticmethod
    def of(root: Path) -> "Disk":
        """A tree that is wholly on the disk."""
        disk = Disk()
        for path in sorted(root.rglob("*")):
            name = str(path.relative_to(root))
            disk.apply(Call("mkdir", name) if path.is_dir() else Call("open", name))
            if path.is_file():
                disk.apply(Call("write", name, data=path.read_bytes()))
                disk.apply(Call("fsync", name))
        disk.sure, disk.doubt = copy.deepcopy(disk.seen), []
        return disk

    def find(self, path: str) -> int | None:
        """The inode that programs see at a path."""
        here: int | None = ROOT
        for name in path.split("/") if path not in ("", ".") else []:
            here = self.seen.get(here, {}).get(name) if here is not None else None
        return here

    def apply(self, call: Event) -> None:
        """What a call does."""
        if isinstance(call, Ack):
            return
        inode = self.find(call.path)
        if call.kind == "open" and inode is not None:
            self.files[inode].data = b"" if call.fresh else self.files[inode].data
        elif call.kind == "open":
            self._name(call.path, self._new(File()))
        elif call.kind == "mkdir":
            self._name(call.path, self._new(None))
        elif call.kind == "symlink":
            self._name(call.path, self._new(File(call.data, call.data, link=True)))
        elif inode is None:
            raise AssertionError(f"{call.kind} of {call.path}, which nobody made")
        elif call.kind == "write":
            self.files[inode].data += call.data
        elif call.kind == "fsync":
            self.files[inode].disk = self.files[inode].data
        elif call.kind == "fsync_dir":
            self._settle(inode)
        elif call.kind == "link":
            self._name(call.target, inode)
        elif call.kind in ("rename", "replace"):
            self._change([(*self._place(call.path), None), (*self._place(call.target), inode)])
        elif call.kind in ("unlink", "rmdir"):
            self._name(call.path, None)

    def _new(self, file: File | None) -> int:
        self._next += 1
        if file is None:
            self.seen[self._next], self.sure[self._next] = {}, {}
        else:
            self.files[self._next] = file
        return self._next

    def _place(self, path: str) -> tuple[int, str]:
        folder, _, name = path.rpartition("/")
        inode = self.find(folder)
        if inode is None:
            raise AssertionError(f"{folder}: nobody made this folder")
        return inode, name

    def _name(self, path: str, inode: int | None) -> None:
        self._change([(*self._place(path), inode)])

    def _change(self, change: Change) -> None:
        _set(self.seen, change)
        self.doubt.append((change, {folder for folder, _, _ in change}))

    def _settle(self, folder: int) -> None:
        """The names of a folder are brought to the disk."""
        for change, left in self.doubt:
            left.discard(folder)
            if not left:
                _set(self.sure, change)
        self.doubt = [(change, left) for change, left in self.doubt if left]

    # -- after the crash -----------------------------------------------------------------------------------

    def after_crash(self, rng: random.Random) -> dict[str, bytes | None]:
        """One state that the disk may be in: path -> bytes, or None for a folder."""
        names = copy.deepcopy(self.sure)
        for change in self._happened(rng):
            _set(names, change)
        state: dict[str, bytes | None] = {}
        self._collect(names, ROOT, "", state, rng)
        return state

    def _happened(self, rng: random.Random) -> list[Change]:
        """Which of the changes in doubt came to the disk, folder by folder."""
        chosen = set[int]()
        for folder in {change[-1][0] for change, _ in self.doubt}:
            here = [i for i, (change, _) in enumerate(self.doubt) if change[-1][0] == folder]
            open_ones = set(rng.sample(here, min(IN_DOUBT, len(here))))
            rest = rng.random() < 0.5
            chosen |= {i for i in here if (rng.random() < 0.5 if i in open_ones else rest)}
        return [change for i, (change, _) in enumerate(self.doubt) if i in chosen]

    def _collect(
        self, names: dict[int, dict[str, int]], folder: int, prefix: str, state: dict[str, bytes | None],
        rng: random.Random,
    ) -> None:  # fmt: skip
        for name, inode in sorted(names[folder].items()):
            if inode in names:
                state[prefix + name] = None
                self._collect(names, inode, f"{prefix}{name}/", state, rng)
            else:
                state[prefix + name] = _bytes_after(self.files[inode], rng)


def _set(names: dict[int, dict[str, int]], change: Change) -> None:
    for folder, name, inode in change:
        if inode is None:
            names[folder].pop(name, None)
        else:
            names[folder][name] = inode


def _bytes_after(file: File, rng: random.Random) -> bytes:
    """The bytes on the disk, or what else may be there of bytes that were not brought to it."""
    if file.link:
        return Link(file.data)
    if file.disk == file.data:
        return file.data
    cut = rng.randrange(len(file.data) + 1)
    zeroed = file.data[:cut] + bytes(len(file.data) - cut)
    return rng.choice([file.disk or b"", file.data[:cut], zeroed, file.data])


# -- recording ---------------------------------------------------------------------------------------------


class Recorder:
    """Hook of `intercepted` that keeps what was done; `disk` follows along."""

    def __init__(self, root: Path) -> None:
        self.root, self.events, self.disk = root, list[Event](), Disk.of(root)

    def __call__(self, call: Call, do: Callable[[], Any]) -> Any:
        if call.kind == "rename" or (call.kind == "fsync" and self.disk.find(call.path) is None):
            self._unseen(self.root / call.path)
        answer = do()
        if call.kind == "write":
            call = call._replace(data=call.data[:answer])
        self.add(call)
        return answer

    def add(self, event: Event) -> None:
        if isinstance(event, Call) and event.kind in ("read", "opendir"):
            return
        self.events.append(event)
        self.disk.apply(event)

    def _unseen(self, path: Path) -> None:
        """Files that libraries wrote without `os`: not on the disk."""
        for file in [path] if path.is_file() else sorted(path.iterdir()):
            name = str(file.relative_to(self.root))
            if self.disk.find(name) is None:
                self.add(Call("open", name))
                self.add(Call("write", name, data=file.read_bytes()))


def record(root: Path, plan: Any) -> list[Event]:
    """Everything that a run of `plan` does to the disk, and when it says that something is stored.

    Names of owners are those of a process that has ended, as its power loss would end it.
    """
    recorder = Recorder(root)
    gone = f"{atomic.machine()}-{scene.NO_PROCESS}"
    with intercepted(root, recorder), _acknowledging(recorder), mock.patch.object(atomic, "owner", lambda: gone):
        scene.run(plan, root)
    recorder.add(Ack(tables=True))
    return recorder.events


@contextlib.contextmanager
def _acknowledging(recorder: Recorder) -> Iterator[None]:
    publish, build = Store.publish_part, Store.build_bank

    def publish_part(store: Store, unit: str, records: Any, *rest: Any) -> Any:
        answer = publish(store, unit, records, *rest)
        recorder.add(Ack(cells=tuple(row["fingerprint"] for row in records)))
        return answer

    def build_bank(store: Store, bank_id: str, *rest: Any) -> Any:
        answer = build(store, bank_id, *rest)
        recorder.add(Ack(banks=(bank_id,)))
        return answer

    with mock.patch.object(Store, "publish_part", publish_part), mock.patch.object(Store, "build_bank", build_bank):
        yield


# -- the harness -------------------------------------------------------------------------------------------


class Scenario(NamedTuple):
    """A recorded run: from which disk, what it did, what it comes to."""

    name: str
    start: Disk
    events: list[Event]
    truth: scene.Truth


def run(
    base: Path,
    seed: int,
    n: int,
    *,
    only: str | None = None,
    until_violation: bool = False,
    show: Callable[[list[Any]], Iterable[Any]] = iter,
) -> scene.Report:
    """`n` distinct states after a power loss (fewer where there are no more), each read and gone on from.

    only: of the scenario of this name.
    """
    rng, report, seen = random.Random(seed), scene.Report("power-loss", seed), set[bytes]()
    with scene.quick():
        scenarios = [scenario for scenario in _scenarios(base) if only in (None, scenario.name)]
        report.counts["calls"] = sum(len(scenario.events) for scenario in scenarios)
        for i in show(list(range(n))):
            for _ in range(TRIES):
                scenario = rng.choice(scenarios)
                k = rng.choice(_moments(scenario.events))
                state = _disk_at(scenario, k).after_crash(rng)
                if (key := _digest(scenario.name, state)) not in seen:
                    break
            else:
                break
            seen.add(key)
            problems = _check(base / f"state{i}", scenario, k, state)
            case = {"of": scenario.name, "after": k, "last": [_word(e) for e in scenario.events[max(0, k - 6) : k]]}
            report.add({**case, "files": {name: data and len(data) for name, data in state.items()}}, problems)
            if problems and until_violation:
                break
    return report


def _scenarios(base: Path) -> list[Scenario]:
    """A new sweep; one that grows, so that plan and tables are replaced; many small parts that are merged."""
    plan, bigger = scene.small(), scene.small(scene.SEEDS + 1)
    truth = scene.truth_of(plan, base / "truth")
    truth_bigger = scene.truth_of(bigger, base / "bigger", truth)
    scattered = crash_points.scattered(plan, base / "truth", base / "scattered")
    (base / "nothing").mkdir()
    return [
        _recorded("new", base / "nothing", truth, base),
        _recorded("grown", base / "truth", truth_bigger, base),
        _recorded("merged", scattered, truth, base),
    ]


def _recorded(name: str, template: Path, truth: scene.Truth, base: Path) -> Scenario:
    root = scene.copied(template, base / f"recorded-{name}")
    start = Disk.of(root)
    return Scenario(name, start, record(root, truth.plan), truth)


def _moments(events: list[Event]) -> list[int]:
    """Numbers of calls after which to crash; of many writes in a row the first and the last."""
    writes = [isinstance(event, Call) and event.kind == "write" for event in events]
    inner = {i for i in range(1, len(events) - 1) if all(writes[i - 1 : i + 2])}
    return [k for k in range(len(events) + 1) if k - 1 not in inner]


def _disk_at(scenario: Scenario, k: int) -> Disk:
    disk = copy.deepcopy(scenario.start)
    for event in scenario.events[:k]:
        disk.apply(event)
    return disk


def _digest(name: str, state: dict[str, bytes | None]) -> bytes:
    parts = [(path, None if data is None else hashlib.sha256(data).digest()) for path, data in sorted(state.items())]
    return hashlib.sha256(repr((name, parts)).encode()).digest()


def _word(event: Event) -> str:
    return f"{event.kind} {event.path} {event.target}" if isinstance(event, Call) else "acknowledged"


def _check(folder: Path, scenario: Scenario, k: int, state: dict[str, bytes | None]) -> list[str]:
    root = folder / "root"
    _materialise(root, state)
    try:
        problems = scene.served(root, scenario.truth) + _lost(root, scenario, k)
    except Exception as error:
        problems = [f"reading failed: {error!r}"]
    problems += scene.settle(root, scenario.truth)
    shutil.rmtree(folder)
    return problems


def _materialise(root: Path, state: dict[str, bytes | None]) -> None:
    root.mkdir(parents=True)
    for name, data in state.items():
        if data is None:
            (root / name).mkdir()
        elif isinstance(data, Link):
            (root / name).symlink_to(data.decode())
        else:
            (root / name).write_bytes(data)


def _lost(root: Path, scenario: Scenario, k: int) -> list[str]:
    """What was said to be stored and is not there."""
    said = [event for event in scenario.events[:k] if isinstance(event, Ack)]
    store, cells = Store(root), {key for ack in said for key in ack.cells}
    problems = [f"{len(gone)} cells were stored and are lost"] if (gone := cells - set(store.done(cells))) else []
    if gone := cells - {row["fingerprint"] for row in store.costs(cells).to_pylist()}:
        problems.append(f"costs of {len(gone)} cells were stored and are lost")
    problems += [f"bank {bank} was stored and is lost" for ack in said for bank in ack.banks if not store.bank(bank)]
    tables = root / "sweeps" / "s"
    if any(ack.tables for ack in said):
        for name, data in scenario.truth.tables.items():
            path = tables / f"{name}.parquet"
            if not path.is_file() or path.read_bytes() != data:
                problems.append(f"{name}.parquet was written and is lost")
    return problems
