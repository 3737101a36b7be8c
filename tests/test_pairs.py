"""dataset=pairs and preference test sets: how each format is read, what a bank made of them holds, what is refused."""

import gzip
import json
import sys
import unicodedata
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PRESETS, cell_config, make_spec, random_bank

from rmsweep import component
from rmsweep.bank import Bank
from rmsweep.cell import bank_config, bank_id, bank_inputs, bank_shape, build_cell, cell_id, generate_bank
from rmsweep.cli import compose
from rmsweep.datasets import Sets, _fetch, _preference_files
from rmsweep.datasets._preference_files import Reading, read_pairs
from rmsweep.datasets._preference_sets import set_names
from rmsweep.errors import ConfigError, DataError, DesignError
from rmsweep.planner import make as make_plan
from rmsweep.problems import normalised

LSA = component.build("embedder", {"kind": "lsa", "dim": 8, "min_df": 1})
WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "jetty", "knoll", "larch"]


def text(rng, n=6):
    return " ".join(rng.choice(WORDS, n))


def rows(n=24, **extra):
    """One pair for each of n prompts, words at random; extra: column -> value of the row number."""
    rng = np.random.default_rng(n)
    made = [{"prompt": f"prompt {i}", "chosen": f"{text(rng)} yes", "rejected": f"{text(rng)} no"} for i in range(n)]
    return [{**row, **{k: f(i) for k, f in extra.items()}} for i, row in enumerate(made)]


def save(tmp_path, data, name="data.jsonl"):
    path = tmp_path / name
    lines = "".join(json.dumps(row) + "\n" for row in data).encode()
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(data), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(data, indent=1))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    else:
        path.write_bytes(lines)
    return path


def read(tmp_path, data, name="data.jsonl", **fields):
    """(chosen, rejected, strength, category) of every pair as read, and the source."""
    source = read_pairs(Reading(str(save(tmp_path, data, name)), **fields))
    return [(p.chosen, p.rejected, p.strength, p.category) for p in source.pairs], source


def make(path, **fields):
    return component.build("dataset", {"kind": "pairs", "path": str(path), **fields})


def bank_of(tmp_path, data, sets=None, **fields):
    dataset = make(save(tmp_path, data), **fields)
    folder = tmp_path / "bank"
    folder.mkdir(exist_ok=True)
    given = {"sets": sets} if sets else {}
    shape = dataset.shape(None, None, LSA, **given)
    dataset.generate(None, None, LSA, folder, **given)
    bank = Bank.read(folder)
    np.testing.assert_array_equal(shape.count_train, bank.train.count)
    np.testing.assert_array_equal(shape.count_test, bank.test.count)
    assert shape.recorded == bank.recorded and shape.has_texts
    return bank


def refused(tmp_path, data, **fields):
    with pytest.raises(DataError) as error:
        make(save(tmp_path, data), **fields).shape(None, None, LSA)
    return str(error.value)


# -- formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json", "a.jsonl.gz"])
def test_a_plain_file_in_every_container(tmp_path, name):
    """Catches swapped sides, a strength on another row, an array or a compressed file that is not read."""
    data = rows(5, strength=lambda i: i, category=lambda i: "ab"[i % 2])
    pairs, source = read(tmp_path, data, name)
    assert pairs == [(r["chosen"], r["rejected"], r["strength"], r["category"]) for r in data]
    assert [p.row for p in source.pairs] == [0, 1, 2, 3, 4] and source.notes["format"] == "plain"


def test_columns_of_the_users_own(tmp_path):
    """Catches a named column that is ignored, and the order in which unnamed ones are looked for."""
    data = [{"q": "why", "win": "a", "lose": "b", "n": 2.0, "source": "s", "subset": "t"}]
    named = {"prompt_column": "q", "chosen_column": "win", "rejected_column": "lose", "strength_column": "n"}
    assert read(tmp_path, data, **named)[0] == [("a", "b", 2, "s")]
    assert read(tmp_path, data, **named, category_column="subset")[0] == [("a", "b", 2, "t")]
    plain = [{**row, "subset": "mine"} for row in rows(1)]
    assert read(tmp_path, plain)[0][0][2:] == (1, "mine")  # no strength column: 1


