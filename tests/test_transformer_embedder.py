"""embedder=transformer: against the model run by hand on one text, and what must be refused before it is run."""

import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from rmsweep import component
from rmsweep.bank import Bank
from rmsweep.cli import main
from rmsweep.embedders import transformer as embedder_file
from rmsweep.errors import ConfigError, DataError

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'transformers>=5.3,<6'")
import tokenizers  # noqa: E402
import torch  # noqa: E402

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PAIRS = [
    ("why?", "because of that"), ("a", "b"), ("a longer prompt, with words", "no"), ("x" * 40, "y" * 50),
    ("p", ""), ("same prompt", "one"), ("same prompt", "another answer to it"),
]  # fmt: skip


def save_tokenizer(folder, template=None):
    """One token per byte, `<s>` put before a text unless a template does."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    core.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )
    tokenizer.save_pretrained(folder)


def save_model(folder, family="llama", seed=0, template=None, positions=256, **changes):
    """A random model of two layers, D = 16."""
    size = {"vocab_size": 300, "max_position_embeddings": positions, **changes}
    wide = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(seed)
    if family == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**wide, **size))
    elif family == "gpt2":
        size["n_positions"] = size.pop("max_position_embeddings")
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, **size))
    else:
        model = transformers.BertForMaskedLM(transformers.BertConfig(**wide, **size))
    for name, weights in model.named_parameters():
        if "norm" not in name.lower() and "ln_" not in name:
            torch.nn.init.normal_(weights, std=0.3)  # as created, states of all texts are nearly equal
    model.save_pretrained(folder)
    save_tokenizer(folder, template)
    return folder


def make(folder, **fields):
    return component.build("embedder", {"kind": "transformer", "model": str(folder), **fields})


def embed(folder, pairs=PAIRS, **fields):
    """Embeddings of `pairs` as the training split."""
    return make(folder, **fields).fit_embed(pairs, PAIRS[:1], seed=0)[0]


def alone(folder, text, layer=-1, special=True):
    """Hidden states [T, D] of one text, unpadded."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(text, add_special_tokens=special)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0].numpy()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("chatty"), template=CHAT)


@pytest.fixture
def copy(llama, tmp_path):
    """A model's folder to spoil."""
    return shutil.copytree(llama, tmp_path / "copy")


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embedding_in_a_batch_is_that_of_the_text_alone(tmp_path, family, pooling):
    """Catches padding that is attended to or pooled, wrong positions, rows in another order, a prompt in the mean."""
    folder = save_model(tmp_path, family)
    found = embed(folder, pooling=pooling)
    assert found.shape == (len(PAIRS), 16) and found.dtype == np.float32
    for row, (prompt, response) in zip(found, PAIRS, strict=True):
        states = alone(folder, f"{prompt}\n\n{response}")
        n = max(1, len(response))  # one token per character; without any the last of the text stands in
        wanted = states[-1] if pooling == "last" else states[-n:].mean(axis=0)
        np.testing.assert_allclose(row, wanted, atol=1e-5)
    assert np.linalg.norm(found[0] - found[1]) > 0.1


@pytest.mark.parametrize("layer", [0, 1, 2, -1, -2, -3])
def test_layer_counts_from_the_embeddings_and_ends_after_the_norm(llama, layer):
    """Catches an off-by-one, and a last layer that is not the one a reward head would see."""
    np.testing.assert_allclose(
        embed(llama, layer=layer)[0], alone(llama, "why?\n\nbecause of that", layer)[-1], atol=1e-5
    )


def test_repeated_runs_give_the_same_bits_and_grouping_only_rounds(llama, monkeypatch):
    """Catches dropout, chance, and windows or batches that mix up rows."""
    rng = np.random.default_rng(0)
    pairs = [(f"prompt {i}", "w" * int(n)) for i, n in enumerate(rng.integers(1, 60, 40))]
    first = embed(llama, pairs)
    assert first.tobytes() == make(llama).fit_embed(pairs, PAIRS, seed=9)[0].tobytes()
    np.testing.assert_allclose(embed(llama, pairs[::-1])[::-1], first, atol=1e-5)
    monkeypatch.setattr(embedder_file, "WINDOW_TEXTS", 7)
    np.testing.assert_allclose(embed(llama, pairs, batch_tokens=1), first, atol=1e-5)


