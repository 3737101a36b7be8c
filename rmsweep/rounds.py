"""Rounds of slots: when others are to come, in whose place, and when that has become hopeless.

A round begins when no slot is at work. While some are, those that were lost are replaced; one that found nothing to
claim is not, until a turn is cut off and may have left work that nobody holds.
"""

from __future__ import annotations

from rmsweep.fleet import Fleet
from rmsweep.slots import Order

FRUITLESS = 3  # rounds, one after the other, that stored nothing; or as many slots for each that was asked for


class Rounds:
    """What one driver has seen of a sweep's rounds. number: the present one."""

    def __init__(self) -> None:
        self.number = 1
        self._order = Order()  # that the counts below are of; one without a plan before the first look
        self._n_fruitless = self._stored_before = 0
        self._has_waited = False
        self._barren_before = self._done_before = self._n_cut = 0

    def see(self, now: Fleet) -> None:
        """Take note of a look at the fleet: another driver may have begun a round, or a turn may have been cut off."""
        if now.round > self.number:
            self._next(now.round)
        if now.order != self._order:  # the first look, or slots are told other things: counts begin anew
            is_first, self._order = not self._order.plan, now.order
            self._barren_before, self._done_before, self._n_cut = now.n_barren(self.number), 0, now.n_cut
            if is_first and not now.n_at_work and now.has_round(self.number):
                self._next(self.number + 1)  # what was over when this driver began is an earlier one's business
        if now.n_at_work:
            self._has_waited = False
        if now.n_cut > self._n_cut:
            self._done_before, self._n_cut = now.n_done(self.number), now.n_cut

    def may_begin(self, now: Fleet, n_stored: int) -> bool:
        """No slot is at work: whether others are to come now. n_stored: cells that slots have stored so far."""
        if now.has_round(self.number):  # else Slurm took none, which says nothing of slots
            if now.has_ended_well(self.number) and not self._has_waited:
                self._has_waited = True  # what they stored a moment ago may not be seen yet
                return False
            self._n_fruitless = 0 if n_stored > self._stored_before else self._n_fruitless + 1
            self._next(self.number + 1)
        self._stored_before = n_stored
        return not self.is_hopeless

    @property
    def is_hopeless(self) -> bool:
        """Whether rounds have stored nothing often enough."""
        return self._n_fruitless >= FRUITLESS

    def n_done(self, now: Fleet) -> int:
        """Slots in whose place nobody has to come as long as others run."""
        return now.n_done(self.number) - self._done_before if now.n_running else 0

    def n_barren(self, now: Fleet) -> int:
        """Slots that ended badly without a cell since this driver began, less turns that computed some."""
        return now.n_barren(self.number) - self._barren_before

    def _next(self, number: int) -> None:
        self.number, self._has_waited = number, False
        self._barren_before = self._done_before = 0
