"""An audit hook that says what a call did beyond its folder: files written elsewhere, programs or input executed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CANARY = "rmsweep_canary"  # every payload that would execute carries this word
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATHS = {  # event -> (place of a path, place of its directory descriptor)
    "os.rename": ((0, 2), (1, 3)), "os.link": ((1, 3),), "os.symlink": ((1, 2),), "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.truncate": ((0, 9),), "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),), "os.utime": ((0, 3),), "os.mkfifo": ((0, 2),),
}  # fmt: skip
PROGRAMS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn")
OUTSIDE = ("antigravity", "this", "turtle", "webbrowser", "pty", "idlelib", "telnetlib", "smtplib", "ftplib", CANARY)
ALLOWED = (os.devnull, "__pycache__", ".hypothesis")


class Watch:
    """What happened while armed: `escapes` (writes outside the folder) and `executions`."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.escapes: list[str] = []
        self.executions: list[str] = []
        self._busy = False

    @contextlib.contextmanager
    def armed(self, folder: Path) -> Iterator[None]:
        """Take note of everything until the block ends; `folder` may be written."""
        self.folder = os.path.realpath(folder)
        try:
            yield
        finally:
            self.folder = None

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        """One audit event."""
        if self.folder is None or self._busy:
            return
        self._busy = True
        try:
            self._note(event, args)
        finally:
            self._busy = False

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & WRITES:
            self._path(event, args[0], -1)
        elif event in PATHS:
            for place, descriptor in PATHS[event]:
                self._path(event, args[place], args[descriptor] if descriptor < len(args) else -1)
        elif event in PROGRAMS:
            self.executions.append(f"{event} {args!r}"[:300])
        elif event == "import" and args[0].partition(".")[0] in OUTSIDE:
            self.executions.append(f"import {args[0]}")
        elif event == "exec" and _holds_canary(args[0]):
            self.executions.append(f"exec {args[0]!r}")

    def _path(self, event: str, path: Any, descriptor: Any) -> None:
        if isinstance(path, int):
            return
        text = os.fsdecode(path)
        base = os.readlink(f"/proc/self/fd/{descriptor}") if isinstance(descriptor, int) and descriptor >= 0 else ""
        full = os.path.join(os.path.realpath(base or "."), text)
        real = os.path.join(os.path.realpath(os.path.dirname(full)), os.path.basename(full))
        if not real.startswith(self.folder + os.sep) and real != self.folder and not any(a in real for a in ALLOWED):
            self.escapes.append(f"{event} {real}"[:300])


def _holds_canary(code: Any) -> bool:
    names = (*getattr(code, "co_names", ()), *(c for c in getattr(code, "co_consts", ()) if isinstance(c, str)))
    inner = (c for c in getattr(code, "co_consts", ()) if hasattr(c, "co_consts"))
    return any(CANARY in name for name in names) or any(map(_holds_canary, inner))


_WATCH: list[Watch] = []


def watch() -> Watch:
    """The hook of this process, installed once: an audit hook cannot be taken away."""
    if not _WATCH:
        _WATCH.append(Watch())
        sys.addaudithook(_WATCH[0])
    return _WATCH[0]
