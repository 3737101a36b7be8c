"""dataset=table: what a bank made of the user's own file holds, and what is refused."""

import json
import resource
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rmsweep import component
from rmsweep.bank import Bank
from rmsweep.datasets import _rows, table
from rmsweep.errors import ConfigError, DataError

NATIVE = component.build("embedder", "native")


class Lengths:
    """An embedder that needs no fitting: D = 2, number of characters and of training texts."""

    kind = "lengths"

    def fit_embed(self, train, test, seed):
        return tuple(np.array([[len(r), len(train)] for _, r in side], dtype=np.float32) for side in (train, test))


def rows(counts=(3, 1, 2, 4), **extra):
    """One row per response; prompts interleaved so that order of appearance and grouping both matter."""
    made = [
        {"prompt": f"prompt {p}", "response": f"answer {p}.{i}", "golden_reward": p + i / 10}
        for i in range(max(counts))
        for p, n in enumerate(counts)
        if i < n
    ]
    return [{**row, **{k: f(row) for k, f in extra.items()}} for row in made]


def save(tmp_path, data, suffix=".parquet"):
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(data) if isinstance(data, list) else data, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return path


def make(path, **fields):
    return component.build("dataset", {"kind": "table", "path": str(path), **fields})


def bank_of(tmp_path, data, embedder=None, suffix=".parquet", **fields):
    dataset, embedder = make(save(tmp_path, data, suffix), **fields), embedder or Lengths()
    shape = dataset.shape(None, None, embedder)
    folder = tmp_path / "bank"
    folder.mkdir(exist_ok=True)
    dataset.generate(None, None, embedder, folder)
    bank = Bank.read(folder)
    np.testing.assert_array_equal(shape.count_train, bank.train.count)
    np.testing.assert_array_equal(shape.count_test, bank.test.count)
    assert shape.has_texts
    return bank


def refused(tmp_path, data, embedder=None, suffix=".parquet", **fields):
    with pytest.raises(DataError) as error:
        make(save(tmp_path, data, suffix), **fields).shape(None, None, embedder or Lengths())
    return str(error.value)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_every_response_lands_in_its_place(tmp_path, suffix):
    """Catches a reward, text or embedding attached to another response, and padding in the wrong place."""
    bank = bank_of(tmp_path, rows(), suffix=suffix, test_fraction=0.5)
    seen = []
    for split in (bank.train, bank.test):
        assert split.golden.dtype == np.float32 and split.n_responses == split.count.max()
        assert split.prompt_id == split.prompt == sorted(split.prompt)  # order of first appearance
        for p, prompt in enumerate(split.prompt):
            k = int(prompt.split()[1])
            assert split.response[p] == [f"answer {k}.{i}" for i in range(split.count[p])]
            wanted = [k + i / 10 for i in range(split.count[p])]
            np.testing.assert_allclose(split.golden[p, : split.count[p]], wanted, rtol=1e-6)
            assert np.isnan(split.golden[p, split.count[p] :]).all()
            assert (split.embedding[p, split.count[p] :] == 0).all()
            assert (split.embedding[p, : split.count[p], 0] == len("answer 0.0")).all()
            seen.append((k, int(split.count[p])))
    assert sorted(seen) == [(0, 3), (1, 1), (2, 2), (3, 4)]
    assert (bank.train.embedding[0, 0, 1]) == bank.train.count.sum()  # fitted on the training texts


def test_split_is_seeded_by_prompt_and_sized_as_asked(tmp_path):
    """Catches a prompt on both sides, a split that ignores its seed or depends on the cell's."""
    path = save(tmp_path, rows((2,) * 20))

    def ids(**fields):
        d = make(path, **fields)
        return [tuple(side.prompt) for side in d._sides(Lengths())]

    train, test = ids(n_train_prompts=12, n_test_prompts=5)
    assert len(train) == 12 and len(test) == 5 and not set(train) & set(test)
    assert ids(n_train_prompts=12, n_test_prompts=5, seed=9) == [train, test]
    assert ids(n_train_prompts=12, n_test_prompts=5, split_seed=1) != [train, test]
    assert [len(s) for s in ids()] == [15, 5]
    assert [len(s) for s in ids(n_train_prompts=12)] == [12, 8]
    assert [len(s) for s in ids(n_test_prompts=3)] == [17, 3]


