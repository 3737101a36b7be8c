"""One contract for every registered component and every option of conf/: a new file is tested by being there."""

import dataclasses
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import PRESETS, make_spec, simulated

from rmsweep import component
from rmsweep.bank import Bank
from rmsweep.errors import ConfigError
from rmsweep.fingerprint import canonical_json
from rmsweep.preferences import Levels
from rmsweep.presets import PLAIN_GROUPS
from rmsweep.reward_models import Compute, TrainingData
from rmsweep.reward_models._labels import is_graded
from rmsweep.rng import stream, streams
from rmsweep.schemas import METRICS
from rmsweep.stages.annotate import annotate

REQUIRED = {"simulated": {"name": "x"}}  # kinds with a field that has no default
KINDS = [(g, k) for g in component.PACKAGES for k in component.kinds(g)]
OPTIONS = [(g, o) for g in PRESETS.groups if g not in PLAIN_GROUPS for o in PRESETS.options(g)]
SHORTER = {"converged": {"protocol.max_epochs": 10}, "lgb_pairs": {"reward_model.rounds": 80}}  # stop early elsewhere
HISTORY = {"n_train", "n_validation", "epochs", "best_epoch", "train_loss", "validation_loss", "l2"}


def kinds(group):
    return pytest.mark.parametrize("kind", component.kinds(group))


def make(group, kind):
    extra = REQUIRED.get(kind, {}) if group == "base_llm" else {}
    return component.build(group, {"kind": kind, **extra})


@pytest.mark.parametrize(("group", "kind"), KINDS)
def test_component_is_light_checked_and_identified(group, kind):
    """Frozen, picklable, documented; unknown keys refused; identity is canonical JSON and survives a round trip."""
    thing = make(group, kind)
    cls = type(thing)
    assert dataclasses.is_dataclass(thing) and cls.__dataclass_params__.frozen
    assert cls.__doc__ and (cls.group, cls.kind) == (group, kind) and isinstance(cls.version, int)
    assert pickle.loads(pickle.dumps(thing)) == thing
    with pytest.raises(ConfigError, match="unknown key"):
        component.build(group, {"kind": kind, "no_such_key": 1})
    canonical_json(component.identity(thing))
    node = {**component.defaults(group, kind), **({} if group != "base_llm" else REQUIRED.get(kind, {}))}
    assert component.identity(component.build(group, node)) == component.identity(thing)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_conf_builds(group, option):
    """Catches a preset with a misspelt key, a wrong type, or a kind that does not exist."""
    component.build(group, PRESETS.node(group, option))


@kinds("candidates")
@pytest.mark.parametrize("pairs_per_prompt", [1, 4])
def test_candidates_contract(tiny_bank, kind, pairs_per_prompt):
    """Distinct valid responses, as many as announced."""
    rule = make("candidates", kind)
    picked = rule.pick(tiny_bank.train, pairs_per_prompt, stream(0, "candidates"))
    size = rule.size(tiny_bank.train.count, pairs_per_prompt)
    assert picked.shape == (tiny_bank.train.n_prompts, size.max()) and picked.max() < tiny_bank.train.n_responses
    assert all(len({i for i in row if i >= 0}) == k for row, k in zip(picked, size, strict=True))


@kinds("pairing")
@pytest.mark.parametrize("n", [1, 60, 90])
def test_pairing_contract(kind, n):
    """As many comparisons as asked for, candidates only, none of a response with itself, none twice, seeded."""
    rule = make("pairing", kind)
    candidates = np.tile(np.arange(3), (60, 1))
    first, again, other = (rule.compare(candidates, np.arange(60), n, 1, streams(s)) for s in (0, 0, 1))
    arrays = [[getattr(c, f.name) for f in dataclasses.fields(c)] for c in (first, again, other)]
    np.testing.assert_array_equal(arrays[0], arrays[1])
    assert n == 1 or not np.array_equal(arrays[0], arrays[2])
    sides = [tuple(sorted([(a, i), (b, j)])) for a, i, b, j in zip(*arrays[0], strict=True)]
    assert len(set(sides)) == n <= rule.capacity(np.full(60, 3)) and all(a != b for a, b in sides)


@pytest.mark.parametrize("kind", [k for k in component.kinds("annotator") if component.get("annotator", k).simulated])
def test_annotator_contract(kind):
    """Probabilities, symmetric under a swap, rising with the difference, a coin flip at beta 0, certain at inf."""
    annotator, d = make("annotator", kind), np.linspace(-4, 4, 81)
    for beta in (0.0, 0.5, 3.0, np.inf):
        p = annotator.probability(d, beta)
        assert p.min() >= 0 and p.max() <= 1 and (np.diff(p) >= 0).all()
        np.testing.assert_allclose(p + annotator.probability(-d, beta), 1, rtol=1e-12)
        np.testing.assert_array_equal(p, annotator.probability(d, np.full(81, beta)))


