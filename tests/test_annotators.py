"""Every annotator against its formula, its draws against its closed form, and what a reward model makes of them."""

import dataclasses
import itertools
import types

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import cell_config, make_spec, random_bank
from scipy.stats import logistic, norm
from test_end_to_end import here

from rmsweep import component
from rmsweep.annotators import Seen
from rmsweep.bank import Bank
from rmsweep.cell import build_cell, cell_id
from rmsweep.datasets import BankShape
from rmsweep.errors import ConfigError, DesignError
from rmsweep.pipeline import run_cell
from rmsweep.preferences import Levels
from rmsweep.reward_models import Compute
from rmsweep.rng import stream, streams
from rmsweep.skips import why_skipped
from rmsweep.stages.annotate import annotate, reference_pairs, solve_beta
from rmsweep.stages.train import train

N = 4000
INF = float("inf")
GRADED = {
    "likert": {},
    "likert_ties": {},
    "one level": {"annotator.levels": 1},
    "uneven": {"annotator.quantiles": [0.5, 0.9]},
    **{f"shift {d}": {"annotator.direction": d} for d in ("up", "down", "stronger", "weaker")},
    "shift all ties": {"annotator.share": 1.0, "annotator.tie": True},
    "noise": {"annotator.share": 0.4},
    "noise ties": {"annotator.tie": True},
}
BINARY = {
    "bradley_terry": {},
    "thurstone": {},
    "gumbel_bias": {"annotator.n_annotators": 3},
    "fixed_bias": {},
    "half fixed_bias": {"annotator.fixed_share": 0.5},
    "length_bias": {},
    "position_bias": {},
    "cyclic": {"annotator.share": 0.5},
    "flat_flip": {},
    "mixture": {"annotator.shares": [1.0, 2.0, 3.0]},
}
OPTION = {
    "one level": "likert",
    "uneven": "likert",
    "noise": "level_noise",
    "noise ties": "level_noise",
    "half fixed_bias": "fixed_bias",
}
UNBIASED = [name for name in BINARY if not name.endswith(("length_bias", "position_bias"))]


def spec(name, **changes):
    """The cell of a case of GRADED or BINARY."""
    option = OPTION.get(name, "level_shift" if name.startswith("shift") else name)
    settings = {**GRADED, **BINARY}.get(name, {})
    return make_spec(annotator=option, n_annotations=changes.pop("n", N), **settings, **changes)


def labelled(name, bank, seed=3, **changes):
    return annotate(spec(name, **changes), bank, streams(seed), {})


def make(kind, **fields):
    return component.build("annotator", {"kind": kind, **fields})


def sigma(x):
    return 1 / (1 + np.exp(-np.asarray(x, dtype=np.float64)))


@pytest.fixture(scope="module")
def bank():
    """Independent rewards, and texts whose lengths have nothing to do with them."""
    plain, rng = random_bank(np.random.default_rng(0), p=N, n=6, q=60, m=7, d=2), np.random.default_rng(1)

    def texts(split):
        return [["x" * k for k in row] for row in rng.integers(1, 200, split.golden.shape)]

    return Bank(*(dataclasses.replace(s, response=texts(s)) for s in (plain.train, plain.test)))


# -- formulas ----------------------------------------------------------------------------------------------


def test_probabilities_are_the_formulas():
    """Each closed form re-stated in float64: catches a wrong constant, sign or weight."""
    d = np.linspace(-3, 3, 13)
    close = {"rtol": 1e-12, "atol": 1e-15}
    sd = np.pi / np.sqrt(3) / 1.7
    np.testing.assert_allclose(make("thurstone").probability(d, 1.7), norm.cdf(d / sd), **close)
    np.testing.assert_allclose(make("fixed_bias").probability(d, 1.7), norm.cdf(d / sd), **close)
    np.testing.assert_allclose(make("gumbel_bias").probability(d, 1.7), sigma(1.7 * d), **close)
    np.testing.assert_allclose(make("flat_flip").probability(d, 1.7), sigma(1.7 * np.sign(d)), **close)
    np.testing.assert_allclose(make("cyclic", share=0.3).probability(d, 1.7), 0.7 * sigma(1.7 * d) + 0.15, **close)
    mixture = make("mixture", beta_factors=[0.0, 2.0], shares=[1.0, 3.0])
    np.testing.assert_allclose(mixture.probability(d, 1.7), 0.125 + 0.75 * sigma(3.4 * d), **close)
    seen = Seen(d, length_difference=d[::-1] ** 2)
    biased = make("biased", length_bias=0.4, position_bias=-0.2).expected(seen, 1.7)
    np.testing.assert_allclose(biased, sigma(1.7 * (d + 0.4 * d[::-1] ** 2 - 0.2)), **close)


