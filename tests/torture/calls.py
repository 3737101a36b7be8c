"""See, and perhaps refuse, every call of `os` that changes something below a folder, whichever module makes it."""

import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

KINDS = ("open", "write", "fsync", "link", "rename", "replace", "mkdir", "unlink", "rmdir", "symlink")
DESCRIPTOR = ("write", "fsync")


class Call(NamedTuple):
    """One call. kind: of KINDS, or opendir, read (open for that), fsync_dir; path: relative to the folder.

    target: of link, rename and replace; data: what is written, or a symbolic link's text; fresh: whether open
    truncates; caller: the function that calls; descriptor: of write.
    """

    kind: str
    path: str
    target: str = ""
    data: bytes = b""
    fresh: bool = False
    caller: str = ""
    descriptor: int = -1


Hook = Callable[[Call, Callable[..., Any]], Any]


@contextlib.contextmanager
def intercepted(root: Path, hook: Hook) -> Iterator[None]:
    """hook(call, do) stands in for each call below `root`; do() makes it, do(*arguments) another."""
    with contextlib.ExitStack() as stack:
        for kind in KINDS:
            stack.enter_context(mock.patch.object(os, kind, _stand_in(kind, getattr(os, kind), str(root) + "/", hook)))
        yield


def _stand_in(kind: str, real: Callable[..., Any], root: str, hook: Hook) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        path = _of_descriptor(args[0]) if kind in DESCRIPTOR else _absolute(args[kind == "symlink"], options)
        if not (path + "/").startswith(root):
            return real(*args, **options)
        caller = sys._getframe(1).f_code.co_name
        return hook(_call(kind, args, path, root, caller), lambda *instead: real(*(instead or args), **options))

    return call


def _call(kind: str, args: tuple[Any, ...], path: str, root: str, caller: str) -> Call:
    here = path[len(root) :]
    if kind == "write":
        return Call("write", here, data=bytes(args[1]), caller=caller, descriptor=args[0])
    if kind == "symlink":
        return Call(kind, here, data=os.fsencode(args[0]), caller=caller)
    if kind in ("link", "rename", "replace"):
        return Call(kind, here, _absolute(args[1], {})[len(root) :], caller=caller)
    if kind == "open":
        flags = args[1] if len(args) > 1 else os.O_RDONLY
        kind = "opendir" if flags & os.O_DIRECTORY else "open" if flags & os.O_CREAT else "read"
        return Call(kind, here, fresh=bool(flags & os.O_TRUNC), caller=caller)
    if kind == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode):
        return Call("fsync_dir", here, caller=caller)
    return Call(kind, here, caller=caller)


def _of_descriptor(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(" (deleted)")
    except OSError:
        return ""


def _absolute(path: Any, options: Mapping[str, Any]) -> str:
    if isinstance(path, int):
        return _of_descriptor(path)
    folder = options.get("dir_fd")
    here = os.getcwd() if folder is None else _of_descriptor(folder)
    return os.path.normpath(os.path.join(here, os.fsdecode(path)))
