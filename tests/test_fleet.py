"""What a sweep's slots are at, from their records, the queue and their notes; nothing is asked but accounting."""

import itertools

import pytest

from rmsweep import fleet
from rmsweep.engines._queue import Task
from rmsweep.slots import Job, Look, Note, Order

ORDER = Order("p", "r")


def note(task, end=None, restart=0, computed=0, order=ORDER, **in_flight):
    return Note(task, restart, "n1", computed, in_flight, end, "", *order)


def seen(jobs=(), tasks=(), notes=(), known=None, ends=None):
    """A fleet: tasks as id -> state."""
    records = {job.id: job for job in jobs}
    look = Look(
        {name: Task(name, state, "n1") for name, state in dict(tasks).items()},
        frozenset(records if known is None else known),
    )
    return fleet.assembled(ORDER, records, look, list(notes), lambda names: dict(ends or {}))


def job(name="7", n_slots=2, order=ORDER, memory=4.0, number=1):
    return Job(name, n_slots, memory, *order, number)


def test_who_is_at_work_by_what_they_run():
    """Catches slots of another plan taken for help, and slots of the same plan taken for strangers."""
    orders = {"1": ORDER, "2": Order("p"), "3": Order("q", "r"), "4": Order()}
    now = seen([job(n, 2, order) for n, order in orders.items()], {f"{n}_{i}": "RUNNING" for n in orders for i in "01"})
    assert [now.n_live(of) for of in (now.is_ours, now.is_akin, now.is_foreign)] == [4, 2, 2]
    assert now.n_running == 8


def test_what_was_submitted_since_the_look_is_waiting():
    """Catches a second submission on a look that is older than the first; not so for what the look had to know."""
    assert seen([job()], known=()).n_live(lambda order: True) == 2
    gone = seen([job()])
    assert gone.n_live(lambda order: True) == 0 and gone.n_barren(1) == 2


def test_accounting_is_asked_of_forgotten_slots_of_this_order_only():
    """Catches sacct asked for every job that a sweep ever had."""
    asked = []
    records = {"1": job("1"), "2": job("2", order=Order("q")), "3": job("3", 1)}
    look = Look({"1_0": Task("1_0", "RUNNING", "n1"), "3": Task("3", "FAILED", "")}, frozenset(records))
    now = fleet.assembled(ORDER, records, look, [], lambda names: asked.extend(names) or {"1_1": "NODE_FAIL"})
    assert asked == ["1_1"] and now.tasks["1_1"].state == "NODE_FAIL"


@pytest.mark.parametrize(
    ("end", "state", "well"),
    [
        ("done", "COMPLETED", True),
        ("done", "GONE", True),
        ("done", "OUT_OF_MEMORY", True),
        ("given_up", "COMPLETED", True),
        (None, "COMPLETED", True),
        ("time", "COMPLETED", False),
        ("stopped", "COMPLETED", False),
        (None, "GONE", False),
        ("time", "GONE", False),
        (None, "NODE_FAIL", False),
        ("bug", "FAILED", False),
    ],
)
def test_in_whose_place_another_comes(end, state, well):
    """A slot needs to say that it had done its work; one that merely vanished had not."""
    notes = [note("7_0", end)] if end else []
    now = seen([job()], {"7_0": state, "7_1": "RUNNING"}, notes)
    assert now.n_done(1) == well and now.has_ended_well(1) == well
    assert now.n_barren(1) == (not well)


def test_rounds_are_counted_apart():
    """Catches slots of an earlier round that keep their successors from being replaced."""
    jobs = [job("1", number=1), job("2", number=2)]
    tasks = {"1_0": "COMPLETED", "1_1": "COMPLETED", "2_0": "RUNNING", "2_1": "FAILED"}
    now = seen(jobs, tasks)
    assert (now.round, now.n_done(1), now.n_done(2), now.n_barren(2)) == (2, 2, 0, 1)
    assert [task.id for task in now.lost(2)] == ["2_1"] and now.has_round(2) and not now.has_round(3)


def test_turns_that_computed_something_outweigh_bad_ends():
    """Catches a long sweep on preemptible nodes that is taken for a broken one."""
    notes = [note("7_0", "time", n, computed=3) for n in range(5)]
    assert seen([job()], {"7_0": "RUNNING", "7_1": "FAILED"}, notes).n_barren(1) == 1 - 5


