"""annotator=recorded: what people said as training data, which cells are skipped, and whole runs on such files."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import PRESETS, make_bank, make_spec, random_bank

from rmsweep import component
from rmsweep.bank import Bank, Recorded
from rmsweep.cli import main
from rmsweep.datasets import BankShape
from rmsweep.errors import DesignError
from rmsweep.planner import NO_BANK
from rmsweep.preferences import Levels
from rmsweep.rng import streams
from rmsweep.skips import why_skipped
from rmsweep.stages.annotate import annotate

GOOD, BAD, PLAIN = ["bright", "calm"], ["harsh", "vague"], ["amber", "birch", "cedar", "delta", "ember", "fjord"]


def write(path, n=240, seed=0):
    """Pairs of texts whose better one holds more good words; every third prompt has two pairs."""
    rng, lines = np.random.default_rng(seed), []
    for i in range(n):
        worth = rng.integers(-3, 4, size=2)
        texts = [" ".join([*rng.choice(PLAIN, 6), *rng.choice(GOOD if w > 0 else BAD, abs(w))]) for w in worth]
        z = int(np.clip(worth[0] - worth[1], -3, 3))
        chosen, rejected = texts if z >= 0 else texts[::-1]
        row = {"prompt": f"prompt {i - (i % 3 == 2)}", "chosen": f"{chosen}.", "rejected": rejected}
        lines.append({**row, "strength": abs(z), "category": "ab"[i % 2]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    return make_bank(spec_of(write(folder / "pairs.jsonl")), folder)


def spec_of(path="x.jsonl", **changes):
    given = {"dataset.path": str(path), "annotator": "recorded", "reward_model": "bt_linear", **changes}
    return make_spec(dataset="pairs", base_llm="table", **given)


def triples(bank, preferences):
    """(prompt, chosen response, rejected response, strength) of every preference."""
    pairs, z = preferences.comparisons, preferences.strength.astype(int)
    sides = np.stack([pairs.response_a, pairs.response_b], axis=1)
    sides[z < 0] = sides[z < 0, ::-1]
    return list(zip(pairs.prompt_a.tolist(), *sides.T.tolist(), np.abs(z).tolist(), strict=True))


def test_every_recorded_pair_is_used_once_with_its_strength(bank):
    """Catches a swapped sign, pairs of the test prompts, a cap at the 10,000 of simulated annotators, a lost tie."""
    preferences = annotate(spec_of(), bank, streams(0), {})
    recorded = [tuple(row) for row in bank.train.recorded.tolist()]
    found = triples(bank, preferences)
    untied = [row for row in found if row[3]]
    assert len(found) == len(recorded) > 100 and sorted(untied) == sorted(r for r in recorded if r[3])
    ties = {(p, *sorted(pair), z) for p, *pair, z in found if not z}
    assert ties == {(p, *sorted(pair), z) for p, *pair, z in recorded if not z} and ties
    np.testing.assert_array_equal(preferences.preference, (np.sign(preferences.strength) + 1) / 2)
    np.testing.assert_array_equal(preferences.probability, preferences.preference)
    assert preferences.levels == Levels(3, True, None) and preferences.beta == 1.0
    assert preferences.strength.dtype == np.int8 and preferences.preference.dtype == np.float32
    assert (preferences.comparisons.prompt_a == preferences.comparisons.prompt_b).all()


def test_more_than_ten_thousand_pairs_are_all_used():
    """Catches the default of simulated annotators applied to recorded pairs."""
    rng = np.random.default_rng(0)
    plain = random_bank(rng, p=300, n=60)
    recorded = np.array([(p, i, i + 1, 1) for p in range(300) for i in range(59)])
    train = replace(plain.train, recorded=recorded)
    preferences = annotate(spec_of(), Bank(train, plain.test), streams(0), {})
    assert len(preferences) == 17_700 and preferences.strength is None and preferences.levels is None


def test_fewer_are_a_prefix_of_more_in_a_random_order(bank):
    """Catches the order of the file, one order for every seed, and another draw for another quantity."""
    few, many, other = (
        annotate(spec_of(n_annotations=n), bank, streams(s), {}) for n, s in ((40, 0), (None, 0), (None, 1))
    )
    assert len(few) == 40 and triples(bank, few) == triples(bank, many)[:40]
    np.testing.assert_array_equal(few.strength, many.strength[:40])
    orders = [bank.train.recorded[:, 0], *(p.comparisons.prompt_a for p in (many, other))]
    assert len({tuple(order.tolist()) for order in orders}) == 3


def test_a_fair_coin_decides_the_side(bank):
    """Catches a chosen response that is always a, as in every file: asymmetric thresholds would learn the order."""
    signs = np.concatenate([np.sign(annotate(spec_of(), bank, streams(s), {}).strength) for s in range(40)])
    untied = signs[signs != 0]
    assert abs(np.mean(untied > 0) - 0.5) < 4 * 0.5 / np.sqrt(len(untied))


def test_levels_of_the_scale(bank):
    """None where all strengths are 1; dataset.levels makes the scale wider than what is there."""
    assert Recorded.of(None, bank.test.recorded) is None and Recorded.of(bank.train.recorded[:0], None) is None
    ones = np.array([[0, 0, 1, 1]])
    assert not Recorded.of(ones, None).graded and Recorded.of(ones, ones * [1, 1, 1, 0]).graded
    assert Recorded.of(ones, ones * [1, 1, 1, 2]) == (1, 2, False) and Recorded.of(ones, None, 3) == (1, 3, False)
    with pytest.raises(DesignError, match="can only be learned"):
        _ = Levels(3, True, None).cut_points


def test_which_cells_are_skipped(bank):
    """Catches a cell that repeats another under a new name, or is run without what it needs."""
    known = BankShape(bank.train.count, bank.test.count, True, bank.recorded)
    binary = known._replace(recorded=Recorded(150, 1, False))
    n = len(bank.train.recorded)

    def reason(shape=known, **changes):
        return why_skipped(spec_of(**changes), shape, "table")

    assert reason() is None and reason(n_annotations=n) is None and reason(seed=3) is None
    assert f"{n} preferences are recorded" in reason(n_annotations=n + 1)
    assert "dataset=pairs" in reason(NO_BANK)
    settings = {"beta": 3.0, "pairs_per_prompt": 2, "cross_beta_factor": 0.5, "pairing": "cross_prompt"}
    settings |= {"candidates": "similar", "error_rate": {"value": 0.1}, "candidates.k": 2}
    for key, value in settings.items():
        words = reason(**{key: value})
        assert words.startswith(key.partition(".")[0]) and "without effect" in words, key
    assert reason(reward_model="ord_nll_linear") is None
    assert "recorded pairs say only which" in reason(binary, reward_model="ord_nll_linear")
    assert reason(binary) is None
    assert reason(beta=3.0, annotator="likert") is None


def test_the_stage_refuses_what_the_plan_would_skip(bank, tiny_bank):
    """The notebook has no plan: the same reasons come from the stage itself."""
    with pytest.raises(DesignError, match="dataset=pairs"):
        annotate(spec_of(), tiny_bank, streams(0), {})
    with pytest.raises(DesignError, match="n_annotations=9999 but"):
        annotate(spec_of(n_annotations=9999), bank, streams(0), {})


@pytest.mark.parametrize("option", ["bradley_terry", "likert_ties", "length_bias"])
def test_simulated_annotators_label_such_a_bank_too(bank, option):
    """More noise upon human labels: golden rewards are the mean signed strengths."""
    spec = spec_of(annotator=option, beta=float("inf"))
    preferences = annotate(spec, bank, streams(0), {})
    untied = (preferences.golden_difference != 0) & (preferences.preference != 0.5)
    assert untied.sum() > 50
    if option == "bradley_terry":
        assert preferences.annotation_error_rate == 0


def run(root, *words, workers=0):
    assert main(["run", *words, f"engine.workers={workers}", "sweep.name=r", f"root={root}"]) == 0
    rows = pq.read_table(root / "sweeps" / "r" / "results.parquet").to_pylist()
    return {(row["annotator"], row["reward_model"]): row for row in rows}


def test_end_to_end(tmp_path, capsys):
    """The command line on a file: people's preferences train, length stands beside, the same again computes nothing."""
    files = [write(tmp_path / "pairs.jsonl"), write(tmp_path / "bench.jsonl", 30, seed=1)]
    words = ["dataset=pairs", f"dataset.path={files[0]}", "annotator=recorded,bradley_terry"]
    words += ["reward_model=bt_linear,length,ord_nll_linear", f"evaluate.preferences={files[1]}"]
    words += ["evaluate.overlap=drop"]
    rows = run(tmp_path, *words, workers=1)
    assert rows["recorded", "bt_linear"]["agreement"] > 0.85 > 0.75 > rows["recorded", "length"]["agreement"]
    assert rows["recorded", "ord_nll_linear"]["agreement"] > 0.85
    assert rows["bradley_terry", "ord_nll_linear"]["status"] == "skipped"
    assert rows["recorded", "bt_linear"]["beta"] == 1.0
    capsys.readouterr()
    run(tmp_path, *words)
    assert "0 computed" in capsys.readouterr().out
    assert main(["verify", "r", "--sample", "2", f"root={tmp_path}"]) == 0


