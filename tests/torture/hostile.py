"""What a stranger might send: strategies of hostile command lines, YAML files, plans, and data sets with defects."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from torture.watch import CANARY

RUN = f"__import__('os').system('touch {CANARY}')"
NAMES = (
    "../../etc/passwd", "/etc/passwd", "~", "~root/x", "C:\\x", "%2e%2e%2f", "a\x00b", ".", "..", "x" * 300,
    "\u202egnp.exe", "CON", "Demo", "a\nb", "\x1b[2J\x1b]0;x\x07", "\x9b31m", "=cmd|' /C calc'!A0", "@SUM(1)",
    "-1+1", "\ud800", "\U0001f600", "", " ", "null", "on", "no", "'", '"', "`id`", "$(id)", "; rm -rf x", "{{7*7}}",
    "<script>", "a" * 5000,
)  # fmt: skip
VALUES = (
    "${oc.env:HOME}", "${oc.decode:x}", f"${{eval:{RUN}}}", "${hydra:runtime.cwd}", "{_target_: os.system}",
    f"{{_target_: {CANARY}.f, _args_: [1]}}", "{_partial_: true}", "[[[[[[1]]]]]]", "[" * 60 + "]" * 60, "[" * 3000,
    "{a:" * 50, "9" * 30, "9" * 5000, "1e400", "-1", "nan", "inf", "-inf", "0", "1.5", "null", "true", "[]", "{}",
    "[null]", "{a: 1}", "range(5)", "range(0)", "range(1,2,0)", "range(1e9)", "range(99999999999)", "1,2",
    "glob(*)", "glob(zz)", "shuffle(1,2)", "interval(0,1)", "choice(1,2)", "sort(2,1)", "int(x)", "str(1)",
    "@size.quantities", "!!python/object:os.system", "0x10", "010", "1_0", "1:30", "2020-01-01", "\u0661", "𝟙",
    "a,b,c", "tag(a,1)", RUN,
)  # fmt: skip
KEYS = (
    "beta", "error_rate", "error_rate.value", "n_annotations", "pairs_per_prompt", "seed", "size", "size.P",
    "size.N", "size.D", "size.reward_model", "size.quantities", "dataset", "dataset.seed", "dataset.path",
    "dataset.kind", "dataset.where", "base_llm", "base_llm.name", "base_llm.kind", "embedder", "embedder.kind",
    "candidates", "candidates.k", "pairing", "annotator", "reward_model", "reward_model.objective",
    "reward_model.kind", "reward_model.hidden", "protocol", "protocol.kind", "evaluate", "evaluate.tilt_tau",
    "engine", "engine.kind", "engine.workers", "sweep", "sweep.name", "sweep.note", "sweep.axes", "sweep.set",
    "sweep.paired", "sweep.when", "sweep.exclude", "device", "precision", "keep", "_target_",
    "reward_model._target_", "hydra.run.dir", "hydra/launcher", "hydra.sweeper.params", "defaults", "__class__",
    "a b", "\u043a", "beta@x", "x" * 200, "..", "seed.x",
)  # fmt: skip
CHEAP = (  # keys whose values cannot make a cell of size=tiny expensive
    "beta", "error_rate", "seed", "sweep.name", "sweep.note", "candidates.k", "pairs_per_prompt", "dataset.seed",
    "reward_model.l2", "keep", "evaluate.tilt_tau", "reward_model.objective", "pairing", "candidates", "protocol",
    "dataset.nonlinearity",
)  # fmt: skip
FLAGS = (
    "--config-path=/tmp",
    "--config-name=x",
    "--cfg",
    "-m",
    "--plugin=/etc/passwd",
    "--multirun",
    "--package=x",
    "--",
    "-x",
)
YAML = (
    f"!!python/object/apply:os.system ['touch {CANARY}']", f"!!python/object/new:{CANARY}.f []",
    f"!!python/name:{CANARY}.f", "!!python/module:antigravity", "&x [*x]", "{<<: {kind: mlp}}", "${oc.env:HOME}",
    "!!binary aGk=", "2020-01-01", "!!set {a}", "!!timestamp x", "!!int ''", "!!float ''", "on", "no", "9" * 5000,
    "9" * 30, "[" * 2000, "0o17", "1:30", "? [a]\n: b", "{1: 2}", "{null: 1}", "'\\ud800'", '"\\0"', '"\\ud800"',
    "|\n " + "x" * 5000, "!x y", "{_target_: os.system}", "NaN", ".nan", "a\x1b[2J", "\ufeffx", "%TAG ! x",
    "---\n...\n---",
)  # fmt: skip


class PlanFiles(NamedTuple):
    """Changes to a sweep's files: fields of plan.json (or its whole text), columns of plan.parquet, running.json."""

    verb: str
    header: dict[str, Any]
    text: bytes | None
    columns: dict[str, str]
    running: bytes | None