def test_same_text_under_two_ids_never_straddles_the_split(tmp_path):
    """Catches leakage: prompts that differ in whitespace or Unicode form only, one on each side."""
    data = rows((2,) * 12, id=lambda r: int(r["prompt"].split()[1]))
    texts = ["caf\u00e9  one", "cafe\u0301 one\n"]
    for row in data:
        row["prompt"] = texts[row["id"] % 2] if row["id"] < 6 else row["prompt"]
    path = save(tmp_path, data)
    for seed in range(20):
        sides = make(path, prompt_id_column="id", split_seed=seed, n_train_prompts=4)._sides(Lengths())
        held = [any(int(i) < 6 for i in side.prompt_id) for side in sides]
        assert held != [True, True]


def test_where_selects_rows(tmp_path):
    """Catches a filter on the wrong column, any-instead-of-all, and True taken for 1."""
    data = rows(
        (4, 4, 4),
        flag=lambda r: "" if r["golden_reward"] % 1 < 0.15 else "x",
        n=lambda r: int(r["response"][-1]),
    )
    bank = bank_of(tmp_path, data, where={"flag": ""})
    assert bank.train.n_responses == 2 and bank.notes["rows_filtered_out"] == 6
    bank = bank_of(tmp_path, data, where={"flag": ["", "x"], "n": [1, 2, 3]})
    assert bank.train.response[0][0].endswith(".1") and bank.train.n_responses == 3
    message = refused(tmp_path, data, where={"flag": "none"})
    assert "matches none of 12 rows" in message and "flag holds '', 'x'" in message
    assert "matches none" in refused(tmp_path, data, where={"n": True})


def test_center_subtracts_the_mean_of_usable_responses(tmp_path):
    """Catches centring over rows that were filtered out, or over the split instead of the prompt."""
    data = rows((4, 4, 4), flag=lambda r: r["response"].endswith("3"))
    bank = bank_of(tmp_path, data, where={"flag": False}, center="prompt")
    for split in (bank.train, bank.test):
        np.testing.assert_allclose(split.golden, np.tile([-0.1, 0, 0.1], (split.n_prompts, 1)), atol=1e-6)


def test_empty_duplicates_and_limits(tmp_path):
    """Catches empty responses used silently, the last duplicate kept, limits applied before filters."""
    data = rows((4, 4, 4, 1))
    data[0]["response"], data[5]["response"] = " \n", data[1]["response"]
    message = refused(tmp_path, data)
    assert "row 0, column 'response'" in message and "dataset.empty=drop" in message
    kept = bank_of(tmp_path, data, empty="keep", test_fraction=0.3, contradictions="keep")
    assert sum(s.count.sum() for s in (kept.train, kept.test)) == 13 and kept.notes["duplicate_responses"] == 1
    noisy = {"contradictions": "keep", "duplicates": "drop"}
    dropped = bank_of(tmp_path, data, empty="drop", min_responses=2, n_train_prompts=2, **noisy)
    counts = {i: n for s in (dropped.train, dropped.test) for i, n in zip(s.prompt_id, s.count, strict=True)}
    assert counts == {"prompt 0": 3, "prompt 1": 3, "prompt 2": 4}
    assert dropped.notes["empty_dropped"] == 1 and dropped.notes["prompts_unused"] == 1
    first = {i: g[0] for s in (dropped.train, dropped.test) for i, g in zip(s.prompt_id, s.golden, strict=True)}
    assert first["prompt 1"] == pytest.approx(1.0)


def test_contradictory_duplicates(tmp_path):
    """Catches one response with two golden rewards used as if one were right; equal rewards are no contradiction."""
    data = rows((3, 3, 3))
    data[3]["response"] = data[0]["response"]
    message = refused(tmp_path, data)
    assert "1 problem " in message and "row 3, column 'golden_reward': 0.1; allowed: 0.0" in message
    assert "row 0" in message and "dataset.contradictions=keep" in message
    data[3]["golden_reward"] = data[0]["golden_reward"]
    bank_of(tmp_path, data)
    assert component.identity(make("a", contradictions="keep")) == component.identity(make("a"))


def test_ids_that_look_alike(tmp_path):
    """Catches two prompts made of one id in two Unicode forms."""
    data = rows((2, 2, 2), id=lambda r: ["caf\u00e9", "cafe\u0301", "x"][int(r["prompt"][-1])])
    message = refused(tmp_path, data, prompt_id_column="id")
    assert "1 problem " in message and "row 1, column 'id'" in message and "row 0" in message


