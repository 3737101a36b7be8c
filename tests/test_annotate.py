"""The annotate stage: frequencies, common random numbers, error rates, scales."""

import numpy as np
import pytest
from conftest import make_spec, random_bank

from rmsweep import component
from rmsweep.annotators import Seen
from rmsweep.bank import Bank
from rmsweep.errors import DataError, DesignError
from rmsweep.preferences import Comparisons, Preferences
from rmsweep.rng import stream, streams
from rmsweep.stages.annotate import annotate, reference_pairs, reward_scale, solve_beta

BT = component.build("annotator", "bradley_terry")


@pytest.fixture(scope="module")
def bank():
    return random_bank(np.random.default_rng(0), p=3000, n=6, d=2)


def spec(**changes):
    return make_spec(n_annotations=3000, **changes)


def test_probability_is_the_formula():
    """sigma(beta d) in float64, with both extremes of beta and of d."""
    d = np.array([-2.0, 0.0, 0.5, 3.0])
    np.testing.assert_allclose(BT.probability(d, 1.7), 1 / (1 + np.exp(-1.7 * d)), rtol=1e-14)
    np.testing.assert_array_equal(BT.probability(d, 0.0), 0.5)
    np.testing.assert_array_equal(BT.probability(d, np.inf), [0, 0.5, 1, 1])
    np.testing.assert_array_equal(BT.probability(np.array([-1e300, 1e300]), 10.0), [0, 1])
    np.testing.assert_allclose(BT.probability(d, 3.0) + BT.probability(-d, 3.0), 1, rtol=1e-14)


def test_label_frequencies_follow_the_probability(bank):
    """Chi-square of drawn labels in ten bins of P(a > b) (fixed seed, 99.9 % level): catches flipped or stale draws."""
    statistic = 0.0
    preferences = annotate(spec(), bank, streams(3), {})
    for part in np.array_split(np.argsort(preferences.probability), 10):
        expected = preferences.probability[part].sum()
        variance = (preferences.probability[part] * (1 - preferences.probability[part])).sum()
        statistic += (preferences.preference[part].sum() - expected) ** 2 / variance
    assert statistic < 29.6


def test_every_beta_sees_the_same_pairs_under_the_same_draws(bank):
    """Common random numbers: raising beta only ever turns wrong labels right, never right ones wrong."""
    weak, strong = (annotate(spec(beta=b), bank, streams(0), {}) for b in (0.5, 5.0))
    np.testing.assert_array_equal(weak.golden_difference, strong.golden_difference)
    wrong = [(p.preference > 0.5) != (p.golden_difference > 0) for p in (weak, strong)]
    assert not (wrong[1] & ~wrong[0]).any() and wrong[0].sum() > wrong[1].sum()


def test_noise_free_annotations_are_the_golden_order(bank):
    """beta = inf: no label against the golden order."""
    assert annotate(spec(beta=float("inf")), bank, streams(0), {}).annotation_error_rate == 0


@pytest.mark.parametrize("changes", [{}, {"pairing": "cross_prompt"}, {"candidates": "similar"}])
def test_error_rate_is_solved_on_the_reference_not_on_the_design(bank, changes):
    """One beta per bank: solving it per design would cancel the quality that cross-prompt pairs gain."""
    reference = annotate(spec(error_rate={"value": 0.2}), bank, streams(0), {})
    design = annotate(spec(error_rate={"value": 0.2}, **changes), bank, streams(1), {})
    assert design.beta == reference.beta
    pairs, weight = reference_pairs(bank.train)
    size = np.abs(pairs.golden_difference(bank.train))
    expected = np.average(1 - BT.probability(size, design.beta), weights=weight)
    assert expected == pytest.approx(0.2, abs=1e-9)