def test_rewardbench_sections(tmp_path):
    """Catches a subset in the wrong section, and one that is not RewardBench's."""
    subsets = {"mt-bench-med": "chat", "mt-bench-hard": "chat_hard", "donotanswer": "safety", "hep-rust": "reasoning",
               "math-prm": "reasoning", "llmbar-natural": "chat_hard", "alpacaeval-hard": "chat"}  # fmt: skip
    data = rows(len(subsets), subset=lambda i: list(subsets)[i], chosen_model=lambda i: "m")
    pairs, source = read(tmp_path, data)
    assert [p[3] for p in pairs] == list(subsets.values()) and source.notes["format"] == "rewardbench"
    assert read(tmp_path, data, category_column="subset", format="plain")[0][0][3] == "mt-bench-med"
    data[3]["subset"] = "hep-cobol"
    with pytest.raises(DataError, match="row 3, column 'subset': 'hep-cobol'; allowed: a subset of RewardBench"):
        read(tmp_path, data)


def test_rm_bench_gives_nine_pairs(tmp_path):
    """Catches pairs of equal style only, chosen and rejected exchanged, and safety told apart by its two halves."""
    data = [
        {"id": i, "prompt": f"p{i}", "chosen": ["c0", "c1", "c2"], "rejected": ["r0", "r1", "r2"], "domain": d}
        for i, d in enumerate(("chat", "safety-refuse", "safety-response"))
    ]
    for name in ("total_dataset.json", "x.parquet"):
        pairs, source = read(tmp_path, data, name)
        assert source.notes["format"] == "rm_bench" and len(pairs) == 27
        assert {p[:2] for p in pairs} == {(f"c{i}", f"r{j}") for i in range(3) for j in range(3)}
        assert [p[3] for p in pairs[::9]] == ["chat", "safety", "safety"]
    data[1]["rejected"] = []
    with pytest.raises(DataError, match="row 1, column 'rejected': \\[\\]; allowed: a list of texts"):
        read(tmp_path, data, "total_dataset.json")


@pytest.mark.parametrize("version", ["helpsteer2", "helpsteer3"])
def test_helpsteer_signs(tmp_path, version):
    """Catches the classic defect, a swapped sign: positive means that the second response is better, in both."""
    first, second, score = {
        "helpsteer2": ("response_1", "response_2", "preference_strength"),
        "helpsteer3": ("response1", "response2", "overall_preference"),
    }[version]

    def row(i, z):
        texts = {first: f"first {i}", second: f"second {i}", score: z}
        if version == "helpsteer2":
            return {"prompt": f"prompt {i}", "split": "val" if i else "train", **texts}
        return {"context": [{"role": "user", "content": f"prompt {i}"}], "domain": "code", "language": "c", **texts}

    category = None if version == "helpsteer2" else "code"
    pairs, source = read(tmp_path, [row(i, z) for i, z in enumerate((3, -2, 0, 1))], "x.jsonl.gz")
    assert source.notes["format"] == version and source.pairs[0].prompt == "prompt 0"
    assert pairs == [
        ("second 0", "first 0", 3, category), ("first 1", "second 1", 2, category),
        ("first 2", "second 2", 0, category), ("second 3", "first 3", 1, category),
    ]  # fmt: skip
    with pytest.raises(DataError, match=f"row 1, column '{score}': 4; allowed: a whole number from -3 to 3"):
        read(tmp_path, [row(0, 1), row(1, 4)])
    if version == "helpsteer2":
        assert read(tmp_path, [row(0, 1), row(1, 1)], split_column="split")[1].side == ["train", "test"]


def test_messages_become_text_with_their_roles(tmp_path):
    """Catches a conversation whose speakers are lost, and messages that are none."""
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "x"},
    ]
    row = {"context": talk, "response1": "a", "response2": "b", "overall_preference": -1, "domain": "general"}
    for name in ("x.jsonl", "x.parquet"):
        assert read(tmp_path, [row], name)[1].pairs[0].prompt == "user: hi\n\nassistant: yes?\n\nuser: x"
    for bad in ([], [{"role": "user"}], None, 3):
        with pytest.raises(DataError, match=r"row 0, column 'context'.*messages, each with role and content"):
            read(tmp_path, [{**row, "context": bad}])


