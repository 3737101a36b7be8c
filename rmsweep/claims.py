"""Claims: who computes what, so that two runs of the same cells share the work instead of doing it twice.

For efficiency only: results are right whoever computes them, and a claim that is lost or taken twice costs time. A
claim is a symbolic link `<key>` whose text names its owner: made in one step that fails where it exists, on NFS too.
An owner beats: it counts up in a file of its own. A claim is void once its owner has ended (a process of this
machine), or has not beaten for `lease` seconds of the observer's own monotonic clock. No wall clock, no mtime.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from rmsweep import atomic, crash

LEASE, BEAT = 120.0, 10.0  # seconds; NFS may show a change a minute late
BEATS = ".beat"
WAIT = 0.1  # seconds between two tries
LAST_WORDS = 5.0  # seconds for a beat that hangs on a dead file server


def has_ended(owner: str) -> bool:
    """Whether an owner of claims was a process of this machine that is no more."""
    return atomic.is_dead(owner.partition(".")[0])


class Claims:
    """What this process has claimed in a folder; a context, that beats inside and gives everything back at its end.

    on_death: called with a dead owner before the first of its keys becomes ours; where it raises, none does.
    """

    def __init__(
        self,
        folder: Path,
        lease: float | None = None,
        beat: float = BEAT,
        now: Callable[[], float] = time.monotonic,
        on_death: Callable[[str], object] = lambda owner: None,
    ) -> None:
        self.folder, self.owner = folder, f"{atomic.owner()}.{uuid.uuid4().hex[:12]}"
        self._beat, self._mine, self._n = beat, set[str](), 0
        self._unlinked = set[str]()  # what a file system without symbolic links let us have
        self._on_death, self._buried = on_death, set[str]()  # owners that it was called for
        self._ended, self._lives = threading.Event(), Lives(folder, lease, now)
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def take(self, keys: Iterable[str]) -> set[str]:
        """Claim keys; those that are ours now. Keys of a dead owner become ours."""
        return {key for key in keys if self._take(key)}

    def is_gone(self, owner: str) -> bool:
        """Whether an owner is no more, or seems so: it has no beat file, which a folder seen late may not show yet."""
        with contextlib.suppress(OSError):
            try:
                os.lstat(self.folder / f"{owner}{BEATS}")
            except FileNotFoundError:
                return True
        return has_ended(owner)

    def holds(self, key: str) -> bool:
        """Whether a key is still ours: who sleeps past the lease loses it."""
        return key in self._unlinked or (key in self._mine and self._holder(key) == self.owner)

    @contextlib.contextmanager
    def held(self, key: str) -> Iterator[Callable[[], bool]]:
        """A key that is ours inside, as soon as nobody else has it; yields what asks whether it still is."""
        while not self._take(key):
            time.sleep(WAIT)
        try:
            yield lambda: self.holds(key)
        finally:
            self.release([key])

    def release(self, keys: Collection[str]) -> None:
        """Give keys back; those that are not ours are passed over."""
        for key in self._mine.intersection(keys):
            self._mine.discard(key)
            with contextlib.suppress(OSError):
                if self._holder(key) == self.owner:
                    os.unlink(self.folder / key)
        with atomic.disk_errors(self.folder):
            crash.at("claim", "released")

    def __enter__(self) -> Claims:
        self._say()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(LAST_WORDS)
        self.release(set(self._mine))
        with contextlib.suppress(OSError):
            os.unlink(self.folder / f"{self.owner}{BEATS}")

    def _take(self, key: str) -> bool:
        if key in self._mine:
            return True
        with atomic.disk_errors(self.folder / key):
            crash.at("claim", "pre_claim")
        for _ in range(2):  # once more after a void claim was removed
            if self._link(key) or self._holder(key) == self.owner:  # NFS may say "exists" of the link that it made
                self._mine.add(key)
                with atomic.disk_errors(self.folder / key):
                    crash.at("claim", "claimed")
                return True
            holder = self._holder(key)
            if holder is not None and not self._void(key, holder):
                return False
        return False

    def _link(self, key: str) -> bool:
        """Make the link; True also where the file system has none: then nobody can claim, and all compute."""
        with atomic.disk_errors(self.folder / key):
            try:
                os.symlink(self.owner, self.folder / key)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in atomic.NO_LINK:
                    raise
                self._unlinked.add(key)
            return True

    def _holder(self, key: str) -> str | None:
        try:
            return os.readlink(self.folder / key)
        except FileNotFoundError:
            return None
        except OSError:
            return ""  # no link at all: nobody's

    def _void(self, key: str, holder: str) -> bool:
        """Remove a dead owner's claim, unless somebody else has done so and claimed it meanwhile."""
        if not self._lives.is_dead(holder):
            return False
        if holder and holder not in self._buried:
            self._on_death(holder)
            self._buried.add(holder)
        aside = self.folder / atomic.temporary_name()
        with contextlib.suppress(OSError):
            os.rename(self.folder / key, aside)
            taken = os.readlink(aside)
            if taken != holder:  # a new claim: give it back
                os.link(aside, self.folder / key, follow_symlinks=False)
            os.unlink(aside)
            return taken == holder
        return False

    def _tick(self) -> None:
        while not self._ended.wait(self._beat):
            self._say()

    def _say(self) -> None:
        self._n += 1
        with contextlib.suppress(OSError):  # who cannot beat loses its claims, no more
            atomic.note(self.folder / f"{self.owner}{BEATS}", str(self._n).encode())


class Lives:
    """Which owners are alive, as seen from here. now: a monotonic clock in seconds."""

    def __init__(self, folder: Path, lease: float | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.lease, self._now = folder, LEASE if lease is None else lease, now
        self._seen: dict[str, tuple[bytes | None, float]] = {}  # owner -> its beat, and since when it stands

    def owners(self) -> list[str]:
        """Owners that have a beat file and are not known to be dead."""
        with contextlib.suppress(FileNotFoundError):
            names = sorted(name[: -len(BEATS)] for name in os.listdir(self.folder) if name.endswith(BEATS))
            return [name for name in names if not self.is_dead(name)]
        return []

    def is_dead(self, owner: str) -> bool:
        """Whether a process of this machine has ended, or the owner's beat has stood still for `lease` seconds."""
        if not owner or has_ended(owner):
            return True
        try:
            beat: bytes | None = atomic.read(self.folder / f"{owner}{BEATS}")
        except OSError:
            beat = None
        now, known = self._now(), self._seen.get(owner)
        if known is None or known[0] != beat:
            self._seen[owner] = (beat, now)
            return False
        return now - known[1] > self.lease
