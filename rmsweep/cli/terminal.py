"""What is printed: names and values from configs and data must drive neither a terminal nor a spreadsheet."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from rmsweep.errors import RmsweepError
from rmsweep.text import printable

if TYPE_CHECKING:
    import pandas as pd

FORMULA = re.compile(r"[=+\-@\t\r]")  # what makes a spreadsheet read a cell as a formula
ENVIRONMENT = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF, errno.EMFILE, errno.ENFILE}
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class Escaped:
    """A text stream that writes control characters, and what its encoding cannot hold, as escapes.

    name: of the stream, for the RmsweepError where it is full or closed; that of a closed pipe stays as it is.
    """

    def __init__(self, stream: TextIO, name: str = "standard output") -> None:
        self._stream, self._name = stream, name
        self.needs_reader = True

    def write(self, text: str) -> int:
        """Write `text`, escaped; a carriage return in front, as progress bars begin, stays."""
        start = "\r" if text.startswith("\r") else ""
        with self._perhaps_unread():
            self._stream.write(start + self._encodable(printable(text[len(start) :])))
        return len(text)

    def flush(self) -> None:
        """Bring it to the reader."""
        with self._perhaps_unread():
            self._stream.flush()

    @contextlib.contextmanager
    def _perhaps_unread(self) -> Iterator[None]:
        """Once nobody reads (a closed pipe or terminal), write nowhere, unless a reader is needed."""
        try:
            yield
        except OSError as error:
            if self.needs_reader and error.errno not in ENVIRONMENT:
                raise
            write_to_nobody(self._stream)
            if self.needs_reader:
                raise RmsweepError(f"{self._name}: {error.strerror}") from error

    def _encodable(self, text: str) -> str:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return text.encode(encoding, errors="backslashreplace").decode(encoding)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def write_to_nobody(stream: TextIO) -> None:
    """Let what is written to `stream` vanish for the rest of the process, also what it still holds back."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def work_without_a_reader() -> None:
    """From here on the work counts, not who reads of it: `rmsweep run | head -1` goes on to its end."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Escaped):
            stream.needs_reader = False


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Standard output and error through Escaped; where the shell closed them (>&-) they lead nowhere."""
    with contextlib.ExitStack() as stack:
        if None in (sys.stdin, sys.stdout, sys.stderr):
            _fill_gaps()
        streams = [stream or stack.enter_context(open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr)]
        out: Any = Escaped(streams[0])
        err: Any = Escaped(streams[1], "standard error")
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        yield


def _fill_gaps() -> None:
    """Open closed descriptors 0 to 2 on nothing, for workers too: no file of the store must come by their number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def spreadsheet_safe(frame: pd.DataFrame) -> pd.DataFrame:
    """A copy in which text that a spreadsheet would take for a formula begins with an apostrophe.

    So do such column names, as a query may give; numbers stay, written as text too.
    """
    safe = frame.rename(columns=_cell)
    for column in range(safe.shape[1]):
        if any(isinstance(value, str) for value in safe.iloc[:, column]):
            safe.isetitem(column, safe.iloc[:, column].map(_cell).array)
    return safe


def _cell(value: Any) -> Any:
    if not isinstance(value, str) or not FORMULA.match(value) or NUMBER.fullmatch(value):
        return value
    return "'" + value