def test_one_thread_inside_and_what_was_before_afterwards(llama, monkeypatch):
    """Catches bits that depend on the machine's number of cores."""
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(embedder_file, "_embed", lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        embed(llama)
        assert seen == [1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_batches_hold_every_text_once_within_the_budget():
    """Catches a text that is lost between batches, and memory that grows with the batch."""
    lengths = np.random.default_rng(0).integers(1, 90, 200).tolist()
    batches = list(embedder_file._batches(lengths, 512))
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    assert all(len(b) * max(lengths[i] for i in b) <= 512 for b in batches) and len(batches) < 30
    assert [len(b) for b in embedder_file._batches([500, 3], 10)] == [1, 1]


def test_long_texts_lose_the_beginning_of_their_prompt(llama, capsys):
    """Catches a response that is cut, a lost <s>, and cuts that nobody is told of."""
    pairs = [("p" * 30, "the answer"), ("q", "short"), ("", "r" * 40)]
    found = embed(llama, pairs, max_length=20, pooling="mean")
    said = capsys.readouterr().err
    assert "2 of 3 texts were longer than 20 tokens" in said
    kept = alone(llama, "p" * 7 + "\n\nthe answer")
    np.testing.assert_allclose(found[0], kept[-10:].mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found[1], embed(llama, pairs[1:2], pooling="mean")[0], atol=1e-5)
    np.testing.assert_allclose(found[2], alone(llama, "r" * 19)[1:].mean(axis=0), atol=1e-5)
    assert embed(llama, pairs, max_length=2).shape == (3, 16)


def test_positions_of_the_model_cut_by_default(tmp_path):
    """Catches an index beyond the position table: GPT-2 has no more than it was trained with."""
    folder = save_model(tmp_path, "gpt2", positions=32)
    found = embed(folder, [("p" * 100, "end")])
    np.testing.assert_allclose(found[0], alone(folder, "p" * 26 + "\n\nend")[-1], atol=1e-5)


def test_chat_template_is_used_where_there_is_one(llama, chatty):
    """Catches a second <s>, a prompt without its turn, and a response that begins inside the header."""
    text = "<s>[user]why?</s>[assistant]because of that</s>"
    states = alone(chatty, text, special=False)
    np.testing.assert_allclose(embed(chatty)[0], states[-1], atol=1e-5)
    np.testing.assert_allclose(embed(chatty, pooling="mean")[0], states[-16:].mean(axis=0), atol=1e-5)
    assert np.array_equal(embed(chatty), embed(chatty, format="chat"))
    np.testing.assert_array_equal(embed(chatty, format="plain"), embed(llama))
    with pytest.raises(DataError, match=r"embedder\.format=chat: this tokenizer has no chat template"):
        embed(llama, format="chat")


def test_template_sees_no_clock_and_may_open_a_thought(tmp_path):
    """Catches embeddings that change at midnight, and a generation prompt that holds more than a finished turn."""
    dated = "{{ strftime_now('%d %B') }}|" + CHAT.replace("[assistant]{% endif", "[assistant]<think>{% endif")
    folder = save_model(tmp_path, template=dated)
    states = alone(folder, "26 Jul 2024|<s>[user]why?</s>[assistant]because of that</s>", special=False)
    np.testing.assert_allclose(embed(folder, pooling="mean")[0], states[-16:].mean(axis=0), atol=1e-5)


def test_template_that_fails_and_unpaired_odd_texts(tmp_path):
    """Catches a traceback from Jinja, and NaN from texts of few or many bytes."""
    folder = save_model(tmp_path, template="{{ raise_exception('system turn missing') }}")
    with pytest.raises(DataError, match=r"system turn missing.*embedder\.format=plain"):
        embed(folder)
    odd = [("", ""), ("\x00", "\U0001f600"), ("caf\u00e9", "\u4e2d\u6587 " * 5), ("p", "</s><pad>")]
    for pooling in ("last", "mean"):
        assert np.isfinite(embed(folder, odd, format="plain", pooling=pooling)).all()


def test_precision_and_storage(llama):
    """Catches bf16 that is not used, a half that loses more than its rounding, and infinity in a bank."""
    full, half, brain = embed(llama), embed(llama, stored="fp16"), embed(llama, dtype="bf16")
    assert half.dtype == np.float16 and brain.dtype == np.float32
    np.testing.assert_array_equal(half, full.astype(np.float16))
    assert 1e-4 < np.abs(brain - full).max() < 0.3
    with pytest.raises(DataError, match=r"text 3 holds 1e\+05.*embedder\.stored=fp32"):
        embedder_file._checked_cast(np.array([[1.0], [1e5]], dtype=np.float32), np.float16, np.array([2, 3]))


# -- identity ----------------------------------------------------------------------------------------------


def test_inputs_are_the_files_that_decide_numbers(copy):
    """Catches weights, tokenizer or template outside the identity, and notes of a trainer inside."""
    (copy / "generation_config.json").write_text("{}")
    (copy / "chat_template.jinja").write_text(CHAT)
    (copy / "README.md").write_text("x")
    names = set(make(copy).inputs())
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == {f"embedder/{name}" for name in files}


def test_identity_holds_what_changes_numbers_only(llama):
    """Catches a path in the identity, and a setting that is left out of it."""
    base = component.identity(make(llama))
    for same in ({"device": "cpu"}, {"model": "elsewhere"}, {"revision": "main"}):
        assert component.identity(component.build("embedder", {"kind": "transformer", **same})) == base
    for other in (
        {"pooling": "mean"}, {"layer": -2}, {"format": "plain"}, {"dtype": "bf16"}, {"stored": "fp16"},
        {"max_length": 9}, {"batch_tokens": 9},
    ):  # fmt: skip
        assert component.identity(make(llama, **other)) != base


def test_planning_loads_no_library(llama):
    """Catches seconds of imports before every command, and torch in the driver."""
    code = (
        "import sys; from rmsweep import component; "
        f"e = component.build('embedder', {{'kind': 'transformer', 'model': {str(llama)!r}}}); "
        "assert e.inputs() and e.dim == 16; "
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "[]", found.stderr


def test_dim_is_that_of_the_config(llama, tmp_path):
    """Catches a plan that cannot say how large the bank is, and one that fails where the model is not."""
    assert make(llama).dim == 16 and make(save_model(tmp_path, "gpt2")).dim == 16
    assert getattr(make(tmp_path / "no"), "dim", 0) == 0


# -- refusals ----------------------------------------------------------------------------------------------


def refused(folder, **fields):
    with pytest.raises(DataError) as error:
        make(folder, **fields).inputs()
    return str(error.value)


def test_every_problem_of_a_folder_is_named(copy):
    """Catches pickled weights being read, an adapter taken for a model, and problems told one at a time."""
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    (copy / "tokenizer.json").unlink()
    (copy / "adapter_config.json").write_text("{}")
    edit_json(copy / "config.json", quantization_config={"quant_method": "gptq"}, is_encoder_decoder=True)
    message = refused(copy)
    for part in ("5 problems", "only pytorch_model.bin", "safe_serialization", "no tokenizer", "quantization_config",
                 "encoder-decoder", "merge_and_unload"):  # fmt: skip
        assert part in message
    (copy / "config.json").write_text("[1]")
    assert "needed: a JSON object" in refused(copy)
    (copy / "config.json").unlink()
    assert "no config.json" in refused(copy)


def test_shards_must_be_there_and_in_the_folder(copy):
    """Catches weights outside the digests, and a download that broke off."""
    (copy / "model.safetensors").rename(copy / "a.safetensors")
    shards = {"x": "a.safetensors", "y": "b.safetensors", "z": "../c.safetensors", "w": "d.bin"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    message = refused(copy)
    assert "3 problems" in message and "names b.safetensors, which is missing" in message
    assert "names '../c.safetensors'; allowed" in message and "names 'd.bin'; allowed" in message


def test_limits_of_the_model(llama):
    """Catches an index error in the middle of a run."""
    assert "embedder.max_length=257: this model has 256 positions" in refused(llama, max_length=257)
    assert "embedder.layer=3: this model has 2 layers" in refused(llama, layer=3)
    assert "embedder.layer=-4" in refused(llama, layer=-4)
    make(llama, max_length=256, layer=-3).inputs()
    with pytest.raises(ConfigError, match="max_length"):
        make(llama, max_length=1)


def test_names_that_lead_nowhere(tmp_path, monkeypatch, llama):
    """Catches a download nobody asked for, and a message that does not say what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "embedder.model is not set" in refused("")
    assert "no such folder, and no name of the hub" in refused("/no/such/folder")
    assert "hf download owner/name " in refused("owner/name")
    assert "hf download owner/name --revision abc" in refused("owner/name", revision="abc")
    assert "not in the local Hugging Face cache" in refused("a--b")
    assert "leave it null" in refused(llama, revision="main")
    with pytest.raises(ConfigError, match="revision"):
        make("owner/name", revision="../../etc")


def test_hub_name_stands_for_the_cached_snapshot(llama, tmp_path, monkeypatch):
    """Catches a revision that is ignored."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, commits = tmp_path / "models--owner--name", ("a" * 40, "b" * 40)
    for commit in commits:
        shutil.copytree(llama, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[0])
    for revision, commit in ((None, commits[0]), ("main", commits[0]), (commits[1], commits[1])):
        files = make("owner/name", revision=revision).inputs()
        assert files["embedder/config.json"].parent == repository / "snapshots" / commit
    np.testing.assert_array_equal(embed("owner/name"), embed(llama))


def test_missing_library_says_what_to_install(llama, monkeypatch):
    """Catches an ImportError with a traceback."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "transformers" else real(n, *a))
    assert "pip install 'transformers>=5.3,<6'" in refused(llama)


def test_missing_weights_are_refused(copy):
    """Catches layers that transformers fills at random, new ones in every run."""
    edit_json(copy / "config.json", num_hidden_layers=3)
    with pytest.raises(DataError, match=r"weights lack layers\.2\..*would be random"):
        embed(copy)


def test_code_beside_the_weights_is_never_run(copy, tmp_path):
    """Catches trust_remote_code, however the config asks for it."""
    marker = tmp_path / "marker"
    (copy / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
    auto_map = {"AutoConfig": "evil.C", "AutoModel": "evil.C", "AutoTokenizer": ["evil.C", "evil.C"]}
    edit_json(copy / "config.json", auto_map=auto_map, trust_remote_code=True)
    edit_json(copy / "tokenizer_config.json", auto_map=auto_map, trust_remote_code=True)
    assert embed(copy).shape == (len(PAIRS), 16)  # transformers has this model itself
    edit_json(copy / "config.json", model_type="unheard_of")
    with pytest.raises(DataError, match="transformers cannot load it"):
        embed(copy)
    assert not marker.exists()


def test_truncated_weights_are_bad_data(copy):
    """Catches a library's own error without the folder's name."""
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"{copy}: transformers cannot load it"):
        embed(copy)


# -- the whole way -----------------------------------------------------------------------------------------


def responses(path):
    """Forty prompts, three responses each; longer ones are better."""
    rows = [
        {"prompt": f"question {p}", "response": "good " * (1 + (p + i) % 5), "golden_reward": float((p + i) % 5)}
        for p in range(40)
        for i in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(tmp_path, model, *words):
    return main(
        ["run", "dataset=table", f"dataset.path={tmp_path / 'data.jsonl'}", "embedder=transformer", "base_llm=table",
         f"embedder.model={model}", "reward_model=bt_linear", "n_annotations=20", f"root={tmp_path / 'out'}",
         "sweep.name=frozen", *words]
    )  # fmt: skip


def test_command_line_trains_on_frozen_embeddings(llama, tmp_path, capsys):
    """Catches a bank that is not made of this model's embeddings, and one that outlives a change of the weights."""
    responses(tmp_path / "data.jsonl")
    assert run(tmp_path, llama) == 0
    results = pd.read_parquet(tmp_path / "out" / "sweeps" / "frozen" / "results.parquet")
    assert results["status"].tolist() == ["done"] and results["embedder"].tolist() == ["transformer"]
    (folder,) = (tmp_path / "out" / "store" / "banks").iterdir()
    bank = Bank.read(folder)
    pairs = [(bank.train.prompt[0], text) for text in bank.train.response[0]]
    np.testing.assert_allclose(bank.train.embedding[0, :3], embed(llama, pairs), atol=1e-5)

    moved = shutil.copytree(llama, tmp_path / "moved")
    assert run(tmp_path, moved, "engine.workers=0") == 0
    assert len(list(folder.parent.iterdir())) == 1  # the same model elsewhere
    save_model(moved, seed=1)
    assert run(tmp_path, moved, "engine.workers=0") == 0
    assert len(list(folder.parent.iterdir())) == 2  # another model in the same place


def test_bad_model_is_bad_input(tmp_path, capsys):
    """Catches a sweep that starts, and a traceback."""
    responses(tmp_path / "data.jsonl")
    assert run(tmp_path, tmp_path / "nowhere") == 1
    said = capsys.readouterr().err
    assert "no such folder" in said and "Traceback" not in said
