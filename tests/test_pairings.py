"""Pairing strategies: rules, uniformity, nesting, capacity."""

import itertools

import numpy as np
import pytest

from rmsweep import component
from rmsweep.errors import DesignError
from rmsweep.pairings.cross_prompt import uniform_places
from rmsweep.rng import streams

SAME, CROSS = component.build("pairing", "same_prompt"), component.build("pairing", "cross_prompt")


def candidates(p, k):
    """Response 100 + i is the i-th candidate: mistakes between place and index show."""
    return np.tile(100 + np.arange(k), (p, 1))


def as_tuples(pairs):
    return list(zip(pairs.prompt_a, pairs.response_a, pairs.prompt_b, pairs.response_b, strict=True))


def unordered(pairs):
    return [tuple(sorted([(a, i), (b, j)])) for a, i, b, j in as_tuples(pairs)]


def test_same_prompt_visits_each_prompt_once_then_further_rounds():
    """Catches a prompt used twice before all were used, a repeated pair, or a pair across prompts."""
    order = np.random.default_rng(0).permutation(20)
    pairs = SAME.compare(candidates(20, 4), order, 120, 1, streams(0))
    assert (pairs.prompt_a == pairs.prompt_b).all()
    for r in range(6):
        np.testing.assert_array_equal(pairs.prompt_a[20 * r : 20 * (r + 1)], order)
    assert len(set(unordered(pairs))) == 120 == SAME.capacity(np.full(20, 4))


def test_same_prompt_pairs_per_prompt_gives_that_many_at_each_visit():
    """Catches pairs_per_prompt read as a cap only: ten annotations at five per prompt use two prompts."""
    order = np.arange(7)
    pairs = SAME.compare(candidates(7, 5), order, 50, 5, streams(1))
    np.testing.assert_array_equal(pairs.prompt_a[:35], np.repeat(order, 5))
    assert len(set(unordered(pairs))) == 50


@pytest.mark.parametrize("per_prompt", [1, 3])
def test_same_prompt_is_nested(per_prompt):
    """n annotations are a prefix of more annotations under the same seed."""
    small, large = (
        as_tuples(SAME.compare(candidates(30, 6), np.arange(30), n, per_prompt, streams(3))) for n in (25, 200)
    )
    assert large[:25] == small


def test_same_prompt_pairs_and_orientation_are_uniform():
    """Catches a favourite pair or side (chi-square over the 12 ordered pairs of 4 candidates, 99.9 % level)."""
    counts = dict.fromkeys(itertools.permutations(range(100, 104), 2), 0)
    for seed in range(50):
        for _, a, _, b in as_tuples(SAME.compare(candidates(60, 4), np.arange(60), 60, 1, streams(seed))):
            counts[a, b] += 1
    assert sum((c - 250) ** 2 / 250 for c in counts.values()) < 31.3


def test_same_prompt_refuses_more_than_there_are():
    """Catches silent repetition of pairs when the design is exhausted."""
    with pytest.raises(DesignError, match="at most 30"):
        SAME.compare(candidates(30, 2), np.arange(30), 31, 1, streams(0))


def test_ragged_candidates_are_never_padding():
    """Catches -1 (padding) taken for a response."""
    ragged = candidates(10, 4)
    ragged[::2, 2:] = -1
    for rule in (SAME, CROSS):
        pairs = rule.compare(ragged, np.arange(10), 10, 1, streams(0))
        assert pairs.response_a.min() >= 100 and pairs.response_b.min() >= 100


def test_cross_prompt_equals_the_plain_rule():
    """Released step 5: every prompt in use once on side a, side b a prompt in use, each side one of its candidates."""
    order = np.random.default_rng(1).permutation(500)
    pairs = CROSS.compare(candidates(500, 2), order, 300, 1, streams(2))
    np.testing.assert_array_equal(pairs.prompt_a, order[:300])
    assert set(pairs.prompt_b) <= set(order[:300])
    assert {*pairs.response_a, *pairs.response_b} == {100, 101}


def test_cross_prompt_never_compares_a_response_with_itself_or_a_pair_twice():
    """The two departures from the released script, where they are likely: few prompts, many comparisons."""
    for seed in range(30):
        pairs = CROSS.compare(candidates(6, 2), np.arange(6), 24, 4, streams(seed))
        keys = unordered(pairs)
        assert all(a != b for a, b in keys) and len(set(keys)) == len(keys)


def test_cross_prompt_partner_is_uniform_over_the_prompts_in_use():
    """Catches a partner drawn over all prompts, or favouring early ones (chi-square, 39 df, 99.9 % level)."""
    counts = np.zeros(40)
    for seed in range(200):
        counts += np.bincount(uniform_places(40, 40, streams(seed), 0), minlength=40)
    assert ((counts - 200) ** 2 / 200).sum() < 72.1


def test_cross_prompt_partners_agree_as_much_as_uniform_draws_can():
    """n/n' of the partners stay when n grows to n'; the others are new prompts."""
    small, large = (uniform_places(4000, k, streams(0), 0) for k in (1000, 2000))
    same = small == large
    assert same.mean() == pytest.approx(0.5, abs=0.03)
    assert (large[~same] >= 1000).all()


def test_cross_prompt_says_when_too_few_distinct_pairs_exist():
    """Catches an endless redraw."""
    with pytest.raises(DesignError, match="distinct cross-prompt"):
        CROSS.compare(candidates(2, 1), np.arange(2), 2, 1, streams(0))
