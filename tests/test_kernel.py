"""Errors, random streams, fingerprints, components, banks."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import make_spec, random_bank

from rmsweep import cell, component
from rmsweep.bank import Bank, NpyWriter, open_npy
from rmsweep.errors import ConfigError, DataError, unknown
from rmsweep.fingerprint import canonical_json, digest, digest_of_parts
from rmsweep.reward_models import Compute
from rmsweep.rng import stream


def test_unknown_names_the_nearest_and_all_valid_choices():
    """A typing mistake must be mendable from the message alone."""
    message = str(unknown("reward_model option", "bt_mpl", ["clf_mlp", "bt_mlp"]))
    assert "Did you mean 'bt_mlp'?" in message and "Valid: bt_mlp, clf_mlp" in message


def test_streams_are_named_and_independent():
    """Equal names give equal draws, other names or seeds do not; catches one generator shared by all."""
    draws = {key: stream(*key).random(4).tobytes() for key in [(0, "a"), (0, "b"), (1, "a"), (0, "a", "b"), (0, "a/c")]}
    assert len(set(draws.values())) == len(draws)
    assert stream(0, "a").random(4).tobytes() == draws[0, "a"]


def test_canonical_json_has_one_spelling():
    """Key order, tuples and inf must not change a fingerprint; NaN has none."""
    assert canonical_json({"b": (1, 2), "a": float("inf")}) == canonical_json({"a": float("inf"), "b": [1, 2]})
    assert canonical_json({"a": float("inf")}) == '{"a":"inf"}'
    with pytest.raises(ValueError, match="NaN"):
        digest({"a": float("nan")})


BASE = {}
MUST_CHANGE = [
    {"beta": 2.0}, {"seed": 1}, {"n_annotations": 7}, {"pairs_per_prompt": 2}, {"pairing": "cross_prompt"},
    {"candidates": "similar"}, {"candidates.k": 3}, {"reward_model": "clf_mlp"}, {"reward_model.hidden": [8]},
    {"protocol": "released"}, {"protocol.patience": 4}, {"dataset": "sim_harmless"}, {"dataset.seed": 9},
    {"dataset.reward_scale": 2.0}, {"base_llm": "sim_7b"}, {"size.P": 501}, {"size": "demo"},
    {"error_rate": {"value": 0.2}}, {"evaluate": {"n_noisy_pairs": 5}},
]  # fmt: skip
MUST_NOT_CHANGE = [
    {"beta": 1}, {"dataset.base_llms": ["sim_2b"]}, {"embedder": "native"}, {"size.quantities": [3]},
    {"evaluate": {}}, {"candidates.k": None},
]  # fmt: skip


def cell_id_of(changes):
    return cell.cell_id(make_spec(**{"size": "tiny", **changes}), {})


@pytest.mark.parametrize("changes", MUST_CHANGE, ids=str)
def test_what_affects_numbers_changes_the_cell_id(changes):
    """Catches a stale result served for another config."""
    assert cell_id_of(changes) != cell_id_of(BASE)


@pytest.mark.parametrize("changes", MUST_NOT_CHANGE, ids=str)
def test_what_cannot_affect_numbers_leaves_the_cell_id(changes):
    """Catches finished work thrown away for a spelling."""
    assert cell_id_of(changes) == cell_id_of(BASE)


def test_input_digest_device_and_precision_enter_the_identities():
    """The bytes of the data decide the bank and the cell; device class and precision decide the result's key."""
    spec = make_spec()
    assert cell.cell_id(spec, {"f": "1"}) != cell.cell_id(spec, {"f": "2"})
    assert cell.bank_id(spec, {"f": "1"}) != cell.bank_id(spec, {"f": "2"})
    keys = {cell.fingerprint("x", Compute(d, p)) for d in ("cpu", "cuda") for p in ("fp32", "bf16")}
    assert len(keys) == 4


def test_banks_are_shared_between_cells_that_differ_downstream():
    """Catches a bank rebuilt for every annotator unit or seed."""
    ids = {cell.bank_id(make_spec(**c), {}) for c in ({}, {"dataset.reward_scale": 6.0}, {"seed": 4}, {"beta": 3.0})}
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"kind": "os.system"}, "unknown objective kind"),
        ({"kind": "../evil"}, "unknown objective kind"),
        ({"kind": "bradley_terry", "_target_": "os.system"}, "unknown key"),
        ({}, "needs 'kind'"),
    ],
)
def test_configs_name_no_code(node, message):
    """The registry is closed: nothing is imported because a config says so."""
    with pytest.raises(ConfigError, match=message):
        component.build("objective", node)


@pytest.mark.parametrize(
    "changes",
    [{"reward_model.hidden": "64"}, {"reward_model.hidden": [0]}, {"protocol.patience": 2.5}, {"beta": -1.0},
     {"beta": float("nan")}, {"beta": "high"}, {"seed": -1}, {"n_annotations": 0}, {"error_rate": {"value": 0.5}},
     {"protocol.restore_bets": True}, {"candidates.k": 1}, {"dataset.within_share": 0.0}],
    ids=str,
)  # fmt: skip
def test_wrong_types_and_ranges_are_refused(changes):
    """Strict: no string becomes a number, no number is clipped."""
    with pytest.raises(ConfigError):
        make_spec(**changes)


