"""Rounds of slots: when others come, in whose place, and when it is hopeless; on fleets made by hand."""

from dataclasses import replace

import pytest
from test_fleet import job, note, seen

from rmsweep.engines._queue import Task
from rmsweep.rounds import FRUITLESS, Rounds
from rmsweep.slots import Order


def fleet(number=1, notes=(), **states):
    """Slots of job 7 of one round: `t0="RUNNING"`."""
    return seen([job(n_slots=max(2, len(states)), number=number)], {f"7_{k[1:]}": v for k, v in states.items()}, notes)


def test_a_first_round_begins_at_once():
    """Catches a driver that waits for slots which nobody submitted."""
    rounds, empty = Rounds(), seen()
    rounds.see(empty)
    assert rounds.may_begin(empty, 0) and rounds.number == 1


def test_a_driver_that_comes_back_goes_on_with_the_round():
    """Catches slots that are submitted anew, or replaced although they were done, by a driver that was away."""
    rounds, now = Rounds(), fleet(3, [note("7_0", "done")], t0="COMPLETED", t1="RUNNING")
    rounds.see(now)
    assert rounds.number == 3 and rounds.n_done(now) == 1


def test_a_driver_that_comes_back_to_nobody_begins_a_round():
    """What was over at its first look is an earlier driver's business: no waiting, no fruitless round."""
    rounds, now = Rounds(), fleet(3, [note("7_0", "done")], t0="COMPLETED", t1="FAILED")
    rounds.see(now)
    assert rounds.number == 4 and rounds.may_begin(now, 0) and not rounds.n_barren(now)


def test_slots_that_ended_well_are_given_one_look():
    """Catches a round that is submitted before its cells were seen, and a wait for ever where they never come."""
    rounds = Rounds()
    rounds.see(seen())
    assert rounds.may_begin(seen(), 0)
    rounds.see(fleet(t0="RUNNING", t1="RUNNING"))
    well = fleet(1, [note("7_0", "done"), note("7_1", "done")], t0="COMPLETED", t1="COMPLETED")
    rounds.see(well)
    assert not rounds.may_begin(well, 5) and rounds.may_begin(well, 5) and rounds.number == 2


def test_lost_slots_are_not_waited_for():
    """One of them ended badly: others come at once."""
    rounds = Rounds()
    rounds.see(seen())
    rounds.may_begin(seen(), 0)
    assert rounds.may_begin(fleet(t0="COMPLETED", t1="FAILED"), 0)


@pytest.mark.parametrize(
    ("stored", "hopeless"), [([0, 0, 0], True), ([0, 0, 1], False), ([5, 5, 5], False), ([1, 2, 3], False)]
)
def test_rounds_that_store_nothing(stored, hopeless):
    """Catches endless submitting, and giving up on rounds that stored something since the one before."""
    rounds = Rounds()
    rounds.see(seen())
    assert rounds.may_begin(seen(), 0)
    for number, n_stored in enumerate(stored, 1):
        may = rounds.may_begin(fleet(number, t0="FAILED", t1="FAILED"), n_stored)
        assert may != (hopeless and number == FRUITLESS)
    assert rounds.is_hopeless == hopeless
    more = [stored[-1]] * FRUITLESS
    for number, n_stored in enumerate(more, len(stored) + 1):
        rounds.may_begin(fleet(number, t0="FAILED", t1="FAILED"), n_stored)
    assert rounds.is_hopeless


def test_a_round_in_which_nothing_was_taken_says_nothing():
    """Catches a driver that gives up on slots because the site was full."""
    rounds = Rounds()
    rounds.see(seen())
    assert all(rounds.may_begin(seen(), 0) for _ in range(10)) and rounds.number == 1


def test_who_found_nothing_to_claim_is_not_replaced_while_others_run():
    """Catches slots that come and go while the last cells are computed; and a sweep that one waiting slot starves."""
    rounds, notes = Rounds(), [note("7_0", "done"), note("7_1", "done")]
    now = fleet(1, notes, t0="COMPLETED", t1="COMPLETED", t2="RUNNING")
    rounds.see(now)
    assert rounds.n_done(now) == 2
    waiting = fleet(1, notes, t0="COMPLETED", t1="COMPLETED", t2="PENDING")
    rounds.see(waiting)
    assert rounds.n_done(waiting) == 0


def test_a_turn_that_is_cut_off_leaves_work_for_those_who_had_none():
    """Catches seven slots that stay away while the eighth, requeued, works off everybody's rest."""
    rounds, notes = Rounds(), [note("7_0", "done")]
    rounds.see(fleet(1, notes, t0="COMPLETED", t1="RUNNING"))
    cut = fleet(1, [*notes, note("7_1", "time", computed=3), note("7_1", restart=1)], t0="COMPLETED", t1="RUNNING")
    rounds.see(cut)
    assert rounds.n_done(cut) == 0
    rounds.see(cut)
    again = fleet(1, [*cut.notes, note("7_2", "done")], t0="COMPLETED", t1="RUNNING", t2="COMPLETED")
    rounds.see(again)
    assert rounds.n_done(again) == 1  # it found nothing either


def test_slots_that_are_told_other_things_count_anew():
    """Catches counts of the old order that are taken off the new one's: more slots than were asked for."""
    rounds, notes = Rounds(), [note("7_0", "done"), note("7_1", "time", computed=1), note("7_1", restart=1)]
    now = fleet(1, notes, t0="COMPLETED", t1="RUNNING", t2="FAILED")
    rounds.see(now)
    rounds.see(fleet(1, [*notes, note("7_2", "stopped")], t0="COMPLETED", t1="RUNNING", t2="FAILED"))
    order = Order("p", "other")
    other = replace(
        now, order=order, notes=(), jobs={"8": job("8", order=order)}, tasks={"8_0": Task("8_0", "RUNNING", "")}
    )
    rounds.see(other)
    assert rounds.n_done(other) == 0 == rounds.n_barren(other)


def test_bad_ends_count_from_this_drivers_first_look():
    """Catches a node that was mended since and is still not trusted; each round counts anew."""
    rounds, now = Rounds(), fleet(t0="RUNNING", t1="FAILED", t2="FAILED")
    rounds.see(now)
    assert rounds.n_barren(now) == 0
    worse = fleet(t0="RUNNING", t1="FAILED", t2="FAILED", t3="FAILED")
    rounds.see(worse)
    assert rounds.n_barren(worse) == 1
    other = fleet(2, t0="RUNNING", t1="FAILED")
    rounds.see(other)
    assert rounds.number == 2 and rounds.n_barren(other) == 1
