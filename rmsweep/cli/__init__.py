"""The command line: `rmsweep VERB ...`.

Exit codes: 0 done, 1 bad input, 2 some cells failed or diverged, 3 the store cannot be written, 130 and 143
interrupted. Heavy libraries are imported by the verb that needs them, so that --help is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rmsweep.errors import RmsweepError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except RmsweepError as error:
        print(f"rmsweep: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader (head, less) has gone: nobody is left to complain to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