def test_the_normal_noise_is_as_wide_as_the_logistic():
    """Thurstone's and Bradley-Terry's beta mean the same: equal variance of the noise."""
    assert norm.std(scale=np.pi / np.sqrt(3)) == pytest.approx(logistic.std())


def test_equal_rewards_are_a_coin_flip_for_a_perfect_annotator():
    """Beta = inf times a difference of 0 is no NaN; neither is a mixture's factor of 0 times inf."""
    for kind in component.kinds("annotator"):
        if not component.get("annotator", kind).simulated:
            continue
        assert make(kind).probability(np.zeros(1), INF) == 0.5
    assert make("mixture", beta_factors=[0.0, 1.0], shares=[1.0, 1.0]).probability(np.ones(1), INF) == 0.75


@pytest.mark.parametrize("tie", [False, True])
def test_level_probabilities_are_ordered_logit(tie):
    """Differences of sigma(beta (zeta - d)) by hand, sum 1; P(a > b) and P(tie) follow from them."""
    levels, d, beta = Levels(2, tie, (0.4, 1.1) if tie else (0.4,)), np.linspace(-3, 3, 7), 1.3
    cuts = [-INF, -1.1, -0.4, 0.4, 1.1, INF] if tie else [-INF, -0.4, 0.0, 0.4, INF]
    by_hand = np.stack([sigma(beta * (b - d)) - sigma(beta * (a - d)) for a, b in itertools.pairwise(cuts)], 1)
    likert, seen = make("likert", levels=2, tie=tie), Seen(d, levels=levels)
    p = likert.level_probabilities(seen, beta)
    np.testing.assert_allclose(p, by_hand, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-12)
    half = (np.sign(levels.strengths) + 1) / 2
    np.testing.assert_allclose(likert.expected(seen, beta), p @ half, rtol=1e-12)
    np.testing.assert_allclose(likert.tie_probability(seen, beta), p @ (levels.strengths == 0), atol=1e-14)
    if not tie:
        np.testing.assert_array_equal(likert.expected(seen, beta), make("bradley_terry").probability(d, beta))


def test_levels_name_their_classes():
    """Index, strengths and cut points of both kinds of scale."""
    plain, tied = Levels(3, False, (0.5, 2.0)), Levels(2, True, (0.5, 2.0))
    assert plain.strengths.tolist() == [-3, -2, -1, 1, 2, 3] and tied.strengths.tolist() == [-2, -1, 0, 1, 2]
    assert plain.cut_points.tolist() == [-2, -0.5, 0, 0.5, 2] and tied.cut_points.tolist() == [-2, -0.5, 0.5, 2]
    for levels in (plain, tied):
        assert levels.index(levels.strengths).tolist() == list(range(len(levels.strengths)))


# -- draws against closed forms ----------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 3.0])
@pytest.mark.parametrize("name", [*BINARY, *GRADED])
def test_draws_follow_the_expected_probability(bank, name, beta):
    """Chi-square of labels in ten bins of P(a > b) (fixed seed, 99.99 % level), every response used once."""
    preferences, statistic = labelled(name, bank, beta=beta), 0.0
    for part in np.array_split(np.argsort(preferences.probability, kind="stable"), 10):
        p = preferences.probability[part]
        statistic += (preferences.preference[part].sum() - p.sum()) ** 2 / max((p * (1 - p)).sum(), 1e-9)
    assert statistic < 35.6