def test_memory():
    """What slots had that ran out of it, unless they had done their work; and what those at work have."""
    jobs = [job("1", memory=4.0), job("2", memory=16.0), job("3", memory=8.0)]
    tasks = {"1_0": "OUT_OF_MEMORY", "2_0": "OUT_OF_MEMORY", "3_0": "RUNNING"}
    now = seen(jobs, tasks, [note("2_0", "done")])
    assert now.short_memory_gib == 4.0 and now.live_memory_gib == 8.0
    assert seen().short_memory_gib is None and seen().live_memory_gib is None


def test_waiting_jobs_of_this_plan():
    """Those that need not come once nothing is left; those of other orders may have work."""
    jobs = [job("1"), job("2", order=Order("q")), job("3", order=Order("p"))]
    tasks = {"1_0": "RUNNING", "1_1": "PENDING", "2_0": "PENDING", "3_0": "PENDING", "3_1": "COMPLETED"}
    assert seen(jobs, tasks).waiting == {"1"}


# -- deaths ------------------------------------------------------------------------------------------------


def deaths(*notes, state="RUNNING", jobs=None):
    return [(d.cell, d.cause) for d in seen(jobs or [job()], {"7_0": state}, notes).deaths()]


def test_a_turn_that_goes_on_kills_nobody():
    """Catches cells that are given up while they are computed."""
    assert not deaths(note("7_0", a=0.9))
    assert not deaths(note("7_0", a=0.9), state="PENDING")


def test_a_turn_that_was_followed_by_another_is_over():
    """It was requeued without a word: preempted."""
    assert deaths(note("7_0", a=0.9), note("7_0", restart=1, b=0.1)) == [("a", "preempted")]


@pytest.mark.parametrize("share", [0.0, 0.5, fleet.WHOLE - 0.01, fleet.WHOLE, 1.0])
def test_the_time_limit_counts_for_cells_that_had_most_of_it(share):
    """Catches a short cell that is blamed for beginning late."""
    assert deaths(note("7_0", "time", a=share)) == [("a", "timeout")] * (share >= fleet.WHOLE)


@pytest.mark.parametrize("end", fleet.NOT_COMPUTING)
def test_who_was_not_computing_kills_nobody(end):
    """Catches cells blamed for a full disk or for code that does not fit."""
    assert not deaths(note("7_0", end, a=1.0), state="FAILED")


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ("NODE_FAIL", "preempted"),
        ("PREEMPTED", "preempted"),
        ("GONE", "preempted"),
        ("OUT_OF_MEMORY", "oom"),
        ("FAILED", "bug"),
        ("COMPLETED", "bug"),
        ("TIMEOUT", "timeout"),
    ],
)
def test_causes(state, cause):
    """Of a slot that was killed in the middle of a cell."""
    assert deaths(note("7_0", a=0.9), state=state) == [("a", cause)]


def test_told_to_leave_is_preempted_whatever_the_queue_makes_of_it():
    """A slot that left on SIGTERM may be listed as FAILED, or as forgotten."""
    for state in ("FAILED", "GONE", "COMPLETED"):
        assert deaths(note("7_0", "stopped", a=0.9), state=state) == [("a", "preempted")]


def test_what_a_human_cancelled_kills_nobody():
    """Catches a cell that is given up because somebody changed their mind five times."""
    for end in (None, "stopped"):
        assert not deaths(note("7_0", end, a=0.9), state="CANCELLED")


def test_deaths_of_another_order_do_not_count():
    """Catches a cell that is run again at the user's word and given up for what happened before."""
    assert not deaths(note("7_0", order=Order("p", "earlier"), a=1.0), state="FAILED")


def test_nothing_depends_on_the_order_of_things():
    """The same facts in any order give the same fleet."""
    jobs = [job("1"), job("2", number=2), job("3", order=Order("q"))]
    tasks = {"1_0": "FAILED", "1_1": "COMPLETED", "2_0": "RUNNING", "2_1": "PENDING", "3_0": "RUNNING"}
    notes = [note("1_0", a=0.9), note("2_0", "time", computed=1, b=0.9), note("2_0", restart=1)]
    facts = set()
    for turned in itertools.permutations(jobs):
        for order in itertools.permutations(tasks):
            now = seen(turned, {name: tasks[name] for name in order}, notes)
            facts.add(
                (now.n_live(now.is_ours), now.n_done(1), now.n_barren(1), now.round, tuple(now.deaths()), str(now))
            )
    assert len(facts) == 1
