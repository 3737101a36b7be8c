"""The grid: a sweep's description -> cells."""

import itertools

import pytest
from conftest import PRESETS

from rmsweep.errors import ConfigError
from rmsweep.grid import Grid, Setting, Sweep, check_name, derived_name, describe, override


def cells(sweep, **fields):
    return list(Grid(sweep if isinstance(sweep, Sweep) else describe({"axes": sweep, **fields}), PRESETS).cells())


def points(grid_cells, *keys):
    return [tuple(c.varied[k] for k in keys) for c in grid_cells]


def test_product_in_order():
    """Catches a wrong nesting: the first axis varies slowest, as in the preset."""
    found = cells({"beta": [0.5, 1], "candidates": ["random", "similar"], "seed": [0, 1, 2]})
    assert points(found, "beta", "candidates", "seed") == list(
        itertools.product([0.5, 1], ["random", "similar"], [0, 1, 2])
    )


def test_baseline_alone_is_one_cell():
    """Catches a default that comes from the code instead of conf/config.yaml."""
    (cell,) = cells({})
    assert cell.choices == {g: o for g, o in PRESETS.baseline_choices.items() if g not in ("engine", "sweep")}
    assert cell.config["beta"] == PRESETS.baseline["beta"] and cell.config["size"] == PRESETS.node("size", "demo")


def test_dotted_keys_reach_only_their_node():
    """Catches a setting that leaks into the preset's shared node (cells share nodes)."""
    before = PRESETS.node("size", "demo")
    found = cells({"size.P": [100, 200]}, set={"reward_model.hidden": [8]})
    assert [c.config["size"]["P"] for c in found] == [100, 200]
    assert all(c.config["reward_model"]["hidden"] == [8] for c in found)
    assert PRESETS.node("size", "demo") == before and found[0].config["size"]["N"] == before["N"]


def test_paired_axes_advance_together():
    """Catches a product where a zip was asked for."""
    found = cells({"seed": [0, 1]}, paired=[{"beta": [1, 3], "n_annotations": [250, 500]}])
    assert points(found, "seed", "beta", "n_annotations") == [
        (0, 1, 250),
        (0, 3, 500),
        (1, 1, 250),
        (1, 3, 500),
    ]


def test_conditional_axis_applies_where_its_condition_holds():
    """Catches cells multiplied by an axis that has no meaning for them, and cells lost by it."""
    found = cells(
        {"candidates": ["random", "similar"], "candidates.k": [2, 3], "seed": [0, 1]},
        when={"candidates.k": {"candidates": "random"}},
    )
    assert points(found, "candidates", "seed", "candidates.k") == [
        ("random", 0, 2), ("random", 0, 3), ("random", 1, 2), ("random", 1, 3),
        ("similar", 0, None), ("similar", 1, None),
    ]  # fmt: skip


def test_condition_with_several_values_and_on_a_value():
    """Catches a rule that compares a list with a value."""
    found = cells({"beta": [0.5, 1, 3], "pairs_per_prompt": [1, 2]}, when={"pairs_per_prompt": {"beta": [1, 3.0]}})
    assert points(found, "beta", "pairs_per_prompt") == [(0.5, 1), (1, 1), (1, 2), (3, 1), (3, 2)]


def test_excluded_cells_stay_with_their_reason():
    """Catches cells that vanish: a skipped cell is a row that says why."""
    rule = {"candidates": "similar", "pairing": ["cross_prompt"]}
    found = cells({"candidates": ["random", "similar"], "pairing": ["same_prompt", "cross_prompt"]}, exclude=[rule])
    assert [c.reason is not None for c in found] == [False, False, False, True]
    assert "candidates=similar" in found[3].reason


def test_values_looked_up_in_the_chosen_size():
    """Catches quantities of the baseline's size under another size, fixed or varied."""
    fixed = cells({"n_annotations": "@size.quantities"}, set={"size": "tiny"})
    assert points(fixed, "n_annotations") == [(n,) for n in PRESETS.node("size", "tiny")["quantities"]]
    varied = cells({"n_annotations": "@size.quantities", "size": ["tiny", "demo"]})
    expected = [(s, n) for s in ("tiny", "demo") for n in PRESETS.node("size", s)["quantities"]]
    assert points(varied, "size", "n_annotations") == expected
    last = cells({"n_annotations": "@size.quantities.3"}, set={"size": "tiny"})
    assert points(last, "n_annotations") == [(500,)]
    with pytest.raises(ConfigError, match="no values stand there"):
        cells({"n_annotations": "@size.nothing"})


def test_base_llm_follows_the_dataset_unless_given():
    """Catches a table run under the simulated baseline LLM, and a choice of the user's that is overruled."""
    (cell,) = cells({}, set={"dataset": "table"})
    assert cell.choices["base_llm"] == "table" and cell.config["base_llm"] == PRESETS.node("base_llm", "table")
    (cell,) = cells({}, set={"dataset": "table", "base_llm": "sim_7b"})
    assert cell.choices["base_llm"] == "sim_7b"


def test_a_key_that_only_some_choices_have():
    """Catches one impossible cell that takes the grid down, and one composed without the key in silence."""
    found = cells({"reward_model": ["bt_mlp", "length"], "reward_model.hidden": [[8], [16]]})
    assert [c.error is not None for c in found] == [False, False, True, True]
    assert "no such key" in str(found[2].error)


