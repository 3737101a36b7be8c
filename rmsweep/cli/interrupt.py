"""Ctrl-C where no engine listens: imports, planning, tables.

An import must not be cut: callbacks of the import system swallow a KeyboardInterrupt, libraries turn it into errors of
their own, and C++ code that is being loaded aborts. So it waits for the end of imports. Where it is swallowed all the
same it comes again, `check` raises it before long work begins, and whatever error follows it is its doing.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

WAIT, AGAIN = 0.02, 1.0  # seconds until we look again whether the import has ended, or raise again
_came: list[int] = []  # signals noted


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Let the first Ctrl-C raise KeyboardInterrupt outside imports; a second one ends the process at once.

    Does nothing outside the main thread, or where SIGINT is ignored or somebody else's.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    hook, alarm = sys.unraisablehook, signal.signal(signal.SIGALRM, _raise)
    signal.signal(signal.SIGINT, _note)
    sys.unraisablehook = _once_more
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if alarm is None else alarm)
        # after Ctrl-C the process is on its way out: a second one must not end in a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL if _came else signal.default_int_handler)
        _came.clear()


def check() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed and somebody swallowed it."""
    if _came:
        raise KeyboardInterrupt


def is_cause(error: BaseException) -> bool:
    """Whether `error` is Ctrl-C's doing: it came before, or stands in the chain of what led to the error."""
    if _came:
        signal.setitimer(signal.ITIMER_REAL, 0)  # it need not come again
    chain = [error]
    for one in chain:  # it grows
        chain += [e for e in (one.__cause__, one.__context__) if e is not None and all(e is not c for c in chain)]
    return bool(_came) or any(isinstance(one, KeyboardInterrupt) for one in chain)


def _note(number: int, frame: FrameType | None) -> None:
    _came.append(number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _raise(number, frame)


def _raise(number: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt, as soon as no import is under way."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            signal.setitimer(signal.ITIMER_REAL, WAIT)
            return
        frame = frame.f_back
    signal.setitimer(signal.ITIMER_REAL, AGAIN)  # unless it has led to the end by then
    raise KeyboardInterrupt


def _once_more(unraisable: sys.UnraisableHookArgs) -> None:
    """A KeyboardInterrupt that was raised where nobody can catch it, as in a destructor, comes again."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    signal.setitimer(signal.ITIMER_REAL, WAIT)