class Config(NamedTuple):
    """A hostile config: words, YAML files of a --config-dir, or a plan on the disk; run: it is cheap enough to run."""

    words: list[str]
    files: dict[str, bytes]
    plan: PlanFiles | None = None
    run: bool = False


def _word(keys: Sequence[str]) -> st.SearchStrategy[str]:
    value = st.one_of(st.sampled_from(VALUES), st.sampled_from(NAMES), st.text(max_size=12), st.integers().map(str))
    quoted = value.map(lambda text: "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'")
    key = st.tuples(st.sampled_from(["", "", "", "", "+", "++", "~"]), st.sampled_from(keys)).map("".join)
    nested = st.tuples(value, st.integers(1, 40)).map(lambda p: "[" * p[1] + p[0] + "]" * p[1])
    return st.tuples(key, st.sampled_from(["=", "=", "=", "=", ""]), st.one_of(value, quoted, nested)).map("".join)


def _noise() -> st.SearchStrategy[str]:
    return st.one_of(
        st.text(max_size=20), st.sampled_from(FLAGS), st.text(alphabet="=,[]{}()'\"\\:+~$@ ab1", max_size=20)
    )


def _files() -> st.SearchStrategy[Config]:
    """One YAML file: a payload alone, as a value, or deep inside an otherwise sound option."""
    group = st.sampled_from(
        ["reward_model", "protocol", "dataset", "size", "sweep", "engine", "candidates", "annotator"]
    )
    raw = st.one_of(st.binary(max_size=40), st.sampled_from(YAML).map(lambda y: y.encode(errors="surrogatepass")))
    shapes = (
        b"%s", b"kind: %s\n", b"kind: mlp\nobjective: %s\n", b"axes: {beta: %s}\n", b"set: {beta: %s}\n", b"P: %s\n",
        b"a: {b: {c: [%s]}}\n", b"%s: 1\n", b"kind: linear\n<<: %s\n", b"name: %s\n", b"exclude: [%s]\n",
    )  # fmt: skip
    name = st.sampled_from(["own", "own", "own", "..x", "a b", "\x1b[2J", "deep/own"])

    def config(group: str, name: str, shape: bytes, content: bytes) -> Config:
        return Config([f"{group}={name}"], {f"{group}/{name}.yaml": shape.replace(b"%s", content)})

    return st.builds(config, group, name, st.sampled_from(shapes), raw)


def _plans() -> st.SearchStrategy[Config]:
    """plan.json, plan.parquet and running.json as somebody else left them."""
    junk = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.sampled_from(NAMES)),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
        max_leaves=4,
    )
    header = st.dictionaries(st.sampled_from(["name", "compute", "keep", "plugins", "format"]), junk, max_size=2)
    evil = st.just({"plugins": {"/tmp/" + CANARY + ".py": "0" * 64}})
    column = st.sampled_from(
        ["labels", "config.dataset", "config.reward_model", "config.beta", "bank_id", "fingerprint", "reason"]
    )
    columns = st.dictionaries(
        column, st.one_of(junk.map(json.dumps), st.sampled_from(NAMES[:12]), st.just("[" * 9000)), max_size=2
    )
    columns = columns.map(lambda c: {k: v.encode(errors="replace").decode() for k, v in c.items()})
    text = st.one_of(
        st.none(),
        st.none(),
        st.none(),
        st.binary(max_size=20),
        st.just(b"[" * 9000),
        junk.map(json.dumps).map(str.encode),
    )
    running = st.one_of(
        st.none(), st.binary(max_size=9), junk.map(json.dumps).map(str.encode), st.just(b'{"host": "x", "pid": 1}')
    )
    verb = st.sampled_from(["status", "retry", "results", "status"])
    plan = st.builds(PlanFiles, verb, st.one_of(header, evil), text, columns, running)
    return plan.map(lambda p: Config([], {}, p))