def test_human_pairs(shared, tmp_path):
    """Real human preferences (466 pairs of LLMBar): better than a coin, length beside it."""
    path = shared / "data" / "human_pairs.parquet"
    sources = [s for s in pq.read_table(path, columns=["source"])["source"].unique().to_pylist() if "LLMBar" in s]
    quoted = ",".join(f'"{source}"' for source in sources)
    words = ["dataset=pairs", f"dataset.path='{path}'", f"dataset.where={{source: [{quoted}]}}"]
    words += ["dataset.identical=drop", "dataset.empty=keep"]
    rows = run(tmp_path, *words, "annotator=recorded", "reward_model=bt_linear,length")
    assert all(row["status"] == "done" for row in rows.values())
    assert rows["recorded", "length"]["agreement"] > 0.55 and rows["recorded", "bt_linear"]["agreement"] > 0.5
    assert rows["recorded", "bt_linear"]["n_annotations"] > 300
    assert pd.isna(rows["recorded", "bt_linear"]["annotation_error_rate"])
    length = rows["recorded", "length"]
    assert list(length["preference_category"]) == [f"test/{source}" for source in sorted(sources)]
    assert sum(length["preference_category_n"]) == length["preference_n"][0] > 80
    for row in rows.values():  # per source, and together
        n, accuracy = np.array(row["preference_category_n"]), np.array(row["preference_category_accuracy"])
        assert row["preference_accuracy"][0] == pytest.approx((n * accuracy).sum() / n.sum())


def test_presets_name_their_kind():
    """conf/annotator/recorded.yaml is the annotator of recorded preferences."""
    annotator = component.build("annotator", PRESETS.node("annotator", "recorded"))
    assert not annotator.simulated and np.isnan(annotator.probability(np.zeros(2), 1.0)).all()