@pytest.mark.parametrize("name", GRADED)
def test_level_frequencies_follow_their_probabilities(bank, name):
    """Every level's count within 4.2 standard deviations of its expectation: catches a shifted class or threshold."""
    cell = spec(name, beta=0.8)
    preferences = annotate(cell, bank, streams(5), {})
    seen = Seen(preferences.golden_difference, levels=preferences.levels)
    p = cell.annotator.level_probabilities(seen, 0.8)
    counts = (preferences.strength[:, None] == preferences.levels.strengths).sum(axis=0)
    assert counts.sum() == N
    np.testing.assert_array_less(np.abs(counts - p.sum(axis=0)), 4.2 * np.sqrt((p * (1 - p)).sum(axis=0)) + 1e-9)


@pytest.mark.parametrize("name", [*BINARY, *GRADED])
def test_a_solved_error_rate_is_the_realised_one(bank, name):
    """error_rate holds for every annotator, ties of either kind left out; level noise of 0.4 cannot do it."""
    if name == "noise":
        with pytest.raises(DesignError, match=r"error_rate=0.2: this annotator's is between 0.24 .*choose a rate"):
            labelled(name, bank, error_rate={"value": 0.2})
        return
    target = 0.35 if name in ("shift down", "shift up", "shift all ties", "cyclic", "noise ties") else 0.2
    realised = labelled(name, bank, error_rate={"value": target}).annotation_error_rate
    assert realised == pytest.approx(target, abs=4.2 * np.sqrt(target * (1 - target) / N))


def test_a_solved_error_rate_knows_that_better_responses_are_longer():
    """Lengths change sides with their responses: catches a length bias that is averaged away."""
    d = np.random.default_rng(0).standard_normal(1000)
    beta = solve_beta(Seen(d, length_difference=0.6 * d), 0.2, make("biased", length_bias=0.5))
    assert np.mean(sigma(-beta * 1.3 * np.abs(d))) == pytest.approx(0.2, abs=1e-9)


# -- common random numbers ---------------------------------------------------------------------------------


def test_bradley_terry_is_as_it_always_was(bank):
    """Bit for bit 1[u < sigma(beta d)] with u from "annotation": stored results stay comparable."""
    for beta in (0.0, 0.7, 10.0, INF):
        p = labelled("bradley_terry", bank, beta=beta)
        with np.errstate(invalid="ignore", over="ignore"):
            chance = sigma(beta * p.golden_difference) if beta < INF else (np.sign(p.golden_difference) + 1) / 2
        np.testing.assert_allclose(p.probability, chance, rtol=1e-14)
        np.testing.assert_array_equal(p.preference, stream(3, "annotation").random(N) < p.probability)
        assert p.strength is None and p.levels is None and p.preference.dtype == np.float32


@pytest.mark.parametrize("beta", [0.0, 0.5, 3.0, INF])
@pytest.mark.parametrize("name", ["likert", "likert_ties", "one level", "uneven"])
def test_the_sign_of_a_strength_is_the_binary_label(bank, name, beta):
    """Ties apart, bit for bit: a graded and a binary cell differ in the grading alone."""
    graded, binary = (labelled(n, bank, beta=beta) for n in (name, "bradley_terry"))
    decided = graded.strength != 0
    np.testing.assert_array_equal(graded.preference[decided], binary.preference[decided])
    np.testing.assert_array_equal(graded.preference, (np.sign(graded.strength) + 1) / 2)
    assert decided.all() == (name != "likert_ties" or beta == 0) and graded.strength.dtype == np.int8


def test_a_level_is_the_noisy_differences_interval(bank):
    """y = d + e / beta with e = -logit(u), restated: catches noise of the wrong sign or scale."""
    p, u = labelled("likert_ties", bank, beta=2.0), stream(3, "annotation").random(N)
    y = p.golden_difference + np.log(u / (1 - u)) / -2.0
    index = np.searchsorted(p.levels.cut_points, y)
    np.testing.assert_array_equal(p.levels.index(p.strength), index)
    assert len(np.unique(index)) == 7


