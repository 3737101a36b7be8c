"""What a stranger sends: files, names, plans and environments that must be refused, or do no harm."""

import ast
import hashlib
import io
import json
import os
import pickle
import re
import tracemalloc
from dataclasses import make_dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import random_bank

from rmsweep import component, presets
from rmsweep.bank import Bank, open_npy
from rmsweep.cli import main
from rmsweep.cli.terminal import Escaped, spreadsheet_safe
from rmsweep.errors import ConfigError, DataError
from rmsweep.fingerprint import sealed, unsealed
from rmsweep.paths import user_path
from rmsweep.text import printable

ROOT = Path(__file__).resolve().parents[1]
CELL = ("size=tiny", "reward_model=bt_linear", "n_annotations=40", "device=cpu", "precision=fp32", "engine.workers=0")
BANNED_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
BANNED_CALLS = {
    "eval", "exec", "torch.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "np.load",
    "numpy.load", "pd.read_pickle", "hydra.utils.instantiate", "OmegaConf.register_new_resolver",
}  # fmt: skip
SAFE_LOADERS = {"_Loader", "yaml.SafeLoader", "yaml.CSafeLoader"}


# -- source ------------------------------------------------------------------------------------------------


def offences(text):
    """Lines of a source that could execute what was read."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: import {n}" for n in names if n.partition(".")[0] in BANNED_MODULES)
        if isinstance(node, ast.Call):
            called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            bad = called in BANNED_CALLS and keywords.get("allow_pickle") != "False"
            bad |= called == "yaml.load" and keywords.get("Loader") not in SAFE_LOADERS
            bad |= keywords.get("shell", "False") != "False" or keywords.get("trust_remote_code", "False") != "False"
            bad |= keywords.get("allow_pickle", "False") != "False"
            if bad:
                yield f"{node.lineno}: {called}"


@pytest.mark.parametrize("folder", ["rmsweep", "scripts"])
def test_no_source_executes_data(folder):
    """Catches pickle and its kin, eval, shells and unsafe loaders anywhere in the package and the scripts."""
    found = {str(path.relative_to(ROOT)): list(offences(path.read_text())) for path in (ROOT / folder).rglob("*.py")}
    assert len(found) > 5 and not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from joblib import load", "np.load(x)", "np.load(x, allow_pickle=True)", "torch.load(x)",
     "eval(x)", "yaml.load(x)", "yaml.load(x, Loader=yaml.Loader)", 
     "f(trust_remote_code=True)", "subprocess.run(x, shell=True)",
     "os.system(x)", "open_memmap(x, allow_pickle=1)"],
)  # fmt: skip
def test_the_lint_sees(text):
    """The rule above on one offence each."""
    assert list(offences(text))
    assert not list(offences("np.load(x, allow_pickle=False); yaml.load(x, Loader=_Loader); f(shell=False)"))


# -- arrays and banks --------------------------------------------------------------------------------------


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def header(text):
    body = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + b"\0" * 64


def npy(**fields):
    described = {"descr": "'<f4'", "fortran_order": "False", "shape": "(4, 4)", **fields}
    return header("{" + ", ".join(f"'{k}': {v}" for k, v in described.items()) + "}")


def _bad_npy():
    yield "claims 2^60", npy(shape="(1152921504606846976,)"), "bytes; the file holds 64"
    yield "wraps around", npy(shape="(4294967296, 4294967296, 4)"), "the file holds 64"
    yield "negative", npy(shape="(-1, 4)"), "shape"
    yield "code", npy(shape="__import__('os').getpid()"), "not a plain .npy"
    yield "nested", npy(shape="(" * 300 + ")" * 300), "not a plain .npy"
    yield "objects", npy(descr="'|O'"), "never loaded"
    yield "record of objects", npy(descr="[('a', '|O')]", shape="(1,)"), "never loaded"
    yield "pickle", pickle.dumps(Trap()), "not a plain .npy"
    yield "empty", b"", "not a plain .npy"
    archive = io.BytesIO()
    np.savez(archive, a=np.zeros(3))
    yield "npz", archive.getvalue(), "not a plain .npy"
    with io.BytesIO() as handle:
        np.save(handle, np.array([Trap()], dtype=object), allow_pickle=True)
        yield "object array", handle.getvalue(), "never loaded"


@pytest.mark.parametrize(("content", "message"), [c[1:] for c in _bad_npy()], ids=[c[0] for c in _bad_npy()])
def test_bad_npy_files(tmp_path, content, message):
    """Catches code run by a header or a pickle, an archive taken for an array, memory asked for by a claim."""
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_npy(tmp_path / "x.npy")
    assert "x.npy" in str(caught.value)


def test_what_is_no_file(tmp_path):
    """Catches a reader that waits for ever for a named pipe, or trips over a folder or a dangling link."""
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "link.npy").symlink_to(tmp_path / "gone")
    for name in ("pipe.npy", "folder.npy", "link.npy"):
        with pytest.raises(DataError, match="not a regular file"):
            open_npy(tmp_path / name)
    os.mkfifo(tmp_path / "own.yaml")
    with pytest.raises(ConfigError, match="not a regular file"):
        presets.read_yaml(tmp_path / "own.yaml")
    for suffix in (".parquet", ".jsonl"):
        os.mkfifo(tmp_path / f"pipe{suffix}")
        table = component.build("dataset", {"kind": "table", "path": str(tmp_path / f"pipe{suffix}")})
        with pytest.raises(DataError, match="not a regular file"):
            table.inputs(None, None)


@pytest.fixture
def folder(tmp_path):
    random_bank(np.random.default_rng(0), p=6, n=3, q=4, m=3, d=2).write(tmp_path / "bank")
    return tmp_path / "bank"


def refused(folder):
    dataset = component.build("dataset", {"kind": "folder", "path": str(folder)})
    with pytest.raises(DataError) as caught:
        dataset.shape(None, None, None)
    return str(caught.value)


def test_a_sound_folder_passes(folder):
    """The tests below start from a bank that is accepted."""
    shape = component.build("dataset", {"kind": "folder", "path": str(folder)}).shape(None, None, None)
    assert shape.count_train.tolist() == [3] * 6 and not shape.has_texts


def test_all_problems_of_a_folder_at_once(folder):
    """Catches a check that stops at the first bad value or the first split."""
    for name, place in (("golden_train", (1, 2)), ("golden_test", (0, 0)), ("embedding_train", (5, 0, 1))):
        array = np.load(folder / f"{name}.npy", allow_pickle=False)
        array[place] = np.inf
        np.save(folder / f"{name}.npy", array)
    pq.write_table(pa.table({"prompt_id": ["a", "a", "b", "test-1", "d", "e"]}), folder / "prompts_train.parquet")
    message = refused(folder)
    assert "5 problems" in message and str(folder) in message
    for part in ("golden_train[1, 2] is inf", "golden_test[0, 0] is inf", "embedding_train[5, 0]", "'a' occurs more",
                 "'test-1' is in train and in test"):  # fmt: skip
        assert part in message


def test_all_unreadable_files_of_a_folder_at_once(folder):
    """Catches a check that opens the second file only when the first is sound."""
    (folder / "golden_train.npy").write_bytes(b"x")
    (folder / "embedding_test.npy").unlink()
    (folder / "prompts_test.parquet").write_bytes(b"PAR1")
    (folder / "bank.json").write_text("[" * 5000)
    (folder / "reference_train.json").write_text('{"path": "/etc/passwd", "layout": "PND"}')
    (folder / "a\nb").write_text("x")
    message = refused(folder)
    for part in (
        "golden_train.npy",
        "embedding_test.npy",
        "prompts_test.parquet",
        "bank.json",
        "reference_train",
        "'a\\nb'",
    ):
        assert part in message
    assert "6 problems" in message


def test_leaks_between_the_splits(folder):
    """Catches one prompt on both sides, hidden by whitespace or Unicode form, in ids or in texts."""
    for ids, texts, part in (
        (["caf\u00e9", "b"], None, "'caf\\xe9' is in"),
        (["x", "b"], ["one  two", "z"], "prompt 'one two'"),
    ):
        for name, n in (("train", 6), ("test", 4)):
            own = [f"{name}{i}" for i in range(n)]
            own[0] = ids[0] if name == "train" else ids[0].replace("\u00e9", "e\u0301") if not texts else "y"
            columns = {"prompt_id": own}
            if texts:
                columns["prompt"] = [texts[0] if name == "train" else " one\ttwo", *own[1:]]
            pq.write_table(pa.table(columns), folder / f"prompts_{name}.parquet")
        message = refused(folder)
        assert part in message and "1 problem" in message


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"prompt_id": [1, 2, 3, 4, 5, 6]}, "has type int64; allowed: text"),
     ({"prompt_id": ["a"]}, "1 rows for 6 prompts"), ({"id": list("abcdef")}, "needed: prompt_id"),
     ({"prompt_id": [None, *"bcdef"]}, r"prompt_id_train\[0\]: missing"),
     ({"prompt_id": list("abcdef"), "response": list("abcdef")}, "lists of text"),
     ({"prompt_id": list("abcdef"), "response": [["x"] * 3] * 5 + [None]}, "one text per response"),
     ({"prompt_id": list("abcdef"), "prompt": [1.0] * 6}, "'prompt' has type double")],
)  # fmt: skip
def test_bad_prompts_of_a_folder(folder, columns, message):
    """Catches ids that are no text, texts of another number, and types that nothing downstream expects."""
    pq.write_table(pa.table(columns), folder / "prompts_train.parquet")
    assert re.search(message, refused(folder))


def test_memory_stays_near_the_files_size(tmp_path):
    """Catches a check that copies embeddings as a whole: a bank four times the memory it may take."""
    p, n, d = 4000, 10, 400
    golden, rng = np.zeros((p, n), np.float32), np.random.default_rng(0)
    bank = Bank.from_arrays(
        golden, np.zeros((p, n, d), np.float16), rng.normal(size=(2, 3)), np.zeros((2, 3, d), np.float16)
    )
    bank.write(tmp_path / "bank")
    size = (tmp_path / "bank" / "embedding_train.npy").stat().st_size
    tracemalloc.start()
    component.build("dataset", {"kind": "folder", "path": str(tmp_path / "bank")}).shape(None, None, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * size


def test_an_extension_type_is_not_unpickled(tmp_path):
    """Catches CVE-2023-47248: Parquet metadata that is a pickle."""
    marker = tmp_path / "ran"

    class Evil(pa.ExtensionType):
        def __init__(self):
            super().__init__(pa.string(), "arrow.py_extension_type")

        def __arrow_ext_serialize__(self):
            return pickle.dumps((os.system, f"touch {marker}"))

        @classmethod
        def __arrow_ext_deserialize__(cls, storage, data):
            marker.write_text("x")
            return cls()

    columns = {"prompt": ["a", "a", "b", "b"], "golden_reward": [1.0, 2.0, 1.0, 2.0]}
    text = pa.ExtensionArray.from_storage(Evil(), pa.array(["p", "q", "r", "s"]))
    pq.write_table(pa.table({**columns, "response": text}), tmp_path / "x.parquet")
    table = component.build("dataset", {"kind": "table", "path": str(tmp_path / "x.parquet")})
    table.shape(None, None, component.build("embedder", "lsa"))  # its storage is text: taken as that
    assert not marker.exists()


# -- names and words ---------------------------------------------------------------------------------------

HOSTILE = [
    "../../etc",
    "/etc/x",
    "~",
    "C:\\x",
    "%2e%2e",
    ".",
    "..",
    "x" * 300,
    "\u202ex",
    "a b",
    "a\nb",
    "\x1b[2J",
    "=1+1",
    "a/b",
    "",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_of_a_sweep(name, tmp_path, capsys, monkeypatch):
    """Catches a sweep whose folder lies elsewhere, and a name that reaches the terminal as it is."""
    monkeypatch.chdir(tmp_path)
    quoted = name.replace("\\", "\\\\")
    assert main(["run", *CELL, f"root={tmp_path / 'root'}", f"sweep.name='{quoted}'"]) == 1
    captured = capsys.readouterr()
    assert not list(tmp_path.iterdir()) and "\x1b" not in captured.err + captured.out and captured.err.count("\n") == 1


def test_hostile_texts_in_data_are_never_names(tmp_path, monkeypatch):
    """Catches an id, category or text of a table that becomes a path: only known files appear."""
    monkeypatch.chdir(tmp_path)
    ids = [name for name in HOSTILE if name.strip() and name != "a b"]  # which "a\nb" would be taken for
    rows = [{"prompt": f"{p} {name}", "id": name, "kind": name, "response": f"{name} {i}", "golden_reward": i * 1.0}
            for p, name in enumerate(ids) for i in range(3)]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "dataset=table",
        f"dataset.path={tmp_path / 'data.jsonl'}",
        "dataset.prompt_id_column=id",
        "base_llm=table",
    ]
    code = main(
        [
            "run",
            *CELL[1:2],
            *CELL[3:],
            "n_annotations=5",
            *words,
            "dataset.category_column=kind",
            f"root={tmp_path / 'root'}",
        ]
    )
    assert code == 0
    names = {part for path in tmp_path.rglob("*") for part in path.relative_to(tmp_path).parts}
    assert not names & set(ids) and all(name.isascii() and name.isprintable() and " " not in name for name in names)
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "root"}


@pytest.mark.parametrize("text", ["a\0b", "x" * 5000, "~nobody_here/x", "", "  ", "\ud800"])
def test_paths_that_nothing_can_have(text, tmp_path, capsys):
    """Catches a traceback of the system's own for a path of the user's."""
    with pytest.raises(ConfigError, match="root="):
        user_path(text, "root")
    for verb in ("status", "results", "retry"):
        assert main([verb, f"root={text}"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_what_is_printed_cannot_drive_the_terminal():
    """Catches escapes, carriage returns, direction marks and lone surrogates let through; and plain text changed."""
    text = "\x1b[2J a\rb \u202e \u2066 \x9b \x07 \ud800 \x7f"
    assert printable(text) == "\\x1b[2J a\\rb \\u202e \\u2066 \\x9b \\x07 \\ud800 \\x7f"
    plain = "caf\u00e9 \U0001f600 ± 1\n\t\u4e2d"
    assert printable(plain) == plain
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print("\r10% \x1b ± \ud800", file=Escaped(stream), flush=True)
    assert stream.buffer.getvalue() == b"\r10% \\x1b \\xb1 \\ud800\n"


def test_csv_cells_are_no_formulas():
    """Catches a text that a spreadsheet would execute, a number that was changed, and a formula as a column's name."""
    texts = ["=cmd|' /C calc'!A0", "+1+1", "-1", "@SUM(A1)", "\tx", "plain", None]
    frame = pd.DataFrame({"text": texts, "number": [-1.5, 2, -3, 4, 5, 6, 7], "=1": ["[1, 2]"] * 7})
    safe = spreadsheet_safe(frame)
    assert safe["text"].fillna("").tolist() == ["'=cmd|' /C calc'!A0", "'+1+1", "-1", "'@SUM(A1)", "'\tx", "plain", ""]
    assert safe["number"].tolist() == frame["number"].tolist() and list(safe) == ["text", "number", "'=1"]
    assert frame["text"].tolist()[:5] == texts[:5]


