"""How many slots a site takes: arrays are halved when it refuses one, and nothing is asked for a while after that."""

from __future__ import annotations

import functools
from collections.abc import Callable

from rmsweep.engines.slurm import Busy, TooMany
from rmsweep.errors import ConfigError

LONGEST = 15  # calls of `take` that are left out at most, between two refusals


class Intake:
    """Submits slots in arrays. submit: of one array of so many slots, says whether others may follow; may raise Busy,
    TooMany or ConfigError. most: how many slots an array may have, asked once; said: hears why slots were not taken.
    """

    def __init__(self, submit: Callable[[int], bool], most: Callable[[], int], said: Callable[[str], object]) -> None:
        self._submit, self._most, self._said = submit, functools.cache(most), said
        self._size: int | None = None  # of the next array
        self._pause = self._left_out = 0
        self._has_taken = False

    def take(self, n_slots: int) -> int:
        """Submit `n_slots` slots; how many were taken. Raises ConfigError when the site will never take one."""
        if self._left_out > 0:
            self._left_out -= 1
            return 0
        taken, grows = 0, True
        while taken < n_slots:
            size = min(n_slots - taken, self._size or self._most())
            try:
                if not self._submit(size):
                    break
            except Busy as error:
                self._said(f"sbatch gave no clear answer ({error}); asking the queue before trying again")
                break
            except TooMany as error:
                self._refused(size, error)
                if size == 1:
                    break
                grows = False
                continue
            taken, self._pause, self._has_taken = taken + size, 0, True
            if self._size and grows:
                self._size = min(2 * self._size, self._most())
        return taken

    def _refused(self, size: int, error: TooMany) -> None:
        text = str(error)
        if size == 1 and not self._has_taken and "violates" in text and "submitjob" not in text.lower():
            raise ConfigError(f"engine=slurm: {text}") from None  # not one, ever: too long, too large, no such account
        self._said(text)
        self._size = max(1, size // 2)
        if size == 1:
            self._left_out, self._pause = self._pause, min(2 * self._pause + 1, LONGEST)
