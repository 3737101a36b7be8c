"""Files that appear whole or not at all: temp file, fsync, publish without replacing, fsync of the directory."""

from __future__ import annotations

import errno
import os
import socket
import uuid
from pathlib import Path

from rmsweep.errors import StoreError

UNSUPPORTED = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def publish(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, durably, without replacing: an equal file there is success, another is StoreError."""
    temp = _written(path, data)
    try:
        _link(temp, path)
    except FileExistsError:
        if path.read_bytes() != data:
            raise StoreError(f"{path} exists with other content: two runs of one artefact differ") from None
    except OSError as error:
        raise _store_error(path, error) from error
    finally:
        temp.unlink(missing_ok=True)
    fsync_folder(path.parent)


def replace(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, durably, in place of what stood there: readers see the old file or the new one."""
    temp = _written(path, data)
    try:
        os.replace(temp, path)
    except OSError as error:
        temp.unlink(missing_ok=True)
        raise _store_error(path, error) from error
    fsync_folder(path.parent)


def publish_folder(temp: Path, path: Path) -> None:
    """Rename a finished folder to its name, durably; losing a race against an equal one is success."""
    for file in temp.rglob("*"):
        if file.is_file():
            _fsync(file, os.O_RDONLY)
    fsync_folder(temp)
    try:
        os.rename(temp, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise _store_error(path, error) from error
    fsync_folder(path.parent)


def temp_name(path: Path) -> Path:
    """A hidden name beside `path` that nobody else uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}.tmp")


def make_folder(path: Path) -> Path:
    """Create a folder and its parents; StoreError names the path that cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _store_error(path, error) from error
    return path


def check_writable(folder: Path) -> None:
    """Write and remove a probe; StoreError before any work when the folder cannot be written."""
    temp = _written(make_folder(folder) / "probe", b"probe")
    temp.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Make renames and links in `folder` durable."""
    _fsync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _written(path: Path, data: bytes) -> Path:
    """A durable temp file beside `path`; removed again if it cannot be written whole."""
    temp = temp_name(path)
    try:
        descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        temp.unlink(missing_ok=True)
        raise _store_error(path, error) from error
    return temp


def _link(temp: Path, path: Path) -> None:
    """Give the temp file its name; a hard link never replaces. Where there are none, rename after a look."""
    try:
        os.link(temp, path)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        if path.exists():
            raise FileExistsError(path) from None
        os.rename(temp, path)


def _fsync(path: Path, flags: int) -> None:
    try:
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _store_error(path, error) from error


def _store_error(path: Path, error: OSError) -> StoreError:
    if isinstance(error, StoreError):
        return error
    remedy = {
        errno.ENOSPC: "the disk is full: free some space",
        errno.EDQUOT: "the quota is used up: free some space",
        errno.EACCES: "no permission: choose another root=DIR",
        errno.EROFS: "the file system is read-only: choose another root=DIR",
    }.get(error.errno or 0, os.strerror(error.errno or errno.EIO))
    return StoreError(f"cannot write {path}: {remedy}; finished cells are safe, the same command continues")