@pytest.mark.parametrize("name", [*UNBIASED, "likert"])
def test_more_beta_never_turns_a_right_label_wrong(bank, name):
    """The same draws at every beta, for every annotator that is not biased."""
    weak, strong = (labelled(name, bank, beta=b) for b in (0.5, 4.0))
    wrong = [(p.preference > 0.5) != (p.golden_difference > 0) for p in (weak, strong)]
    assert not (wrong[1] & ~wrong[0]).any() and wrong[0].sum() > wrong[1].sum() + 50


@pytest.mark.parametrize("name", [n for n in UNBIASED if n != "cyclic"])
def test_the_extremes_of_beta(bank, name):
    """Beta = inf: the golden order; beta = 0: nothing of it."""
    assert labelled(name, bank, beta=INF).annotation_error_rate == 0
    assert labelled(name, bank, beta=0.0).annotation_error_rate == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(N))


@pytest.mark.parametrize("name", [*BINARY, *GRADED])
def test_fewer_annotations_are_a_prefix(bank, name):
    """A comparison's label depends on no other: catches draws that shift with n."""
    few, many = labelled(name, bank, n=700), labelled(name, bank)
    np.testing.assert_array_equal(few.preference, many.preference[:700])
    if few.strength is not None:
        np.testing.assert_array_equal(few.strength, many.strength[:700])
        assert few.levels == many.levels


@pytest.mark.parametrize("name", [*UNBIASED, *GRADED])
def test_swapping_a_and_b_swaps_the_probability(name):
    """P(a > b) + P(b > a) = 1 for all but the biased, and but for a signed shift of levels."""
    cell, d = spec(name), np.linspace(-3, 3, 31)
    annotator = cell.annotator
    levels = None
    if name in GRADED:
        n_thresholds = annotator.levels - (not annotator.tie)
        levels = Levels(annotator.levels, annotator.tie, (0.3, 0.8, 1.9)[:n_thresholds])
    total = sum(annotator.expected(Seen(side, levels=levels), 1.5) for side in (d, -d))
    if name.startswith("shift") and name.split()[1] in ("up", "down", "all"):
        assert annotator.order_matters and ((total > 1.001).all() or (total < 0.999).all())
    else:
        assert not annotator.order_matters
        np.testing.assert_allclose(total, 1, rtol=1e-12)


# -- thresholds --------------------------------------------------------------------------------------------


def test_thresholds_belong_to_the_bank(bank):
    """The same for every beta, seed, pairing, quantity and corruption; another unit of rewards scales nothing."""
    first = labelled("likert", bank).levels
    for changes in ({"beta": 5.0}, {"seed": 9}, {"pairing": "cross_prompt"}, {"n": 100}, {"candidates": "similar"}):
        assert labelled("likert", bank, **changes).levels == first
    assert labelled("level_noise", bank).levels == first
    larger = Bank(*(dataclasses.replace(s, golden=s.golden * 4) for s in (bank.train, bank.test)))
    scaled = labelled("likert", larger, **{"dataset.reward_scale": 4.0}).levels
    np.testing.assert_allclose(scaled.thresholds, first.thresholds, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "shares"),
    [("likert", [1 / 3, 2 / 3]), ("likert_ties", [1 / 7, 3 / 7, 5 / 7]), ("uneven", [0.5, 0.9])],
)
def test_thresholds_are_quantiles_of_the_noisy_difference(bank, name, shares):
    """P(|y| < zeta_k) over the reference pairs at reference_beta; realised levels are as full as they should be."""
    cell = spec(name, **{"annotator.reference_beta": 2.0}, beta=2.0)
    levels = annotate(cell, bank, streams(0), {}).levels
    pairs, weight = reference_pairs(bank.train)
    d = pairs.golden_difference(bank.train)
    for zeta, share in zip(levels.thresholds, shares, strict=True):
        inside = sigma(2 * (zeta - d)) - sigma(2 * (-zeta - d))
        assert np.average(inside, weights=weight) == pytest.approx(share, abs=1e-9)
        realised = np.mean(
            np.abs(annotate(cell, bank, streams(1), {}).strength) <= shares.index(share) + (name != "likert_ties")
        )
        assert realised == pytest.approx(share, abs=0.035)