def test_a_value_in_place_of_a_mapping():
    """Catches a whole sub-tree of the config lost to one value."""
    (cell,) = cells({}, set={"size.reward_model": 3})
    assert "needs a mapping" in str(cell.error)
    (cell,) = cells({}, set={"size.reward_model": {"lgb": {"rounds": 5}}})
    assert cell.config["size"]["reward_model"]["lgb"] == {"rounds": 5} and "mlp" in cell.config["size"]["reward_model"]


def test_settings_replace_an_axis_and_leave_the_others():
    """Catches an override that adds an axis beside the preset's, moves it, or drops its neighbours."""
    preset = describe({"axes": {"beta": [1, 3], "seed": [0, 1]}, "set": {"size": "tiny"}})
    single = override(preset, [Setting("beta", (5,)), Setting("size", ("demo",))])
    assert single.axes == {"beta": [5], "seed": [0, 1]} and single.set == {"size": "demo"}
    several = override(preset, [Setting("beta", (5, 7), axis=True), Setting("size", ("demo", "tiny"), axis=True)])
    assert several.axes == {"beta": [5, 7], "seed": [0, 1], "size": ["demo", "tiny"]} and several.set == {}
    reset = override(preset, [Setting("beta", reset=True), Setting("size", reset=True)])
    assert reset.axes == {"seed": [0, 1]} and reset.set == {}
    paired = describe({"paired": [{"beta": [1, 3], "n_annotations": [250, 500]}]})
    assert override(paired, [Setting("beta", (2,))]).paired == ({"n_annotations": [250, 500]},)


def test_error_rate_and_beta_exclude_each_other():
    """Catches beta being ignored in silence; an override replaces the preset's other one."""
    with pytest.raises(ConfigError, match="exclude each other"):
        cells({"beta": [1], "error_rate": [0.2]})
    with pytest.raises(ConfigError, match="exclude each other"):
        cells({"beta": [1]}, set={"error_rate": {"value": 0.2}})
    replaced = override(describe({"axes": {"beta": [1, 3]}}), [Setting("error_rate", (0.1, 0.2), axis=True)])
    assert replaced.axes == {"error_rate.value": [0.1, 0.2]}
    assert [c.config["error_rate"]["value"] for c in cells(replaced)] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"axis": {}}, "Did you mean 'axes'"),
        ({"axes": {"bata": [1]}}, "Did you mean 'beta'"),
        ({"axes": {"beta": []}}, "needs a list"),
        ({"axes": {"beta": 3}}, "needs a list"),
        ({"axes": {"candidates": ["randm"]}}, "Did you mean 'random'"),
        ({"set": {"candidates": "../random"}}, "never a path"),
        ({"set": {"candidates": ["random"]}}, "name of an option"),
        ({"set": {"reward_model.hiden": [8]}}, "reward_model.hidden"),
        ({"set": {"size": "demo", "root": "x"}}, "no axis"),
        ({"axes": {"keep": ["none", "scores"]}}, "no axis"),
        ({"axes": {"seed.x": [1]}}, "unknown key"),
        ({"set": {"beta": float("nan")}}, "NaN"),
        ({"paired": [{"beta": [1, 2], "seed": [0]}]}, "equally many"),
        ({"when": {"beta": {"seed": 0}}}, "sweep.when"),
        ({"axes": {"beta": [1]}, "when": {"beta": {"candidates": "x"}}}, "Valid: diversified"),
        ({"exclude": [{"candidates": "simlar"}]}, "Did you mean 'similar'"),
        ({"axes": {"beta": [1]}, "set": {"beta": 2}}, "twice"),
        ({"name": "../x"}, "sweep.name"),
        ({"set": {"reward_model": {"kind": "mlp"}}}, "name of an option"),
    ],
)
def test_bad_descriptions(node, message):
    """Catches a typing mistake that is ignored, so that another grid runs than was meant."""
    with pytest.raises(ConfigError, match=message):
        cells(describe(node))


def test_a_huge_grid_is_refused_before_it_is_made():
    """Catches a typo that fills the memory."""
    with pytest.raises(ConfigError, match="allowed are 1,000,000"):
        cells({"seed": list(range(2000)), "beta": [i / 7 for i in range(600)]})


def test_repeated_values_are_one():
    """Catches duplicated rows from beta=1,1.0,1."""
    assert points(cells({"beta": [1, 3, 1.0, 1]}), "beta") == [(1,), (3,)]


def test_derived_names_are_stable_and_tell_grids_apart():
    """Catches a name that depends on the order of values or processes, or two grids under one name."""
    one = describe({"axes": {"beta": [1, 3], "reward_model": ["bt_mlp", "length"]}})
    assert derived_name(one) == "beta2_reward_model2-" + derived_name(one)[-8:]
    assert derived_name(one) == derived_name(
        describe({"axes": {"beta": [3.0, 1], "reward_model": ["bt_mlp", "length"]}})
    )
    others = [
        {"axes": {"beta": [1, 5], "reward_model": ["bt_mlp", "length"]}},
        {"set": {"beta": 1}},
        {"set": {"beta": 3}},
    ]
    assert len({derived_name(one), *(derived_name(describe(o)) for o in others)}) == 4
    assert derived_name(one) != derived_name(one, ["digest of a plug-in"])
    nasty = describe({"set": {"dataset.path": "/a/../b c;rm -rf/" + "x" * 300}})
    assert check_name(derived_name(nasty))


@pytest.mark.parametrize("name", ["", ".x", "-x", "a/b", "a b", "x" * 129, "a\n", "å"])
def test_names_outside_the_allow_list(name):
    """Catches a name that would leave the sweeps folder or break a shell line."""
    with pytest.raises(ConfigError, match="letters, digits"):
        check_name(name)