def configs() -> st.SearchStrategy[Config]:
    """Hostile configs of every kind."""
    words = st.lists(st.one_of(_word(KEYS), _word(KEYS), _noise()), min_size=1, max_size=4).map(lambda w: Config(w, {}))
    cheap = st.lists(_word(CHEAP), min_size=1, max_size=2).map(lambda w: Config(w, {}, run=True))
    return st.one_of(words, words, words, cheap, _files(), _plans())


# -- data --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    """A data set with defects: `kind` table, folder or released; `seed` of its numbers; extra words."""

    kind: str
    defects: tuple[str, ...]
    seed: int
    jsonl: bool = False
    words: tuple[str, ...] = field(default=())

    def write(self, folder: Path) -> list[str]:
        """Write it; the words that name it."""
        rng = np.random.default_rng(self.seed)
        words = {"table": _write_table, "folder": _write_folder, "released": _write_released}[self.kind](
            self, folder, rng
        )
        return [*words, *self.words]


TEXTS = (
    None,
    "",
    "  ",
    "a\x00b",
    "\ud83d",
    "\u202e",
    "cafe\u0301",
    "caf\u00e9",
    "x" * 100_000,
    "=1+1",
    "\x1b[2J",
    3,
    True,
    ["x"],
)
NUMBERS = (None, float("nan"), float("inf"), 1e39, 10**30, "1", True, [1.0], {}, -0.0, 1e30)
VECTORS = (
    None,
    [],
    [1.0],
    [1.0, float("nan"), 0.0],
    ["a", "b", "c"],
    [[1.0]],
    3.0,
    [1e39, 0.0, 0.0],
    [True, False, True],
    "x",
)
TABLE = (
    "prompt", "response", "golden_reward", "embedding", "id", "twice", "contradiction", "leak", "drop_column",
    "no_rows", "truncated", "garbage", "crlf", "bom", "dup_key", "extension", "decimal", "dictionary", "symlink",
    "folder", "fifo", "one_prompt", "huge_rows", "offset",
)  # fmt: skip
FOLDER = (
    "nan_golden", "inf_golden", "gap", "nan_embedding", "object", "npz", "pickle", "huge_header", "wrap_header",
    "bad_header", "complex", "string", "big_endian", "float64", "ids_twice", "leak_id", "leak_text", "null_id",
    "int_id", "rows", "no_column", "bank_json", "deep_json", "seed_text", "fifo", "folder", "missing", "truncated",
    "foreign", "reference", "dims", "flat", "flip", "negative_shape",
)  # fmt: skip
RELEASED = (
    "nan_golden", "inf_golden", "nan_embedding", "object", "npz", "pickle", "huge_header", "wrap_header",
    "bad_header", "complex", "string", "big_endian", "float64", "fifo", "folder", "missing", "truncated", "dims",
    "flat", "flip", "negative_shape",
)  # fmt: skip


def data_sets() -> st.SearchStrategy[DataSet]:
    """Data sets of every kind with up to three defects."""
    kinds = {"table": TABLE, "folder": FOLDER, "released": RELEASED}

    def of(kind: str) -> st.SearchStrategy[DataSet]:
        several = st.lists(st.sampled_from(kinds[kind]), max_size=3, unique=True).map(tuple)
        defects = st.one_of(st.just(()), st.sampled_from(kinds[kind]).map(lambda d: (d,)), several)
        extra: tuple[tuple[str, ...], ...] = ((), (), (), ())
        if kind == "table":
            extra += (("dataset.empty=keep",), ("dataset.empty=drop", "dataset.duplicates=drop"))
            extra += (("dataset.center=prompt",), ("dataset.contradictions=keep",))
        return st.builds(DataSet, st.just(kind), defects, st.integers(0, 10**6), st.booleans(), st.sampled_from(extra))

    return st.one_of(*map(of, kinds))