def test_a_key_that_stands_twice(tmp_path):
    """Catches JSON of which the last of two golden rewards would silently count."""
    path = save(tmp_path, rows((2, 2)), ".jsonl")
    path.write_text(path.read_text() + '{"prompt": "p", "response": "r", "golden_reward": 1, "golden_reward": 2}\n')
    with pytest.raises(DataError, match=r"row 4 .*'golden_reward' stands twice"):
        make(path).shape(None, None, Lengths())


def test_files_that_would_fill_the_memory(tmp_path, monkeypatch):
    """Catches a small file of repeated text unpacked value by value, too many rows, and a line without end."""
    text = "x" * 5_000_000
    data = {"prompt": [f"p{i // 2}" for i in range(400)], "response": [text] * 400, "golden_reward": [0.5] * 400}
    path = save(tmp_path, pa.table(data))
    assert path.stat().st_size < 1_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(make(path).shape(None, None, Lengths()).count_train) == 150
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB; 2 GB when unpacked
    monkeypatch.setattr(_rows, "MAX_ROWS", 399)
    with pytest.raises(DataError, match="400 rows"):
        make(path, seed=1, where={"golden_reward": 0.5}).shape(None, None, Lengths())
    monkeypatch.setattr(_rows, "MAX_LINE", 50)
    line = save(tmp_path, [{**r, "response": r["response"] * 9} for r in rows((2, 2))], ".jsonl")
    with pytest.raises(DataError, match=r"row 0 .*longer than 50 bytes"):
        make(line).shape(None, None, Lengths())


def test_max_responses_is_a_random_choice_in_file_order(tmp_path):
    """Catches the first k taken: in a file sorted by reward those are the worst ones."""
    path = save(tmp_path, rows((10,) * 30))
    sides = [make(path, max_responses=3, seed=s)._sides(Lengths()) for s in (0, 0, 1)]
    chosen = [[r for side in pair for r in side.response] for pair in sides]
    assert chosen[0] == chosen[1] != chosen[2]
    last = np.array([int(r[-1]) for r in chosen[0]]).reshape(-1, 3)
    assert (np.diff(last, axis=1) > 0).all() and 3.5 < last.mean() < 5.5


def test_category_of_a_prompt(tmp_path):
    """Catches categories in another order than the prompts, and conflicting ones taken silently."""
    data = rows((2, 2, 2), kind=lambda r: f"kind {r['prompt'][-1]}")
    bank = bank_of(tmp_path, data, category_column="kind")
    assert bank.train.category == [f"kind {p[-1]}" for p in bank.train.prompt]
    data[4]["kind"] = "other"
    assert "row 4, column 'kind': 'other'" in refused(tmp_path, data, category_column="kind")


@pytest.mark.parametrize("kind", ["float32", "float16", "float64", "fixed"])
def test_embedding_column(tmp_path, monkeypatch, kind):
    """Catches embeddings of another row (batches, filters, ragged prompts), and fp16 blown up to fp32."""
    monkeypatch.setattr(table, "batches", lambda *a: _rows.batches(*a, size=3))
    data = rows((3, 1, 2, 4), flag=lambda r: not r["response"].endswith("1"))
    value = {row["response"]: [row["golden_reward"], float(i), 0.5] for i, row in enumerate(data)}
    types = {"fixed": pa.list_(pa.float32(), 3), "float16": pa.list_(pa.float16())}
    typ = types.get(kind, pa.list_(getattr(pa, kind)() if kind != "fixed" else pa.float32()))
    source = pa.Table.from_pylist(data)
    vectors = [
        [np.float16(v) for v in value[r["response"]]] if kind == "float16" else value[r["response"]] for r in data
    ]
    source = source.append_column("e", pa.array(vectors, typ))
    bank = bank_of(tmp_path, source, NATIVE, embedding_column="e", where={"flag": True}, test_fraction=0.5)
    for split in (bank.train, bank.test):
        assert split.embedding.dtype == (np.float16 if kind == "float16" else np.float32) and split.dim == 3
        for p in range(split.n_prompts):
            wanted = [value[r] for r in split.response[p]]
            np.testing.assert_allclose(split.embedding[p, : split.count[p]], wanted, rtol=1e-3)
            assert (split.embedding[p, split.count[p] :] == 0).all()


