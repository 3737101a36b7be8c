"""Released embeddings: both published layouts give the same bank, and nothing doubtful is guessed."""

import itertools
import pickle

import numpy as np
import pytest

from rmsweep import component
from rmsweep.bank import Bank
from rmsweep.cli import main
from rmsweep.datasets.released import Released
from rmsweep.errors import DataError
from rmsweep.presets import Presets
from rmsweep.results import load
from rmsweep.store import Store

NATIVE = component.build("embedder", "native")
LLM = component.build("base_llm", {"kind": "external", "name": "Gemma2b-sft"})
SIZES = {"train": (12, 4), "test": (9, 5)}
D = 6


def arrays(seed=0, sizes=SIZES):
    """Per split golden [P, N], sorted along N as in rank-major files, and embedding [P, N, D]."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            np.sort(rng.standard_normal((p, n)), axis=1).astype(np.float32),
            rng.standard_normal((p, n, D)).astype(np.float32),
        )
        for name, (p, n) in sizes.items()
    }


def save(folder, data, embedding="PND", reward="PN1"):
    for name, (golden, values) in data.items():
        stem = f"Gemma2b-sft_Gemma2b_Harmless_{name}.npy"
        np.save(folder / f"embd_{stem}", values if embedding == "PND" else values.transpose(1, 0, 2).copy())
        golden = golden.T if reward.startswith("NP") else golden
        np.save(folder / f"reward_{stem}", golden[..., None] if reward.endswith("1") else golden)
    return folder


def make(root, **fields):
    return component.build("dataset", {"kind": "released", "root": str(root), **fields})


def refused(root, **fields):
    with pytest.raises(DataError) as error:
        make(root, **fields).shape(LLM, None, NATIVE)
    return str(error.value)


@pytest.mark.parametrize(("embedding", "reward"), list(itertools.product(("PND", "NPD"), ("PN1", "PN", "NP", "NP1"))))
def test_layouts_give_the_same_bank(tmp_path, embedding, reward):
    """Catches a reward matched with the wrong embedding in any combination of the files' axes."""
    data = arrays()
    dataset = make(save(tmp_path, data, embedding, reward))
    shape = dataset.shape(LLM, None, NATIVE)
    assert shape.count_train.tolist() == [4] * 12 and shape.count_test.tolist() == [5] * 9 and not shape.has_texts
    (tmp_path / "bank").mkdir()
    dataset.generate(LLM, None, NATIVE, tmp_path / "bank")
    bank = Bank.read(tmp_path / "bank")
    for name, split in (("train", bank.train), ("test", bank.test)):
        np.testing.assert_array_equal(split.golden, data[name][0])
        np.testing.assert_array_equal(split.embedding, data[name][1])
        assert split.golden.dtype == np.float32 and split.prompt_id[0] == f"{name}-0" and split.response is None
        rows = np.array([1, split.n_responses, -1 % split.golden.size])
        np.testing.assert_array_equal(split.gather(rows), data[name][1].reshape(-1, D)[rows])
    assert not list((tmp_path / "bank").glob("embedding_*.npy"))  # referred to, not copied


def test_unsorted_rewards_are_fine_where_the_shape_decides(tmp_path):
    data = {name: (golden[:, ::-1], values) for name, (golden, values) in arrays().items()}
    assert len(make(save(tmp_path, data, "NPD", "NP")).shape(LLM, None, NATIVE).count_train) == 12


def test_equal_axes_are_ambiguous_unless_order_or_layout_says(tmp_path):
    """Catches a guess where P = N: prompts and responses would be swapped without a word."""
    data = arrays(sizes={"train": (5, 5), "test": (5, 5)})
    assert make(save(tmp_path, data, "NPD", "NP"))._sides(LLM)[0].layout == "NPD"
    assert make(save(tmp_path, data))._sides(LLM)[0].layout == "PND"
    rng = np.random.default_rng(0)
    data = {name: (rng.permuted(golden, axis=1), values) for name, (golden, values) in data.items()}
    message = refused(save(tmp_path, data))
    assert "equally long" in message and "dataset.layout=PND or NPD" in message and message.count("embd_") == 2
    golden = data["train"][0]
    np.testing.assert_array_equal(make(tmp_path, layout="NPD")._sides(LLM)[0].golden, golden.T)
    np.testing.assert_array_equal(make(tmp_path, layout="PND")._sides(LLM)[0].golden, golden)


def test_more_responses_than_prompts_in_rank_order(tmp_path):
    """Catches trusting the longer axis against the order of the rewards."""
    data = arrays(sizes={"train": (12, 4), "test": (3, 20)})
    assert "disagree" in refused(save(tmp_path, data, "NPD", "NP"))
    shape = make(save(tmp_path, data), layout="PND").shape(LLM, None, NATIVE)
    assert shape.count_test.tolist() == [20] * 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("embedding", ["PND", "NPD"])
def test_rewards_that_are_not_finite(tmp_path, bad, embedding):
    data = arrays()
    data["train"][0][7, 2] = data["test"][0][1, 3] = bad
    message = refused(save(tmp_path, data, embedding, "PN" if embedding == "PND" else "NP"))
    assert f"prompt 7, response 2: {bad}" in message and f"prompt 1, response 3: {bad}" in message