def test_size_fills_only_what_the_reward_model_leaves_open():
    """size=tiny brings small layers; an explicit choice wins; other datasets take the paper's."""
    assert make_spec(size="tiny").reward_model.hidden == (64, 32)
    assert make_spec(size="tiny", **{"reward_model.hidden": [7]}).reward_model.hidden == (7,)
    assert make_spec(size="tiny", dataset="folder").reward_model.hidden is None


def test_bank_round_trip_with_padding_and_texts(tmp_path):
    """Catches lost padding, a re-ordered prompt, or texts on the wrong prompt."""
    bank = random_bank(np.random.default_rng(0))
    golden = bank.train.golden.copy()
    golden[3, 4:] = np.nan
    bank = Bank.from_arrays(
        golden, bank.train.embedding, bank.test.golden, bank.test.embedding,
        response_train=[[f"{p}.{i}" for i in range(n)] for p, n in enumerate(np.isfinite(golden).sum(1))], seed=5,
    )  # fmt: skip
    bank.write(tmp_path)
    again = Bank.read(tmp_path)
    np.testing.assert_array_equal(again.train.golden, golden)
    np.testing.assert_array_equal(again.train.embedding, bank.train.embedding)
    assert again.train.response == bank.train.response and again.seed == 5
    assert again.train.count[3] == 4 and again.train.prompt_id == list(bank.train.prompt_id)
    rows = again.train.rows(np.array([2, 3]), np.array([1, 0]))
    np.testing.assert_array_equal(again.train.gather(rows), bank.train.embedding[[2, 3], [1, 0]])
    assert again.train.golden_of(rows).tolist() == golden[[2, 3], [1, 0]].tolist()


def _bad_arrays():
    g, e = np.zeros((4, 3)), np.zeros((4, 3, 2), np.float32)
    gt, et = np.zeros((2, 5)), np.zeros((2, 5, 2), np.float32)
    gap, inf, nan_e = g.copy(), g.copy(), e.copy()
    gap[1, 0], inf[2, 1], nan_e[0, 1, 1] = np.nan, np.inf, np.nan
    yield "shape", (g, e[:, :2], gt, et), {}, r"needed: \[P, N\]"
    yield "dims", (g, e, gt, et[..., :1]), {}, "must be equal"
    yield "gap", (gap, e, gt, et), {}, "NaN may only pad"
    yield "inf", (inf, e, gt, et), {}, r"golden_train\[2, 1\]"
    yield "embedding", (g, nan_e, gt, et), {}, r"embedding_train\[0, 1\]"
    offset = np.random.default_rng(0).standard_normal((4, 3)) * 0.2 + 1e7
    yield "rounding", (offset, e, gt, et), {}, "subtract their mean first"
    yield "overflow", (g + 1e39, e, gt, et), {}, "finite float32"
    yield "texts", (g, e, gt, et), {"response_train": [["x"] * 3] * 3}, "one text per response"
    yield "objects", (g.astype(object), e, gt, et), {}, "real numbers"
    yield "ids", (g, e, gt, et), {"prompt_id_train": ["a", "b", "a", "c"]}, "'a' occurs more than once"
    ids = {"prompt_id_train": list("abcd"), "prompt_id_test": ["x", "b"]}
    yield "both", (g, e, gt, et), ids, "'b' is in train and in test"


@pytest.mark.parametrize(
    ("name", "arrays", "options", "message"), list(_bad_arrays()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_bad_arrays_are_refused_with_their_place(name, arrays, options, message):
    """Bad data get one clear message before any compute."""
    with pytest.raises(DataError, match=message):
        Bank.from_arrays(*arrays, **options)


def test_pickled_arrays_are_never_opened(tmp_path):
    """An object-dtype .npy is a pickle: opening it would run code."""
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    np.save(tmp_path / "evil.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    (tmp_path / "raw.npy").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.npy", "raw.npy", "absent.npy"):
        with pytest.raises(DataError, match=name):
            open_npy(tmp_path / name)
    assert not marker.exists()


def test_npy_writer_writes_what_numpy_reads(tmp_path):
    """Catches a wrong header or block order."""
    array = np.arange(60, dtype=np.float16).reshape(5, 4, 3)
    with NpyWriter(tmp_path / "x.npy", np.float16, array.shape) as writer:
        for block in (array[:2], array[2:]):
            writer.append(block.astype(np.float64))
    np.testing.assert_array_equal(open_npy(tmp_path / "x.npy"), array)


def test_importing_rmsweep_loads_nothing_heavy():
    """`rmsweep plan` must start at once: torch, pandas and Hydra are loaded when they are used."""
    heavy = ("torch", "pandas", "hydra", "sklearn", "lightgbm")
    code = f"import sys, rmsweep, rmsweep.cell; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_a_digest_of_parts_is_that_of_the_whole():
    """Catches identities that change with how they are put together: old results would be orphaned."""
    whole = {"b": {"y": 1.0, "x": [1, "é", None]}, "a": "inf", "B": True, "ä": {}}
    assert digest_of_parts({name: canonical_json(part) for name, part in whole.items()}) == digest(whole)
