"""The command line: `rmsweep VERB ...`.

Exit codes: 0 done, 1 bad input, 2 some cells failed or diverged, 3 the store cannot be written, 4 verify found a
mismatch, 130 and 143 interrupted. Heavy libraries are imported by the verb that needs them, so that --help is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rmsweep.cli.terminal import escaped_output, write_to_nobody
from rmsweep.errors import RmsweepError
from rmsweep.text import shortened


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    with escaped_output():
        return _guarded(words)


def _guarded(words: list[str]) -> int:
    """Run the words; what a user can mend is one message, never a traceback."""
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except RmsweepError as error:
        print(f"rmsweep: {shortened(str(error))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader (head, less) has gone: nobody is left to complain to
        write_to_nobody(sys.stdout)
        return 0
    except KeyboardInterrupt:
        print("rmsweep: interrupted; the same command again continues", file=sys.stderr)
        return 130


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