# -- bad input ---------------------------------------------------------------------------------------------


def test_every_bad_value_is_named(tmp_path):
    """All problems in one message: file, row, column, value, what is allowed and the fix."""
    data = rows(9, strength=lambda i: 1)
    data[0]["prompt"], data[1]["chosen"], data[2]["rejected"] = None, 7, " \n"
    data[3]["strength"], data[4]["strength"], data[5]["strength"], data[6]["strength"] = -2, 1.5, 101, True
    data[7]["rejected"], data[8]["prompt"] = data[7]["chosen"], "half an emoji \ud83d"
    message = refused(tmp_path, data)
    assert "data.jsonl: 9 problems" in message
    for part in (
        "row 0, column 'prompt': missing; allowed: text (valid UTF-8), not empty",
        "row 1, column 'chosen': 7; allowed: text",
        "row 2, column 'rejected': ' \\n'; allowed: text that is not empty; dataset.empty=drop",
        "row 3, column 'strength': -2; allowed: a whole number from 0 to 100; swap chosen and rejected",
        "row 4, column 'strength': 1.5", "row 5, column 'strength': 101", "row 6, column 'strength': True",
        "row 7, column 'rejected'", "dataset.identical=drop", "row 8, column 'prompt'",
    ):  # fmt: skip
        assert part in message, part


def test_what_is_left_out_is_counted(tmp_path):
    """Catches rows that vanish unnoted: empty, identical (tied too), repeated, contradicting, filtered ones."""
    data = rows(12, strength=lambda i: 1, use=lambda i: i != 11)
    data[0]["chosen"] = ""
    data[1]["rejected"] = data[1]["chosen"]
    data[2].update(rejected=data[2]["chosen"], strength=0)
    data += [dict(data[3]), {**data[4], "chosen": data[4]["rejected"], "rejected": data[4]["chosen"]}]
    data += [{**data[5], "strength": 2}]  # another opinion, no repetition
    options = {"empty": "drop", "identical": "drop", "where": {"use": True}}
    kept, source = read(tmp_path, data, **options)
    wanted = {"rows": 15, "empty_dropped": 1, "identical_dropped": 2, "duplicate_pairs": 1, "contradicting_pairs": 1,
              "rows_filtered_out": 1}  # fmt: skip
    assert {k: source.notes[k] for k in wanted} == wanted and len(kept) == 11
    once, source = read(tmp_path, data, duplicates="drop", **options)
    assert len(once) == 10 and source.notes["duplicate_pairs"] == 1


