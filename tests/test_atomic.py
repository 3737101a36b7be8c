"""The commit protocol: whole or not at all, never replaced, durable before it is visible."""

import errno
import os

import pytest

from rmsweep import atomic
from rmsweep.errors import StoreError


def test_publish_is_whole_and_leaves_no_temp(tmp_path):
    """Catches a torn or stray file."""
    atomic.publish(tmp_path / "a", b"x" * 100_000)
    assert (tmp_path / "a").read_bytes() == b"x" * 100_000
    assert os.listdir(tmp_path) == ["a"]


def test_publish_never_replaces(tmp_path):
    """Equal content is success (another worker was first); other content is nondeterminism and says so."""
    atomic.publish(tmp_path / "a", b"one")
    atomic.publish(tmp_path / "a", b"one")
    with pytest.raises(StoreError, match="nondeterminism"):
        atomic.publish(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one" and os.listdir(tmp_path) == ["a"]


def test_replace_swaps_whole_files(tmp_path):
    """Tables may be replaced; readers see the old or the new one."""
    atomic.replace(tmp_path / "t", b"old")
    atomic.replace(tmp_path / "t", b"new")
    assert (tmp_path / "t").read_bytes() == b"new" and os.listdir(tmp_path) == ["t"]


def test_order_of_the_protocol(tmp_path, monkeypatch):
    """fsync of the file before it gets its name, fsync of the directory after: kills cannot show a missing one."""
    calls = []
    for name in ("fsync", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real, **k: (calls.append(name), real(*a, **k))[1])
    atomic.publish(tmp_path / "a", b"x")
    assert calls == ["fsync", "link", "fsync"]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "link"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_failing_calls_name_the_path_and_leave_nothing(tmp_path, monkeypatch, call, number):
    """Disk full, quota, I/O error at any call: one message, no half file, no temp file, nothing published."""

    def failing(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(StoreError, match=r"/a: cannot be written"):
            atomic.publish(tmp_path / "a", b"x")
    assert os.listdir(tmp_path) == []


def test_without_hard_links_publishing_still_works(tmp_path, monkeypatch):
    """Some file systems have no link(2)."""

    def unsupported(*args, **kwargs):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", unsupported)
    atomic.publish(tmp_path / "a", b"x")
    atomic.publish(tmp_path / "a", b"x")
    with pytest.raises(StoreError, match="nondeterminism"):
        atomic.publish(tmp_path / "a", b"y")
    assert os.listdir(tmp_path) == ["a"]


def test_folders_are_published_once(tmp_path):
    """Two builders of one bank: the first wins, the second is no error."""
    for text in ("first", "second"):
        temp = tmp_path / f".{text}"
        temp.mkdir()
        (temp / "file").write_text(text)
        atomic.publish_folder(temp, tmp_path / "bank")
    assert (tmp_path / "bank" / "file").read_text() == "first"


def test_a_file_where_a_folder_must_be_is_bad_news_before_any_work(tmp_path):
    """A root that cannot be written (root user may write anywhere, so a file stands in the way)."""
    (tmp_path / "store").write_text("not a folder")
    with pytest.raises(StoreError, match="store"):
        atomic.probe(tmp_path / "store" / "banks")
