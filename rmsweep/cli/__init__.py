"""The command line: `rmsweep VERB ...`.

Exit codes: 0 done, 1 bad input, 2 some cells failed, diverged or are left, 3 the store cannot be written, 4 verify
found a mismatch, 129, 130 and 143 interrupted. Heavy libraries are imported by the verb that needs them, so that --help
is quick.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Sequence

from rmsweep.cli import interrupt
from rmsweep.cli.terminal import ENVIRONMENT, escaped_output, write_to_nobody
from rmsweep.errors import RmsweepError, StoreError
from rmsweep.text import shortened


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    with interrupt.noted() if argv is None else contextlib.nullcontext(), escaped_output():
        return _guarded(words)


def _guarded(words: list[str]) -> int:
    """Run the words; what a user can mend is one message, never a traceback."""
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        interrupt.check()
        return code
    except BaseException as error:
        if interrupt.is_cause(error):
            _say("interrupted; the same command again continues")
            return 130
        if isinstance(error, RmsweepError):
            _say(shortened(str(error)))
            return error.exit_code
        if isinstance(error, BrokenPipeError):  # the reader (head, less) has gone: nobody is left to complain to
            write_to_nobody(sys.stdout)
            return 0
        if isinstance(error, OSError) and error.errno in ENVIRONMENT:
            more = "; `ulimit -n 1024` before it allows more" if error.errno == errno.EMFILE else ""
            _say(f"{error.filename or 'this process'}: {error.strerror}{more}")
            return StoreError.exit_code
        raise


def _say(text: str) -> None:
    """One message on standard error, as far as that can be written."""
    with contextlib.suppress(OSError, RmsweepError):
        print(f"rmsweep: {text}", file=sys.stderr)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        from rmsweep.cli.help import OVERVIEW

        print(OVERVIEW)
        return 0 if words else 1
    if words[0] == "--version":
        import rmsweep

        print(f"rmsweep {rmsweep.__version__}")
        return 0
    if words[0] == "complete":
        from rmsweep.cli.complete import candidates

        print(*candidates(words[1:]), sep="\n")
        return 0
    from rmsweep.cli.verbs import call

    return call(words[0], words[1:])