def test_files_that_are_no_preferences(tmp_path):
    """Catches a crash on a missing column, no rows, a broken archive, an array of other things, another suffix."""
    assert "unknown column 'chosen'" in refused(tmp_path, [{"prompt": "a", "answer": "b"}])
    assert "matches none of 4 rows" in refused(tmp_path, rows(4, s=lambda i: "x"), where={"s": "y"})
    assert "levels=2" in refused(tmp_path, rows(4, strength=lambda i: 3), levels=2)
    assert "train, test, validation, val" in refused(tmp_path, rows(4, s=lambda i: "dev"), split_column="s")
    path = save(tmp_path, rows(4), "x.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / "y.json").write_text("[1, 2]")
    (tmp_path / "z.json").write_text('[{"prompt": "a"')
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    for name, message in {"x.jsonl.gz": "gzip", "y.json": "array of objects", "z.json": "no valid JSON",
                          "plain.jsonl.gz": "gzip", "none.jsonl": "no such file"}.items():  # fmt: skip
        with pytest.raises(DataError, match=message):
            make(tmp_path / name).shape(None, None, LSA)
    with pytest.raises(DataError, match="cannot embed"):
        make(save(tmp_path, rows())).shape(None, None, component.build("embedder", "native"))


# -- the bank ----------------------------------------------------------------------------------------------


def test_golden_is_the_mean_signed_strength(tmp_path):
    """Catches a sign, a sum for a mean, a comparison of another prompt, and slots that tell which was chosen."""
    data = [
        {"prompt": "p", "chosen": "b", "rejected": "a", "strength": 3},
        {"prompt": " p\n", "chosen": "a", "rejected": "b", "strength": 1},
        {"prompt": "p", "chosen": "c", "rejected": "a", "strength": 0},
        {"prompt": "q", "chosen": "z", "rejected": "y", "strength": 2},
        {"prompt": "test", "chosen": "u", "rejected": "v", "strength": 1},
    ]
    data = [{**row, "split": "validation" if row["prompt"] == "test" else "train"} for row in data]
    bank = bank_of(tmp_path, data, split_column="split")
    assert bank.train.response == [["a", "b", "c"], ["y", "z"]] and bank.train.prompt == ["p", "q"]
    np.testing.assert_allclose(bank.train.golden, [[(-3 + 1 - 0) / 3, (3 - 1) / 2, 0], [-2, 2, np.nan]], rtol=1e-6)
    assert bank.train.recorded.tolist() == [[0, 1, 0, 3], [0, 0, 1, 1], [0, 2, 0, 0], [1, 1, 0, 2]]
    assert bank.test.recorded.tolist() == [[0, 0, 1, 1]] and bank.recorded == (4, 3, True)
    assert bank.notes["contradicting_pairs"] == 1 and bank.notes["ties_train"] == 1
    taken = bank.train.take(np.array([1]))
    assert taken.recorded.tolist() == [[0, 1, 0, 2]] and taken.prompt == ["q"]


def test_responses_keep_their_embedding_through_padding(tmp_path):
    """Catches embeddings of one response beside the text of another."""
    bank = bank_of(tmp_path, [*rows(8), {"prompt": "prompt 0", "chosen": "amber birch", "rejected": "cedar delta"}])
    for split in (bank.train, bank.test):
        for p in range(split.n_prompts):
            alone = LSA.fit_embed(
                [(q, r) for q, rs in zip(bank.train.prompt, bank.train.response, strict=True) for r in rs],
                [(split.prompt[p], r) for r in split.response[p]],
                0,
            )[1]
            np.testing.assert_allclose(split.embedding[p, : split.count[p]], alone, rtol=1e-4, atol=1e-4)


def test_no_prompt_on_both_sides(tmp_path):
    """Catches leakage by spaces or Unicode form, a split that ignores its seed, sizes other than asked for."""
    data = rows(20)
    data += rows(40)[20:] + [{**row, "prompt": row["prompt"].replace(" ", " \n "), "chosen": "z"} for row in rows(40)]
    data += [
        {"prompt": p, "chosen": f"x{i}", "rejected": f"y{i}"} for i, p in enumerate(["caf\u00e9", "cafe\u0301"] * 3)
    ]
    path, seen = save(tmp_path, data), set()
    for seed in range(8):
        train, test = make(path, split_seed=seed, n_train_prompts=20, n_test_prompts=9)._sides()[1]
        sides = [{normalised(p) for p in side.prompt} for side in (train, test)]
        assert [len(s) for s in sides] == [20, 9] and not sides[0] & sides[1]
        seen.add(tuple(sorted(sides[0])))
    assert len(seen) == 8
    counts = [len(side.count) for side in make(path)._sides()[1]]
    assert counts == [31, 10]
    with pytest.raises(DataError, match="41 usable prompts give 41 to train, 0 to test"):
        make(path, n_train_prompts=41)._sides()
    both = [*rows(4, split=lambda i: "train"), {**rows(4)[0], "split": "test"}]
    assert "the prompt with the same text in row 0, 'train'" in refused(tmp_path, both, split_column="split")


def test_test_prompts_are_told_apart_by_category(tmp_path):
    """One category per prompt: where a test prompt stands in two, it is two prompts; in training it is one."""
    data = rows(4, category=lambda i: "a", split=lambda i: "train" if i < 2 else "test")
    data += [{**data[0], "category": "b", "chosen": "other"}, {**data[3], "category": "b", "chosen": "other"}]
    bank = bank_of(tmp_path, data, split_column="split")
    assert bank.train.n_prompts == 2 and bank.train.count.tolist() == [3, 2]
    assert bank.test.prompt == ["prompt 2", "prompt 3", "prompt 3"] and bank.test.category == ["a", "a", "b"]
    assert bank.test.recorded[:, 0].tolist() == [0, 1, 2] and bank.notes["prompts_unused"] == 0


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    """Catches a file parsed for every seed of a sweep, and a cached filter or file that was another."""
    reads = []
    real = _preference_files.batches
    monkeypatch.setattr(_preference_files, "batches", lambda p, c, *a, **k: reads.append(k) or real(p, c, *a, **k))
    path = save(tmp_path, rows(9, flag=lambda i: 1))
    for seed in range(3):
        make(path, split_seed=seed).shape(None, None, LSA)
    assert len([k for k in reads if not k]) == 1  # the one with size=1 looks at the first row
    assert make(path, where={"flag": 1}).shape(None, None, LSA)
    with pytest.raises(DataError, match="matches none"):
        make(path, where={"flag": True}).shape(None, None, LSA)
    save(tmp_path, rows(12))
    assert make(path).shape(None, None, LSA).recorded.n_pairs == 9


def test_a_bank_with_recorded_pairs_and_sets_survives_writing(tmp_path):
    """Bank.write, Bank.read and dataset=folder keep pairs and sets; damaged ones are refused with the place."""
    sets = Sets({"mine": save(tmp_path, [{"prompt": "s", "chosen": "a b", "rejected": "c d"}], "s.jsonl")})
    bank = bank_of(tmp_path, rows(12, strength=lambda i: i % 3), sets, levels=5)
    assert bank.recorded == (9, 5, True)
    bank.write(tmp_path / "again")
    folder = component.build("dataset", {"kind": "folder", "path": str(tmp_path / "again")})
    again = Bank.read(tmp_path / "again")
    assert folder.shape(None, None, None).recorded == bank.recorded == again.recorded
    for one, two in [(bank.train, again.train), (bank.sets["mine"], again.sets["mine"])]:
        np.testing.assert_array_equal(one.recorded, two.recorded)
    bad = bank.train.recorded.copy()
    bad[1, 2] = 9
    np.save(tmp_path / "again" / "recorded_train.npy", bad)
    np.save(tmp_path / "again" / "recorded_set_mine.npy", np.zeros((1, 3)))
    with pytest.raises(DataError) as error:
        folder.shape(None, None, None)
    assert "recorded_train[1] is [1, " in str(error.value) and "recorded_set_mine is float64 (1, 3)" in str(error.value)


# -- the hub -----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub's library that serves files of tmp_path/hub and records what it was asked for."""
    asked = []

    def hf_hub_download(**request):
        asked.append(request)
        found = tmp_path / "hub" / request["filename"]
        if not found.is_file():
            raise OSError("no such entry\non the hub")
        return str(found)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hf_hub_download))
    _fetch._fetched.cache_clear()
    yield asked
    _fetch._fetched.cache_clear()