@pytest.mark.parametrize("option", [o for o in PRESETS.options("annotator") if simulated(o)])
@pytest.mark.parametrize("beta", [0.0, 1.0, np.inf])
def test_annotator_labels_contract(text_bank, option, beta):
    """Labels 0, 1 or a tie, the same twice, others under another seed; graded ones agree with their strength."""
    spec = make_spec(size="tiny", annotator=option, beta=beta, pairing="cross_prompt", cross_beta_factor=0.5)
    first, again, other = (annotate(spec, text_bank, streams(s), {}) for s in (0, 0, 1))
    np.testing.assert_array_equal(first.preference, again.preference)
    assert first.preference.dtype == np.float32 and set(first.preference) <= {0.0, 0.5, 1.0}
    assert not np.array_equal(first.preference, other.preference)
    assert first.probability.min() >= 0 and first.probability.max() <= 1
    assert (first.levels is not None) == (first.strength is not None) == spec.annotator.graded
    if first.strength is not None:
        np.testing.assert_array_equal(first.preference, (np.sign(first.strength) + 1) / 2)
        assert set(first.strength) <= set(first.levels.strengths) and first.strength.dtype == np.int8


@kinds("objective")
def test_objective_contract(kind):
    """One finite loss per comparison, lower when the reward agrees with the preference, swap-consistent."""
    objective = make("objective", kind)
    a, b = torch.tensor([2.0, -2.0, 1e4]), torch.tensor([-2.0, 2.0, -1e4])

    def loss(a, b, a_is_better):
        if not is_graded(objective):
            return objective(a, b, a_is_better.float())
        strength = np.where(a_is_better, 2, -2).astype(np.int8)
        scale = Levels(2, False, (1.0,))
        target = torch.from_numpy(objective.target(strength, scale))
        points = [torch.tensor(scale.cut_points, dtype=torch.float32)] if hasattr(objective, "cut_points") else []
        return objective(a, b, target, *points)

    agree, against = loss(a, b, a > b), loss(a, b, a < b)
    assert agree.shape == (3,) and torch.isfinite(agree).all() and (agree < against).all()
    torch.testing.assert_close(agree, loss(b, a, b > a))


@pytest.fixture(scope="module")
def text_bank(tiny_bank):
    """The tiny bank with responses' texts, for models that read them."""

    def texts(split):
        return [[f"word {'x' * int(20 + 5 * g)}!" for g in row] for row in split.golden]

    sides = [replace(s, response=texts(s), prompt=list(s.prompt_id)) for s in (tiny_bank.train, tiny_bank.test)]
    return Bank(*sides, seed=tiny_bank.seed)


@pytest.mark.parametrize("option", PRESETS.options("reward_model"))
@pytest.mark.parametrize("protocol", PRESETS.options("protocol"))
def test_reward_model_contract(text_bank, option, protocol):
    """Finite scores that beat a random pick, bit-identical when fitted again, complete history, inputs untouched."""
    kinds = (PRESETS.node("protocol", protocol)["kind"], PRESETS.node("reward_model", option)["kind"])
    shorter = {key: value for kind in kinds for key, value in SHORTER.get(kind, {}).items()}
    spec = make_spec(size="tiny", reward_model=option, protocol=protocol, beta=3.0, pairing="cross_prompt", **shorter)
    if getattr(spec.reward_model, "graded", False):
        spec = replace(spec, annotator=component.build("annotator", PRESETS.node("annotator", "likert")))
    preferences = annotate(spec, text_bank, streams(0), {})
    before = preferences.preference.copy()
    data = TrainingData(text_bank.train, preferences, spec.protocol, streams(0), Compute(), {})
    model, again = (spec.reward_model.fit(data) for _ in range(2))
    scores = model.score(text_bank.test)
    assert scores.shape == text_bank.test.golden.shape and scores.dtype == np.float32 and np.isfinite(scores).all()
    np.testing.assert_array_equal(scores, again.score(text_bank.test))
    np.testing.assert_array_equal(before, preferences.preference)
    assert HISTORY <= set(model.history) <= {c.name for c in METRICS}
    picked = np.take_along_axis(text_bank.test.golden, scores.argmax(axis=1)[:, None], axis=1).mean()
    assert picked > text_bank.test.golden.mean() + 0.4  # an untrained network reaches 0.31
    assert all(isinstance(v, np.ndarray) and v.dtype != object for v in model.state().values())