def test_error_rate_weighs_every_prompt_equally():
    """Ragged banks: random annotation visits prompts equally, so prompts with many pairs must not dominate."""
    rng = np.random.default_rng(0)
    golden = np.full((2000, 30), np.nan)
    golden[:1800, :2] = rng.standard_normal((1800, 2)) * 0.2
    golden[1800:] = rng.standard_normal((200, 30)) * 3
    split = random_bank(rng, p=2000, n=30, d=1).train
    ragged = Bank(type(split)(golden.astype(np.float32), split.embedding, split.prompt_id), split)
    rates = [
        annotate(make_spec(error_rate={"value": 0.2}), ragged, streams(s), {}).annotation_error_rate for s in range(3)
    ]
    assert np.mean(rates) == pytest.approx(0.2, abs=0.02)


def test_ties_count_neither_for_the_error_rate_nor_for_its_solution():
    """Equal golden rewards have no order to violate."""
    difference = np.array([0.0] * 50 + [1.0] * 50)
    beta = solve_beta(Seen(difference), 0.2, BT)
    assert BT.probability(np.array([1.0]), beta)[0] == pytest.approx(0.8)
    pairs = Comparisons(*np.zeros((4, 4), dtype=np.int64))
    p = Preferences(pairs, np.array([1, 0, 1, 0], np.float32), np.full(4, 0.5), np.array([0.0, 0.0, 1.0, 1.0]), 1.0)
    assert p.annotation_error_rate == 0.5


def test_error_rate_of_this_design_holds_there(bank):
    """error_rate.reference=this_design: the design's own error rate is the one asked for."""
    config = {"value": 0.2, "reference": "this_design"}
    preferences = annotate(spec(error_rate=config, candidates="similar"), bank, streams(5), {})
    assert preferences.annotation_error_rate == pytest.approx(0.2, abs=0.03)


def test_released_uses_the_first_prompts_and_clean_a_permutation(bank):
    """The prompt subset is seed-free under released, seeded and nested under clean."""
    few = make_spec(n_annotations=100, protocol="released")
    used = annotate(few, bank, streams(9), {}).comparisons.prompt_a
    np.testing.assert_array_equal(used, np.arange(100))
    small, large = (annotate(make_spec(n_annotations=n), bank, streams(9), {}).comparisons.prompt_a for n in (100, 400))
    np.testing.assert_array_equal(small, large[:100])
    assert len(np.unique(large)) == 400 and large.max() > 400


def test_reward_scales_are_their_formulas():
    """sd of all rewards, pooled sd within prompts, a number; ragged rows included."""
    golden = stream(0, "t").standard_normal((50, 4)) + 5 * stream(1, "t").standard_normal((50, 1))
    golden[3, 2:] = np.nan
    split = random_bank(np.random.default_rng(0), p=50, n=4).train
    split = type(split)(golden, split.embedding, split.prompt_id)
    rows = [r[np.isfinite(r)] for r in golden]
    pooled = np.sqrt(sum(((r - r.mean()) ** 2).sum() for r in rows) / sum(len(r) - 1 for r in rows))
    assert reward_scale("within_prompt_sd", split) == pytest.approx(pooled)
    assert reward_scale("sd", split) == pytest.approx(np.concatenate(rows).std())
    assert reward_scale(6.0, split) == 6.0
    with pytest.raises(DataError, match="positive"):
        reward_scale(0.0, split)


def test_more_annotations_than_the_design_gives_is_an_error_with_the_remedy(bank):
    """Catches silent repetition; the message must say what to change."""
    with pytest.raises(DesignError, match=r"at most 3000 .*pairs_per_prompt \(to 2"):
        annotate(make_spec(n_annotations=3001), bank, streams(0), {})


def test_realised_numbers_are_what_they_say(bank):
    """annotation_error_rate and golden_gap from their definitions."""
    p = annotate(spec(beta=1.0), bank, streams(0), {})
    a = bank.train.golden[p.comparisons.prompt_a, p.comparisons.response_a].astype(float)
    b = bank.train.golden[p.comparisons.prompt_b, p.comparisons.response_b].astype(float)
    assert p.golden_gap == pytest.approx(np.abs(a - b).mean())
    assert p.annotation_error_rate == pytest.approx(((a > b) != (p.preference == 1)).mean())