def test_files_of_the_hub(tmp_path, hub):
    """Catches a lost revision or folder, a file of the models, another identity than the same bytes have here."""
    (tmp_path / "hub" / "preference").mkdir(parents=True)
    local = save(tmp_path / "hub" / "preference", rows(), "train.jsonl.gz")
    spec = make_spec(
        dataset="pairs", base_llm="table", **{"dataset.path": "hf://datasets/nvidia/H3/preference/train.jsonl.gz@v1.0"}
    )
    here = replace(spec, dataset=make(local))
    assert bank_inputs(spec) == bank_inputs(here) and bank_shape(spec).recorded.n_pairs == 18
    assert hub == [
        {"repo_id": "nvidia/H3", "filename": "preference/train.jsonl.gz", "revision": "v1.0", "repo_type": "dataset"}
    ]
    assert cell_id(spec, {"pairs": "0"}) == cell_id(here, {"pairs": "0"})
    with pytest.raises(DataError, match=r"cannot be fetched \(no such entry on the hub\)"):
        make("hf://datasets/nvidia/H3/gone.jsonl").inputs(None, None)
    with pytest.raises(DataError, match="needs the form hf://datasets/OWNER/NAME/FILE"):
        make("hf://models/a/b/c.jsonl").inputs(None, None)


