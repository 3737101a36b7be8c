"""Every error a user can meet, each with the exit code of the command line (1 bad input, 3 store)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RmsweepError(Exception):
    """Base of all errors that are shown without a traceback."""

    exit_code = 1


class ConfigError(RmsweepError, ValueError):
    """A configuration that names something unknown or impossible."""


class DataError(RmsweepError, ValueError):
    """Input data that must not be used: names file, row, column, value and what is allowed."""


class DesignError(RmsweepError, ValueError):
    """A combination that cannot be run, such as more annotations than the design can give."""


class StoreError(RmsweepError, OSError):
    """The store cannot be written or read."""

    exit_code = 3


class Diverged(RmsweepError, ArithmeticError):
    """Training produced NaN or infinity: a result with null metrics, not a failure."""


def unknown(what: str, name: object, valid: Iterable[object]) -> ConfigError:
    """One message for every misspelling: what was given, the nearest valid name, all valid names."""
    choices = sorted(str(v) for v in valid)
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"unknown {what} {str(name)!r}.{hint} Valid: {', '.join(choices) or '(none)'}")