def test_embedding_column_decides_the_default_embedder(tmp_path):
    assert make("x.parquet").default_embedder == "lsa"
    assert make("x.parquet", embedding_column="e").default_embedder == "native"
    assert "embedding_column" in refused(tmp_path, rows(), NATIVE)
    assert "cannot embed" in refused(tmp_path, rows(), SimpleNamespace(kind="other"))


@pytest.mark.parametrize(
    ("value", "said"),
    [([1.0, 2.0], "2 numbers"), ([1.0, float("nan"), 0], "[1] = nan"), ([1.0, 1e39, 0], "inf"),
     (None, "missing"),
     (["a", "b", "c"], "a list of numbers"), ([], "a list of numbers")],
)  # fmt: skip
def test_bad_embeddings_are_refused(tmp_path, value, said):
    data = rows((2, 2), e=lambda r: [0.0, 1.0, 2.0])
    data[2]["e"] = value
    message = refused(tmp_path, data, NATIVE, ".jsonl", embedding_column="e")
    assert "row 2, column 'e'" in message and said in message


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_all_problems_at_once_with_row_and_column(tmp_path, suffix):
    """Catches a reader that stops at the first problem, and rows counted from elsewhere."""
    data = rows((3, 3, 3))
    data[1]["golden_reward"] = float("nan")
    data[2]["golden_reward"] = None
    data[3]["prompt"] = "  "
    data[4]["response"] = None
    data[5]["golden_reward"] = float("inf")
    data[6]["golden_reward"] = 1e39
    message = refused(tmp_path, data, suffix=suffix)
    for row, column in [
        (1, "golden_reward"),
        (2, "golden_reward"),
        (3, "prompt"),
        (4, "response"),
        (5, "golden_reward"),
        (6, "golden_reward"),
    ]:
        assert f"row {row}, column '{column}'" in message
    assert "7 problems" in message or "6 problems" in message
    assert f"data{suffix}" in message


def test_long_lists_of_problems_are_cut(tmp_path):
    data = [{**row, "golden_reward": "high"} for row in rows((50, 50))]
    message = refused(tmp_path, data)
    assert "100 problems" in message and "and 80 more" in message and len(message.splitlines()) == 22
    assert "'high'; allowed: a finite number" in message


def test_missing_column_names_the_nearest(tmp_path):
    message = refused(tmp_path, rows(), golden_column="golden_rewad", category_column="kind")
    assert "Did you mean 'golden_reward'?" in message and "'kind'" in message and "2 problems" in message
    assert "dataset.where.flga" in refused(tmp_path, rows(flag=lambda r: ""), where={"flga": ""})


def test_conflicting_prompt_ids_and_prompts_in_both_splits(tmp_path):
    """Catches two prompts merged under one id, and the same prompt to train and to test on."""
    data = rows((2, 2, 2), id=lambda r: r["prompt"], side=lambda r: "test" if r["prompt"][-1] == "2" else "train")
    bank = bank_of(tmp_path, data, split_column="side", prompt_id_column="id")
    assert bank.test.prompt_id == ["prompt 2"] and bank.train.prompt_id == ["prompt 0", "prompt 1"]
    data[3]["id"] = "prompt 1"
    message = refused(tmp_path, data, prompt_id_column="id")
    assert "row 3, column 'prompt': 'prompt 0'" in message and "as in row 1" in message
    data = rows((2, 2, 2), side=lambda r: "test" if r["response"] == "answer 1.1" else "train")
    assert "row 4, column 'side': 'test'" in refused(tmp_path, data, split_column="side")
    data = [{**r, "side": "test" if r["prompt"].endswith("1") else "train"} for r in rows((1, 1))]
    data[1]["prompt"] = " prompt  0"
    assert "same text" in refused(tmp_path, data, split_column="side")
    data[0]["side"] = "dev"
    assert "'dev'; allowed: train, test" in refused(tmp_path, data, split_column="side")


def test_too_few_prompts(tmp_path):
    message = refused(tmp_path, rows((2,) * 8), n_train_prompts=6, n_test_prompts=3)
    assert "8 usable prompts give 6 to train, 2 to test; needed: 6 and 3" in message
    assert "needed" in refused(tmp_path, rows((2,)))
    with pytest.raises(DataError, match="already says"):
        make(save(tmp_path, rows(s=lambda r: "train")), split_column="s", n_train_prompts=1).shape(
            None, None, Lengths()
        )