def test_thresholds_need_pairs_of_one_prompt(bank):
    """One response per prompt gives no reference: a message, no numbers out of nothing."""
    alone = Bank(
        *(dataclasses.replace(s, golden=s.golden[:, :1], embedding=s.embedding[:, :1]) for s in (bank.train, bank.test))
    )
    with pytest.raises(DesignError, match="two responses"):
        labelled("likert", alone, pairing="cross_prompt")


# -- biases ------------------------------------------------------------------------------------------------


def test_who_is_shown_first_wins_more(bank):
    """Position bias is the one violation of antisymmetry: both orders together exceed 1 by what the formula says."""
    biased, d = make("biased", length_bias=0.0, position_bias=0.5), np.linspace(-2, 2, 9)
    total = biased.expected(Seen(d), 1.0) + biased.expected(Seen(-d), 1.0)
    np.testing.assert_allclose(total, sigma(d + 0.5) + sigma(0.5 - d), rtol=1e-12)
    assert (total > 1.05).all()
    assert labelled("position_bias", bank).preference.mean() > 0.55


def test_length_bias_favours_the_longer_and_needs_texts(bank):
    """By characters in standard deviations of the training lengths; without texts the cell is skipped."""
    p = labelled("length_bias", bank, beta=1.3)
    length = np.array([[len(text) for text in row] for row in bank.train.response])
    pairs = p.comparisons
    longer = length[pairs.prompt_a, pairs.response_a] - length[pairs.prompt_b, pairs.response_b]
    expected = sigma(1.3 * (p.golden_difference + 0.5 * longer / length.std()))
    np.testing.assert_allclose(p.probability, expected, rtol=1e-12)
    shape = BankShape(np.full(N, 6), np.full(60, 7), has_texts=False)
    assert "texts" in why_skipped(spec("length_bias"), shape, "sim_2b")
    assert why_skipped(spec("length_bias"), shape._replace(has_texts=True), "sim_2b") is None
    assert why_skipped(spec("position_bias"), shape, "sim_2b") is None
    bare = Bank(*(dataclasses.replace(s, response=None) for s in (bank.train, bank.test)))
    with pytest.raises(DesignError, match="texts"):
        labelled("length_bias", bare)


@pytest.mark.parametrize("kind", ["gumbel_bias", "fixed_bias"])
def test_an_annotators_bias_is_fixed(kind):
    """One annotator says the same of a pair, either way round, among whatever other comparisons, and is transitive."""
    annotator, rng = make(kind, n_annotators=1), np.random.default_rng(0)
    golden = rng.standard_normal(30)
    a, b = (x.ravel() for x in np.meshgrid(np.arange(30), np.arange(30)))
    a, b = a[a != b], b[a != b]
    order = rng.permutation(len(a))[:400]

    def wins(index, seed=0):
        seen = Seen(golden[a[index]] - golden[b[index]], row_a=a[index], row_b=b[index], n_rows=30)
        return annotator.label(seen, 0.5, streams(seed)).preference

    everything = wins(np.arange(len(a)))
    np.testing.assert_array_equal(wins(order), everything[order])
    table = np.full((30, 30), 0.5)
    table[a, b] = everything
    np.testing.assert_array_equal(table + table.T, 1)
    assert sorted(table.sum(axis=1)) == [0.5 + k for k in range(30)]  # a total order
    assert not np.array_equal(wins(np.arange(len(a)), seed=1), everything)


@pytest.mark.parametrize("kind", ["gumbel_bias", "fixed_bias"])
def test_annotators_have_biases_of_their_own(kind):
    """Asked about one pair of equal responses, some prefer a and some b: catches one bias shared by all."""
    n = 2000
    seen = Seen(np.zeros(n), row_a=np.zeros(n, np.int64), row_b=np.ones(n, np.int64), n_rows=2)
    share = make(kind, n_annotators=50).label(seen, 1.0, streams(0)).preference.mean()
    assert share == pytest.approx(0.5, abs=4.2 * 0.5 / np.sqrt(50) + 0.05)