def test_without_the_hubs_library(tmp_path, hub, monkeypatch):
    """The message says what to install."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match="pip install huggingface_hub"):
        make("hf://datasets/a/b/c.jsonl").inputs(None, None)


@pytest.mark.parametrize("option", ["helpsteer2", "helpsteer3"])
def test_presets_of_the_hub_read_a_file_here(tmp_path, option):
    """dataset=helpsteer2 dataset.path=FILE: catches a preset whose columns are not its format's."""
    names = {"helpsteer2": ("response_1", "response_2", "preference_strength")}
    first, second, score = names.get(option, ("response1", "response2", "overall_preference"))
    data = [{first: f"good {text(np.random.default_rng(i))}", second: f"bad {i}", score: i % 7 - 3} for i in range(40)]
    extra = {"helpsteer2": lambda i: {"prompt": f"p {i}", "split": "val" if i % 4 == 0 else "train"}}
    extra = extra.get(option, lambda i: {"context": [{"role": "user", "content": f"p {i}"}], "domain": "code"})
    path = save(tmp_path, [{**row, **extra(i)} for i, row in enumerate(data)], "x.jsonl.gz")
    shape = component.override(
        component.build("dataset", PRESETS.node("dataset", option)), {"kind": "pairs", "path": str(path)}
    ).shape(None, None, LSA)
    assert shape.recorded == ((30, 3, True) if option == "helpsteer2" else (38, 3, True))


# -- preference test sets ----------------------------------------------------------------------------------


@pytest.fixture
def held(tmp_path):
    """A spec over a file of pairs, and two files to evaluate on."""
    bench = [
        {**r, "prompt": f"bench {r['prompt']}"} for r in rows(7, subset=lambda i: "math-prm", strength=lambda i: 1)
    ]
    files = [save(tmp_path, bench, "Reward-Bench v1.jsonl"), save(tmp_path, bench[:3], "other.parquet")]
    path = save(tmp_path, rows(40))

    def spec_of(*paths, **changes):
        given = {"evaluate.preferences": tuple(map(str, paths)) if paths else None, **changes}
        return make_spec(dataset="pairs", base_llm="table", embedder="lsa", **{"dataset.path": str(path), **given})

    spec_of.files, spec_of.path = files, path
    return spec_of


def built(spec, folder):
    folder.mkdir()
    generate_bank(spec, folder)
    return Bank.read(folder)


def test_sets_leave_train_and_test_as_they_are(held, tmp_path):
    """Catches an embedder fitted on the test sets, a set whose rows are exchanged with another's, a lost category."""
    plain, with_sets = built(held(), tmp_path / "one"), built(held(*held.files), tmp_path / "two")
    for name in ("golden", "embedding", "recorded", "prompts"):
        for split in ("train", "test"):
            (file,) = (tmp_path / "one").glob(f"{name}_{split}.*")
            assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
    assert not plain.sets and list(with_sets.sets) == ["other", "reward_bench_v1"]
    bench, other = with_sets.sets["reward_bench_v1"], with_sets.sets["other"]
    assert bench.category == ["reasoning"] * 7 and bench.n_prompts == 7 and other.n_prompts == 3
    np.testing.assert_array_equal(bench.embedding[:3], other.embedding)
    assert bench.response[2][bench.recorded[2, 1]].endswith("yes") and (np.nanmax(bench.golden, axis=1) == 1).all()
    assert np.abs(bench.embedding).sum(axis=2).min() > 0
    assert with_sets.notes["sets"]["other"]["pairs"] == 3