def _rows(data: DataSet, rng: np.random.Generator) -> list[dict[str, Any]]:
    n = 1 if "one_prompt" in data.defects else 14
    rows = [
        {"prompt": f"prompt {p}", "response": f"answer {p} {i} " + "word " * int(rng.integers(1, 9)), "id": f"i{p}",
         "golden_reward": float(rng.normal()), "embedding": rng.normal(size=3).tolist()}
        for p in range(n) for i in range(3)
    ]  # fmt: skip
    for defect in data.defects:
        row = rows[int(rng.integers(len(rows)))]
        pools = {"prompt": TEXTS, "response": TEXTS, "id": TEXTS, "golden_reward": NUMBERS, "embedding": VECTORS}
        if defect in pools:
            row[defect] = pools[defect][int(rng.integers(len(pools[defect])))]
        elif defect == "twice":
            rows.append(dict(row))
        elif defect == "contradiction":
            rows.append({**row, "golden_reward": 9.0})
        elif defect == "leak":
            rows.append({**row, "prompt": f" {row['prompt']}\n", "id": "another"})
        elif defect == "offset":
            rows = [
                {
                    **r,
                    "golden_reward": (r["golden_reward"] or 0.0) + 1e9
                    if isinstance(r["golden_reward"], float)
                    else None,
                }
                for r in rows
            ]
    if "drop_column" in data.defects:
        column = ("prompt", "response", "golden_reward")[int(rng.integers(3))]
        rows = [{k: v for k, v in row.items() if k != column} for row in rows]
    return [] if "no_rows" in data.defects else rows


def _write_table(data: DataSet, folder: Path, rng: np.random.Generator) -> list[str]:
    rows, path = _rows(data, rng), folder / ("data.jsonl" if data.jsonl else "data.parquet")
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if not data.jsonl:
        content = _parquet(data, rows)
    if data.jsonl and "dup_key" in data.defects:
        content += b'{"prompt": "a", "prompt": "b", "response": "r", "golden_reward": 1}\n'
    if data.jsonl and "crlf" in data.defects:
        content = content.replace(b"\n", b"\r\n")
    if "bom" in data.defects:
        content = b"\xef\xbb\xbf" + content
    _place(data, path, content, rng)
    words = ["dataset=table", f"dataset.path={path}"]
    if data.seed % 2:
        words += ["dataset.embedding_column=embedding"]
    return words + (["dataset.prompt_id_column=id"] if data.seed % 3 == 0 else [])


def _parquet(data: DataSet, rows: list[dict[str, Any]]) -> bytes:
    names = list(dict.fromkeys(k for row in rows for k in row)) or ["prompt"]
    columns = {name: _column(data, name, [row.get(name) for row in rows]) for name in names}
    if "huge_rows" in data.defects:
        columns["response"] = pa.array(["y" * 50_000] * len(rows))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


class Evil(pa.ExtensionType):
    """An extension type whose metadata is a pickle, as CVE-2023-47248 had it."""

    def __init__(self) -> None:
        super().__init__(pa.string(), "arrow.py_extension_type")

    def __arrow_ext_serialize__(self) -> bytes:
        return pickle.dumps(Trap())

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> Any:
        return cls()


class Trap:
    """What runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {CANARY}",))


def _column(data: DataSet, name: str, values: list[Any]) -> pa.Array:
    try:
        array = pa.array(values)
    except (pa.ArrowException, UnicodeEncodeError, TypeError, OverflowError, ValueError):
        array = pa.array([ascii(v) for v in values])
    if name == "golden_reward" and "decimal" in data.defects and pa.types.is_floating(array.type):
        array = pa.array([str(round(v, 3)) if v is not None and abs(v) < 99 else "1" for v in values]).cast(
            pa.decimal128(9, 3)
        )
    if name == "response" and "dictionary" in data.defects and pa.types.is_string(array.type):
        array = array.dictionary_encode()
    if name == "response" and "extension" in data.defects and pa.types.is_string(array.type):
        array = pa.ExtensionArray.from_storage(Evil(), array)
    return array


def _place(data: DataSet, path: Path, content: bytes, rng: np.random.Generator) -> None:
    """Write the bytes, as a file or as what should have been one."""
    if "truncated" in data.defects:
        content = content[: int(rng.integers(len(content) + 1))]
    if "garbage" in data.defects:
        content = rng.bytes(60)
    if "flip" in data.defects and content:
        at = int(rng.integers(len(content)))
        content = content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]
    if "fifo" in data.defects:
        os.mkfifo(path)
    elif "folder" in data.defects:
        path.mkdir()
    elif "missing" not in data.defects:
        target = path.with_name("target.bin") if "symlink" in data.defects else path
        target.write_bytes(content)
        if target != path:
            path.symlink_to(target)


def _arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"train": (30, 4), "test": (8, 5)}
    golden = {f"golden_{s}": np.sort(rng.normal(size=shape), axis=1).astype(np.float32) for s, shape in shapes.items()}
    return {
        **golden,
        **{f"embedding_{s}": rng.normal(size=(*shape, 3)).astype(np.float32) for s, shape in shapes.items()},
    }


def _spoiled(data: DataSet, name: str, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The array with those of the defects that belong to its numbers."""
    kind, d = name.partition("_")[0], data.defects
    if (kind == "golden" and "nan_golden" in d) or (kind == "embedding" and "nan_embedding" in d):
        array.reshape(-1)[int(rng.integers(array.size))] = np.nan
    if kind == "golden" and "inf_golden" in d:
        array.reshape(-1)[int(rng.integers(array.size))] = [np.inf, -np.inf, 3e38][int(rng.integers(3))]
    if kind == "golden" and "gap" in d:
        array[0, 0] = np.nan
    if "dims" in d and name == "embedding_test":
        array = array[..., :2]
    if "flat" in d and rng.random() < 0.5:
        array = array.reshape(-1)
    types = {"complex": np.complex64, "string": "U3", "big_endian": ">f4", "float64": np.float64}
    for defect, dtype in types.items():
        if defect in d and rng.random() < 0.5:
            array = (array.real if np.iscomplexobj(array) else array).astype(dtype)
    return array