@pytest.mark.parametrize(("share", "agree"), [(0.0, None), (0.5, None), (1.0, 1.0)])
def test_the_fixed_share_decides_how_consistent_annotators_are(share, agree):
    """One pair asked twice of one annotator: agreement rises with the share, the marginal stays Thurstone's."""
    annotator, n = make("fixed_bias", n_annotators=1, fixed_share=share), 20_000
    rows = np.arange(n)
    seen = Seen(np.full(2 * n, 0.4), row_a=np.tile(rows, 2), row_b=np.tile(rows + n, 2), n_rows=2 * n)
    first, again = annotator.label(seen, 1.0, streams(0)).preference.reshape(2, n)
    p = norm.cdf(0.4 * np.sqrt(3) / np.pi)
    assert first.mean() == pytest.approx(p, abs=4.2 * np.sqrt(p * (1 - p) / n))
    both = np.mean(first == again)
    if share == 0:
        assert both == pytest.approx(p**2 + (1 - p) ** 2, abs=4.2 * 0.5 / np.sqrt(n))
    elif agree is None:
        assert p**2 + (1 - p) ** 2 + 0.1 < both < 0.9
    else:
        assert both == agree


def test_no_fixed_share_is_thurstone(bank):
    """Bit for bit, by the same draws."""
    biased = labelled("fixed_bias", bank, **{"annotator.fixed_share": 0.0})
    np.testing.assert_array_equal(biased.preference, labelled("thurstone", bank).preference)


def test_a_quarter_of_circular_triples_are_cycles():
    """Share 1: one in four; share 0 under beta = inf: none."""
    triples = np.arange(3 * 20_000).reshape(-1, 3)
    golden = np.random.default_rng(0).standard_normal(triples.size)
    a, b = triples.ravel(), np.roll(triples, -1, axis=1).ravel()
    seen = Seen(golden[a] - golden[b], row_a=a, row_b=b, n_rows=triples.size)
    for share, cycles in ((1.0, 0.25), (0.0, 0.0)):
        wins = make("cyclic", share=share).label(seen, INF, streams(0)).preference.reshape(-1, 3).sum(axis=1)
        assert np.mean((wins == 0) | (wins == 3)) == pytest.approx(cycles, abs=4.2 * np.sqrt(0.1875 / 20_000))


# -- corruption --------------------------------------------------------------------------------------------

SHIFTS = {  # strengths -2, -1, (0,) 1, 2 and what is said
    ("up", False): [-1, 1, 2, 2],
    ("down", False): [-2, -2, -1, 1],
    ("stronger", False): [-2, -2, 2, 2],
    ("weaker", False): [-1, -1, 1, 1],
    ("up", True): [-1, 0, 1, 2, 2],
    ("down", True): [-2, -2, -1, 0, 1],
    ("stronger", True): [-2, -2, 0, 2, 2],
    ("weaker", True): [-1, -1, 0, 1, 1],
}


@pytest.mark.parametrize(("direction", "tie"), SHIFTS)
def test_a_shift_goes_one_level_and_never_over_the_end(bank, direction, tie):
    """Share 1: each level's own target, by enumeration; ends and signs as documented."""
    settings = {"annotator.levels": 2, "annotator.tie": tie}
    clean = labelled("likert", bank, **settings)
    moved = labelled(f"shift {direction}", bank, **settings, **{"annotator.share": 1.0})
    said = np.array(SHIFTS[direction, tie], dtype=np.int8)
    np.testing.assert_array_equal(moved.strength, said[clean.levels.index(clean.strength)])
    assert set(clean.strength) == set(clean.levels.strengths)


