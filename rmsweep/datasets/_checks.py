"""What the checks of data files share: all problems in one message, values shown short, texts compared."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from rmsweep.errors import DataError

MAX_LISTED = 20
MAX_SHOWN = 60


class Problems:
    """Everything wrong with one file, raised together: the first MAX_LISTED and how many more there are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[str] = []
        self.count = 0

    def add(self, text: str) -> None:
        """One problem of the file as a whole."""
        self.count += 1
        if len(self.lines) < MAX_LISTED:
            self.lines.append(text)

    def at(self, row: int, column: str, value: Any, allowed: str) -> None:
        """One bad value: data row (from 0), column, the value, what would be allowed."""
        self.add(f"row {row}, column {column!r}: {shown(value)}; allowed: {allowed}")

    def check(self) -> None:
        """Raise a DataError when there is any problem."""
        if not self.count:
            return
        more = [f"... and {self.count - len(self.lines)} more"] if self.count > len(self.lines) else []
        title = f"{self.path}: {self.count} problem{'s' * (self.count > 1)} (rows are data rows, counted from 0)"
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