def _npy(data: DataSet, name: str, array: np.ndarray, path: Path, rng: np.random.Generator) -> None:
    """Write one array, or what claims to be one."""
    array, d = _spoiled(data, name, array, rng), data.defects
    np.save(path, array)
    content = path.read_bytes()
    path.unlink()
    headers = {"huge_header": (2**60,), "wrap_header": (2**32, 2**32, 3), "negative_shape": (-1, 4)}
    if rng.random() < 0.5:
        hit = [shape for defect, shape in headers.items() if defect in d]
        if hit:
            content = _header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {hit[0]}, }}") + b"\0" * 64
        if "bad_header" in d:
            content = _header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {RUN}, }}") + b"\0" * 64
        if "pickle" in d:
            content = pickle.dumps(Trap())
        if "object" in d:
            np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)
            content = path.read_bytes()
            path.unlink()
        if "npz" in d:
            np.savez(path.with_suffix(".npz"), a=array)
            content = path.with_suffix(".npz").read_bytes()
            path.with_suffix(".npz").unlink()
        _place(data, path, content, rng)
    else:
        path.write_bytes(content)


def _header(text: str) -> bytes:
    body = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def _write_folder(data: DataSet, folder: Path, rng: np.random.Generator) -> list[str]:
    d = data.defects
    for name, array in _arrays(rng).items():
        _npy(data, name, array, folder / f"{name}.npy", rng)
    for split, n in (("train", 30), ("test", 8)):
        ids: list[Any] = [f"{split}-{i}" for i in range(n)]
        if split == "test":
            ids[0] = {"ids_twice": ids[1], "leak_id": "train-0 ", "null_id": None}.get(next(iter(d), ""), ids[0])
        columns: dict[str, Any] = {"prompt_id": list(range(n)) if "int_id" in d else ids}
        if "leak_text" in d:
            columns["prompt"] = (
                [f"text {i}" if i else "same  text" for i in range(n)] if split == "train" else ["same text"] * n
            )
        if "no_column" in d:
            columns["other"] = columns.pop("prompt_id")
        table = pa.table(columns)
        pq.write_table(table.slice(1) if "rows" in d else table, folder / f"prompts_{split}.parquet")
    notes = {"bank_json": "[1]", "deep_json": "[" * 9000, "seed_text": '{"seed": "x"}'}
    (folder / "bank.json").write_text(next((notes[x] for x in d if x in notes), '{"seed": 0}'))
    if "foreign" in d:
        (folder / "a\nb\x1b[2J").write_text("x")
    if "reference" in d:
        (folder / "reference_train.json").write_text(json.dumps({"path": "/etc/passwd", "layout": "PND"}))
    return ["dataset=folder", f"dataset.path={folder}", "base_llm=table"]


def _write_released(data: DataSet, folder: Path, rng: np.random.Generator) -> list[str]:
    for name, array in _arrays(rng).items():
        kind, split = name.split("_")
        file = f"{'embd' if kind == 'embedding' else 'reward'}_Gemma2b_Gemma2b_Harmless_{split}.npy"
        _npy(data, name, array, folder / file, rng)
    return ["dataset=released_harmless", f"dataset.root={folder}", "base_llm=gemma2b"]