def test_unreadable_files(tmp_path):
    """Catches a traceback instead of a message."""
    cases = {
        "a.parquet": b"PAR1 no",
        "b.jsonl": b"",
        "c.csv": b"x",
        "d.jsonl": b"[1, 2]\n",
        "e.jsonl": b'{"prompt": \n',
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    for name in (*cases, "absent.parquet", "."):
        with pytest.raises(DataError):
            make(tmp_path / name).shape(None, None, Lengths())
    with pytest.raises(DataError, match=r"dataset\.path"):
        make("").inputs(None, None)
    lines = [json.dumps(row) for row in rows((2, 2))]
    lines[2:2] = ["", "{broken"]
    (tmp_path / "f.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"row 2 \(line 4\): no valid JSON"):
        make(tmp_path / "f.jsonl").shape(None, None, Lengths())


def test_strange_text(tmp_path):
    """NUL, direction marks and astral characters pass through; what UTF-8 cannot hold is refused."""
    data = rows((2, 2, 2))
    data[0]["response"] = "nul \x00 \u202e \U0001f600 \u2028 end"
    bank = bank_of(tmp_path, data, suffix=".jsonl")
    assert any(data[0]["response"] in r for s in (bank.train, bank.test) for r in s.response)
    data[1]["response"] = "half an emoji \ud83d"
    assert "row 1, column 'response'" in refused(tmp_path, data, suffix=".jsonl")
    binary = pa.Table.from_pylist(rows((2, 2))).to_pydict()
    texts = pa.array([b"good", b"bad \xff", b"good", b"good"], pa.binary()).view(pa.string())
    source = pa.table({**{k: pa.array(v) for k, v in binary.items()}, "response": texts})
    assert "row 1, column 'response'" in refused(tmp_path, source)


def test_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    """Catches parsing twice for shape and generate, and a stale cache after the file was replaced."""
    reads = []
    monkeypatch.setattr(table, "read_source", lambda t, real=table.read_source: reads.append(t) or real(t))
    path = save(tmp_path, rows((2,) * 8))
    for seed in range(3):
        make(path, split_seed=seed, center="prompt").shape(None, None, Lengths())
    assert len(reads) == 1
    save(tmp_path, rows((2,) * 9))
    assert make(path).shape(None, None, Lengths()).count_train.size == 7 and len(reads) == 2


def test_identity_leaves_out_paths_but_not_the_filter():
    """Catches a moved file that orphans results, and a filter that does not reach the fingerprint."""
    plain, moved = (component.identity(make(p)) for p in ("a.parquet", "b.parquet"))
    assert plain == moved != component.identity(make("a.parquet", where={"flag": ""}))
    with pytest.raises(ConfigError):
        make("a.parquet", where={"flag": {"sql": "1=1"}})
    with pytest.raises(ConfigError):
        make("a.parquet", test_fraction=1.0)


def test_bank_bytes_do_not_depend_on_the_run(tmp_path):
    """Two generations give the same bytes, file by file."""
    path = save(tmp_path, rows((5,) * 9))
    lsa = component.build("embedder", {"kind": "lsa", "dim": 8})
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        make(path).generate(None, None, lsa, folder)
        table._read.cache_clear()
    files = sorted(p.name for p in folders[0].iterdir())
    assert len(files) == 7 and files == sorted(p.name for p in folders[1].iterdir())
    assert all((folders[0] / f).read_bytes() == (folders[1] / f).read_bytes() for f in files)


def test_alpaca_eval_file(shared, tmp_path):
    """The real file: 600 + 205 prompts, 6 of them with 47 responses, 24 empty ones refused unless kept."""
    fields = {
        "golden_column": "golden_logit",
        "n_train_prompts": 600,
        "n_test_prompts": 205,
        "where": {"flag": ""},
        "contradictions": "keep",
    }
    dataset = make(shared / "data" / "alpaca_eval2_golden.parquet", **fields)
    with pytest.raises(DataError, match="24 problems"):
        dataset.shape(None, None, Lengths())
    kept = component.override(dataset, {"kind": "table", "empty": "keep"})
    counts = np.concatenate(kept.shape(None, None, Lengths())[:2])
    assert counts.size == 805 and (counts == 47).sum() == 6 and (counts == 48).sum() == 799