@pytest.mark.parametrize("option", ["level_shift", "level_noise"])
def test_a_share_of_levels_is_corrupted_and_more_includes_less(bank, option):
    """Realised share within binomial bounds, nested, share 0 is clean; noise says every other level equally often."""
    clean = labelled("likert", bank).strength
    changed = {}
    for share in (0.0, 0.2, 0.6):
        said = labelled(option, bank, **{"annotator.share": share}).strength
        changed[share] = said != clean
        movable = np.ones(N, bool) if option == "level_noise" else clean < 3
        bound = 4.2 * np.sqrt(share * (1 - share) / movable.sum())
        assert changed[share][movable].mean() == pytest.approx(share, abs=bound)
        assert not changed[share][~movable].any()
    assert not (changed[0.2] & ~changed[0.6]).any()
    if option == "level_noise":
        for z in (-3, -2, -1, 1, 2, 3):
            candidates = changed[0.6] & (clean != z)
            bound = 4.2 * np.sqrt(0.16 / candidates.sum())
            assert np.mean(said[candidates] == z) == pytest.approx(0.2, abs=bound)


# -- cross_beta_factor -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bradley_terry", "thurstone", "gumbel_bias", "mixture", "likert_ties"])
def test_cross_beta_factor_is_beta_where_prompts_differ(bank, name):
    """Cross-prompt labels are those of beta * factor, same-prompt ones those of beta, for every annotator."""
    harder = labelled(name, bank, beta=2.0, pairing="cross_prompt", cross_beta_factor=0.4)
    lower = labelled(name, bank, beta=0.8, pairing="cross_prompt")
    cross = harder.comparisons.prompt_a != harder.comparisons.prompt_b
    assert cross.mean() > 0.9 and harder.beta == 2.0
    np.testing.assert_array_equal(harder.preference[cross], lower.preference[cross])
    np.testing.assert_allclose(harder.probability[cross], lower.probability[cross], rtol=1e-12)
    same = labelled(name, bank, beta=2.0, cross_beta_factor=0.4)
    np.testing.assert_array_equal(same.preference, labelled(name, bank, beta=2.0).preference)


def test_cross_beta_factor_leaves_old_identities_alone():
    """At 1, or absent as in configs stored before it existed, a cell is the cell it was; otherwise another."""
    config = cell_config()
    del config["cross_beta_factor"]
    old, one, other = (
        cell_id(build_cell({**config, **changes}), {})
        for changes in ({}, {"cross_beta_factor": 1.0}, {"cross_beta_factor": 0.8})
    )
    assert old == one != other
    with pytest.raises(ConfigError, match="cross_beta_factor=0"):
        build_cell({**config, "cross_beta_factor": 0.0})


# -- what a reward model makes of it -----------------------------------------------------------------------


def test_a_binary_reward_model_drops_ties(bank):
    """Trained as on the untied preferences alone; n_annotations stays what was asked for, n_train what was used."""
    cell = spec("likert_ties", reward_model="bt_linear")
    preferences = annotate(cell, bank, streams(0), {})
    untied = preferences.without_ties()
    assert 0 < (preferences.strength == 0).sum() == N - len(untied) and (untied.preference != 0.5).all()
    np.testing.assert_array_equal(untied.preference, untied.strength > 0)
    one, other = (train(cell, bank, p, streams(0), Compute(), {}) for p in (preferences, untied))
    np.testing.assert_array_equal(one.score(bank.test), other.score(bank.test))
    metrics = run_cell(cell, bank, Compute()).metrics
    assert metrics["n_annotations"] == N and metrics["n_train"] + metrics["n_validation"] == len(untied)
    binary = labelled("bradley_terry", bank)
    assert binary.without_ties() is binary


def test_ties_count_neither_as_right_nor_as_wrong(bank):
    """annotation_error_rate over decided labels: catches a tie counted as a preference for b."""
    p = labelled("likert_ties", bank)
    decided = p.strength != 0
    wrong = (p.strength > 0) != (p.golden_difference > 0)
    assert p.annotation_error_rate == wrong[decided].mean() == p.without_ties().annotation_error_rate


def test_nothing_but_ties_is_an_error(bank):
    """A cell that cannot be trained says why."""
    cell = spec("likert_ties", beta=INF, **{"annotator.levels": 1, "annotator.quantiles": [0.999999]})
    preferences = annotate(cell, bank, streams(0), {})
    with pytest.raises(DesignError, match="preferences are ties"):
        train(cell, bank, preferences, streams(0), Compute(), {})