# -- configs -----------------------------------------------------------------------------------------------

PAYLOADS = {
    "python object": "!!python/object/apply:os.system ['touch ran']", "python name": "!!python/name:os.system",
    "tag": "!x 1", "harmless tag": "!!str 1", "binary": "!!binary aGk=", "alias": "[&x 1, *x]",
    "merge": "{<<: {kind: mlp}, b: 1}",
    "environment": "'${oc.env:HOME}'", "resolver": "'${eval:1}'", "target": "{_target_: os.system}",
    "huge number": "9" * 5000,
    "beyond 64 bits": "9" * 30, "deep": "[" * 50 + "]" * 50, "very deep": "[" * 3000,
    "NUL": '"a\\0b"', "surrogate": '"\\ud800"',
    "number as key": "{1: 2}", "null as key": "{null: 1}", "twice": "{a: 1, a: 2}", "list as key": "{[1]: 2}",
}  # fmt: skip


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
@pytest.mark.parametrize(
    "shape", ["%s\n", "kind: linear\nobjective: %s\n", "kind: {a: [{b: %s}]}\n"], ids=["top", "field", "deep"]
)
def test_payloads_in_yaml(tmp_path, capsys, monkeypatch, shape, payload):
    """Catches a payload that is read as something, at any depth; a merge key is an unknown key."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "reward_model").mkdir(parents=True)
    (tmp_path / "conf" / "reward_model" / "own.yaml").write_text(shape.replace("%s", payload))
    assert main(["plan", "size=tiny", "reward_model=own", "--config-dir", "conf", "device=cpu"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("rmsweep: ") and len(error) < 3000
    assert {path.name for path in tmp_path.iterdir()} == {"conf"}


def test_yaml_is_read_as_hydra_reads_it(tmp_path):
    """Catches dates, base-60 and octal numbers, which are words here; a byte order mark is no part of a key."""
    (tmp_path / "x.yaml").write_bytes(
        b"\xef\xbb\xbfa: 2020-01-01\nb: 1:30\nc: 010\nd: -3\ne: 1_000\nf: -1.5e3\ng: .nan\nh: ~\n"
    )
    data = presets.read_yaml(tmp_path / "x.yaml")
    assert data.pop("g") != 0 and data == {
        "a": "2020-01-01", "b": "1:30", "c": "010", "d": -3, "e": 1000, "f": -1500.0, "h": None,
    }  # fmt: skip


def test_many_keys_are_read_quickly(tmp_path):
    """Catches a check for keys that stand twice which compares every pair."""
    (tmp_path / "x.yaml").write_text("".join(f"k{i}: 1\n" for i in range(20_000)))
    assert len(presets.read_yaml(tmp_path / "x.yaml")) == 20_000


# -- plans -------------------------------------------------------------------------------------------------


def test_a_plan_names_no_code(tmp_path, capsys):
    """Catches a plug-in imported because somebody's plan.json names it, and another file in its place."""
    plugin = tmp_path / "own.py"
    plugin.write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('x')\n")
    root = f"root={tmp_path / 'root'}"
    assert main(["run", *CELL, "sweep.name=s", root]) == 0
    path = tmp_path / "root" / "sweeps" / "s" / "plan.json"
    state = unsealed(path.read_bytes())
    state["plugins"] = {str(plugin): hashlib.sha256(plugin.read_bytes()).hexdigest()}
    path.write_bytes(sealed(state))  # its digest is no secret
    assert main(["retry", "s", root]) == 1
    assert f"--plugin {plugin}" in capsys.readouterr().err and not (tmp_path / "ran").exists()
    assert main(["retry", "s", root, "--plugin", str(plugin)]) == 0 and (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    plugin.write_text(plugin.read_text() + "#\n")
    assert main(["retry", "s", root, "--plugin", str(plugin)]) == 1 and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change", [{"name": "../../elsewhere"}, {"name": 3.5e300}, {"compute": {"device": "x", "precision": "fp32"}},
               {"keep": "../x"}, {"plugins": []}, {"compute": 1}],
)  # fmt: skip
def test_a_plan_that_was_tampered_with(tmp_path, capsys, change):
    """Catches a sweep's name in plan.json that leads out of the root."""
    root = f"root={tmp_path / 'root'}"
    assert main(["run", *CELL, "sweep.name=s", root]) == 0
    path = tmp_path / "root" / "sweeps" / "s" / "plan.json"
    path.write_bytes(sealed({**unsealed(path.read_bytes()), **change}))
    before = sorted(tmp_path.rglob("*"))
    for verb in ("status", "retry"):
        assert main([verb, "s", root]) == 3
    assert "is no plan" in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


