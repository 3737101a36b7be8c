"""The file protocol: whole or not at all, never replaced by accident, and the disk's refusals named."""

import errno
import hashlib
import os
import subprocess
import sys

import pytest

from rmsweep import atomic
from rmsweep.errors import StoreError


def entries(folder):
    return sorted(p.name for p in folder.iterdir())


def test_publish_writes_once(tmp_path):
    """Catches a second publication that fails, or leaves a temporary file or link behind."""
    path = tmp_path / "a"
    assert atomic.publish(path, b"one", "results") is True and atomic.publish(path, b"one", "results") is False
    assert path.read_bytes() == b"one" and entries(tmp_path) == ["a"] and path.stat().st_nlink == 1


def test_publish_never_replaces_other_bytes(tmp_path):
    """Catches an overwriting rename: equal keys with different bytes are nondeterminism."""
    atomic.publish(tmp_path / "a", b"one", "results")
    with pytest.raises(StoreError, match=r"a: exists with other bytes.*nondeterminism"):
        atomic.publish(tmp_path / "a", b"two", "results")
    assert (tmp_path / "a").read_bytes() == b"one" and entries(tmp_path) == ["a"]


@pytest.mark.parametrize("code", sorted(atomic.NO_LINK))
def test_publish_without_hard_links(tmp_path, monkeypatch, code):
    """File systems without link(2): rename, still without replacing."""

    def refuse(*_, **__):
        raise OSError(code, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert atomic.publish(tmp_path / "a", b"one", "results") and not atomic.publish(tmp_path / "a", b"one", "results")
    with pytest.raises(StoreError, match="nondeterminism"):
        atomic.publish(tmp_path / "a", b"two", "results")
    assert entries(tmp_path) == ["a"]


def test_link_that_succeeded_but_says_it_exists(tmp_path, monkeypatch):
    """NFS repeats a lost reply: EEXIST for our own link is success."""
    link = os.link

    def twice(*args, **options):
        link(*args, **options)
        raise FileExistsError(errno.EEXIST, "exists")

    monkeypatch.setattr(os, "link", twice)
    assert atomic.publish(tmp_path / "a", b"one", "results") is True


def test_order_is_fsync_publish_fsync_folder(tmp_path, monkeypatch):
    """Kill tests cannot see a missing fsync, so its place is asserted."""
    seen, fsync, link = [], os.fsync, os.link
    monkeypatch.setattr(
        os, "fsync", lambda fd: (seen.append("dir" if os.path.isdir(f"/proc/self/fd/{fd}") else "file"), fsync(fd))
    )
    monkeypatch.setattr(os, "link", lambda *a, **k: (seen.append("link"), link(*a, **k)))
    atomic.publish(tmp_path / "a", b"x", "results")
    assert seen == ["file", "link", "dir"]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "link"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG])
def test_refusals_of_the_disk(tmp_path, monkeypatch, call, code):
    """Catches a raw OSError, a temporary file left on a full disk, a half-written file under the final name."""

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    with (
        monkeypatch.context() as patch,
        pytest.raises(StoreError, match=f"a: cannot be written .{os.strerror(code)}") as info,
    ):
        patch.setattr(os, call, refuse)
        atomic.publish(tmp_path / "a", b"one", "results")
    assert info.value.exit_code == 3 and entries(tmp_path) == []


