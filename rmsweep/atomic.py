"""The commit protocol: a reader sees the whole of a file or folder or nothing of it, even after a power cut.

A temporary file beside the target, write, fsync, publish, fsync the folder; every step is a named crash point
(`crash.POINTS`). `publish` never replaces what is there; `Draft.replace` does, for tables that are pure functions of
what is. No locks, no clock, no mtime. Every change that the store makes on the disk goes through this module.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from rmsweep import crash
from rmsweep.errors import StoreError

NO_LINK = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
TEMPORARY = re.compile(r"\.(?:[0-9a-f]{16,64}\.)?(?P<owner>[A-Za-z0-9_]+-[0-9a-f]{8}-[0-9]+)-[0-9a-f]{32}\.tmp")
NO_FILE = {errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENXIO}  # what stands there is no regular file
STALE_WAITS = (0.05, 0.5)  # seconds
T = TypeVar("T")


@functools.cache
def machine() -> str:
    """<host>-<digest of this boot and pid namespace>: process numbers mean the same where this is the same."""
    host = re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())[:32] or "host"
    marks = []
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(), lambda: os.readlink("/proc/self/ns/pid")):
        with contextlib.suppress(OSError):
            marks.append(read())
    return f"{host}-{hashlib.sha256(repr(marks).encode()).hexdigest()[:8]}"


def owner() -> str:
    """How temporary files and claims name the present process: <machine>-<pid>."""
    return f"{machine()}-{os.getpid()}"


def is_dead(name: str) -> bool:
    """Whether an `owner` is known to have ended: a process of this machine that is no more, or a zombie."""
    where, _, pid = name.rpartition("-")
    if where != machine():
        return False
    try:
        os.kill(int(pid), 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except ProcessLookupError:
        return True
    except (OSError, OverflowError, IndexError):
        return False


def temporary_name(key: str = "") -> str:
    """A hidden name that no other process uses: `.<key>.<owner>-<uuid>.tmp`."""
    return f".{key}{'.' * bool(key)}{owner()}-{uuid.uuid4().hex}.tmp"


class Draft:
    """A file written beside `path`, to become `path`: write, seal, then link or replace; removed at the end otherwise.

    stage: of crash.POINTS. Every method raises StoreError when the disk refuses. size, sha256: of what was written.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage, self.size = path, stage, 0
        self._temporary, self._hash, self._descriptor = path.parent / temporary_name(), hashlib.sha256(), -1

    def __enter__(self) -> Draft:
        with self._step("tmp_opened"):
            crash.at(self.stage, "pre_tmp")
            self._descriptor = os.open(self._temporary, NEW_FILE, 0o666)
        return self

    def __exit__(self, *_: object) -> None:
        descriptor, self._descriptor = self._descriptor, -1  # a late write must not meet whoever has its number next
        if descriptor >= 0:
            os.close(descriptor)
        with contextlib.suppress(OSError):
            os.unlink(self._temporary)

    @property
    def sha256(self) -> str:
        """Of all that was written."""
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`; how many bytes that was."""
        rest = memoryview(data).cast("B")
        self._hash.update(rest)
        self.size += len(rest)
        n_bytes = len(rest)
        while rest:
            with self._step("half_written"):
                half = max(1, len(rest) // 2) if len(rest) == n_bytes else len(rest)
                rest = rest[os.write(self._descriptor, rest[:half]) :]
        return n_bytes

    def seal(self) -> Draft:
        """Bring the bytes to the disk; nothing is written afterwards."""
        with self._step("fsynced"):
            crash.at(self.stage, "written")
            os.fsync(self._descriptor)
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
        return self

    def link(self) -> bool:
        """Give the file its name unless that is taken; False when it is."""
        with self._step("published"):
            fresh = _link(self._temporary, self.path)
        self._sync_folder()  # also where another process was first: it may not have come to this yet
        return fresh

    def replace(self) -> None:
        """Put the file in the place of what is there."""
        with self._step("published"):
            os.replace(self._temporary, self.path)
        self._sync_folder()

    def _sync_folder(self) -> None:
        with self._step("dirsynced"):
            fsync_folder(self.path.parent)

    @contextlib.contextmanager
    def _step(self, point: str) -> Iterator[None]:
        with disk_errors(self.path):
            yield
            crash.at(self.stage, point)


class Tail:
    """A new file that one process appends to, not brought to the disk: a power cut may take what was written.

    stage: of crash.POINTS. Making and writing raise StoreError when the disk refuses.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage, self._descriptor = path, stage, -1
        with disk_errors(path):
            crash.at(stage, "pre_open")
            self._descriptor = os.open(path, NEW_FILE, 0o666)
            crash.at(stage, "opened")

    def write(self, data: bytes) -> None:
        """Append all of `data`."""
        rest = memoryview(data)
        with disk_errors(self.path):
            while rest:
                half = max(1, len(rest) // 2) if len(rest) == len(data) else len(rest)
                rest = rest[os.write(self._descriptor, rest[:half]) :]
                crash.at(self.stage, "half_written" if rest else "written")

    def is_there(self) -> bool:
        """Whether the file still has its name, as far as is known here."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.lstat(self.path), os.fstat(self._descriptor))
        return False

    def close(self) -> None:
        """Append no more."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # NFS says here what it could not write
                os.close(descriptor)


def publish(path: Path, data: bytes, stage: str) -> bool:
    """Publish `data` as `path` without replacing anything; False when the same bytes were there already.

    Raises StoreError when the disk refuses, and when other bytes stand under this name: equal keys must mean equal
    bytes, so something is not deterministic.
    """
    with Draft(path, stage) as draft:
        draft.write(data)
        fresh = draft.seal().link()
    with disk_errors(path):
        same = fresh or read(path) == data
    if not same:
        raise StoreError(
            f"{path}: exists with other bytes than were computed now; the same key gave two results "
            "(nondeterminism). Neither was replaced; compare them before going on"
        )
    return fresh


def replace(path: Path, data: bytes, stage: str) -> None:
    """Write `data` to `path` in place of what is there; raises StoreError when the disk refuses."""
    with Draft(path, stage) as draft:
        draft.write(data)
        draft.seal().replace()


def note(path: Path, data: bytes) -> None:
    """Write a small file whole, but not to the disk: what a power cut may take. Raises OSError."""
    temporary = path.parent / temporary_name()
    descriptor = os.open(temporary, NEW_FILE, 0o666)
    try:
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read(path: Path) -> bytes:
    """The bytes of a regular file, never through a symbolic link at its end; raises OSError."""

    def whole() -> bytes:
        with open(os.open(path, READ), "rb") as handle:
            return handle.read()

    return _unless_stale(whole)


def probe(folder: Path) -> None:
    """Make `folder` and prove that files can be written there; StoreError before any work otherwise."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / temporary_name()
        try:
            descriptor = os.open(temporary, NEW_FILE, 0o666)
            try:
                os.write(descriptor, b"\0" * 4096)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        for above in (folder, *folder.parents[:2]):  # as far as the root: their names must outlast a power cut too
            fsync_folder(above)
    with contextlib.suppress(StoreError, IndexError):
        fsync_folder(folder.parents[2])  # where the root may be new; it need not be ours to open


def make_folder(path: Path) -> None:
    """A new folder; raises StoreError."""
    with disk_errors(path):
        crash.at("bank", "pre_tmp")
        os.mkdir(path)
        crash.at("bank", "tmp_opened")


def publish_folder(temporary: Path, final: Path) -> bool:
    """Publish a finished folder by renaming it; False, and the folder gone, when another process was first."""
    with disk_errors(final):
        fsync_folder(temporary)
        crash.at("bank", "indexed")
        try:
            os.rename(temporary, final)
            fresh = True
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            fresh = False
        crash.at("bank", "published")
        if not fresh:
            remove_folder(temporary)
        fsync_folder(final.parent)
        crash.at("bank", "dirsynced")
    return fresh


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it; what cannot be removed stays."""
    shutil.rmtree(path, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file that may be gone already; raises StoreError."""
    with disk_errors(path), contextlib.suppress(FileNotFoundError):
        crash.at("discard", "pre_remove")
        os.unlink(path)
        crash.at("discard", "removed")


def move(path: Path, target: Path) -> None:
    """Rename a file or folder that may be gone already; raises StoreError."""
    with disk_errors(path), contextlib.suppress(FileNotFoundError):
        crash.at("quarantine", "pre_move")
        os.rename(path, target)
        crash.at("quarantine", "moved")
        fsync_folder(target.parent)
        fsync_folder(path.parent)


def take(path: Path, target: Path, stage: str) -> None:
    """Give a file that others may want too another name; raises StoreError where it is not to be had."""
    with disk_errors(path):
        crash.at(stage, "pre_take")
        os.rename(path, target)
        crash.at(stage, "taken")


def fsync_file(path: Path) -> tuple[int, str]:
    """Bring a file's bytes to the disk; its size and sha256."""
    with disk_errors(path):
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
        return sha256(path)


def sha256(path: Path) -> tuple[int, str]:
    """Size and sha256 of a regular file, in blocks, never through a symbolic link at its end; raises OSError."""

    def whole() -> tuple[int, str]:
        with open(os.open(path, READ), "rb") as handle:
            return _sha256_of(handle)

    return _unless_stale(whole)


def _sha256_of(handle: BinaryIO) -> tuple[int, str]:
    state, size = hashlib.sha256(), 0
    while block := handle.read(1 << 20):
        state.update(block)
        size += len(block)
    return size, state.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    with disk_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a StoreError that names the path and the cause."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror or error})") from error


def unreadable(path: Path, error: OSError) -> StoreError:
    """The error for a file that cannot be read now although it may be sound: nothing is to be set aside for it."""
    return StoreError(
        f"{path}: cannot be read ({error.strerror or error}); it was left as it is. Where the disk is broken, remove "
        "it: what it holds is computed again"
    )


def is_disk_trouble(error: OSError) -> bool:
    """Whether an OSError of foreign code means the disk: full, read-only, broken. numpy sets no errno."""
    short_write = error.errno is None and "requested and" in str(error) and "written" in str(error)
    return error.errno in DISK or short_write


def _unless_stale(read: Callable[[], T]) -> T:
    """The answer of `read`, asked again while NFS says that the file behind the name was replaced (ESTALE)."""
    for seconds in STALE_WAITS:
        try:
            return read()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            time.sleep(seconds)
    return read()


def _link(temporary: Path, path: Path) -> bool:
    """Give the temporary file its name unless that name is taken; False when it is."""
    try:
        os.link(temporary, path, follow_symlinks=False)
        return True
    except FileExistsError:
        return os.stat(temporary).st_nlink > 1  # NFS may report EEXIST for a link that it made
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
    if os.path.lexists(path):
        return False
    os.rename(temporary, path)
    return True