def test_identities_with_and_without_sets(held, tmp_path):
    """The bytes count, and the name; paths never do; without sets nothing is in the identity that was not before."""
    first, moved = held(held.files[0]), tmp_path / "moved"
    moved.mkdir()
    copy = held(moved / held.files[0].name)
    (moved / held.files[0].name).write_bytes(held.files[0].read_bytes())
    digests = {name: f"digest of {path.name}" for name, path in bank_inputs(first).items()}
    assert list(digests) == ["pairs", "preferences:reward_bench_v1"]
    assert cell_id(first, digests) == cell_id(copy, digests) and bank_id(first, digests) == bank_id(copy, digests)
    others = [held(), held(held.files[0], **{"evaluate.overlap": "drop"}), held(held.files[1]), held(*held.files)]
    assert len({bank_id(spec, digests) for spec in (first, *others)}) == 5
    assert bank_id(first, {**digests, "preferences:reward_bench_v1": "x"}) != bank_id(first, digests)
    dropping = held(**{"evaluate.overlap": "drop"})  # nothing to drop
    assert bank_config(held(), {}) == bank_config(dropping, {}) and "preferences" not in bank_config(held(), {})
    assert cell_id(held(), {}) == cell_id(dropping, {})


def test_prompts_that_are_trained_on_are_refused_or_left_out(held, tmp_path):
    """Catches a leak from training into a test set, by spaces too, and a note that does not count it."""
    trained = make(held.path)._sides()[1][0].prompt[0]
    leaky = [*rows(3), {"prompt": trained.replace(" ", "  "), "chosen": "a b", "rejected": "c d"}]
    leaky = [{**row, "prompt": f"new {row['prompt']}"} for row in leaky[:3]] + leaky[3:]
    path = save(tmp_path, leaky, "leaky.jsonl")
    with pytest.raises(DataError, match=r"leaky.jsonl: 1 problem.*\n  row 3: prompt .*evaluate.overlap=drop"):
        bank_shape(held(path))
    bank = built(held(path, **{"evaluate.overlap": "drop"}), tmp_path / "bank")
    assert bank.sets["leaky"].n_prompts == 3 and bank.notes["sets"]["leaky"]["overlap_dropped"] == 1
    whole = save(tmp_path, leaky[3:], "whole.jsonl")
    with pytest.raises(DataError, match="every prompt of this set"):
        bank_shape(held(whole, **{"evaluate.overlap": "drop"}))


def test_prompts_are_compared_by_what_a_reader_sees(tmp_path):
    """Catches training prompts taken letter by letter: spaces and the Unicode form of an accent would hide a leak."""
    data = rows(24)
    for row in data:
        row["prompt"] = f"cafe\u0301  {row['prompt']}\n"  # e and an accent of its own, spaces
    dataset = make(save(tmp_path, data))
    trained = dataset._sides()[1][0].prompt[0]
    seen = {"prompt": unicodedata.normalize("NFC", " ".join(trained.split())), "chosen": "a b", "rejected": "c d"}
    assert seen["prompt"] != trained
    path = save(tmp_path, [seen, {**seen, "prompt": "another"}], "seen.jsonl")
    with pytest.raises(DataError, match="row 0: prompt"):
        dataset.shape(None, None, LSA, sets=Sets({"seen": path}, "error"))
    held = tmp_path / "held"
    held.mkdir()
    dataset.generate(None, None, LSA, held, sets=Sets({"seen": path}, "drop"))
    assert Bank.read(held).sets["seen"].prompt == ["another"]


def test_what_has_no_fixed_type_is_named_not_a_traceback(tmp_path):
    """Catches lists where a split or a subset is looked up: they cannot be keys."""
    message = refused(tmp_path, rows(4, side=lambda i: ["train"]), split_column="side")
    assert "row 0, column 'side'" in message and "allowed: train" in message
    assert "row 0, column 'subset'" in refused(tmp_path, rows(4, subset=lambda i: ["chat"]))


def test_recognition_looks_at_more_than_the_first_row(tmp_path):
    """Catches one unknown subset in front that turns RewardBench into a plain file, its sections lost."""
    subsets = ["nope", "math-prm", "donotanswer"]
    assert "'nope'; allowed: a subset of RewardBench" in refused(tmp_path, rows(3, subset=lambda i: subsets[i]))
    plain, source = read(tmp_path, rows(3, subset=lambda i: f"kind {i}"))
    assert source.notes["format"] == "plain" and plain[2][3] == "kind 2"