def test_noisy_agreement_is_with_the_cells_own_annotator(bank):
    """Agreement on test pairs knows thresholds, lengths and the cross-prompt factor."""
    kept = {}
    for name, changes in {
        "bradley_terry": {}, "length_bias": {}, "likert_ties": {}, "factor": {"cross_beta_factor": 0.2}
    }.items():  # fmt: skip
        cell = spec(name if name != "factor" else "bradley_terry", reward_model="length", beta=2.0, **changes)
        metrics = run_cell(cell, bank, Compute()).metrics
        kept[name] = metrics["agreement_noisy"], metrics["agreement_noisy_cross_prompt"]
    assert kept["length_bias"][0] > kept["bradley_terry"][0] + 0.05
    assert kept["factor"][0] == kept["bradley_terry"][0] and kept["factor"][1] != kept["bradley_terry"][1]
    assert kept["likert_ties"] != kept["bradley_terry"]


def test_a_graded_reward_model_needs_a_graded_annotator():
    """Levels cannot be learned from who says only which response is better: skipped with the reason."""
    shape = BankShape(np.full(N, 6), np.full(60, 7), has_texts=False)
    graded = types.SimpleNamespace(graded=True)
    cells = [dataclasses.replace(spec(name), reward_model=graded) for name in ("bradley_terry", "likert")]
    reasons = [why_skipped(cell, shape, "sim_2b") for cell in cells]
    assert "levels of preference" in reasons[0] and reasons[1] is None


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"kind": "likert", "quantiles": [0.5]}, "needs 2 ascending"),
        ({"kind": "likert", "quantiles": [0.6, 0.5]}, "needs 2 ascending"),
        ({"kind": "likert", "tie": True, "quantiles": [0.2, 0.5]}, "needs 3 ascending"),
        ({"kind": "likert", "quantiles": [0.5, 1.0]}, "quantiles"),
        ({"kind": "mixture", "shares": [1.0]}, "one share for each"),
        ({"kind": "mixture", "beta_factors": [0.0, 0.0, 0.0]}, "at least one"),
        ({"kind": "level_shift", "direction": "left"}, "direction"),
        ({"kind": "cyclic", "share": 1.5}, "share"),
    ],
)
def test_impossible_settings_are_refused(node, message):
    """One message that names the field and what it needs."""
    with pytest.raises(ConfigError, match=message):
        component.build("annotator", node)


def test_all_annotators_in_one_sweep(tmp_path):
    """The command line: every option as one axis value; the one that needs texts is skipped, the others are done."""
    names = [
        "bradley_terry", "likert", "likert_ties", "thurstone", "gumbel_bias", "fixed_bias", "position_bias",
        "length_bias", "cyclic", "flat_flip", "mixture", "level_shift", "level_noise",
    ]  # fmt: skip
    words = ["size=tiny", "reward_model=bt_linear", f"annotator={','.join(names)}", "cross_beta_factor=1,0.4"]
    words += ["pairing=cross_prompt", "sweep.name=all"]
    planned = here("plan", *words, root=tmp_path).stdout
    assert "skipped 2: the annotator's length_bias needs" in planned and "24 sets of annotations" in planned
    here("run", *words, root=tmp_path)
    rows = pq.read_table(tmp_path / "sweeps" / "all" / "results.parquet").to_pylist()
    status = {name: {r["status"] for r in rows if r["annotator"] == name} for name in names}
    assert len(rows) == 26 and status.pop("length_bias") == {"skipped"} and set.union(*status.values()) == {"done"}
    assert "texts" in next(r["reason"] for r in rows if r["annotator"] == "length_bias")
    rate = {(r["annotator"], r["cross_beta_factor"]): r["annotation_error_rate"] for r in rows}
    assert rate["bradley_terry", 1.0] == rate["likert", 1.0] < rate["bradley_terry", 0.4] == rate["likert", 0.4]