# -- secrets -----------------------------------------------------------------------------------------------


def test_the_environment_reaches_no_file(tmp_path, capsys, monkeypatch):
    """Catches an environment that is logged, hashed into a name or written, also by a cell that fails."""
    secret = "canary-7f3a9c"
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "RMSWEEP_X", "PASSWORD"):
        monkeypatch.setenv(name, secret)
    plugin = tmp_path / "failing.py"
    plugin.write_text(
        "from dataclasses import dataclass\nfrom rmsweep.component import component\n"
        "@component('reward_model', 'failing_h2')\n@dataclass(frozen=True)\nclass Failing:\n"
        "    def fit(self, *args):\n        raise RuntimeError('no')\n"
    )
    (tmp_path / "conf" / "reward_model").mkdir(parents=True)
    (tmp_path / "conf" / "reward_model" / "failing.yaml").write_text("kind: failing_h2\n")
    words = [
        "--plugin",
        str(plugin),
        "--config-dir",
        str(tmp_path / "conf"),
        f"root={tmp_path / 'root'}",
        *CELL[:1],
        *CELL[2:],
    ]
    assert main(["run", *words, "reward_model=failing,bt_linear", "sweep.name=s"]) == 2
    main(["status", "s", f"root={tmp_path / 'root'}"])
    captured = capsys.readouterr()
    files = [path for path in (tmp_path / "root").rglob("*") if path.is_file()]
    assert len(files) > 8 and any("Traceback" in path.read_text() for path in files if path.suffix == ".log")
    for path in files:
        assert secret not in str(path) and secret.encode() not in path.read_bytes(), path
        if path.suffix == ".parquet":  # compressed: read as what it says
            assert secret not in str(pq.read_table(path).to_pylist()), path
    assert secret not in captured.out + captured.err


def test_a_component_carries_no_secret():
    """Catches a plug-in whose config would write a key into plans and logs; fields that only sound so are fine."""
    for field in ("api_key", "token", "password", "client_secret", "db_passwd", "access_token", "APIKEY"):
        with pytest.raises(ConfigError, match="would write a secret"):
            component.component("reward_model", f"s_{field.lower()}")(make_dataclass("S", [(field, str)], frozen=True))
    fine = make_dataclass("F", [("max_tokens", int), ("key_column", str), ("pad_token", str)], frozen=True)
    try:
        component.component("reward_model", "fine_h2")(fine)
    finally:
        component._REGISTRY.pop(("reward_model", "fine_h2"), None)