def test_optional_columns_can_be_left_out(tmp_path):
    """Catches a column called `source` or `strength` that cannot be ignored, whatever stands in it."""
    data = rows(6, source=lambda i: i, strength=lambda i: None)
    assert "column 'source'" in refused(tmp_path, data)
    pairs, _ = read(tmp_path, data, category_column="", strength_column="")
    assert {(p[2], p[3]) for p in pairs} == {(1, None)}


def test_names_of_sets():
    """The file's stem in lower case; two equal ones and none at all are refused."""
    assert list(set_names(["/a/RM-Bench total.json", "hf://datasets/o/n/p/val.jsonl.gz@r"])) == [
        "rm_bench_total",
        "val",
    ]
    for bad in (["/a/x.json", "/b/X.parquet"], ["--.json"], ["/a/test.jsonl"]):
        with pytest.raises(ConfigError, match=r"evaluate\.preferences"):
            build_cell(cell_config(**{"evaluate.preferences": bad}))


def test_a_table_takes_sets_too(tmp_path):
    """dataset=table with texts embeds the set by the same embedder; embeddings of its own cannot, which skips cells."""
    data = [{"prompt": f"p{i // 3}", "response": f"{WORDS[i % 12]} {WORDS[(5 * i) % 12]}", "golden_reward": i / 7,
             "e": [float(i), 1.0]} for i in range(60)]  # fmt: skip
    table, bench = save(tmp_path, data, "t.parquet"), save(tmp_path, rows(5), "bench.jsonl")
    fields = {"dataset.path": str(table), "evaluate.preferences": str(bench), "dataset.duplicates": "drop"}
    spec = make_spec(dataset="table", base_llm="table", embedder="lsa", **fields)
    shape, bank = bank_shape(spec), built(spec, tmp_path / "bank")
    assert shape.n_set_responses == 10 and bank.sets["bench"].n_prompts == 5 and bank.train.recorded is None
    words = ["dataset=table", f"dataset.path={table}", "dataset.embedding_column=e", f"evaluate.preferences={bench}"]
    plan = make_plan(compose.read([*words, "reward_model=bt_linear", "embedder=native,lsa"], PRESETS).sweep, PRESETS)
    reasons = [cell.reason for cell in plan.cells]
    assert "embedded here" in reasons[0] and reasons[1] is None
    simulated = [f"evaluate.preferences={bench}", "reward_model=bt_linear,length", "dataset=sim_helpful"]
    with pytest.raises(DesignError, match=r"none of the 2 cells can run:\n  2 cells: evaluate\.preferences needs"):
        make_plan(compose.read(simulated, PRESETS).sweep, PRESETS)


def test_a_plan_checks_sets_before_anything_runs(held, tmp_path):
    """Catches a missing or broken test set that shows only after hours of training."""
    (tmp_path / "folder.jsonl").mkdir()
    save(tmp_path, [{"prompt": "p", "chosen": "a"}], "half.jsonl")
    messages = {
        "gone.jsonl": "no such file; evaluate.preferences=FILE",
        "folder.jsonl": "a folder, not a file",
        "half.jsonl": "evaluate.preferences: rejected_column: unknown column 'rejected'",
    }
    for name, message in messages.items():
        words = ["dataset=pairs", f"dataset.path={held.path}", f"evaluate.preferences={tmp_path / name}"]
        with pytest.raises(DataError, match=message):
            make_plan(compose.read([*words, "reward_model=length"], PRESETS).sweep, PRESETS)


def test_other_banks_have_no_sets_and_no_records(tmp_path):
    """A bank of arrays is as before: no files more, nothing recorded."""
    random_bank(np.random.default_rng(0)).write(tmp_path)
    bank = Bank.read(tmp_path)
    assert not bank.sets and bank.recorded is None and not list(tmp_path.glob("recorded_*"))