def test_embeddings_that_are_not_finite(tmp_path, monkeypatch):
    """A sample is looked at before any compute, every number when the bank is made."""
    monkeypatch.setattr("rmsweep.datasets.released.SAMPLE_RESPONSES", 2)
    monkeypatch.setattr("rmsweep.datasets.released.CHUNK_BYTES", 4 * D * 4 * 5)
    data = arrays()
    data["test"][1][6, 2, 1] = np.inf
    dataset = make(save(tmp_path, data, "NPD", "NP"))
    dataset.shape(LLM, None, NATIVE)
    with pytest.raises(DataError, match="prompt 6, response 2 holds NaN"):
        dataset.generate(LLM, None, NATIVE, tmp_path)
    data["train"][1][0, 0, 0] = np.nan
    assert "prompt 0, response 0 holds NaN" in refused(save(tmp_path, data))


def test_wrong_shapes_and_types(tmp_path):
    """Catches shapes that only broadcast, integer or object arrays, and splits of different D."""
    good = arrays()
    stem = "Gemma2b-sft_Gemma2b_Harmless"
    for file, array, said in (
        (f"reward_{stem}_train.npy", good["train"][0][:, :3], "must agree"),
        (f"reward_{stem}_train.npy", good["train"][0][0], "needed"),
        (f"reward_{stem}_train.npy", good["train"][0].astype(int), "floating"),
        (f"embd_{stem}_test.npy", good["test"][1].astype(np.float64), "float16 or float32"),
        (f"embd_{stem}_test.npy", good["test"][1][:, :, 0], "needed"),
        (f"embd_{stem}_test.npy", good["test"][1][:, :, :2], "must be equal"),
    ):
        np.save(save(tmp_path, good) / file, array)
        message = refused(tmp_path)
        assert said in message and file in message


def test_pickles_are_never_loaded(tmp_path):
    """An object-dtype .npy and a bare pickle are refused without being read."""

    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    path = save(tmp_path, arrays()) / "embd_Gemma2b-sft_Gemma2b_Harmless_train.npy"
    np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)
    assert "not a plain .npy" in refused(tmp_path)
    path.write_bytes(pickle.dumps(Trap()))
    assert "not a plain .npy" in refused(tmp_path)
    path.write_bytes(b"")
    assert "not a plain .npy" in refused(tmp_path)


def test_missing_files_and_names_that_look_like_paths(tmp_path):
    """Every missing file is named with what is there instead; a name cannot leave the folder."""
    message = refused(tmp_path / "none")
    assert message.count(".npy") == 4 and "is no folder" in message
    message = refused(save(tmp_path, arrays()), task="Helpful")
    assert message.count("no such file") == 1 and "embd_Gemma2b-sft_Gemma2b_Harmless_test.npy" in message
    with pytest.raises(DataError, match=r"dataset\.root"):
        make("").shape(LLM, None, NATIVE)
    outside = component.build("base_llm", {"kind": "external", "name": "../Gemma2b"})
    with pytest.raises(DataError, match="allowed are letters"):
        make(tmp_path).shape(outside, None, NATIVE)
    for name in ("../x", "/x", "", ".."):
        with pytest.raises(ValueError, match="task"):
            make(tmp_path, task=name)
    with pytest.raises(DataError, match="needs texts"):
        make(tmp_path).shape(LLM, None, component.build("embedder", "lsa"))


def test_presets_carry_the_scales_and_base_llms():
    presets = Presets()
    helpful, harmless = (
        component.build("dataset", presets.node("dataset", f"released_{t}")) for t in ("helpful", "harmless")
    )
    assert (helpful.reward_scale, harmless.reward_scale) == (6.0, 1.0) and len(helpful.base_llms) == 6
    assert set(helpful.base_llms) == set(harmless.base_llms) <= set(presets.options("base_llm"))
    names = [component.build("base_llm", presets.node("base_llm", option)).name for option in helpful.base_llms]
    assert names[:2] == ["Gemma2b", "Gemma2b-sft"] and len(set(names)) == 6


def run_released(root, data, *words):
    linear = ["reward_model=bt_linear", "base_llm=gemma2b_sft", "n_annotations=10", "pairs_per_prompt=2", "seed=0"]
    where = ["dataset=released_harmless", f"dataset.root={data}", f"root={root}", "sweep.name=s", "engine.workers=0"]
    return main(["run", *where, *linear, *words])


def test_a_file_that_changes_while_its_bank_is_made(tmp_path, monkeypatch, capsys):
    """Catches a result that is stored under the digest of a file which was not the one read."""
    data = save(tmp_path, arrays())
    generate = Released.generate

    def meanwhile(self, llm, size, embedder, folder):
        generate(self, llm, size, embedder, folder)
        save(data, arrays(seed=1))

    monkeypatch.setattr(Released, "generate", meanwhile)
    assert run_released(tmp_path / "out", data) == 2
    row = load(tmp_path / "out").iloc[0]
    assert row["status"] == "failed" and row["cause"] == "data" and "has changed since" in row["reason"]
    assert not list((tmp_path / "out" / "store" / "banks").iterdir())
    monkeypatch.undo()
    assert run_released(tmp_path / "out", data) == 0  # planned anew, with the new file


def test_embeddings_that_change_under_a_bank(tmp_path):
    """Catches a bank that serves other embeddings than it was made with: they lie outside the store."""
    data = save(tmp_path, arrays())
    assert run_released(tmp_path / "out", data) == 0
    store = Store(tmp_path / "out")
    bank_id = next((tmp_path / "out" / "store" / "banks").iterdir()).name
    assert store.bank(bank_id) is not None
    save(data, arrays(seed=1))
    assert Store(tmp_path / "out").bank(bank_id) is None
