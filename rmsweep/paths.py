"""Paths that a user names: checked before anything is opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rmsweep.errors import ConfigError


def user_path(value: Any, key: str) -> Path:
    """The path in `value`, `~` expanded; ConfigError naming `key` where no file or folder could have that name."""
    text = str(value)
    try:
        if not isinstance(value, str | int | float | Path) or not text.strip():
            raise ValueError("the path is empty")
        text.encode()  # a name that is no UTF-8 could be neither printed nor recorded
        path = Path(text).expanduser()
        os.path.lexists(path)  # NUL, where Python refuses it
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (OSError, ValueError, RuntimeError) as error:
        shown = ascii(text if len(text) <= 100 else text[:100] + "...")
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{key}={shown}: needs the path of a folder or file ({reason})") from None
    return path
