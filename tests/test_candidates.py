"""Candidate selections against a slow plain re-statement of the released rules."""

import numpy as np
import pytest
from conftest import random_bank

from rmsweep import component
from rmsweep.bank import Bank, Split
from rmsweep.rng import stream


def ragged_split(rng):
    golden = rng.standard_normal((40, 10)).astype(np.float32)
    for p, count in enumerate(rng.integers(1, 11, 40)):
        golden[p, count:] = np.nan
    return Split(golden, np.zeros((40, 10, 2), np.float32), [str(i) for i in range(40)])


def plain_similar(golden, k):
    ranked = sorted(range(len(golden)), key=lambda i: golden[i])
    start = (len(golden) - min(k, len(golden))) // 2
    return ranked[start : start + k]


def plain_diversified(golden, k):
    ranked = sorted(range(len(golden)), key=lambda i: golden[i])
    k = min(k, len(golden))
    low = -(-k // 2)
    return ranked[:low] + (ranked[-(k - low) :] if k > low else [])


@pytest.mark.parametrize("pairs_per_prompt", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("kind", "plain"), [("similar", plain_similar), ("diversified", plain_diversified)])
def test_rank_rules_equal_the_plain_restatement(kind, plain, pairs_per_prompt):
    """Catches an off-by-one in the ranks, wrong k for several pairs, padding taken for a response."""
    split = ragged_split(stream(0, "test"))
    picked = component.build("candidates", kind).pick(split, pairs_per_prompt, stream(0, "c"))
    k = next(k for k in range(2, 99) if k * (k - 1) // 2 >= pairs_per_prompt)
    for p in range(split.n_prompts):
        assert [i for i in picked[p] if i >= 0] == plain(list(split.golden[p, : split.count[p]]), k)


def test_of_ten_similar_takes_ranks_4_and_5_and_diversified_0_and_9():
    """The papers' own case, written out."""
    bank = random_bank(np.random.default_rng(0), n=10)
    ranks = np.argsort(bank.train.golden, axis=1)
    for kind, expected in (("similar", [4, 5]), ("diversified", [0, 9])):
        picked = component.build("candidates", kind).pick(bank.train, 1, stream(0, "c"))
        np.testing.assert_array_equal(picked, ranks[:, expected])


def test_random_candidates_are_uniform_distinct_and_valid():
    """Catches a biased draw, a response drawn twice, or padding drawn (chi-square at fixed seed, 99.9 % level)."""
    split = ragged_split(stream(1, "test"))
    rule = component.build("candidates", {"kind": "random", "k": 3})
    counts = np.zeros((40, 10))
    for seed in range(2000):
        picked = rule.pick(split, 1, stream(seed, "candidates"))
        for p in range(40):
            chosen = picked[p][picked[p] >= 0]
            assert len(set(chosen)) == len(chosen) == min(3, split.count[p])
            counts[p, chosen] += 1
    for p in range(40):
        n = split.count[p]
        assert counts[p, n:].sum() == 0
        if n > 3:
            expected = 2000 * 3 / n
            assert ((counts[p, :n] - expected) ** 2 / expected).sum() < 30


def test_random_candidates_are_nested_in_k():
    """Catches draws that change when more candidates are asked for."""
    bank = random_bank(np.random.default_rng(3), n=8)
    few, many = (
        component.build("candidates", {"kind": "random", "k": k}).pick(bank.train, 1, stream(7, "c")) for k in (2, 5)
    )
    np.testing.assert_array_equal(few, many[:, :2])


def test_random_defaults_follow_the_released_scripts():
    """One pair per prompt: two candidates; several: every response may be drawn (the scripts' replacement)."""
    rule, count = component.build("candidates", "random"), np.array([10, 3, 1])
    assert rule.size(count, 1).tolist() == [2, 2, 1]
    assert rule.size(count, 4).tolist() == [10, 3, 1]


def test_selection_sees_only_the_training_split():
    """The rule reads golden rewards of the split it is given and nothing else of the bank."""
    bank = random_bank(np.random.default_rng(4))
    other = Bank(bank.train, random_bank(np.random.default_rng(5)).test)
    for kind in component.kinds("candidates"):
        a, b = (component.build("candidates", kind).pick(k.train, 1, stream(0, "c")) for k in (bank, other))
        np.testing.assert_array_equal(a, b)