def test_short_writes_are_continued(tmp_path, monkeypatch):
    """Catches os.write taken to write everything."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    atomic.publish(tmp_path / "a", b"0123456789", "results")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_replace_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    """Catches truncation in place: a table survives a full disk."""
    atomic.replace(tmp_path / "t", b"old", "results")

    def refuse(*_):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch, pytest.raises(StoreError):
        patch.setattr(os, "fsync", refuse)
        atomic.replace(tmp_path / "t", b"new", "results")
    assert (tmp_path / "t").read_bytes() == b"old" and entries(tmp_path) == ["t"]
    atomic.replace(tmp_path / "t", b"new", "results")
    assert (tmp_path / "t").read_bytes() == b"new"


def test_symbolic_links_are_not_followed(tmp_path):
    """Catches a store that reads or writes through a planted link."""
    (tmp_path / "secret").write_bytes(b"one")
    (tmp_path / "a").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError):
        atomic.read(tmp_path / "a")
    with pytest.raises(StoreError):
        atomic.publish(tmp_path / "a", b"one", "results")
    assert (tmp_path / "secret").read_bytes() == b"one"


def test_folders_are_published_once(tmp_path):
    """Losing the race is success and leaves nothing behind."""
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name)
    assert atomic.publish_folder(tmp_path / "x", tmp_path / "final") is True
    assert atomic.publish_folder(tmp_path / "y", tmp_path / "final") is False
    assert (tmp_path / "final" / "f").read_text() == "x" and entries(tmp_path) == ["final"]


def test_probe_names_the_folder(tmp_path):
    """A root that is a file, before any work."""
    (tmp_path / "root").write_text("not a folder")
    with pytest.raises(StoreError, match="root"):
        atomic.probe(tmp_path / "root" / "store")


def test_numpy_short_write_is_disk_trouble():
    """numpy reports a full disk without an errno."""
    assert atomic.is_disk_trouble(OSError("1000 requested and 12 written"))
    assert not atomic.is_disk_trouble(FileNotFoundError(errno.ENOENT, "no such file"))


def test_a_draft_takes_the_place_at_the_end_only(tmp_path):
    """Catches a half-written table under its name, and a temporary file left behind by an error."""
    path = tmp_path / "a"
    with atomic.Draft(path, "table") as draft:
        draft.write(b"one")
        draft.seal()
        assert not path.exists() and (draft.size, draft.sha256) == (3, hashlib.sha256(b"one").hexdigest())
        draft.replace()
    assert path.read_bytes() == b"one"
    with pytest.raises(ValueError, match="stop"), atomic.Draft(path, "table") as draft:
        draft.write(b"two")
        raise ValueError("stop")
    assert path.read_bytes() == b"one" and entries(tmp_path) == ["a"]


def test_a_late_write_meets_no_other_file(tmp_path):
    """A Parquet writer whose draft failed closes itself when it is collected: catches its bytes in the next table."""
    with pytest.raises(ValueError, match="stop"), atomic.Draft(tmp_path / "a", "table") as first:
        first.write(b"one")
        raise ValueError("stop")
    with atomic.Draft(tmp_path / "b", "table") as second:
        second.write(b"two")
        with pytest.raises(StoreError):
            first.write(b"three")
        second.seal().replace()
    assert (tmp_path / "b").read_bytes() == b"two"


def test_what_stops_a_draft_keeps_its_own_error(tmp_path):
    """Catches an error of reading, inside the block, that is reported as an error of writing this file."""
    with pytest.raises(FileNotFoundError), atomic.Draft(tmp_path / "a", "table"):
        atomic.read(tmp_path / "b")


def test_stale_handles_of_nfs_are_asked_again(tmp_path, monkeypatch):
    """Catches ESTALE, which NFS gives for a file that was replaced, taken for a damaged part."""
    (tmp_path / "a").write_bytes(b"one")
    real, fails = os.open, [errno.ESTALE, errno.ESTALE]

    def open_(*args, **options):
        if fails:
            raise OSError(fails.pop(), "stale")
        return real(*args, **options)

    monkeypatch.setattr(os, "open", open_)
    assert atomic.read(tmp_path / "a") == b"one"


def test_owners(tmp_path):
    """Catches a live process taken for dead, and a process of another machine judged by its number here."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    where = atomic.machine()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie: its parent has not asked yet
    assert atomic.is_dead(f"{where}-{child.pid}")
    child.wait()
    assert atomic.is_dead(f"{where}-{child.pid}") and not atomic.is_dead(atomic.owner())
    assert not atomic.is_dead(f"elsewhere-00000000-{child.pid}") and not atomic.is_dead("nonsense")
    assert atomic.TEMPORARY.fullmatch(atomic.temporary_name()).group("owner") == atomic.owner()
    assert atomic.TEMPORARY.fullmatch(atomic.temporary_name("ab" * 12)).group("owner") == atomic.owner()
