"""Wait for something to happen in another process or thread: a busy machine takes longer than any fixed sleep."""

import time
from collections.abc import Callable


def wait_until(
    true: Callable[[], object],
    seconds: float = 60.0,
    pause: float = 0.05,
    why: Callable[[], object] = lambda: "it did not come to pass",
) -> None:
    """Until `true()`; AssertionError with what `why` says after so many seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, why()
        time.sleep(pause)
