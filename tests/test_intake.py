"""How many slots a site takes: found with few questions, asked ever more seldom while it is full."""

import math

import pytest

from rmsweep.engines.slurm import Busy, TooMany
from rmsweep.errors import ConfigError
from rmsweep.intake import LONGEST, Intake


class Site:
    """Takes arrays of at most `largest` slots while no more than `room` slots are there."""

    def __init__(self, largest=1000, room=10**9, words="QOSMaxSubmitJobPerUserLimit"):
        self.largest, self.room, self.words = largest, room, words
        self.asked, self.taken, self.said, self.most = [], [], [], 1000

    def submit(self, size):
        self.asked.append(size)
        if size > self.largest or sum(self.taken) + size > self.room:
            raise TooMany(self.words)
        self.taken.append(size)
        return True

    def intake(self):
        return Intake(self.submit, lambda: self.most, self.said.append)


@pytest.mark.parametrize("n_slots", [0, -3])
def test_nothing_is_asked_for_nothing(n_slots):
    """Catches an array of no slots."""
    site = Site()
    assert site.intake().take(n_slots) == 0 and not site.asked


@pytest.mark.parametrize(
    ("largest", "room"), [(1000, 10**9), (300, 10**9), (1, 10**9), (1000, 700), (1000, 1), (64, 65)]
)
def test_all_that_fits_is_taken_with_few_questions(largest, room):
    """Catches a site that is left half empty, and one that is asked once for every slot."""
    site = Site(largest, room)
    assert site.intake().take(1000) == sum(site.taken) == min(1000, room)
    assert len(site.asked) - len(site.taken) <= 2 * math.log2(1000) + 1


def test_arrays_are_no_larger_than_the_site_says():
    """Catches arrays above MaxArraySize, and a limit that is asked for anew for every array."""
    site = Site()
    questions = []
    intake = Intake(site.submit, lambda: questions.append(1) or 400, site.said.append)
    assert intake.take(1000) == 1000 and site.taken == [400, 400, 200] and len(questions) == 1


def test_a_full_site_is_asked_ever_more_seldom_and_remembered():
    """Catches ten sbatch calls at every look while the site is full, and a wait that never ends."""
    site = Site(room=0)
    intake = site.intake()
    calls = []
    for _ in range(200):
        before = len(site.asked)
        intake.take(1000)
        calls.append(len(site.asked) - before)
    assert calls[0] <= 11 and max(calls[1:]) == 1 and sum(calls[1:]) <= 4 + 200 / (LONGEST + 1)
    site.room = 10**9
    assert sum(intake.take(1000) > 0 for _ in range(LONGEST + 1)) >= 1 and len(site.taken) < 20


def test_no_clear_answer_ends_the_round():
    """Catches a second submission beside one whose answer was lost."""
    asked, said = [], []

    def submit(size):
        asked.append(size)
        raise Busy("timed out")

    assert Intake(submit, lambda: 10, said.append).take(25) == 0
    assert asked == [10] and "timed out" in said[0]


def test_what_can_never_be_taken_is_an_error_until_something_was():
    """'violates' is said of a job that no limit would ever allow, and of a full queue: the first job tells."""
    words = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
    with pytest.raises(ConfigError, match="violates accounting"):
        Site(room=0, words=words).intake().take(4)
    site = Site(room=2, words=words)
    intake = site.intake()
    assert intake.take(4) == 2 and intake.take(2) == 0
    for limit in ("QOSMaxSubmitJobPerUserLimit", "QOSGrpSubmitJobsLimit", "AssocGrpSubmitJobsLimit"):
        assert Site(room=0, words=f"{limit} {words}").intake().take(4) == 0


def test_nothing_follows_where_that_is_not_wanted():
    """Catches arrays that are submitted after `rmsweep cancel`, and cancelled ones that count as taken."""
    asked = []
    assert Intake(lambda size: asked.append(size), lambda: 2, print).take(9) == 0 and asked == [2]
