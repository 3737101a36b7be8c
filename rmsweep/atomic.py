"""The protocol for single files and folders: a reader sees the whole of it or nothing, even after a power cut.

A temporary file beside the target, write, fsync, publish, fsync the folder. `publish` never replaces what is there;
`replace` and `replacing` do, for tables that are pure functions of what is. No locks, no clock, no mtime.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rmsweep.errors import StoreError

NO_LINK = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def temporary_name(key: str = "") -> str:
    """A hidden name that no other process uses: `.<key>.<host>-<pid>-<uuid>.tmp`."""
    host = re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())[:32]
    owner = f"{host}-{os.getpid()}-{uuid.uuid4().hex}"
    return f".{key}.{owner}.tmp" if key else f".{owner}.tmp"


def publish(path: Path, data: bytes) -> bool:
    """Publish `data` as `path` without replacing anything; False when the same bytes were there already.

    Raises StoreError when the disk refuses, and when other bytes stand under this name: equal keys must mean equal
    bytes, so something is not deterministic.
    """
    with _temporary(path, data) as temporary:
        fresh = _link(temporary, path)
    with disk_errors(path):
        same = fresh or read(path) == data
    if not same:
        raise StoreError(
            f"{path}: exists with other bytes than were computed now; the same key gave two results "
            "(nondeterminism). Neither was replaced; compare them before going on"
        )
    fsync_folder(path.parent)  # also where another process was first: it may not have come to this yet
    return fresh


def replace(path: Path, data: bytes) -> None:
    """Write `data` to `path` in place of what is there; raises StoreError when the disk refuses."""
    with _temporary(path, data) as temporary, disk_errors(path):
        os.replace(temporary, path)
    fsync_folder(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends without an error; raises StoreError."""
    temporary = path.parent / temporary_name()
    try:
        with disk_errors(path):
            with open(os.open(temporary, NEW_FILE, 0o666), "w+b") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def read(path: Path) -> bytes:
    """The bytes of a regular file, never through a symbolic link at its end; raises OSError."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as handle:
        return handle.read()


def probe(folder: Path) -> None:
    """Make `folder` and prove that files can be written there; StoreError before any work otherwise."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _temporary(folder / "probe", b"\0" * 4096):
        pass
    fsync_folder(folder)


def publish_folder(temporary: Path, final: Path) -> bool:
    """Publish a finished folder by renaming it; False, and the folder gone, when another process was first."""
    with disk_errors(final):
        fsync_folder(temporary)
        try:
            os.rename(temporary, final)
            fresh = True
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(temporary, ignore_errors=True)
            fresh = False
    fsync_folder(final.parent)
    return fresh


def fsync_file(path: Path) -> tuple[int, str]:
    """Bring a file's bytes to the disk; its size and sha256."""
    with disk_errors(path), open(path, "rb") as handle:
        os.fsync(handle.fileno())
        return sha256(path)


def sha256(path: Path) -> tuple[int, str]:
    """Size and sha256 of a regular file, in blocks, never through a symbolic link at its end; raises OSError."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as handle:
        return sha256_of(handle)


def sha256_of(handle: BinaryIO) -> tuple[int, str]:
    """Size and sha256 of an open file from its beginning; leaves it at its end."""
    handle.seek(0)
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


def is_disk_trouble(error: OSError) -> bool:
    """Whether an OSError of foreign code means the disk: full, read-only, broken. numpy sets no errno."""
    short_write = error.errno is None and "requested and" in str(error) and "written" in str(error)
    return error.errno in DISK or short_write


@contextlib.contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[Path]:
    """A file with `data` beside `path`, on the disk; gone afterwards unless it was renamed."""
    temporary = path.parent / temporary_name()
    try:
        with disk_errors(path):
            _write(temporary, data)
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, NEW_FILE, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(temporary: Path, path: Path) -> bool:
    """Give the temporary file its name unless that name is taken; False when it is."""
    with disk_errors(path):
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
