"""What the checks of data share: all problems in one message, values shown short, texts compared."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from rmsweep.errors import DataError

MAX_LISTED = 20
MAX_SHOWN = 60
T = TypeVar("T")


class Problems:
    """Everything wrong with one source, raised together: the first MAX_LISTED and how many more there are.

    where: the file or folder; note: what the title says after the count.
    """

    def __init__(self, where: Path | str, note: str = " (rows are data rows, counted from 0)") -> None:
        self.where, self.note = where, note
        self.lines: list[str] = []
        self.count = 0

    def add(self, *texts: str) -> None:
        """Some problems, one line each."""
        self.many(len(texts), texts)

    def many(self, count: int, texts: Iterable[str]) -> None:
        """`count` problems; `texts` is read as far as lines are listed."""
        self.count += count
        self.lines += itertools.islice(texts, max(0, MAX_LISTED - len(self.lines)))

    def of(self, read: Callable[..., T], *args: Any) -> T | None:
        """What read(*args) gives; None, and one problem more, where it raises a DataError."""
        try:
            return read(*args)
        except DataError as error:
            self.add(str(error))
            return None

    def at(self, row: int, column: str, value: Any, allowed: str) -> None:
        """One bad value: data row (from 0), column, the value, what would be allowed."""
        self.add(f"row {row}, column {column!r}: {shown(value)}; allowed: {allowed}")

    def check(self) -> None:
        """Raise a DataError when there is any problem."""
        if not self.count:
            return
        more = [f"... and {self.count - len(self.lines):,} more"] if self.count > len(self.lines) else []
        title = f"{self.where}: {self.count:,} problem{'s' * (self.count > 1)}{self.note}"
        raise DataError("\n  ".join([title, *self.lines, *more]))


def shown(value: Any) -> str:
    """A value for a message: printable whatever it holds (lone surrogates, NUL), cut at MAX_SHOWN."""
    text = "missing" if value is None else ascii(value[:MAX_SHOWN] if isinstance(value, str | bytes) else value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def normalised(text: str) -> str:
    """NFC with runs of whitespace as one space: prompts that agree in this form are the same to a reader."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def is_text(value: Any) -> bool:
    """A string that UTF-8 can hold; lone surrogates (half an emoji cut off in JSON) cannot be stored."""
    if not isinstance(value, str):
        return False
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False
